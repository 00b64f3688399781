"""The Metal device as its caller sees it: wrapped memory, steps in flight, what is encoded and kept, and Metal's errors."""
from __future__ import annotations

import gc
import itertools
import mmap
import os
import re
import shutil
import sys
import threading
import time
import weakref
from collections import Counter

import numpy as np
import pytest

from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import DeviceBuffer, NativeDevice

pytestmark = [
    pytest.mark.skipif(sys.platform == "darwin", reason="what Metal is asked to do is seen in the simulated one only"),
    pytest.mark.skipif(
        shutil.which(os.environ.get("METALSTEP_CLANG", "clang++")) is None,
        reason="simulated Metal needs clang++: put it on PATH or set METALSTEP_CLANG",
    ),
]
COUNT = 64
PAGE = mmap.PAGESIZE
SOURCE = """#include <metal_stdlib>
using namespace metal;
kernel void add(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant float& by [[buffer(2)]],
  uint i [[thread_position_in_grid]]) { y[i] = x[i] + by; }
kernel void twice(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = 2 * y[i]; }
kernel void next(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = float(uint(5 * y[i]) % 4096); }
kernel void slow(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  if (i == 0) for (uint n = 0; n < 30000000u; n++) y[0] = y[0] * 1.5f + float(n);
  y[i] = 1;
}
kernel void bad(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  if (i < 32) threadgroup_barrier(mem_flags::mem_none);
  y[i] = 1;
}
"""


@pytest.fixture
def log(monkeypatch, tmp_path):
    """Reads the lines that simulated Metal has written about what it was asked to do."""
    path = tmp_path / "metal.log"
    monkeypatch.setenv("METALSTEP_SIM_LOG", str(path))
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path / "cache"))
    return lambda start="": [line for line in path.read_text().splitlines() if line.startswith(start)] if path.exists() else []


@pytest.fixture
def metal(log):
    with opened() as device:
        yield device


def opened() -> NativeDevice:
    device = NativeDevice.open("metal-sim")
    device.add_library(SOURCE)
    return device


def floats(device: NativeDevice, fill: float = 0.0, count: int = COUNT) -> Buffer:
    owner = device.create_buffer(4 * count)
    owner.numpy(np.float32, (count,))[:] = fill
    return Buffer(owner.handle, 0, (count,), "float32")


def values(device: NativeDevice, buffer: Buffer) -> np.ndarray:
    return device.numpy(buffer, np.float32, buffer.shape)


def launch(name: str, *bindings: Buffer, by: float | None = None, barrier: bool = True) -> Launch:
    constants = b"" if by is None else np.float32(by).tobytes()
    return Launch(name, list(bindings), constants, (1, 1, 1), (COUNT, 1, 1), barrier)


def run(device: NativeDevice, *launches: Launch, steps: int = 1) -> None:
    plan = device.create_plan(list(launches), 1, 1)
    plan.wait(plan.run(steps))
    plan.close()


class Mapping(mmap.mmap):
    """A mapping that weak references can watch."""


def mapped(*numbers: float, pages: int = 1) -> tuple[Mapping, int]:
    """An anonymous mapping that begins with float32 `numbers`, and its address."""
    mapping = Mapping(-1, pages * PAGE)
    array = np.frombuffer(mapping, np.float32)
    array[: len(numbers)] = numbers
    return mapping, array.ctypes.data


def region(buffer: DeviceBuffer, offset: int = 0, count: int = COUNT) -> Buffer:
    return Buffer(buffer.handle, offset, (count,), "float32")


# ---- names ------------------------------------------------------------------------------------------------------------
def test_the_simulated_device_has_a_name_of_its_own(metal):
    assert metal.info.name == "Simulated Metal" and metal.info.threads == 0 and metal.info.isa == ""


def test_threads_are_the_hosts():
    with pytest.raises(ValueError, match="metal-sim: threads is 2, expected 0"):
        NativeDevice.open("metal-sim", 2)


# ---- wrapped memory ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["host", "metal-sim"])
def test_a_wrapped_mapping_is_the_memory_itself(name, log):
    mapping, address = mapped(1, 2, 3)
    with NativeDevice.open(name) as device:
        owner = device.wrap_buffer(address, 12, mapping)
        view = owner.numpy(np.float32, (3,))
        assert view.ctypes.data == address and list(view) == [1, 2, 3] and not view.flags.writeable
        np.frombuffer(mapping, np.float32)[1] = 7
        assert view[1] == 7
        with pytest.raises(ValueError, match="does not fit into buffer"):
            owner.numpy(np.float32, (4,))


def test_kernels_read_a_mapped_file_from_any_offset(metal, tmp_path):
    """The file's size is no multiple of the page: the rest of the last page is the mapping's too."""
    path = tmp_path / "weights"
    path.write_bytes(np.arange(COUNT + 2000, dtype=np.float32).tobytes())
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    owner = metal.wrap_buffer(np.frombuffer(mapping, np.uint8).ctypes.data, len(mapping), mapping)
    out = floats(metal)
    run(metal, launch("add", region(owner, 4 * 2000), out, by=0.5))
    np.testing.assert_array_equal(values(metal, out), np.arange(2000, 2000 + COUNT) + 0.5)


@pytest.mark.parametrize("name", ["host", "metal-sim"])
def test_memory_that_cannot_be_wrapped_is_refused(name, log):
    mapping, address = mapped(pages=2)
    with NativeDevice.open(name) as device:
        for at, nbytes, text in [
            (address + 4, 16, f"is not a multiple of the page of {PAGE} bytes; wrap the whole mapping"),
            (0, 16, "address is NULL"),
            (address, 0, "0 bytes to wrap"),
            (address, -1, "does not fit its C type"),
            (address, 2**64 - 1, "more than a machine can address"),
            (2**64 - PAGE, 16, "more than a machine can address"),
        ]:
            with pytest.raises(ValueError, match=text):
                device.wrap_buffer(at, nbytes, mapping)


def test_more_than_a_buffer_holds_is_refused_so_that_the_caller_copies(metal):
    mapping, address = mapped()
    with pytest.raises(MemoryError, match=r"wraps at most \d+ bytes, not \d+; copy them into several buffers"):
        metal.wrap_buffer(address, 1 << 50, mapping)


def test_a_weight_is_not_packed_into_wrapped_memory(log):
    mapping, address = mapped(pages=4)
    with NativeDevice.open("host") as host:
        owner = host.wrap_buffer(address, 4 * PAGE, mapping)
        with pytest.raises(ValueError, match="wrapped memory, which is only read"):
            host.pack_weight(owner, 0, format=0, n=16, k=32, bits=32, group_size=0, dtype=0, data=address)


@pytest.mark.parametrize("name", ["host", "metal-sim"])
def test_the_owner_of_wrapped_memory_is_held_while_anything_uses_it(name, log):
    mapping, address = mapped()
    watch = weakref.ref(mapping)
    with NativeDevice.open(name) as device:
        owner = device.wrap_buffer(address, PAGE, mapping)
        view = owner.numpy(np.uint8, (PAGE,))
        del mapping
        owner.close()
        gc.collect()
        assert watch() is not None, "a view still shows it"
        del view
        gc.collect()
        assert watch() is None


def test_the_owner_of_wrapped_memory_is_held_until_the_runs_of_a_closed_plan_are_done(metal):
    mapping, address = mapped(*range(COUNT))
    watch = weakref.ref(mapping)
    owner, busy, out = metal.wrap_buffer(address, PAGE, mapping), floats(metal), floats(metal)
    plan = metal.create_plan([launch("slow", busy), launch("add", region(owner), out, by=1)], 1, 1)
    last = metal.create_plan([], 1, 1)
    owner.close()
    del mapping
    gc.collect()
    assert watch() is not None, "the plan reads it"
    plan.run(2)
    plan.close()
    gc.collect()
    assert watch() is not None, "the runs read it"
    last.wait(last.run())
    gc.collect()
    assert watch() is None
    np.testing.assert_array_equal(values(metal, out), np.arange(COUNT) + 1)


def test_a_plan_may_be_dropped_and_its_device_closed_while_it_reads_wrapped_memory(log):
    device = opened()
    mapping, address = mapped(*range(COUNT))
    watch = weakref.ref(mapping)
    owner, busy, out = device.wrap_buffer(address, PAGE, mapping), floats(device), floats(device)
    view = values(device, out)
    plan = device.create_plan([launch("slow", busy), launch("add", region(owner), out, by=1)], 1, 1)
    plan.run(2)
    del plan, mapping, owner
    device.close()
    del device, view
    gc.collect()
    assert watch() is None


# ---- memory -----------------------------------------------------------------------------------------------------------
def test_the_memory_that_is_left_goes_down_and_up(metal):
    before = metal.memory_left()
    assert 0 < before <= metal.info.memory_bytes
    owner = metal.create_buffer(1 << 20)
    mapping, address = mapped(pages=3)
    wrapped = metal.wrap_buffer(address, 2 * PAGE + 1, mapping)
    assert before - metal.memory_left() == (1 << 20) + 3 * PAGE
    owner.close()
    wrapped.close()
    assert metal.memory_left() == before


def test_a_buffer_beyond_the_gpus_is_refused_with_the_limits(log, monkeypatch):
    monkeypatch.setenv("METALSTEP_SIM_MEMORY", str(1 << 20))
    with NativeDevice.open("metal-sim") as device:
        assert device.info.memory_bytes == 1 << 20
        device.create_buffer(1 << 19)
        with pytest.raises(MemoryError, match=r"cannot give 2097152 bytes; .* 1048576, and .* 1048576, of which 524288 are taken"):
            device.create_buffer(1 << 21)
        for _ in range(2):
            device.create_buffer(1 << 19)
        assert device.memory_left() == 0


def test_buffers_are_resident_from_the_next_plan_on_until_they_are_destroyed(metal, log):
    owners = [metal.create_buffer(4096) for _ in range(3)]
    assert log("residency") == []
    metal.create_plan([], 1, 1)
    metal.create_plan([], 1, 1)  # nothing is new
    assert log("residency") == ["residency commit 3 12288", "residency request 3 12288"]
    owners[0].close()
    assert log("residency")[2:] == ["residency commit 2 8192"]
    metal.close()
    gc.collect()
    owners.clear()
    assert log("residency")[3:] == ["residency commit 1 4096", "residency commit 0 0", "residency end", "residency commit 0 0"]
    assert log("queue") == ["queue adds residency set", "queue removes residency set"]


def test_what_the_gpu_should_not_hold_at_once_is_not_made_resident(log, monkeypatch):
    monkeypatch.setenv("METALSTEP_SIM_MEMORY", str(1 << 16))
    with opened() as device:
        buffers = [floats(device, 1, 1 << 13) for _ in range(3)]  # 32 KB each
        run(device, launch("add", buffers[2], buffers[0], by=1))
        assert (values(device, buffers[0])[:COUNT] == 2).all()
        assert log("residency request") == ["residency request 2 65536"]


# ---- encoding ---------------------------------------------------------------------------------------------------------
def calls(line: str) -> Counter:
    """What a line of the log says about one encoder."""
    return Counter({name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)})


def test_what_is_set_already_is_not_set_again(metal, log):
    x, y, z = (floats(metal, 1) for _ in range(3))
    halves = [Buffer(x.handle, 4 * n, (COUNT // 2,), "float32") for n in (0, COUNT // 2)]
    short = (COUNT // 2, 1, 1)
    launches = [
        launch("add", x, y, by=1),  # pipeline, 3 buffers
        launch("add", x, y, by=2),  # the constants' offset
        launch("add", x, z, by=3, barrier=False),  # a buffer, the constants' offset
        launch("twice", y),  # pipeline, a buffer
        launch("twice", y, barrier=False),  # nothing
        launch("twice", halves[0]),  # a buffer
        launch("twice", halves[1], barrier=False),  # its offset
        launch("twice", halves[1]),  # nothing
    ]
    for entry in launches[5:]:
        entry.threads = short
    run(metal, *launches, steps=3)
    lines = log("commands")
    assert len(lines) == 3, "one command buffer for a step"
    for line in lines:
        assert line.startswith("commands step ")
        assert calls(line) == {
            "setComputePipelineState": 2, "setBuffer": 6, "setBufferOffset": 3, "memoryBarrier": 5, "dispatchThreadgroups": 8,
        }  # fmt: skip


def test_every_launch_sees_its_own_bindings_whatever_was_set_before(metal, log):
    """Random plans: the same as numpy, with no more calls than there are differences between neighbours."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        count = 12
        handles = [floats(metal, 0, 4 * COUNT) for _ in range(3)]
        expected = [np.zeros(4 * COUNT, np.float32) for _ in range(3)]
        launches = []
        for _ in range(count):
            a, b = rng.integers(0, 3, 2)
            i, j = (int(n) for n in rng.integers(0, 4, 2))
            by = float(rng.integers(1, 9))
            source, target = (Buffer(handles[n].handle, 4 * COUNT * k, (COUNT,), "float32") for n, k in ((a, i), (b, j)))
            launches.append(launch("add", source, target, by=by) if rng.random() < 0.6 else launch("twice", target))
            at = slice(COUNT * j, COUNT * (j + 1))
            if launches[-1].kernel == "add":
                expected[b][at] = expected[a][COUNT * i : COUNT * (i + 1)] + np.float32(by)
            else:
                expected[b][at] *= 2
        run(metal, *launches)
        for handle, values_ in zip(handles, expected, strict=True):
            np.testing.assert_array_equal(values(metal, handle), values_)
        made = calls(log("commands step")[-1])
        assert made["dispatchThreadgroups"] == made["memoryBarrier"] == count
        assert made["setComputePipelineState"] == 1 + sum(p.kernel != q.kernel for p, q in itertools.pairwise(launches))
        assert made["setBuffer"] + made["setBufferOffset"] <= 3 * count


def test_a_profile_runs_each_launch_in_an_encoder_with_its_name(metal, log):
    x, y = floats(metal, 1), floats(metal)
    plan = metal.create_plan([launch("add", x, y, by=1), launch("add", x, y, by=2), launch("twice", y)], 1, 1)
    assert all(time > 0 for time in plan.profile())
    lines = log("commands")
    assert [line.split()[1] for line in lines] == ["add", "add", "twice"]
    assert all(calls(line)["dispatchThreadgroups"] == calls(line)["setComputePipelineState"] == 1 for line in lines)
    assert [calls(line)["setBuffer"] for line in lines] == [3, 3, 1]
    assert (values(metal, y) == 6).all()


# ---- pipelines --------------------------------------------------------------------------------------------------------
def test_a_kernel_has_one_pipeline_and_its_name_one_id(metal, log):
    ids = [metal.kernel("add"), metal.kernel("twice")]
    run(metal, *[launch("add", floats(metal), floats(metal), by=1)] * 3)
    assert [metal.kernel("add"), metal.kernel("twice")] == ids
    made = [f"pipeline {name} {how}" for name in ("add", "twice") for how in ("compiled", "archived")]
    assert log("pipeline") == made, "compiled into the archive, and taken from there"


def test_pipelines_are_kept_for_the_next_process(log, tmp_path):
    """And only for the same source; an archive that Metal does not take is begun anew."""
    def pipelines(source: str = SOURCE) -> list[str]:
        before = len(log("pipeline"))
        with NativeDevice.open("metal-sim") as device:
            device.add_library(source)
            run(device, launch("twice", floats(device)))
        return log("pipeline")[before:]

    folder = tmp_path / "cache" / "pipelines"
    assert "pipeline twice compiled" in pipelines()
    (path,) = folder.iterdir()
    assert path.suffix == ".metalarchive"
    assert pipelines() == ["pipeline twice archived"]
    assert "pipeline twice compiled" in pipelines(SOURCE + "\n// another text")
    assert len(list(folder.iterdir())) == 2
    path.write_bytes(b"\xff\x00 of another system")
    assert "pipeline twice compiled" in pipelines()
    assert pipelines() == ["pipeline twice archived"]


def test_without_a_folder_for_it_nothing_is_kept(log, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in [tmp_path / "file" / "cache", ""]:
        monkeypatch.setenv("METALSTEP_CACHE", str(folder))
        if not folder:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.setenv("METALSTEP_SIM_CACHE", str(tmp_path / "simulator"))
            monkeypatch.delenv("HOME", raising=False)
        with opened() as device:
            out = floats(device, 1)
            run(device, launch("twice", out))
            assert (values(device, out) == 2).all()


# ---- steps and tickets ------------------------------------------------------------------------------------------------
def test_run_returns_while_the_steps_are_in_flight(metal):
    out = floats(metal)
    plan = metal.create_plan([launch("slow", out)], 1, 1)
    start = time.perf_counter()
    tickets = [plan.run(1) for _ in range(8)]
    issued = time.perf_counter() - start
    plan.wait(tickets[-1])
    assert issued < (time.perf_counter() - start) / 2


def test_steps_beyond_those_in_flight_wait_their_turn(metal):
    """Steps do not commute, so that a step lost, doubled or out of order would show."""
    out, steps = floats(metal), 150
    plan = metal.create_plan([launch("next", out), launch("add", out, out, by=3)], 1, 1)
    plan.wait(plan.run(steps))
    value = 0.0
    for _ in range(steps):
        value = 5 * value % 4096 + 3
    assert (values(metal, out) == value).all()


def test_steps_happen_in_the_order_of_tickets_whichever_thread_runs_them(metal):
    """x -> 2x and x -> x + 1 do not commute: the result tells the order in which both happened."""
    out = floats(metal)
    plans = [
        metal.create_plan([launch("twice", out)], 1, 1),
        metal.create_plan([launch("add", out, out, by=1)], 1, 1),
    ]
    issued: list[tuple[int, int]] = []

    def work(which: int) -> None:
        for _ in range(9):
            issued.append((plans[which].run(1), which))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    issued.sort()
    plans[0].wait(issued[-1][0])
    value = np.float32(0)
    for _, which in issued:
        value = value + 1 if which else value * 2
    assert (values(metal, out) == value).all()


def test_a_plan_keeps_alive_what_its_commands_use(metal):
    """Metal does not count references here: simulated Metal fails the commands when something is gone."""
    out, busy = floats(metal), floats(metal)
    view = values(metal, out)
    plan = metal.create_plan([launch("slow", busy), launch("add", out, out, by=1)], 1, 1)
    last = metal.create_plan([], 1, 1)
    metal.destroy_buffer(out.handle)
    metal.destroy_buffer(busy.handle)
    plan.run(2)
    plan.close()
    gc.collect()
    last.wait(last.run())
    assert (view == 2).all()


# ---- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fault, text",
    [
        ("timeout", r"run: Caused GPU Timeout Error \(00000002:kIOGPUCommandBufferCallbackErrorTimeout\) \(step faulted\)"),
        ("memory", r"run: Insufficient Memory \(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory\) \(step faulted\)"),
        ("removed", r"run: Device was removed .*\(step faulted\)"),
        ("lost", r"run: Metal gave no command buffer or encoder; the GPU may have been lost: open the device again"),
    ],
)
def test_a_failure_of_the_gpu_is_told_in_metals_own_words(metal, monkeypatch, fault, text):
    out = floats(metal, 1)
    plan = metal.create_plan([launch("twice", out)], 1, 1)
    monkeypatch.setenv("METALSTEP_SIM_FAULT", fault)
    ticket = plan.run(3)
    with pytest.raises(RuntimeError, match=text):
        plan.wait(ticket)
    plan.wait(ticket)  # told once
    monkeypatch.delenv("METALSTEP_SIM_FAULT")
    plan.wait(plan.run())
    assert (values(metal, out) == 2).all()


def test_a_profile_names_the_launch_at_fault(metal, monkeypatch):
    out = floats(metal, 1)
    plan = metal.create_plan([launch("twice", out), launch("bad", out)], 1, 1)
    with pytest.raises(RuntimeError, match=r"profile: launch 1: bad: .*threadgroup_barrier.* \(bad faulted\)"):
        plan.profile()
    monkeypatch.setenv("METALSTEP_SIM_FAULT", "lost")
    with pytest.raises(RuntimeError, match="profile: Metal gave no command buffer"):
        plan.profile()


def test_a_gpu_takes_no_packed_weights(metal):
    nbytes = metal.weight_bytes(16, 32, 32, 0, 0)
    data = np.zeros((16, 32), np.float32)
    with pytest.raises(ValueError, match="read weights as they are stored; wrap or copy them into a buffer"):
        metal.pack_weight(
            metal.create_buffer(nbytes), 0, format=0, n=16, k=32, bits=32, group_size=0, dtype=0, data=data.ctypes.data
        )
