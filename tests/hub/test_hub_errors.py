"""What goes wrong between here and the hub: each has its own text, and behind the last semicolon what to do."""
from __future__ import annotations

import dataclasses
import errno
import shutil
import socket
from collections import namedtuple

import pytest
from hub_models import SHARDS
from stub_hub import StubHub, etag

from metalstep.hub import client, transfer
from metalstep.hub.cache import check_revision
from metalstep.hub.download import find
from metalstep.hub.errors import HubError, UnreachableError
from metalstep.hub.names import hub_name

SHARDED = hub_name("own/sharded")
FIRST = min(SHARDS)


def refused(hub, name="own/sharded", revision=None) -> str:
    with pytest.raises(HubError) as error:
        find(hub_name(name), revision, hub)
    assert "Traceback" not in str(error.value) and "; " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own/none", r"no file or folder 'own/none' here, and the hub has no model own/none, or .* you are not logged in; .*hf auth login"),
        ("own/torch", r"own/torch has weights as \*\.bin only, .*; choose a repository with \.safetensors or \.gguf"),
        ("own/adapter", r"own/adapter is an adapter \(LoRA\), not a whole model; fuse it"),
        ("own/empty", r"own/empty has neither \.safetensors nor \.gguf files; check"),
        ("own/ggufs:Q6_K", r"own/ggufs has no Q6_K; there are own/ggufs:Q2_K, own/ggufs:F16, own/ggufs:Q4_1, own/ggufs:Q8_0"),
        ("own/ggufs/none.gguf", r"own/ggufs has no file 'none\.gguf'; there are .*own/ggufs:Q8_0"),
        ("own/ggufs:Q2_K", r"parts-Q2_K-00001-of-00002\.gguf is split over 2 files, .*; .*llama-gguf-split --merge`, or use .*ggufs:F16"),
        ("own/single:Q4_0", r"own/single has no \.gguf files, so no Q4_0; leave `:Q4_0` out"),
    ],
)
def test_what_a_repository_has_not_is_said_with_what_it_has(stub, hub, name, text):
    with pytest.raises(HubError, match=text):
        find(hub_name(name), hub=hub)
    assert not stub.sent, "bytes of a model that cannot be used"


def test_an_unknown_revision_lists_branches_and_tags(stub, hub):
    stub.tags["own/sharded"] = {"v1": "0" * 40}
    assert "own/sharded has no revision 'v2'; there are main, v1" in refused(hub, revision="v2")


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (FIRST, {"rfilename": "../../outside.gguf"}),
        (FIRST, {"rfilename": "/outside.gguf"}),
        (FIRST, {"rfilename": "red\x1b[31m.gguf"}),
        (FIRST, {"rfilename": 5}),
        ("sha", {"sha": "../../outside"}),
        ("sha", {"siblings": 5}),
    ],
)
def test_a_list_that_names_what_is_not_in_the_repository_is_refused(stub, hub, of, said):
    """Names and commits become paths here."""
    stub.faults.listed = {of: said}
    assert "answers, but not as the hub does" in refused(hub)
    assert not stub.sent


def test_a_hash_that_is_a_path_is_not_used_as_one(stub, hub, tmp_path):
    stub.faults.listed = {"config.json": {"blobId": "../../../outside"}, FIRST: {"size": -1}}
    found = find(SHARDED, hub=hub)
    assert all((found.path / name).read_bytes() == data for name, data in stub.files("own/sharded").items() if (found.path / name).exists())
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("revision", ["", "../main", "a b", "/etc", "-x", "a..b", "refs/../.."])
def test_what_is_no_revision_is_refused_before_a_request(stub, hub, revision):
    with pytest.raises(HubError, match=r"is no revision; name a branch"):
        check_revision(revision)
    refused(hub, revision=revision)
    assert stub.requests == []


def test_a_gated_model_says_how_to_get_access(stub, hub, monkeypatch):
    stub.faults.gated = {"own/sharded"}
    ask = rf"ask for access at {stub.url}/own/sharded"
    assert "is gated: its authors give access on request, and you are not logged in; " + ask in (text := refused(hub))
    assert "`hf auth login`" in text and "HF_TOKEN" in text
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert "your token, which is in HF_TOKEN, has no access yet; " + ask in refused(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_good_granted")
    assert find(SHARDED, hub=hub).downloaded


def test_a_private_model_is_found_with_a_token(stub, hub, monkeypatch):
    stub.faults.private = {"own/single"}
    assert "or it is private and you are not logged in; check the spelling" in refused(hub, "own/single")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert find(hub_name("own/single"), hub=hub).downloaded
    assert "your token, which is in HF_TOKEN, may not see it; " in refused(hub, "own/none")


def test_a_wrong_token_is_told_from_a_missing_one(stub, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub does not accept your token, which is in HF_TOKEN (401: Invalid credentials" in refused(hub)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_wrong")
    assert "your token, which is of `hf auth login` (401" in refused(hub)


@pytest.mark.parametrize("end", ["/api/models/own/sharded", f"/{FIRST}"])
def test_a_busy_hub_is_asked_again(stub, hub, end):
    stub.faults.status = {end: [503, 429, 500]}
    assert find(SHARDED, hub=hub).downloaded


@pytest.mark.parametrize(
    ("status", "text"),
    [(429, r"limits how often you ask \(429.*; try again in"), (503, r"a fault of its own \(503 from http.*; try again later")],
)
@pytest.mark.parametrize("end", ["/api/models/own/sharded", f"/{FIRST}"])
def test_a_hub_that_stays_busy_is_said_so(stub, hub, status, text, end):
    stub.faults.status = {end: [status] * 50}
    with pytest.raises(UnreachableError, match=text):
        find(SHARDED, hub=hub)
    tries = sum(path.endswith(end) for method, path in stub.requests if method == "GET")
    assert tries == client.TRIES


def test_who_is_told_to_wait_for_long_is_told_so_and_not_kept_waiting(stub, hub):
    stub.faults.status, stub.faults.retry_after = {"/api/models/own/sharded": [429] * 5}, "3600"
    assert "try again in 3600 s" in refused(hub)
    assert len(stub.requests) == 1


def test_no_network_is_said_at_once(hub):
    text = refused(dataclasses.replace(hub, endpoint="http://127.0.0.1:9"))
    assert text.startswith("http://127.0.0.1:9 cannot be reached (") and "check the network" in text
    assert "no-such-host.invalid cannot be reached" in refused(dataclasses.replace(hub, endpoint="http://no-such-host.invalid"))


def test_a_server_that_says_nothing_is_a_timeout(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr("metalstep.hub.download.TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = refused(dataclasses.replace(hub, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert "does not answer in time; check the network" in text


def test_a_proxy_that_is_not_there_is_named(stub, hub, monkeypatch):
    from huggingface_hub import close_session

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr("metalstep.hub.download.TRIES", 1)
    close_session()
    try:
        text = refused(dataclasses.replace(hub, endpoint="http://hub.invalid"))
    finally:
        close_session()
    assert "check the network and the proxy in HTTP_PROXY" in text


def test_a_certificate_that_is_not_trusted_is_said_so(stub, hub, monkeypatch):
    """An https endpoint that speaks no TLS fails in the handshake."""
    monkeypatch.setattr("metalstep.hub.download.TRIES", 1)
    text = refused(dataclasses.replace(hub, endpoint=stub.url.replace("http:", "https:")))
    assert "the secure connection to https://127.0.0.1" in text and "SSL_CERT_FILE" in text


def test_a_login_page_in_between_is_not_taken_for_the_hub(stub, hub):
    stub.faults.login_page = True
    assert "answers, but not as the hub does" in (text := refused(hub)) and "HF_ENDPOINT" in text


def test_a_disk_that_is_too_small_is_said_before_a_byte_is_fetched(stub, hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 200_000, 200_000))
    text = refused(hub)
    assert "own/sharded needs 17.3 MB more on the disk of" in text and "which has 200 kB free; free some space" in text
    assert not set(stub.sent) & set(SHARDS)


def test_a_disk_that_fills_up_keeps_what_it_has(stub, hub, monkeypatch):
    """Writes beyond some bytes fail as on a full disk; the next download asks for the rest alone."""
    written = 0
    add = transfer.Progress.add

    def counted(self, nbytes):
        nonlocal written
        written += nbytes
        add(self, nbytes)
        if written > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer.Progress, "add", counted)
    assert "is full (No space left on device), and what came so far is kept; free some space" in refused(hub)
    monkeypatch.setattr(transfer.Progress, "add", add)
    partial = {path.name.partition(".")[0]: path.stat().st_size for path in hub.cache.rglob("*.incomplete")}
    stub.reset()
    found = find(SHARDED, hub=hub)
    data = stub.files("own/sharded")
    assert all((found.path / name).read_bytes() == data[name] for name in SHARDS)
    assert {etag(data[name]): start for name, start in stub.ranges} == {name: nbytes for name, nbytes in partial.items() if nbytes}
    assert sum(stub.sent[name] for name in SHARDS) == sum(len(data[name]) for name in SHARDS) - sum(partial.values())


def test_a_cache_that_cannot_be_written_to_is_said_so(stub, hub, tmp_path):
    (tmp_path / "cache").write_bytes(b"a file")
    assert "cannot be written to (" in refused(hub)


def test_a_repository_that_vanished_is_used_from_the_cache_with_a_warning(served, hub, tmp_path):
    shutil.copytree(served / "own/single", tmp_path / "other/own/single")
    other = StubHub(tmp_path / "other").start()
    mine = dataclasses.replace(hub, endpoint=other.url)
    try:
        found = find(hub_name("own/single"), hub=mine)
        shutil.rmtree(tmp_path / "other/own/single")
        with pytest.warns(UserWarning, match=f"the hub has no model own/single.*Using own/single at commit {found.commit[:12]}"):
            assert find(hub_name("own/single"), hub=mine).path == found.path
    finally:
        other.stop()
