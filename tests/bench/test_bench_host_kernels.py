"""The host device's cases of `bench kernels`: each op on every shape, what is measured of it, its limit and its ratio to MLX's op."""

import json
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from metalstep.bench import host_cases, host_kernels
from metalstep.bench import limits as limits_module
from metalstep.bench.host_inputs import HostInputs
from metalstep.bench.kernels import shape_sizes
from metalstep.bench.limits import Limits, Roof
from metalstep.bench.mlx_ops import mlx_op
from metalstep.cli.bench import main as bench_command
from metalstep.cli.bench_kernels import describe
from metalstep.cli.errors import CommandError
from metalstep.kernels import params
from metalstep.kernels.native import NativeDevice

SMALL = replace(shape_sizes("tiny", [1, 9], [40]), vocab_size=520, norm_rows=1 << 31)
CODECS = ["float16", "affine8", "turbo4"]
CASES = host_cases.bench_cases(SMALL, host_cases.OPS, CODECS, "int16")
ROOF = Roof(read=10.0, cache=100.0, gmac_s={"fp32": 50.0, "int16": 100.0, "int8": 200.0})


@pytest.fixture(scope="module")
def device():
    with NativeDevice.open("host", 1) as opened:
        yield opened


def test_every_op_has_cases_and_no_name_is_twice():
    assert {case.op for case in CASES} == set(host_cases.OPS)
    assert max(Counter(case.name for case in CASES).values()) == 1
    for case in CASES:
        assert 0 <= case.streamed <= case.nbytes and case.work > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_computes_what_is_measured_of_it(device, case):
    """Every row has a new result of finite numbers, or a token."""
    inputs = HostInputs(device, SMALL, 2)
    launches = case.launches(inputs)
    outs = [buffer for name, buffer in inputs._activations.items() if name.startswith("out")]
    views = [device.numpy(out, np.float32, (case.rows, out.nbytes // 4 // case.rows)) for out in outs]
    before = [view.copy() for view in views]
    plan = device.create_plan(launches, case.rows, case.rows)
    plan.wait(plan.run(1))
    plan.close()
    for old, new in zip(before, views, strict=True):
        assert np.isfinite(new).all()
        assert (new != old).mean(axis=1).min() > 0.9
    if case.op == "sample":
        sampled = device.numpy(inputs.step(case.rows).sampled, params.record("MSSampled"), (case.rows,))
        assert (sampled["status"] == params.MS_SAMPLE_OK).all()
    assert outs or case.op in ("kv_write", "sample", "step_advance", "step_load")
    inputs.close()


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_formats_of_weights_are_the_ones_asked_for(device, bits):
    """Bytes of a case are those of its panels; 16 bits are multiplied in float32."""
    sizes = replace(SMALL, bits=bits)
    [case, *_] = host_cases.bench_cases(sizes, ["linear"], [], "int8")
    inputs = HostInputs(device, sizes, 1)
    case.launches(inputs)
    assert inputs.weight_bytes == pytest.approx(case.streamed, rel=0.02)
    assert case.arithmetic == ("fp32" if bits == 16 else "int8")
    inputs.close()


# ---- MLX's ops --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mlx_s_work_has_the_case_s_sizes_or_there_is_no_such_op(case):
    op = mlx_op(SMALL, case, case.codec)
    if op is None:
        assert case.op in ("step_advance", "step_load") or case.codec == "turbo4"
        return
    results = op.make()()
    mx.eval(results)
    assert op.ops and results
    if case.op not in ("kv_write", "row_program", "sample"):
        assert results[0].size % case.rows == 0
        assert all(mx.isfinite(result).all() for result in results)


# ---- limits -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small_limits():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MEMORY_BYTES", 1 << 20), ("CACHE_ROUNDS", 2), ("COMPUTE_ROUNDS", 20), ("SAMPLES", 1)):
            patch.setattr(limits_module, name, value)
        patch.setattr(host_kernels, "ROTATED_BYTES", 1 << 18)
        patch.setattr(host_kernels, "CALL_S", 0.0)
        yield


def test_limits_only_grow_and_are_there_for_one_thread_and_all(small_limits):
    with NativeDevice.open("host", 2) as device:
        limits = Limits(device)
        limits.sample()
        first = limits.facts()
        limits.sample()
        assert [fact["threads"] for fact in first] == [1, 2]
        for before, after in zip(first, limits.facts(), strict=True):
            assert all(0 < before[key] <= after[key] for key in before)
        limits.close()


def test_the_longest_of_memory_cache_and_arithmetic_is_the_limit():
    assert ROOF.seconds(10_000, 20_000, 50_000, "int16") == pytest.approx({"memory": 1e-6, "cache": 2e-7, "arithmetic": 5e-7})
    assert "arithmetic" not in ROOF.seconds(10_000, 20_000, 50_000, None)


class FixedLimits:
    def roof(self):
        return ROOF


def test_a_row_s_fraction_is_its_limit_over_its_median_and_the_ratio_of_speeds_is_theirs_over_ours():
    [case] = [case for case in CASES if case.name == "linear-o-9rows"]
    op = mlx_op(SMALL, case)
    row = host_kernels.row(case, case.streamed, 4, 16, 1, [10.0, 20.0, 40.0], op, [40.0, 60.0, 80.0], True)
    host_kernels.add_limit(row, FixedLimits())
    times = ROOF.seconds(case.streamed, case.nbytes, case.macs, "int16")
    assert row["limit_us"] == pytest.approx(max(times.values()) * 1e6)
    assert row["limit"] == max(times, key=times.get) == "arithmetic"
    assert row["fraction"] == pytest.approx(row["limit_us"] / 20.0)
    assert row["gb_s"] == pytest.approx(case.nbytes / 20e-6 / 1e9)
    assert row["gmac_s"] == pytest.approx(case.rows * 128 * 256 / 20e-6 / 1e9)
    assert row["mlx"]["ratio"] == {"of_medians": 3.0, "median_of_pairs": 3.0}


# ---- the command ------------------------------------------------------------------------------------------------------------
CALL = ["kernels", "--device", "host", "--shape", "tiny", "--rows", "1", "--context", "32", "--samples", "2", "--threads", "1"]


def test_the_command_s_rows_are_below_their_limit_and_say_what_mlx_takes(capsys, small_limits, tmp_path):
    out, plot = tmp_path / "kernels.json", tmp_path / "kernels.svg"
    call = [*CALL, "--op", "linear,kv_write", "--against", "mlx", "--case", "*-down-*,*cache*", "--kv-codecs", "turbo4"]
    assert bench_command([*call, "--out", str(out), "--plot", str(plot)]) == 0
    lines, result = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert [line.split()[0] for line in lines[:4]] == ["machine", "versions", "model", "method"]
    assert [row["name"] for row in result["rows"]] == ["linear-down-1rows", "kv_write-cache-1rows", "kv_write-cache-turbo4-1rows"]
    for row in result["rows"]:
        assert 0 < row["fraction"] < 2  # limits of this test are of little work
        assert row["run_us"]["n"] == 2
    assert [row["mlx"]["ops"] for row in result["rows"]] == ["quantized_matmul, add", "2 × slice_update", None]
    assert any(line.endswith("no such op") for line in describe(result))
    assert "--out" not in result["command"] and "--plot" not in result["command"]
    assert plot.read_text().count("MLX&#x27;s op") == 3  # the legend, and two cases


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "conv"], "--op: no op 'conv', expected one of linear, embedding, attention"),
        (["--chip", "m1"], "--chip: the host device's limits are measured"),
        (["--kv-codecs", "turbo9"], "--kv-codecs: kv_codec: codec is 'turbo9'"),
        (["--against", "torch"], "--against: no peer 'torch', expected mlx"),
        (["--device", "metal-sim", "--against", "mlx"], "--against: times of metal-sim are no speeds"),
        (["--device", "metal-sim", "--threads", "1"], "--threads: only the host device has it"),
        (["--plot", "x.gif"], "--plot x.gif: expected a name that ends in .svg or .png"),
        (["--out", "nowhere/x.json"], "--out nowhere/x.json: there is no folder nowhere"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_measured(options, message):
    with pytest.raises((ValueError, CommandError), match=message):
        bench_command([*CALL, "--op", "rms_norm", *options])
