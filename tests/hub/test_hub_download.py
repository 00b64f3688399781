"""Downloads over HTTP from a stub hub: what is fetched, what is not fetched twice, and what works without a network."""
from __future__ import annotations

import dataclasses
import sys
import threading
import time
import warnings

import pytest
from hub_models import IGNORED, SHARDS, SMALL, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stub_hub import etag

from metalstep.hub import download
from metalstep.hub.cache import storage
from metalstep.hub.download import find, find_in_folder
from metalstep.hub.errors import HubError
from metalstep.hub.names import hub_name
from metalstep.hub.progress import Progress

SHARDED, GGUFS, SINGLE = hub_name("own/sharded"), hub_name("own/ggufs"), hub_name("own/single")
INDEX = "model.safetensors.index.json"
FIRST = min(SHARDS)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_files_that_a_model_needs_are_fetched(stub, hub):
    found = find(SHARDED, hub=hub)
    served = stub.files("own/sharded")
    assert contents(found.path) == {name: served[name] for name in {*SMALL, *SHARDS, INDEX}}
    assert not set(stub.sent) & set(IGNORED)
    assert all(stub.sent[name] == len(served[name]) for name in SHARDS)


def test_the_cache_is_laid_out_as_huggingface_hub_expects(stub, hub):
    """Its own function finds every file without a request."""
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    found = find(SHARDED, hub=hub)
    for name in {*SMALL, *SHARDS}:
        assert try_to_load_from_cache("own/sharded", name, cache_dir=hub.cache) == str(found.path / name)
    scanned = scan_cache_dir(hub.cache)
    assert not scanned.warnings
    assert [repo.repo_id for repo in scanned.repos] == ["own/sharded"]
    assert not list(hub.cache.rglob("*.incomplete"))


def test_a_model_that_is_here_costs_one_request_and_no_bytes(stub, hub):
    first = find(SHARDED, hub=hub)
    stub.reset()
    again = find(SHARDED, hub=hub)
    assert again == dataclasses.replace(first, downloaded=0)
    assert stub.requests == [("GET", "/api/models/own/sharded")]


def test_offline_a_whole_model_takes_no_request_and_says_nothing(stub, hub, capsys):
    first = find(SHARDED, hub=hub)
    stub.reset()
    capsys.readouterr()
    offline = dataclasses.replace(hub, offline=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(SHARDED, hub=offline).path == first.path
        assert find(SHARDED, first.commit, offline).path == first.path
    assert stub.requests == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("lost", [FIRST, "config.json"])
def test_offline_a_model_that_is_not_whole_is_an_error_that_says_so(stub, hub, lost):
    found = find(SHARDED, hub=hub)
    (found.path / lost).unlink()
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set and own/sharded is not whole in the cache .*; unset it"):
        find(SHARDED, hub=dataclasses.replace(hub, offline=True))
    with pytest.raises(HubError, match=r"own/single is not in the cache .*; unset it"):
        find(SINGLE, hub=dataclasses.replace(hub, offline=True))


def test_what_was_lost_is_fetched_again_and_nothing_else(stub, hub):
    found = find(SHARDED, hub=hub)
    (found.path / FIRST).resolve().unlink()
    stub.reset()
    assert contents(find(SHARDED, hub=hub).path)[FIRST] == stub.files("own/sharded")[FIRST]
    assert set(stub.sent) == {FIRST}


def test_an_unreachable_hub_is_one_warning_that_names_the_commit(stub, hub):
    found = find(SHARDED, hub=hub)
    nowhere = dataclasses.replace(hub, endpoint="http://127.0.0.1:9")
    with pytest.warns(UserWarning, match=rf"127\.0\.0\.1:9 cannot be reached.*Using own/sharded at commit {found.commit[:12]}") as raised:
        assert find(SHARDED, hub=nowhere).path == found.path
    assert len(raised) == 1


def test_a_commit_that_is_here_needs_no_request(stub, hub):
    found = find(SHARDED, hub=hub)
    assert find(SHARDED, found.commit, dataclasses.replace(hub, endpoint="http://127.0.0.1:9")).path == found.path


def test_branches_tags_and_commits_name_a_revision(stub, hub, served):
    old = stub.commit("own/single")
    find(SINGLE, hub=hub)
    stub.tags["own/single"] = {"v1.0": old}
    for revision in ("main", "v1.0", old, old[:7]):
        assert find(SINGLE, revision, hub).commit == old
    offline = dataclasses.replace(hub, offline=True)
    assert {find(SINGLE, revision, offline).commit for revision in ("main", "v1.0", old, old[:7])} == {old}
    file = served / "own/single/model.safetensors"
    before = file.read_bytes()
    try:
        file.write_bytes(weights(100_000, 2))
        stub.tags.clear()
        new = find(SINGLE, hub=hub)
        assert new.commit != old and (new.path / file.name).read_bytes() == file.read_bytes()
        assert {find(SINGLE, revision, offline).commit for revision in (None, "main")} == {new.commit}
        assert find(SINGLE, "v1.0", offline).commit == old
    finally:
        file.write_bytes(before)


def test_an_update_that_fails_leaves_the_old_commit_in_use(stub, hub, served):
    old = find(SINGLE, hub=hub)
    file = served / "own/single/model.safetensors"
    before = file.read_bytes()
    try:
        file.write_bytes(weights(100_000, 3))
        stub.faults.wrong = {file.name}
        with pytest.raises(HubError, match="another content"):
            find(SINGLE, hub=hub)
        assert find(SINGLE, hub=dataclasses.replace(hub, offline=True)).path == old.path
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("own/ggufs", "tiny-Q8_0.gguf"),  # no Q4_K_M
        ("own/ggufs:Q4_1", "tiny-Q4_1.gguf"),
        ("own/ggufs:f16", "tiny-F16.gguf"),
        ("own/ggufs/tiny-F16.gguf", "tiny-F16.gguf"),
    ],
)
def test_a_gguf_file_is_chosen_by_quantisation_or_name(stub, hub, capsys, name, file):
    found = find(hub_name(name), hub=hub)
    assert found.path.name == file and set(stub.sent) == {file}
    assert file.partition(".")[0].rpartition("-")[2] in capsys.readouterr().err or "/" in name[4:]
    assert find(hub_name(name), hub=dataclasses.replace(hub, offline=True)).path == found.path


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 300_000), ranges=st.booleans())
def test_a_connection_that_breaks_anywhere_is_taken_up_there(stub, hub, tmp_path_factory, cut, ranges):
    stub.reset()
    fresh = dataclasses.replace(hub, cache=tmp_path_factory.mktemp("cache"))
    stub.faults.cut, stub.faults.no_ranges = {FIRST: cut}, not ranges
    found = find(SHARDED, hub=fresh)
    data = stub.files("own/sharded")[FIRST]
    assert (found.path / FIRST).read_bytes() == data
    assert stub.sent[FIRST] == len(data) + (0 if ranges else cut)
    if ranges and cut:
        assert stub.ranges == [(FIRST, cut)]


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_a_second_download_fetches_what_the_first_had_not(stub, hub, tmp_path, place, monkeypatch):
    """The first gives up half-way; the stub counts what it sends to the second."""
    monkeypatch.setattr("metalstep.hub.transfer.TRIES", 1)

    def bring():
        return find(SHARDED, hub=hub) if place == "cache" else find_in_folder(SHARDED, tmp_path / "mine", hub=hub)

    stub.faults.cut = {FIRST: 123_456}
    with pytest.raises(HubError, match=r"cannot be reached|does not answer"):
        bring()
    stub.reset()
    found = bring()
    data = stub.files("own/sharded")[FIRST]
    assert (FIRST, 123_456) in stub.ranges and stub.sent[FIRST] == len(data) - 123_456
    assert (found.path / FIRST).read_bytes() == data
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_partial_file_with_other_bytes_is_thrown_away(stub, hub):
    data = stub.files("own/sharded")[FIRST]
    blobs = storage(hub.cache, "own/sharded") / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag(data)}.incomplete").write_bytes(bytes(1000))
    assert (find(SHARDED, hub=hub).path / FIRST).read_bytes() == data


def test_wrong_bytes_are_never_kept(stub, hub):
    stub.faults.wrong = {FIRST}
    with pytest.raises(HubError, match=rf"{FIRST} has another content than the hub says .*the hash differs.*; try again"):
        find(SHARDED, hub=hub)
    data = stub.files("own/sharded")[FIRST]
    assert not [path for path in hub.cache.rglob(f"*{etag(data)}*") if path.suffix != ".lock"]
    stub.reset()
    assert (find(SHARDED, hub=hub).path / FIRST).read_bytes() == data


def test_a_folder_of_the_users_gets_the_files_and_is_brought_up_to_date(stub, hub, tmp_path):
    found = find_in_folder(SHARDED, tmp_path / "mine", hub=hub)
    served = stub.files("own/sharded")
    assert contents(found.path) == {name: served[name] for name in {*SMALL, *SHARDS, INDEX}}
    (found.path / "config.json").write_bytes(b"changed")
    stub.reset()
    find_in_folder(SHARDED, tmp_path / "mine", hub=hub)
    assert set(stub.sent) == {"config.json"}
    assert not hub.cache.exists()


def test_a_file_too_large_for_http_goes_through_huggingface_hub(stub, hub, monkeypatch):
    monkeypatch.setattr(download, "HTTP_LIMIT", 250_000)
    found = find(SHARDED, hub=hub)
    assert contents(found.path)[FIRST] == stub.files("own/sharded")[FIRST]


@pytest.mark.parametrize("place", [threading.Thread.start, threading.Event.wait], ids=["before", "behind"])
def test_ctrl_c_while_workers_start_stops_those_that_have(capsys, place):
    """In the start of the second, before its thread is there or when it is and may not have begun."""
    starts, others = 0, set(threading.enumerate())

    def trace(frame, *_):
        nonlocal starts
        if frame.f_code is place.__code__ and download._together.__code__ in (frame.f_back.f_code, frame.f_back.f_back.f_code):
            starts += 1
            if starts == 2:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            download._together([FIRST] * download.WORKERS, lambda file, stop: stop.wait(60), Progress("a model", 100))
    finally:
        sys.settrace(before)
    assert starts == 2 and "are kept, and the same command goes on from there" in capsys.readouterr().err
    until = time.monotonic() + 10
    while set(threading.enumerate()) - others and time.monotonic() < until:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - others
