"""The Metal device on simulated Metal: what it runs, in which order, and which mistakes it reports and how."""
import itertools
import os
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_kernels import COUNT, HEAD, NEEDS, SEEDS, kernel, launch, out, result_of, run

from metalstep.kernels import params
from metalstep.kernels.metal_source import metal_source
from metalstep.kernels.native import NativeDevice

pytestmark = NEEDS


@pytest.fixture
def metal():
    with NativeDevice.open("metal-sim") as device:
        yield device


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch):
    monkeypatch.setenv("METALSTEP_SIM_SEED", str(request.param))
    return request.param


@pytest.mark.parametrize("threads", [1, 31, 33, 128])
def test_simdgroup_functions_see_the_lanes_that_exist(metal, seed, threads):
    body = "o[i] = simd_sum(float(lane)) + 1000.0f * simd_max(float(i)) + 1e6f * simd_shuffle(float(i), ushort(0));"
    got = result_of(metal, kernel(body), threads=threads)[:threads]
    groups = [np.arange(start, min(start + 32, threads)) for start in range(0, threads, 32)]
    expected = [np.full(len(g), (g % 32).sum() + 1000.0 * g.max() + 1e6 * g[0], np.float32) for g in groups]
    np.testing.assert_array_equal(got, np.concatenate(expected))


def test_threadgroup_memory_is_poisoned(metal, seed):
    assert np.isnan(result_of(metal, kernel("threadgroup float t[4];\n if (i == 1) t[1] = 5.0f; o[i] = t[0];"))).all()


@pytest.mark.parametrize(
    "declaration, element",
    [
        ("threadgroup float t[SIZE * 4];", "t[n]"),
        ("threadgroup float t[2][64];", "t[(n) / 64][(n) % 64]"),
        ("threadgroup float s[4 * SIZE]; threadgroup float* t = s;", "t[n]"),
        ("threadgroup float s[4 * SIZE]; threadgroup float (&t)[128] = s;", "t[n]"),
        ("// threadgroup float t, u;\n /* threadgroup float v, */ threadgroup float t [ 128 ] ;", "t[n]"),
    ],
)
def test_threadgroup_variables_are_of_the_threadgroup(metal, seed, declaration, element):
    body = f"constexpr uint SIZE = 32;\n#define T(n) {element}\n{declaration}\n"
    body += "T(i) = float(i); threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = T(127 - i);"
    np.testing.assert_array_equal(result_of(metal, kernel(body)), np.arange(128)[::-1])


def test_bfloat_rounds_to_nearest_even_and_half_is_half(metal):
    values = np.array([1.00390625, 1.01171875, 3.4e38, np.nan, -0.0, 1e-40], np.float32)
    metal.add_library(
        HEAD
        + """kernel void k(device const float* x [[buffer(0)]], device bfloat* b [[buffer(1)]], device half* h [[buffer(2)]],
          uint2 at [[thread_position_in_grid]]) { b[at.x] = bfloat(x[at.x]); h[at.x] = half(x[at.x]); }"""
    )
    x, b, h = (out(metal, len(values)) for _ in range(3))
    metal.numpy(x, np.float32, x.shape)[:] = values
    run(metal, launch("k", x, b, h, threads=len(values)))
    bits = values.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    got = metal.numpy(b, np.uint16, (len(values),))
    np.testing.assert_array_equal(got[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]])
    assert got[3] & 0x7FFF > 0x7F80
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(metal.numpy(h, np.float16, (len(values),)), values.astype(np.float16))


# ---- barriers in kernels


@pytest.mark.parametrize(
    "body, text",
    [
        ("if (i < 64)\n threadgroup_barrier(mem_flags::mem_threadgroup);\n o[i] = 1;", "threadgroup_barrier is not reached by every"),
        ("if (i >= 64) return;\n threadgroup_barrier(mem_flags::mem_threadgroup);", "threadgroup_barrier is not reached by every"),
        (
            "if (i < 64) threadgroup_barrier(mem_flags::mem_threadgroup);\n else threadgroup_barrier(mem_flags::mem_threadgroup);",
            r"some are in the threadgroup_barrier of line \d+, others in that of line \d+",
        ),
        ("if (lane < 16) o[i] = simd_sum(1.0f);", "simd_sum (after|is not reached by every lane)"),
        ("o[i] = lane < 16 ? simd_sum(1.0f) : simd_max(1.0f);", "lanes of simdgroup [0-3] diverge"),
        (
            "if (lane < 16) o[i] = simd_sum(1.0f);\n else threadgroup_barrier(mem_flags::mem_threadgroup);",
            "not reached by every|after 16 lanes",
        ),
        ("threadgroup float t[64];\n t[i % 65] = 1; o[i] = t[0];", "variable of 256 bytes was written at byte 256"),
        ("threadgroup float t[8193];\n t[i] = 1; o[i] = t[i];", "more than 32768 bytes"),
    ],
)
def test_a_kernels_mistake_is_an_error_with_its_name(metal, seed, body, text):
    with pytest.raises(RuntimeError, match=f"run: k: .*({text})"):
        result_of(metal, kernel(body))
    source = kernel("o[i] = 2;", "after")  # the device still works
    metal.add_library(source)
    buffer = out(metal)
    run(metal, launch("after", buffer))
    assert (metal.numpy(buffer, np.float32, buffer.shape) == 2).all()


def test_a_missing_barrier_in_add_rms_norm_is_seen():
    """A whole kernel gives the same in every order of threads; without its barrier some order reads what is not there."""
    whole = metal_source("add_rms_norm")
    cut = re.sub(r"threadgroup_barrier\(.*\);", "", whole)
    assert cut != whole
    finite = {}
    for name, source in {"whole": whole, "cut": cut}.items():
        finite[name] = []
        for seed in SEEDS:
            os.environ["METALSTEP_SIM_SEED"] = str(seed)
            try:
                with NativeDevice.open("metal-sim") as device:
                    device.add_library(source)
                    buffers = [out(device, 64) for _ in range(4)]
                    for buffer in buffers[:3]:
                        device.numpy(buffer, np.float32, (64,))[:] = 1
                    constants = params.pack("AddRMSNormParams", hidden_size=64, eps=0.0)
                    run(device, launch("add_rms_norm_float", *buffers, constants=constants, threads=256))
                    finite[name].append(bool(np.isfinite(device.numpy(buffers[3], np.float32, (64,))).all()))
            finally:
                del os.environ["METALSTEP_SIM_SEED"]
    assert all(finite["whole"])
    assert not all(finite["cut"])


# ---- launches of a plan

ADD = HEAD + "kernel void add(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant float& by [[buffer(2)]],"
ADD += " uint i [[thread_position_in_grid]]) { y[i] = x[i] + by; }"


def chain(device: NativeDevice, barrier: bool) -> np.ndarray:
    """1 + 1 + 2 + 4 in three launches, each reading what the one before it wrote."""
    buffers = [out(device) for _ in range(4)]
    device.numpy(buffers[0], np.float32, (COUNT,))[:] = 1
    run(
        device,
        *(
            launch("add", x, y, constants=np.float32(2**n).tobytes(), barrier=barrier and n > 0)
            for n, (x, y) in enumerate(itertools.pairwise(buffers))
        ),
    )
    return device.numpy(buffers[3], np.float32, (COUNT,)).copy()


def test_barriers_order_launches(metal, seed):
    metal.add_library(ADD)
    assert (chain(metal, barrier=True) == 8).all()


def test_a_missing_barrier_between_launches_is_seen(metal, monkeypatch):
    """Between barriers launches run in the order of the seed: 1 turns them round."""
    metal.add_library(ADD)
    monkeypatch.setenv("METALSTEP_SIM_SEED", "1")
    assert np.isnan(chain(metal, barrier=False)).all()


@given(steps=st.integers(1, 70), runs=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_steps_and_tickets_follow_one_another(steps, runs):
    """More steps than Metal keeps command buffers, several tickets in flight, waited for backwards."""
    with NativeDevice.open("metal-sim") as device:
        device.add_library(ADD)
        buffer = out(device)
        device.numpy(buffer, np.float32, (COUNT,))[:] = 0
        plan = device.create_plan([launch("add", buffer, buffer, constants=np.float32(1).tobytes())], 1, 1)
        tickets = [plan.run(steps) for _ in range(runs)]
        assert tickets == list(range(1, runs + 1))
        for ticket in reversed(tickets):
            plan.wait(ticket)
        assert (device.numpy(buffer, np.float32, (COUNT,)) == steps * runs).all()


SLOW = "if (i == 0) for (uint n = 0; n < 200000000u; n++) o[0] = o[0] * 1.5f + float(n);\n o[i] = 1;"


def test_a_wait_with_a_limit_times_out_and_may_be_repeated(metal):
    metal.add_library(kernel(SLOW))
    buffer = out(metal)
    plan = metal.create_plan([launch("k", buffer)], 1, 1)
    ticket = plan.run(1)
    with pytest.raises(TimeoutError, match="ticket 1 has not finished in time"):
        plan.wait(ticket, timeout=0.001)
    plan.wait(ticket)
    assert (metal.numpy(buffer, np.float32, (COUNT,)) == 1).all()


def test_a_failed_run_is_told_once_and_others_are_not_touched(metal):
    metal.add_library(kernel("if (i < 64) threadgroup_barrier(mem_flags::mem_none);"))
    metal.add_library(ADD)
    buffer = out(metal)
    bad = metal.create_plan([launch("k", buffer)], 1, 1)
    good = metal.create_plan([launch("add", buffer, buffer, constants=bytes(4))], 1, 1)
    tickets = [good.run(), bad.run(3), good.run()]
    good.wait(tickets[2])
    with pytest.raises(RuntimeError, match="threadgroup_barrier"):
        bad.wait(tickets[1])
    for ticket in tickets:
        good.wait(ticket)


def test_a_device_closes_while_a_plan_runs():
    device = NativeDevice.open("metal-sim")
    device.add_library(kernel(SLOW))
    plan = device.create_plan([launch("k", out(device))], 1, 1)
    plan.run(2)
    device.close()


def test_several_threads_may_run_plans(metal):
    metal.add_library(ADD)
    buffers = [out(metal) for _ in range(4)]
    failures = []

    def work(buffer):
        try:
            metal.numpy(buffer, np.float32, (COUNT,))[:] = 0
            plan = metal.create_plan([launch("add", buffer, buffer, constants=np.float32(1).tobytes())], 1, 1)
            for _ in range(20):
                plan.wait(plan.run(2))
        except Exception as error:  # told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(b,)) for b in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all((metal.numpy(b, np.float32, (COUNT,)) == 40).all() for b in buffers)


def test_a_profile_has_a_time_for_each_launch(metal):
    metal.add_library(ADD)
    buffer = out(metal)
    plan = metal.create_plan([launch("add", buffer, buffer, constants=bytes(4)) for _ in range(3)], 1, 1)
    times = plan.profile()
    assert len(times) == 3 and all(time > 0 for time in times)


# ---- refusals


@pytest.mark.parametrize(
    "source, text",
    [
        (kernel("o[i] = nothing;"), r"library: program_source:5:\d+: error: use of undeclared identifier 'nothing'"),
        (HEAD + '#include "params.h"\n', "program_source:3: error: a quoted include"),
        (HEAD + '  #  include   "params.h"\n', "program_source:3: error: a quoted include"),
        (HEAD + "kernel void k(device float* o [[buffer(0)]], uint i) {}", "parameter 2 of kernel k has no attribute"),
        (kernel("threadgroup float a[2], b[3];"), "program_source:5: error: a threadgroup variable must be declared alone"),
        (kernel("threadgroup float a = 3;"), "a threadgroup variable must be declared alone"),
        (kernel("o[0] = 1;").replace("uint i [[", "bfloat b [[stage_in]], uint i [["), "error: .*sim_stage_in"),
        (HEAD + "MS_INSTANCE(a, b<float>)", "an instance of b, which is not a kernel"),
        (kernel("bfloat b = 1.0f; o[i] = b;"), "error: no viable conversion from 'float' to 'bfloat'"),
    ],
)
def test_a_source_that_does_not_compile_is_refused_with_the_reason(metal, source, text):
    with pytest.raises(RuntimeError, match=text):
        metal.add_library(source)


def test_a_kernel_that_does_not_exist_is_refused(metal):
    with pytest.raises(ValueError, match='no library of this device has "k"; they have nothing'):
        metal.kernel("k")
    metal.add_library(ADD)
    with pytest.raises(ValueError, match='has "k"; they have add'):
        metal.kernel("k")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"grid": (0, 1, 1)}, r"launch 0 \(add\) has grid \(0, 1, 1\), expected 1 or more"),
        ({"threads": (2048, 1, 1)}, r"launch 0 \(add\) has threads \(2048, 1, 1\), expected 1 to 1024 in all"),
        ({"threads": (32, 32, 2)}, "expected 1 to 1024 in all"),
        ({"bindings": 31}, "binds 32 buffers, and Metal takes 31"),
    ],
)
def test_a_launch_that_metal_cannot_take_is_refused(metal, change, text):
    metal.add_library(ADD)
    buffer = out(metal)
    entry = launch("add", buffer, buffer, constants=bytes(4))
    for name, value in change.items():
        setattr(entry, name, [buffer] * value if name == "bindings" else value)
    with pytest.raises(ValueError, match=text):
        metal.create_plan([entry], 1, 1)


def test_a_binding_that_a_kernel_needs_and_a_launch_lacks_fails_the_run(metal):
    metal.add_library(ADD)
    with pytest.raises(RuntimeError, match=r"run: add: nothing is bound to \[\[buffer\(2\)\]\]"):
        run(metal, launch("add", out(metal), out(metal)))


def test_threads_of_a_pool_are_refused():
    with pytest.raises(ValueError, match="metal-sim: threads is 2, expected 0"):
        NativeDevice.open("metal-sim", 2)


def test_a_seed_that_is_no_number_fails_the_run(metal, monkeypatch):
    monkeypatch.setenv("METALSTEP_SIM_SEED", "any")
    with pytest.raises(RuntimeError, match="METALSTEP_SIM_SEED is any, expected a number"):
        result_of(metal, kernel("o[i] = 1;"))


def test_without_a_compiler_the_error_says_what_to_do(metal, monkeypatch):
    monkeypatch.setenv("METALSTEP_CLANG", "no-such-clang")
    with pytest.raises(RuntimeError, match=r"there is no no-such-clang on PATH; install clang or set METALSTEP_CLANG"):
        metal.add_library(ADD)


def test_compiled_kernels_are_kept(monkeypatch, tmp_path):
    """The second time no compiler runs: a file changed meanwhile stays as it is."""
    monkeypatch.setenv("METALSTEP_SIM_CACHE", str(tmp_path / "a" / "b"))
    for _ in range(2):
        with NativeDevice.open("metal-sim") as device:
            device.add_library(ADD)
        files = sorted(path.suffix for path in (tmp_path / "a" / "b").iterdir())
        assert files == [".cpp", ".so"]
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "b").iterdir()}
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
