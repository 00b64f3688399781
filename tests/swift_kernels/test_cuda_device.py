"""The CUDA device as its caller sees it, on a driver and a compiler that are not there: order, tickets, memory, refusals.

The fake (fake_cuda.c) does what is queued only when somebody looks. What it saw of misuse is in its log, and fails every test.
"""
from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cuda_fake import COMPILER, COUNT, floats, launch, opened, read, region
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metalstep.kernels.launch import Launch
from metalstep.kernels.native import KernelError, NativeDevice
from metalstep.plan.logits import LogitsRing, rows_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's GPUs are for Linux"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler: put clang or cc on PATH"),
]
SEGMENT = 4 << 20  # bytes that are staged at once


# ---- opening ----------------------------------------------------------------------------------------------------------
def test_a_gpu_has_its_own_name_and_memory(fake):
    with NativeDevice.open("cuda") as first, NativeDevice.open("cuda:1") as second:
        assert (first.info.name, second.info.name) == ("Fake GPU 0", "Fake GPU 1")
        assert not first.unified and not first.info.unified
        left = first.memory_left()
        buffer = first.create_buffer(1 << 20, shared=False)
        assert first.memory_left() == left - (1 << 20)
        buffer.close()
        assert first.memory_left() == left


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(driver=12030), "the driver supports CUDA 12.3, expected 12.4 or later: install NVIDIA's driver 550"),
        (dict(init=100), 'finds no NVIDIA GPU; use device "host"'),
        (dict(devices=0), 'finds no NVIDIA GPU; use device "host"'),
        (dict(init=999), "the driver does not start: something else"),
        (dict(init=3), "the driver does not start: .*forked from one that has used CUDA.*spawn"),
        (dict(retain=2), "gives no context: out of memory .*other processes have filled its memory"),
        (dict(retain=46), "gives no context: .*another process may have it for itself"),
        (dict(retain=1), "gives no context: .*nvidia-smi may say more"),
        (dict(push=700), "gives no stream: .*it has failed before: start a new process"),
        (dict(capability=75), "Fake GPU 0 has compute capability 7.5, expected 8.0 or later"),
        (dict(capability=120), "NVIDIA's compiler 12.4 has no code for Fake GPU 0, which is sm_120; install a newer one"),
    ],
)
def test_a_machine_that_cannot_says_why(fake, options, text):
    fake.options(**options)
    with pytest.raises(RuntimeError, match=text):
        NativeDevice.open("cuda")


def test_an_older_driver_that_lacks_functions_is_told_by_its_version(fake, monkeypatch, tmp_path):
    source, made = tmp_path / "old.c", tmp_path / "libold.so"
    source.write_text("int cuInit(unsigned flags) { return (int)flags; }\nint cuDriverGetVersion(int *v) { return *v = 12020, 0; }\n")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    monkeypatch.setenv("METALSTEP_CUDA_DRIVER", str(made))
    with pytest.raises(RuntimeError, match=r"supports CUDA 12\.2, expected 12\.4 or later: install NVIDIA's driver 550"):
        NativeDevice.open("cuda")


def test_without_a_compiler_it_says_what_to_install(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("METALSTEP_NVRTC", str(tmp_path / "none.so"))
    with pytest.raises(RuntimeError, match=r"no NVIDIA compiler \(NVRTC\) in 1 places: .*none\.so.*pip install nvidia-cuda-nvrtc"):
        NativeDevice.open("cuda")


@pytest.mark.parametrize(
    "name, why",
    [("none.so", "cannot open"), ("text.so", "too short|invalid ELF"), ("libm.so.6", "has no cuInit: it is another library, or too old")],
)
def test_a_variable_that_names_no_driver_is_named_with_what_is_expected(fake, monkeypatch, tmp_path, name, why):
    (tmp_path / "text.so").write_text("no library\n")
    path = name if name.startswith("libm") else str(tmp_path / name)
    monkeypatch.setenv("METALSTEP_CUDA_DRIVER", path)
    expected = rf"METALSTEP_CUDA_DRIVER is \"{path}\", expected the path of NVIDIA's libcuda\.so\.1"
    with pytest.raises(RuntimeError, match=expected) as refused:
        NativeDevice.open("cuda")
    assert re.search(why, str(refused.value)) and "unset it to take the system's" in str(refused.value)
    assert "install" not in str(refused.value)


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists(), reason="this machine has NVIDIA's driver")
def test_without_a_driver_it_says_what_to_install(monkeypatch):
    monkeypatch.delenv("METALSTEP_CUDA_DRIVER", raising=False)
    with pytest.raises(RuntimeError, match=r"no CUDA driver: libcuda\.so\.1: cannot open.*install NVIDIA's driver.*device \"host\""):
        NativeDevice.open("cuda")


@pytest.mark.parametrize(
    "name, text", [("cuda:2", "this process sees 2 GPUs; expected cuda:0 to cuda:1"), ("cuda:", "is unknown"), ("cuda:-1", "is unknown")]
)
def test_a_gpu_that_does_not_exist_is_refused(fake, name, text):
    with pytest.raises(ValueError, match=text):
        NativeDevice.open(name)


def test_threads_are_the_hosts(fake):
    with pytest.raises(ValueError, match="threads is 2, expected 0"):
        NativeDevice.open("cuda", 2)


# ---- memory -----------------------------------------------------------------------------------------------------------
def test_device_memory_is_zeroed_and_not_seen_by_the_host(cuda):
    own = cuda.create_buffer(100, shared=False)
    assert not own.shared
    np.testing.assert_array_equal(own.read(np.uint8, (100,)), 0)
    with pytest.raises(ValueError, match="the device's own memory, which the host does not see"):
        own.numpy(np.uint8, (100,))


def test_shared_memory_is_one_for_host_and_device(cuda):
    shared = cuda.create_buffer(4 * COUNT)
    view = shared.numpy(np.float32, (COUNT,))
    assert shared.shared and not view.any()
    view[:] = 3
    plan = cuda.create_plan([launch("scale", region(shared), by=2)], 1, 1)
    plan.wait(plan.run(2))
    np.testing.assert_array_equal(view, 12)


def test_more_than_is_free_is_refused_before_the_driver_is_asked(fake, cuda):
    total = 1 << 30
    with pytest.raises(MemoryError, match=rf"Fake GPU 0 cannot give {total} bytes: \d+ of its {total} bytes are free.*KV memory"):
        cuda.create_buffer(total, shared=False)
    assert not fake.log(f"alloc {total}")
    fake.options(fragmented=1)
    with pytest.raises(MemoryError, match="cannot give 4096 bytes in one piece"):
        cuda.create_buffer(4096, shared=False)
    fake.options(pinned=1 << 20)
    with pytest.raises(MemoryError, match="cannot be pinned"):
        cuda.create_buffer(2 << 20)


def test_memory_is_never_wrapped(cuda):
    with pytest.raises(MemoryError, match="has memory of its own and wraps none; copy"):
        cuda.wrap_buffer(1 << 20, 4096, None)


# ---- order ------------------------------------------------------------------------------------------------------------
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["write", "copy", "run", "read"]), st.integers(0, 2), st.integers(0, 2), st.integers(1, 3)), max_size=25
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, shared=st.tuples(*[st.booleans()] * 3))
def test_writes_copies_runs_and_reads_happen_in_the_order_of_the_calls(cuda, actions, shared):
    buffers, expected = [floats(cuda, i, shared=shared[i]) for i in range(3)], [np.full(COUNT, i, np.float32) for i in range(3)]
    plans = [cuda.create_plan([launch("add", b, by=1), launch("scale", b, by=0.5)], 1, 1) for b in buffers]
    for action, i, j, n in actions:
        if action == "write":
            data = np.arange(COUNT, dtype=np.float32) + n
            expected[i] = data.copy()
            cuda.write(buffers[i], data)
            data[:] = np.nan  # it may be reused at once
        elif action == "copy" and i != j:
            cuda.copy(buffers[i], buffers[j])
            expected[j] = expected[i].copy()
        elif action == "run":
            plans[i].run(n)
            for _ in range(n):
                expected[i] = (expected[i] + np.float32(1)) * np.float32(0.5)
        elif action == "read":
            np.testing.assert_array_equal(read(cuda, buffers[i]), expected[i])
    for buffer, values in zip(buffers, expected, strict=True):
        np.testing.assert_array_equal(read(cuda, buffer), values)


@pytest.mark.parametrize("nbytes", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 5 * SEGMENT + 300])
def test_data_of_any_size_goes_there_and_back(cuda, nbytes):
    """Also where it goes round the staging memory, with copies still queued."""
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes + 700, dtype=np.uint8)
    owner = cuda.create_buffer(data.size, shared=False)
    for part in (data[:nbytes], data[nbytes:]):
        owner.write(part, 0 if part.size == nbytes else nbytes)
    np.testing.assert_array_equal(owner.read(np.uint8, data.shape), data)
    np.testing.assert_array_equal(owner.read(np.uint8, (13,), nbytes), data[nbytes : nbytes + 13])


def test_a_region_beyond_the_buffer_is_refused(cuda):
    owner = cuda.create_buffer(64, shared=False)
    for offset, count in [(0, 65), (64, 1), (2**63, 1), (1, 64)]:
        with pytest.raises(ValueError, match=f"{count} bytes at offset {offset} do not fit; it has 64"):
            owner.write(np.zeros(count, np.uint8), offset)
        with pytest.raises(ValueError, match="do not fit"):
            owner.read(np.uint8, (count,), offset)
    owner.write(np.zeros(0, np.uint8), 64)
    with pytest.raises(ValueError, match="the source has 256 bytes and the target 252"):
        cuda.copy(floats(cuda), region(cuda.create_buffer(256), count=63))


# ---- plans ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capability, early", [(90, " early"), (80, "")])
def test_a_plan_is_one_graph_whose_launches_begin_early_but_the_first(fake, capability, early):
    fake.options(capability=capability)
    with opened() as device:
        y = floats(device, 1)
        plan = device.create_plan([launch("add", y, by=1), launch("scale", y, by=2), launch("add", y, by=3, grid=(1, 2, 3))], 1, 1)
        for _ in range(2):
            plan.wait(plan.run(3))
    assert fake.log("launch") == [
        "launch add grid 1 1 1 threads 64 1 1",
        f"launch scale grid 1 1 1 threads 64 1 1{early}",
        f"launch add grid 1 2 3 threads 64 1 1{early}",
    ]
    assert fake.log("instantiate") == ["instantiate 3"] and len(fake.log("replay")) == 6


def test_buffers_may_be_bound_behind_those_that_a_kernel_takes(fake, cuda):
    y = floats(cuda)
    cuda.add_library("// fake: add_one 8\n")
    plan = cuda.create_plan([launch("add_one", y, y, y)], 1, 1)
    plan.wait(plan.run(1))


def test_a_plan_without_launches_runs(cuda):
    plan = cuda.create_plan([], 1, 1)
    plan.wait(plan.run(2))


def test_a_plan_outlives_its_buffers_and_a_run_its_plan(cuda):
    owner = cuda.create_buffer(4 * COUNT, shared=False)
    other = floats(cuda, 5)
    plan = cuda.create_plan([launch("add", region(owner), by=1)], 1, 1)
    owner.close()
    ticket = plan.run(40)
    second = cuda.create_plan([launch("add", other, by=1)], 1, 1)
    plan.close()
    del plan
    gc.collect()
    second.wait(second.run(1))
    second.wait(ticket)
    np.testing.assert_array_equal(read(cuda, other), 6)


def test_a_profile_runs_one_step_and_times_each_launch(fake, cuda):
    y = floats(cuda, 1)
    plan = cuda.create_plan([launch("add", y, by=1), launch("scale", y, by=2), launch("add", y, by=3)], 1, 1)
    assert plan.profile() == pytest.approx([1000] * 3)  # the fake's kernels take a microsecond each
    np.testing.assert_array_equal(read(cuda, y), 7)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(grid=(1, 65536, 1)), r"has grid \(1, 65536, 1\), expected 1 to 65535 along y on Fake GPU 0"),
        (dict(grid=(0, 1, 1)), "expected 1 to 2147483647 along x"),
        (dict(threads=(1, 1, 65)), r"has threads \(1, 1, 65\), expected 1 to 64 along z"),
        (dict(threads=(32, 32, 2)), "expected 1 to 1024 in all"),
        (dict(constants=bytes(8)), "has 8 bytes of constants, and the kernel takes 4 at most"),
        (dict(constants=b""), "has 1 bindings and 0 bytes of constants; the kernel takes 2 parameters"),
        (dict(kernel="fault", bindings=2), "has 2 bindings and 4 bytes of constants; the kernel takes 1 parameters"),
        (dict(bindings=2), "has 2 bindings and 4 bytes of constants; the kernel takes 2 parameters"),
        (dict(bindings=2, constants=b""), "has no constants; the kernel takes 4 bytes of them"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused_by_number(cuda, change, text):
    y = floats(cuda)
    good = dict(kernel="add", bindings=[y], constants=bytes(4), grid=(1, 1, 1), threads=(32, 1, 1))
    change = {**change, **({"bindings": [y] * change["bindings"]} if "bindings" in change else {})}
    with pytest.raises(ValueError, match=r"plan: launch 1 \((add|fault)\) " + ("" if text.startswith("has") else ".*") + text):
        cuda.create_plan([Launch(**good), Launch(**{**good, **change})], 1, 1)


# ---- tickets ----------------------------------------------------------------------------------------------------------
def test_tickets_are_waited_for_in_any_order_and_more_than_once(cuda):
    y = floats(cuda)
    plan = cuda.create_plan([launch("add", y, by=1)], 1, 1)
    tickets = [plan.run(n) for n in (16, 8, 4, 2, 2)]
    assert tickets == sorted(tickets)
    for i in (1, 0, 4, 2, 4, 3):
        plan.wait(tickets[i])
    np.testing.assert_array_equal(read(cuda, y), 32)
    for unknown in (0, tickets[-1] + 1):
        with pytest.raises(ValueError, match=f"ticket {unknown} is not one of this device's"):
            plan.wait(unknown)


def test_runs_that_nobody_waits_for_do_not_pile_up(fake, cuda):
    plan = cuda.create_plan([launch("add", floats(cuda), by=1)], 1, 1)
    for _ in range(200):
        last = plan.run(1)
    plan.wait(last)


def test_events_are_used_again(fake, cuda):
    plan = cuda.create_plan([launch("add", floats(cuda), by=1)], 1, 1)
    before = len(fake.log("event"))
    for _ in range(20):
        plan.wait(plan.run(1))
    assert len(fake.log("event")) - before == 1


def test_a_wait_with_a_limit_gives_up_and_leaves_the_ticket_valid(fake, cuda):
    plan = cuda.create_plan([launch("add", floats(cuda), by=1)], 1, 1)
    fake.options(slow=10**9)
    ticket = plan.run(1)
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match=f"ticket {ticket} has not finished in time"):
            plan.wait(ticket, timeout)
    fake.options()
    plan.wait(ticket, 10)


def test_a_wait_that_takes_long_sleeps(fake, cuda):
    """It looks at once for a while, then after naps."""
    plan = cuda.create_plan([launch("add", floats(cuda), by=1)], 1, 1)
    fake.options(slow=60)
    ticket = plan.run(1)
    busy, start = time.thread_time(), time.perf_counter()
    plan.wait(ticket)
    assert time.thread_time() - busy < 0.5 * (time.perf_counter() - start)


def test_threads_share_a_device(cuda):
    buffers = [floats(cuda, i) for i in range(4)]
    problems = []

    def work(i):
        try:
            plan = cuda.create_plan([launch("add", buffers[i], by=1)], 1, 1)
            for _ in range(20):
                plan.wait(plan.run(2))
            np.testing.assert_array_equal(read(cuda, buffers[i]), i + 40)
            plan.close()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# ---- failures ---------------------------------------------------------------------------------------------------------
def test_a_fault_names_the_plan_s_kernels_and_is_the_end_of_the_process_s_use_of_the_gpu(fake):
    with opened() as device:
        y = floats(device)
        good, bad = (device.create_plan([launch("add", y, by=1), *rest], 1, 1) for rest in ([], [launch("fault", y)]))
        first, second, third = good.run(1), bad.run(1), good.run(1)
        good.wait(first)
        what = r"an illegal memory access .*CUDA_ERROR_ILLEGAL_ADDRESS.* in a plan of add, fault; .*start a new one"
        with pytest.raises(RuntimeError, match=what):
            bad.wait(second)
        calls = [lambda: good.wait(third), lambda: good.run(1), lambda: read(device, y), lambda: device.write(y, np.zeros(1)),
                 lambda: device.create_buffer(4, shared=False), good.profile, lambda: device.create_plan([], 1, 1)]  # fmt: skip
        for call in calls:
            with pytest.raises(RuntimeError, match=r"has failed before .*add, fault.*start a new one"):
                call()
        good.wait(first)
        assert device.memory_left() == 0
    fake.options(retain=700)
    with pytest.raises(RuntimeError, match=r"gives no context: an illegal memory access .* it has failed before: start a new process"):
        opened()


def test_a_fault_shows_where_the_results_are_read(cuda):
    y = floats(cuda)
    cuda.create_plan([launch("fault", y)], 1, 1).run(1)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        read(cuda, y)


def test_an_allocation_that_fails_for_another_reason_is_told_and_survived(fake, cuda):
    fake.options(binary=999)
    with pytest.raises(KernelError, match="something else"):
        cuda.add_library("// fake: other 8\n")


def test_a_gpu_that_has_failed_is_closed_with_what_it_had(fake):
    """Also where the driver lets nobody in any more."""
    device = opened()
    plan = device.create_plan([launch("fault", floats(device))], 1, 1)
    for _ in range(3):
        ticket = plan.run(1)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        plan.wait(ticket)
    fake.options(push=700)
    device.close()
    del device, plan
    gc.collect()
    assert len(fake.log("release")) == 1


def test_a_graph_that_finds_no_memory_says_what_to_do(fake, cuda):
    fake.options(instantiate=2)
    with pytest.raises(MemoryError, match=r"plan of 1 launches: out of memory .*needs more of Fake GPU 0's memory.*less KV memory"):
        cuda.create_plan([launch("add", floats(cuda), by=1)], 1, 1)


# ---- what it does not have ----------------------------------------------------------------------------------------------
def test_without_nvidias_library_of_products_it_is_no_kernel(cuda):
    with pytest.raises(ValueError, match="pip install nvidia-cublas"):
        cuda.kernel("library_gemm")


def test_a_weight_is_not_packed(cuda):
    with pytest.raises(ValueError, match="a GPU's kernels read weights as they are stored"):
        cuda.pack_weight(cuda.create_buffer(1 << 20), 0, format=0, n=16, k=64, bits=32, group_size=0, dtype=0, data=1 << 20)


# ---- the end ----------------------------------------------------------------------------------------------------------
def test_a_device_may_be_closed_with_everything_in_use(fake):
    device = opened()
    y, shared = floats(device), device.create_buffer(64)
    view = shared.numpy(np.uint8, (64,))
    plan = device.create_plan([launch("add", y, by=1)], 1, 1)
    plan.run(5)
    device.close()
    view[:] = 1
    with pytest.raises(ValueError):
        plan.run(1)
    with pytest.raises(ValueError, match="closed"):
        device.write(y, np.zeros(1))


def test_a_device_may_be_closed_while_a_plan_is_profiled(fake):
    """The plan is then the last to go, its graph before the code that it runs."""
    device, times = opened(), []
    plan = device.create_plan([launch("add", floats(device), by=1)], 1, 1)
    fake.options(slow=100)
    thread = threading.Thread(target=lambda: times.extend(plan.profile()))
    thread.start()
    while len(fake.log("instantiate")) < 2:
        time.sleep(0.001)
    device.close()
    del device
    thread.join()
    assert len(times) == 1


def test_rows_of_logits_that_somebody_holds_outlive_the_device(fake):
    """Those that a later step has made room for, and those in their places still."""
    with opened() as device:
        place = floats(device, np.arange(COUNT))
        ring = LogitsRing([rows_of(device, place, 4, COUNT // 4)])
        kept = ring.lend(1)
        ring.advance()
        device.write(place, np.arange(COUNT, dtype=np.float32) + 100)
        lent = ring.lend(2)
        ring.close()
    for logits, first in ((kept, COUNT // 4), (lent, 100 + COUNT // 2)):
        np.testing.assert_array_equal(logits.numpy(), first + np.arange(COUNT // 4))
