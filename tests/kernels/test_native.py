"""The launcher from Python: plans compute, tickets come in order, and what cannot be is refused with a reason."""
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from gpu_device import DEVICE
from harness import Harness

from metalstep.kernels import native_library, params, row_program
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice, NativeUnavailable
from metalstep.kernels.program import Program

WIDTH = 64
SLOT = params.MS_SLOT_FIRST


@pytest.fixture
def h():
    with Harness() as harness:
        yield harness


def affine(h, x, factor, term, barrier=True):
    """A launch that makes x = x * factor + term of one row of floats."""
    width, program = x.shape[1], Program()
    row = program.load(SLOT, width, rows=params.MS_ROW_SELF, row_stride=width)
    scaled = program.register(width)
    program.emit(params.MS_OP_MUL, scaled, row, float(factor), n=width)
    program.emit(params.MS_OP_ADD, scaled, scaled, float(term), n=width)
    program.store(scaled, SLOT, row_stride=width)
    (launch,) = row_program.launches(program, h.step(1), [x], params.MS_ROWS_TOKENS, 1)
    launch.barrier = barrier
    return launch


def counter(h, launches=1, width=WIDTH):
    """A row of zeros and a plan that adds `launches` to it in a step."""
    x = h.put(np.zeros((1, width), np.float32))
    return x, h.device.create_plan([affine(h, x, 1, 1)] * launches, 1, 1)


def slow(h):
    """A plan and a number of steps that take long enough to be caught in progress (some 50 ms)."""
    x, plan = counter(h, 1, 1 << 16)
    return x, plan, 1000


# ---- plans and tickets ------------------------------------------------------------------------------------------------
def test_a_plan_runs_its_launches_in_order_and_steps_repeat_them(h):
    x = h.put(np.ones((1, WIDTH), np.float32))
    plan = h.device.create_plan([affine(h, x, 2, 1), affine(h, x, 3, 0)], 1, 1)
    plan.wait(plan.run(3))
    value = 1.0
    for _ in range(3):
        value = (2 * value + 1) * 3
    np.testing.assert_array_equal(h.get(x), np.full((1, WIDTH), value, np.float32))


def test_a_plan_without_launches_runs(h):
    plan = h.device.create_plan([], 1, 1)
    plan.wait(plan.run(2))
    assert plan.profile() == []


def test_runs_of_several_plans_happen_in_the_order_of_their_tickets(h):
    x = h.put(np.ones((1, WIDTH), np.float32))
    steps = [(1, 5), (0.5, 0), (1, -2)]  # they do not commute
    plans = [h.device.create_plan([affine(h, x, factor, term)], 1, 1) for factor, term in steps]
    tickets, value = [], np.float32(1)
    for i in np.random.default_rng(0).integers(0, len(steps), 200):
        tickets.append(plans[i].run(1))
        value = value * np.float32(steps[i][0]) + np.float32(steps[i][1])
    assert tickets == sorted(set(tickets))
    plans[0].wait(tickets[-1])
    np.testing.assert_array_equal(h.get(x), np.full((1, WIDTH), value))


def test_a_ticket_covers_all_before_it_and_can_be_waited_for_twice(h):
    x, plan = counter(h)
    tickets = [plan.run(2) for _ in range(5)]
    plan.wait(tickets[-1])
    assert (h.get(x) == 10).all()
    for ticket in tickets:
        plan.wait(ticket)
        plan.wait(ticket, timeout=0)


def test_a_wait_with_a_limit_gives_up_and_leaves_the_ticket_valid(h):
    x, plan, steps = slow(h)
    start = time.perf_counter()
    ticket = plan.run(steps)
    assert time.perf_counter() - start < 0.05, "run waits for the work"
    with pytest.raises(TimeoutError, match=f"ticket {ticket} has not finished in time"):
        plan.wait(ticket, timeout=0.001)
    plan.wait(ticket)
    assert (h.get(x) == steps).all()


def test_polling_makes_progress(h):
    """wait(timeout=0) never runs the work itself, so something else must."""
    x, plan = counter(h)
    ticket = plan.run(7)
    for _ in range(2000):
        try:
            plan.wait(ticket, timeout=0)
            break
        except TimeoutError:
            time.sleep(0.001)
    assert (h.get(x) == 7).all()


def test_queued_runs_progress_while_nobody_waits(h):
    x, plan = counter(h)
    view = h.device.numpy(x, np.float32, (1, WIDTH))
    for _ in range(3):
        plan.run(1)
    for _ in range(2000):
        if view[0, 0] == 3:
            return
        time.sleep(0.001)
    pytest.fail("three runs were queued and none happened")


def test_threads_share_a_device(h):
    """Each thread's own steps all happen, and no two jobs run at once (the counters are not atomic)."""
    shared, shared_plan = counter(h)
    errors, rounds, count = [], 100, 4

    def work(seed):
        try:
            rng = np.random.default_rng(seed)
            x, plan = counter(h)
            for _ in range(rounds):
                mine, both = plan.run(2), shared_plan.run(1)
                plan.wait(mine, timeout=None if rng.random() < 0.5 else 10)
                if rng.random() < 0.5:
                    shared_plan.wait(both)
            plan.wait(both)
            assert (h.get(x) == 2 * rounds).all()
            plan.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert (h.get(shared) == rounds * count).all()


def test_a_full_queue_is_refused_and_drains(h):
    x, plan, steps = slow(h)
    first = plan.run(steps)
    with pytest.raises(ValueError, match="1024 runs are queued on this device; wait for one of them first"):
        for _ in range(2000):
            last = plan.run(1)
    plan.wait(last)
    assert (h.get(x) == steps + last - first).all()


def test_a_profile_is_one_step_and_times_every_launch(h):
    x, plan = counter(h, 3)
    plan.run(1)
    times = plan.profile()
    assert len(times) == 3 and all(0 <= t < 10**9 for t in times)
    assert (h.get(x) == 6).all()


def test_a_plan_may_leave_threads_of_the_pool_to_others():
    """Plans of any number of threads take turns, and each gives what it gives with all."""
    with Harness(threads=3) as h:
        x, plan = counter(h, 5)
        _, other = counter(h)
        for step, threads in enumerate((1, 3, 2, 1), 1):
            plan.limit_threads(threads)
            other.run()
            plan.wait(plan.run())
            np.testing.assert_array_equal(h.get(x), np.full((1, WIDTH), 5 * step, np.float32))
        for threads in (0, -1, 4):
            with pytest.raises(ValueError, match=f"a limit of {threads} threads, expected 1 to the device's 3"):
                plan.limit_threads(threads)


def test_plans_keep_the_buffers_they_were_made_with(h):
    owner = h.device.create_buffer(4 * WIDTH)
    x = Buffer(owner.handle, 0, (1, WIDTH), "float32")
    plan = h.device.create_plan([affine(h, x, 1, 1)], 1, 1)
    view = owner.numpy(np.float32, (WIDTH,))
    owner.close()
    plan.wait(plan.run(3))
    assert (view == 3).all()
    with pytest.raises(ValueError, match="does not exist on this device"):
        owner.numpy(np.float32, (WIDTH,))


# ---- closing ----------------------------------------------------------------------------------------------------------
def test_a_closed_device_refuses_every_call():
    with Harness() as h:
        _, plan = counter(h)
        ticket = plan.run(1)
        owner = h.device.create_buffer(64)
    h.device.close()
    for call in [
        lambda: plan.run(1),
        lambda: plan.wait(ticket),
        plan.profile,
        lambda: h.device.create_buffer(64),
        lambda: h.device.create_plan([], 1, 1),
        lambda: h.device.kernel("linear_of_another_name"),
        lambda: h.device.weight_bytes(16, 64, 4, 64, 0),
        lambda: owner.numpy(np.uint8, (64,)),
    ]:
        with pytest.raises(ValueError, match=r"closed|destroyed"):
            call()
    plan.close()
    owner.close()


def test_views_outlive_their_device():
    with Harness() as h:
        view = h.device.create_buffer(4 * WIDTH).numpy(np.float32, (WIDTH,))
        view[...] = 7
    gc.collect()
    assert (view == 7).all()


def test_a_plan_keeps_its_device_open():
    h = Harness()
    x, plan = counter(h)
    view = h.device.numpy(x, np.float32, (1, WIDTH))
    del h
    gc.collect()
    plan.wait(plan.run(2))
    assert (view == 2).all()


def test_closing_while_another_thread_waits_ends_the_wait():
    h = Harness()
    _, plan, steps = slow(h)
    results = []

    def wait():
        try:
            plan.wait(tickets[-1])
            results.append("done")
        except ValueError as error:
            results.append(str(error))

    tickets = [plan.run(steps) for _ in range(20)]
    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.05)
    h.device.close()
    for waiter in waiters:
        waiter.join(30)
    assert len(results) == 3 and all("closed" in result for result in results)


def test_a_forked_child_can_use_neither_device_nor_plan_and_exits():
    code = """
        import os, sys
        import numpy as np
        from metalstep.kernels.native import NativeDevice
        device = NativeDevice.open("host", 2)
        plan = device.create_plan([], 1, 1)
        plan.wait(plan.run(1))
        child = os.fork()
        if not child:
            try:
                plan.run(1)
            except ValueError:
                sys.exit(7)
            sys.exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        plan.wait(plan.run(1))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_a_process_may_end_with_everything_open():
    code = """
        from metalstep.kernels.native import NativeDevice
        device = NativeDevice.open("host", 2)
        plan = device.create_plan([], 1, 1)
        view = device.create_buffer(64).numpy("f4", (16,))
        plan.run(60000); plan.run(60000)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


# ---- buffers ----------------------------------------------------------------------------------------------------------
def test_buffers_are_zeroed_aligned_and_free_until_written(h):
    before = _resident()
    owner = h.device.create_buffer(1 << 33)
    view = owner.numpy(np.uint8, (1 << 33,))
    assert view.ctypes.data % 64 == 0
    view[:: 1 << 30] = 1
    assert _resident() - before < 64 << 20, "memory is committed that nobody wrote"
    assert view[1] == 0 and view[-1] == 0


def _resident():
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_view_stays_within_its_buffer(h):
    owner = h.device.create_buffer(64)
    assert owner.numpy(np.uint16, (8, 2), 32).shape == (8, 2)
    assert h.device.create_buffer(0).numpy(np.float32, (0, 4)).shape == (0, 4)
    for shape, offset in [((17,), 0), ((16,), 4), ((1,), -4), ((-1,), 0), ((0,), 65)]:
        with pytest.raises(ValueError, match=f"does not fit into buffer {owner.handle}, which has 64 bytes"):
            owner.numpy(np.float32, shape, offset)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["host", DEVICE])
def test_bytes_are_written_read_and_copied(name, shared):
    """On a device of any kind, whoever owns the memory."""
    x = np.arange(24, dtype=np.int16).reshape(4, 6)
    with NativeDevice.open(name) as device:
        first, second = (device.create_buffer(64, shared=shared) for _ in range(2))
        assert first.shared == (shared or device.unified)
        first.write(x[:, ::2], 8)  # as an array is, whatever its strides
        np.testing.assert_array_equal(first.read(np.int16, (4, 3), 8), x[:, ::2])
        device.copy(Buffer(first.handle, 8, (12,), "uint16"), Buffer(second.handle, 40, (12,), "uint16"))
        np.testing.assert_array_equal(second.read(np.int16, (12,), 40), x[:, ::2].ravel())
        device.write(Buffer(second.handle, 62, (1,), "uint16"), np.int16([9]))
        assert device.read(Buffer(second.handle, 62, (1,), "uint16"), np.int16, (1,)) == [9]
        assert not second.read(np.uint8, (40,)).any()
        for offset, count in [(0, 65), (64, 1), (2**63, 1), (1, 64)]:
            with pytest.raises(ValueError, match=f"{count} bytes at offset {offset} do not fit; it has 64"):
                first.write(np.zeros(count, np.uint8), offset)
            with pytest.raises(ValueError, match="do not fit"):
                first.read(np.uint8, (count,), offset)
        first.close()
        with pytest.raises(ValueError, match="does not exist"):
            device.copy(Buffer(first.handle, 0, (1,), "uint8"), Buffer(second.handle, 0, (1,), "uint8"))


@pytest.mark.parametrize(
    "nbytes, error", [(-1, ValueError), (2**64, ValueError), (2**64 - 1, MemoryError), (2**62, MemoryError)]
)
def test_a_buffer_that_cannot_be_is_refused(h, nbytes, error):
    with pytest.raises(error):
        h.device.create_buffer(nbytes)


# ---- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, threads, text",
    [
        ("gpu", 0, '"gpu" is unknown, expected "host", "metal", "metal-sim" or "cuda"'),
        ("host", -1, "threads is -1, expected 0"),
        ("host", 1025, "threads is 1025, expected 0"),
        ("host", 2**40, "does not fit its C type"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(name, threads, text):
    with pytest.raises(ValueError, match=text):
        NativeDevice.open(name, threads)


def test_threads_are_as_asked():
    for threads in (1, 2, 3):
        with NativeDevice.open("host", threads) as device:
            assert device.info.threads == threads and device.info.name == "host"
            assert device.info.isa in ("avx512", "avx2", "neon", "portable") and device.info.memory_bytes > 0


def test_the_environment_may_set_the_threads(monkeypatch):
    monkeypatch.setenv("METALSTEP_THREADS", "3")
    with NativeDevice.open("host") as device:
        assert device.info.threads == 3
    monkeypatch.setenv("METALSTEP_THREADS", "many")
    with pytest.raises(ValueError, match="METALSTEP_THREADS is not a number of threads, expected 1 to 1024"):
        NativeDevice.open("host")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"kernel": "linaer"}, 'has no "linaer"; it has linear, row_program'),
        ({"bindings": [Buffer(999, 0, (1,), "float32")]}, "binding 0 names buffer 999"),
        ({"bindings": [Buffer(0, 1 << 40, (1,), "float32")]}, "binding 0 starts at byte 1099511627776 of buffer 0"),
        ({"bindings": [Buffer(0, -1, (1,), "float32")]}, "binding's buffer or offset"),
        ({"bindings": []}, r"launch 0 \(row_program\)"),
        ({"constants": b""}, r"launch 0 \(row_program\)"),
        ({"grid": (-1, 1, 1)}, "grid .* of row_program"),
        ({"threads": (1, 1, 1, 1)}, "threads .* of row_program"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused_by_number(h, change, text):
    x = h.put(np.zeros((1, WIDTH), np.float32))
    launch = affine(h, x, 1, 1)
    for name, value in change.items():
        setattr(launch, name, value)
    with pytest.raises(ValueError, match=text):
        h.device.create_plan([launch], 1, 1)


@pytest.mark.parametrize("steps", [0, -1, 65_537, 2**32, 2**80])
def test_a_count_of_steps_out_of_range_is_refused(h, steps):
    _, plan = counter(h)
    with pytest.raises(ValueError, match="steps is"):
        plan.run(steps)


def test_a_wait_that_makes_no_sense_is_refused(h):
    _, plan = counter(h)
    for ticket in (0, 99, -1, 2**64):
        with pytest.raises(ValueError, match=r"wait: .*ticket"):
            plan.wait(ticket)
    ticket = plan.run(1)
    for timeout in (-1, float("nan")):
        with pytest.raises(ValueError, match="expected 0 or more"):
            plan.wait(ticket, timeout=timeout)
    plan.wait(ticket, timeout=float("inf"))


def test_a_library_is_refused_where_kernels_are_built_in(h):
    with pytest.raises(ValueError, match="takes no sources"):
        h.device.add_library("kernel void f() {}")


def test_a_weight_that_does_not_fit_is_refused(h):
    n, k = 32, 64
    nbytes = h.device.weight_bytes(n, k, 4, 32, params.MS_FLOAT16)
    words, scales = np.zeros((n, k // 8), np.uint32), np.zeros((n, k // 32), np.float16)
    order = np.array([*range(n - 1), -1], np.int32)
    owner = h.device.create_buffer(nbytes)
    good = dict(format=params.MS_WEIGHT_AFFINE, n=n, k=k, bits=4, group_size=32, dtype=params.MS_FLOAT16)
    good |= dict(data=words.ctypes.data, scales=scales.ctypes.data, biases=scales.ctypes.data)
    h.device.pack_weight(owner, 0, **good)
    for offset, change, text in [
        (64, {}, "do not fit into buffer"),
        (1, {}, "expected a multiple of 64"),
        (0, {"data": 0}, "source.data is NULL"),
        (0, {"scales": None}, "source.scales is NULL"),
        (0, {"biases": None}, "source.biases is NULL"),
        (0, {"row_order": order.ctypes.data}, r"row_order\[31\] is -1"),
        (0, {"bits": 7}, "bits=7, .* cannot be packed"),
        (0, {"n": -1}, "weight"),
        (0, {"format": 77}, "weight"),
    ]:
        with pytest.raises(ValueError, match=text):
            h.device.pack_weight(owner, offset, **{**good, **change})
    with pytest.raises(ValueError, match="k=63"):
        h.device.weight_bytes(n, 63, 4, 32, params.MS_FLOAT16)


# ---- finding the library ----------------------------------------------------------------------------------------------
@pytest.fixture
def fresh():
    """Looks for the library anew, in the test and after it."""
    native_library.loaded.cache_clear()
    yield
    native_library.loaded.cache_clear()


def test_a_library_of_another_version_is_refused(fresh, monkeypatch):
    own = params.MS_ABI_VERSION
    monkeypatch.setitem(params._constants, "MS_ABI_VERSION", 99)
    with pytest.raises(NativeUnavailable, match=f"has ABI version {own} and this metalstep expects 99; rebuild it: `make build`"):
        NativeDevice.open("host", 1)


def test_a_missing_or_wrong_library_says_what_to_do(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("METALSTEP_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(NativeUnavailable, match=r"METALSTEP_LIBRARY names no file: looked for .*none\.so; run `make build`"):
        NativeDevice.open("host", 1)
    (tmp_path / "text.so").write_text("not a library")
    monkeypatch.setenv("METALSTEP_LIBRARY", str(tmp_path / "text.so"))
    with pytest.raises(NativeUnavailable, match=r"text\.so cannot be loaded"):
        NativeDevice.open("host", 1)


def test_launches_are_plain_data():
    launch = Launch("linear", [], b"", (1, 1, 1), (32, 1, 1))
    assert launch == Launch("linear", [], b"", (1, 1, 1), (32, 1, 1), barrier=False)
