"""Benchmark cases of the GPU kernels: each op's build for every shape, run where a GPU is simulated, and do what is measured of them."""

import functools
import json
import sys
from collections import Counter
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from gpu_device import DEVICE, KIND

from metalstep.bench import kernels as bench
from metalstep.bench.kernel_inputs import CaseInputs
from metalstep.capture import capture
from metalstep.checkpoint import build_model
from metalstep.chips import find_chip
from metalstep.cli import main as command
from metalstep.cli.bench import main as bench_command
from metalstep.cli.bench_kernels import DEFAULTS, describe
from metalstep.cli.errors import CommandError
from metalstep.kernels import params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice
from metalstep.plan.gpu_target import GpuTarget
from metalstep.plan.paper import PaperDevice, paper_plan
from metalstep.shapes import SHAPES, ShapeCheckpoint

SMALL = replace(bench.shape_sizes("tiny", [1, 8], [40], kind=KIND), vocab_size=520)


@pytest.fixture(scope="module")
def device():
    with NativeDevice.open(DEVICE) as opened:
        yield opened


# ---- cases ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [bench.TINY, *SHAPES])
def test_every_case_of_every_op_builds_its_launches_for_every_shape(shape):
    """With the defaults of a GPU, on paper; a case that can be told from no other by its name is no case."""
    _, rows, contexts, _ = DEFAULTS["metal"]
    sizes = bench.shape_sizes(shape, rows, contexts)
    cases = bench.bench_cases(sizes, list(bench.OPS))
    assert {case.op for case in cases} == set(bench.OPS)
    assert max(Counter(case.name for case in cases).values()) == 1
    for case in cases:
        inputs = CaseInputs(cast(NativeDevice, PaperDevice("metal")), sizes, 1, write=False)
        launches = case.launches(inputs)
        assert launches
        assert case.nbytes > 0 < case.work
        if case.op == "linear":
            assert case.nbytes == inputs.weight_bytes + _activations(inputs, sizes.hidden_size)
        if case.op == "attention":  # whole blocks of the cache
            blocks = -(-case.context // sizes.block_size) * sizes.block_size * sizes.position_bytes
            assert inputs.weight_bytes == blocks * (case.rows if case.case == "decode" else 1)


def _activations(inputs, hidden):
    """Bytes of the activations, without the norm's weight, which a step reads once for all rows."""
    return inputs.shared_bytes - 4 * hidden * any(name.startswith("norm") for name in inputs._activations)


@pytest.mark.parametrize(("bits", "group_size", "kv_dtype"), [(8, 32, "float32"), (3, 128, "bfloat16"), (16, 64, "float16")])
def test_formats_of_weights_and_cache_are_the_ones_asked_for(bits, group_size, kv_dtype):
    sizes = bench.shape_sizes("qwen3-0.6b", [1, 16], [100], bits=bits, group_size=group_size, kv_dtype=kv_dtype)
    for case in bench.bench_cases(sizes, list(bench.OPS)):
        texts = "".join(launch.code.text for launch in case.launches(_paper(sizes)))
        if case.op == "linear":
            assert (f"ms_affine<{bits}, {group_size}, bfloat" if bits < 16 else "ms_dense<bfloat") in texts
        if case.op == "attention":
            assert {"float32": "<float, ", "bfloat16": "<bfloat, ", "float16": "<half, "}[kv_dtype] in texts


def _paper(sizes):
    return CaseInputs(cast(NativeDevice, PaperDevice("metal")), sizes, 1, write=False)


def test_a_weight_that_groups_do_not_divide_is_dense():
    sizes = bench.shape_sizes("smollm2-135m", [1], [64], group_size=128)
    qkv, *_ = bench.bench_cases(sizes, ["linear"])
    assert "ms_dense<bfloat" in qkv.launches(_paper(sizes))[0].code.text


@pytest.mark.parametrize("kind", ["apple", "nvidia"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_cases_are_of_the_kernels_that_plans_launch(rows, kind):
    """To the letter: a kernel's name holds a digest of its text."""
    shape = "qwen3-0.6b"
    sizes = bench.shape_sizes(shape, [rows], [1500], kind=kind)
    planned: set[str] = set()
    for invariant in (False, True):  # norms and cache writes are not inside of attention where a row must not depend on its batch
        options = dict(rows=rows, context=1500)
        plan = paper_plan(_captured(shape), ShapeCheckpoint(shape).tensors, GpuTarget(kind, batch_invariant=invariant), **options)
        planned |= {entry.launch.kernel for entry in plan.launches}
    for case in bench.bench_cases(sizes, [op for op in bench.OPS if op != "step_load"]):  # a plan of its own
        if case.case not in ("mixed", "embedding") and (case.case != "rms_norm" or rows > sizes.norm_rows):
            assert {launch.kernel for launch in case.launches(_paper(sizes))} <= planned, case.name


@functools.cache
def _captured(shape):
    return capture(build_model(ShapeCheckpoint(shape)), "qwen3")


CASES = bench.bench_cases(SMALL, list(bench.OPS))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_does_what_is_measured_of_it(device, case):
    """Every row has a new result of finite numbers, or a new token and position; `rewind` takes steps back."""
    inputs = CaseInputs(device, SMALL, 2)
    launches = bench.behind(case.launches(inputs))
    step = inputs.step(case.rows)
    outs = [buffer for name, buffer in inputs._activations.items() if name.startswith("out")]

    def results() -> list[np.ndarray]:
        return [device.read(out, out.dtype, (case.rows, out.nbytes // np.dtype(out.dtype).itemsize // case.rows)) for out in outs]

    def positions() -> np.ndarray:
        return device.read(step.positions, np.int32, (case.rows,))

    before, start = results(), positions()
    if case.op == "step_advance":
        _records(device, step.sampled, "MSSampled", 2 * case.rows)["status"] = params.MS_SAMPLE_OK
    plan = device.create_plan(launches, case.rows, case.rows)
    plan.wait(plan.run(2))
    plan.close()
    for old, new in zip(before, results(), strict=True):
        assert np.isfinite(new).all()
        assert (new != old).mean(axis=1).min() > 0.9
    if outs:
        assert case.op in ("linear", "attention", "row_program")
    elif case.op == "sample":
        sampled = _records(device, step.sampled, "MSSampled", case.rows)
        assert (sampled["status"] == params.MS_SAMPLE_OK).all()
        assert (sampled["rank"] >= 1).all()
    elif case.op == "step_load":
        region, stage = (inputs._activations[name] for name in ("region", "stage"))
        loaded, staged = (device.read(buffer, np.int32, (region.nbytes // 4,)) for buffer in (region, stage))
        first = params.size("MSStep") // 4
        assert (loaded[:first] == staged[:first]).all() and (loaded[first + case.rows :] == staged[first + case.rows :]).all()
    else:
        assert (positions() == start + 2).all()
        inputs.rewind()
        assert (positions() == start).all()
        assert device.read(step.step, params.record("MSStep"), (1,))["index"][0] == 0
    inputs.close()


def _records(device: NativeDevice, buffer: Buffer, struct: str, count: int) -> np.ndarray:
    return device.numpy(buffer, params.record(struct), (count,))


# ---- measuring --------------------------------------------------------------------------------------------------------
def test_weights_rotate_and_calls_repeat(device, monkeypatch):
    """As on a GPU, in small: copies of the weights by what they take together, each case several times in a plan."""
    monkeypatch.setattr(bench, "REPEATS", 4)
    monkeypatch.setattr(bench, "CALL_S", 0.0)
    cases = [case for case in CASES if case.name in ("linear-o-1rows", "sample-greedy-1rows", "step_advance-decode-8rows")]
    linear = cases[0]
    monkeypatch.setattr(bench, "ROTATED_BYTES", 3 * bench.case_bytes(SMALL, linear)[0] - 1)
    result = bench.bench_kernels(device, SMALL, cases, samples=3, chip=find_chip("m4-max"))
    by_op = {row["op"]: row for row in result["rows"]}
    assert [by_op[op]["copies"] for op in ("linear", "sample", "step_advance")] == [3, 1, 1]
    assert [by_op[op]["repeats"] for op in ("linear", "sample", "step_advance")] == [6, 4, 4]
    assert [by_op[op]["launches"] for op in ("linear", "sample", "step_advance")] == [1, 3, 1]
    for row in result["rows"]:
        assert row["steps"] == 1 and row["run_us"]["n"] == row["alone_us"]["n"] == 3
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["run_us"]["mean"] / 1e3)
        assert row["fraction"] == pytest.approx(row["gb_s"] / 546)
    result["rows"][0]["fraction"] = 0.5
    assert describe(result)[3].endswith("of m4-max")
    assert describe(result)[4].endswith("50%")


def test_a_case_that_memory_does_not_hold_is_left_out_and_says_why(device, monkeypatch):
    monkeypatch.setattr(type(device), "memory_left", lambda _: 1000)
    result = bench.bench_kernels(device, SMALL, CASES[:1], samples=1, simulated=True)
    assert result["rows"] == []
    [left_out] = result["left_out"]
    assert left_out["name"] == "linear-qkv-1rows"
    assert "it takes 0.0 GB, and of the 0.0 GB left a case may have 0.0" in left_out["reason"]


# ---- the command ------------------------------------------------------------------------------------------------------
SMALL_CALL = ["kernels", "--device", DEVICE, "--shape", "tiny", "--rows", "1,2", "--context", "32", "--samples", "2"]


def test_the_command_prints_machine_and_versions_then_rows(capsys):
    assert bench_command([*SMALL_CALL, "--op", "step_advance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["machine", "versions", "model", "method"]
    assert any(line.startswith("not timed ") for line in lines)
    assert sum(line.startswith("step_advance-decode-") for line in lines) == 2
    if DEVICE == "metal-sim":
        assert "say nothing of a GPU's speed" in lines[4]
        assert any("say nothing of a GPU's speed" in line for line in lines[5:])


def test_json_has_the_rows_and_what_they_depend_on(capsys):
    assert bench_command([*SMALL_CALL, "--op", "step_advance,row_program", "--case", "step*,*norm-2rows", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        "benchmark", "command", "machine", "versions", "device", "simulated", "note", "shape", "weights", "kv_dtype", "chip", "chip_gb_s",
        "samples", "not_timed", "left_out", "rows", "others", "warnings",
    }  # fmt: skip
    assert [row["name"] for row in result["rows"]] == [f"step_advance-decode-{n}rows" for n in (1, 2)] + ["row_program-rms_norm-2rows"]
    assert set(result["rows"][0]) == {
        "op", "case", "name", "rows", "context", "kernels", "launches", "threadgroups", "copies", "repeats", "steps", "bytes", "alone_us",
        "run_us", "gb_s",
    }  # fmt: skip
    assert set(result["rows"][0]["run_us"]) >= {"mean", "sigma", "n"}
    assert result["simulated"] == (DEVICE == "metal-sim") == (result["note"] is not None)


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac measures large cases")
def test_the_simulator_leaves_large_cases_out_unless_they_are_named(capsys):
    call = ["kernels", "--device", DEVICE, "--shape", "qwen3-0.6b", "--rows", "1", "--samples", "1"]
    assert bench_command([*call, "--op", "step_advance,linear", "--json"]) == 0
    printed = capsys.readouterr()
    assert "left out, large for a simulator: linear-gate_up-1rows, linear-head-1rows" in printed.err
    assert "linear-head-1rows" in [entry["name"] for entry in json.loads(printed.out)["left_out"]]
    assert bench_command([*call, "--case", "linear-gate_up-1rows"]) == 0
    assert "\nlinear-gate_up-1rows " in capsys.readouterr().out
    with pytest.raises(CommandError, match="no case is left to measure"):
        bench_command([*call, "--op", "linear", "--rows", "64"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "linear,conv"], "--op: no op 'conv', expected one of linear, attention, row_program, sample, step_advance, step_load"),
        (["--shape", "gpt-5"], "shape is 'gpt-5', expected one of tiny, qwen2.5-0.5b"),
        (["--case", "linear-qkv-3rows"], "--case: no case 'linear-qkv-3rows' among linear-qkv-1rows, "),
        (["--rows", "1,0"], "argument --rows: '0' is not an integer above 0"),
        (["--bits", "7"], "weights of 7 bits in groups of 64, expected 2, 3, 4, 5, 6, 8 or 16 bits"),
        (["--chip", "m9", "--device", "metal"], "chip is 'm9', expected one of m1, "),
        (["--chip", "m1", "--device", "metal-sim"], "--chip: times of metal-sim are no speeds"),
        (["--device", "eager"], "argument --device: invalid choice: 'eager'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_what_to_do(capsys, options, message):
    assert command.main(["bench", "kernels", "--device", DEVICE, *options]) == command.WRONG_CALL
    printed = capsys.readouterr()
    assert f"error: {message}" in printed.err
    assert ("\nhint: " in printed.err) is ("--shape" not in options)  # whose error lists all that there are
    assert printed.out == ""


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has it")
def test_without_a_mac_there_is_no_metal_to_measure():
    with pytest.raises(CommandError, match="--device metal: this machine has no Metal device"):
        bench_command(["kernels", "--device", "metal"])


def test_help_has_the_ops_and_ends_with_examples(capsys):
    assert command.main(["bench", "kernels", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in bench.OPS)
    assert "\nexamples:\n  metalstep bench kernels" in text
    command.main(["bench"])
    assert "\n  kernels " in capsys.readouterr().out
