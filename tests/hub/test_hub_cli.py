"""`metalstep download`, `models` and `generate` as a user calls them, against a stub hub."""
from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from checkpoint_files import LLAMA_CONFIG, make_model
from hub_models import SHARDS
from stub_hub import etag
from tiny import write_model

METALSTEP = [sys.executable, "-m", "metalstep.cli.main"]
FIRST = min(SHARDS)


@pytest.fixture
def environment(stub, tmp_path):
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "HF_ENDPOINT": stub.url, "HF_HOME": str(tmp_path / "home"), "METALSTEP_THREADS": "1"}


@pytest.fixture
def metalstep(environment):
    def run(*arguments, **options):
        changed = {**environment, **options.pop("env", {})}
        done = subprocess.run([*METALSTEP, *arguments], capture_output=True, text=True, env=changed, timeout=60, **options)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_a_model_is_downloaded_listed_and_removed(metalstep, stub):
    done = metalstep("download", "own/sharded")
    path = done.stdout.removesuffix("\n")
    assert done.returncode == 0 and os.path.isfile(f"{path}/{FIRST}")
    assert "hint: metalstep chat --model own/sharded" in done.stderr and "downloaded 500 kB" in done.stderr
    answer = json.loads(metalstep("download", "own/sharded", "--json").stdout)
    assert (answer["path"], answer["commit"], answer["downloaded_bytes"]) == (path, stub.commit("own/sharded"), 0)
    rows = {row["name"]: row for row in json.loads(metalstep("models", "--json").stdout)}
    assert rows["own/sharded"]["complete"] and rows["own/sharded"]["bits"] == 4 and rows["smollm2"]["where"] == "packaged"
    refused = metalstep("models", "rm", "own/sharded", stdin=subprocess.DEVNULL)
    assert refused.returncode == 2 and "hint: --yes removes it" in refused.stderr
    assert metalstep("models", "rm", "own/sharded", "--yes").returncode == 0
    assert "own/sharded" not in metalstep("models").stdout


def test_a_mistake_is_one_error_one_hint_and_status_2(metalstep):
    done = metalstep("download", "own/none")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert [line.partition(": ")[0] for line in lines] == ["error", "hint"]


def test_ctrl_c_keeps_what_came_and_the_next_run_fetches_the_rest(environment, metalstep, stub):
    stub.faults.delay = 0.15
    process = subprocess.Popen([*METALSTEP, "download", "own/sharded"], env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while stub.sent[FIRST] < 2 << 16 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "are kept, and the same command goes on from there" in errors and "Traceback" not in errors
    data = stub.files("own/sharded")
    hub = f"{environment['HF_HOME']}/hub/models--own--sharded"
    kept = {name: f"{hub}/blobs/{etag(data[name])}.incomplete" for name in SHARDS}
    sizes = {name: os.path.getsize(path) for name, path in kept.items() if os.path.exists(path) and os.path.getsize(path)}
    assert sizes
    stub.reset()
    assert metalstep("download", "own/sharded").returncode == 0
    assert dict(stub.ranges) == sizes
    assert all(stub.sent[name] == len(data[name]) - sizes.get(name, 0) for name in SHARDS)


def test_a_file_that_cannot_grow_is_a_full_disk_and_resumes(metalstep, stub):
    """The limit on a file's size fails a write as a full disk does, part-way."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    done = metalstep("download", "own/sharded", preexec_fn=limit)
    assert done.returncode == 2 and "is full (" in done.stderr and "hint: free some space" in done.stderr
    stub.reset()
    assert metalstep("download", "own/sharded").returncode == 0
    starts = {start for _, start in stub.ranges}  # a file that was still on its way when the first one failed has less
    assert max(starts) == 150_000


def test_an_answer_from_a_model_of_the_hub_and_again_without_a_network(metalstep, stub, served):
    write_model(served / "own/tiny", make_model(LLAMA_CONFIG), LLAMA_CONFIG)
    call = ("generate", "--model", "own/tiny", "--prompt", "1 2 3", "--max-tokens", "4", "--ignore-chat-template")
    first = metalstep(*call)
    assert first.returncode == 0 and "downloaded" in first.stderr
    again = metalstep(*call, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert again.returncode == 0 and again.stdout == first.stdout
    assert f"Using own/tiny at commit {stub.commit('own/tiny')[:12]}" in again.stderr


@pytest.mark.parametrize("command", [["download"], ["models"], ["models", "rm"]])
def test_help_has_examples_and_loads_neither_mlx_nor_huggingface_hub(metalstep, command):
    code = (
        "import sys; from metalstep.cli.main import main; main(sys.argv[1:]); "
        "print([m for m in ('mlx', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True)
    assert "\nexamples:\n  metalstep " in done.stdout and done.stdout.endswith("[]\n")
