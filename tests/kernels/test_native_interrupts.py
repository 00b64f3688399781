"""Ctrl-C while a device, its buffers and plans are made or collected: what nothing refers to is closed, whenever it comes."""
import _weakrefset
import contextlib
import gc
import mmap
import os
import subprocess
import sys
import textwrap
import time
import weakref

import numpy as np
import pytest
from harness import Harness
from interrupt_at import InterruptAt
from test_native import SLOT, slow

from metalstep.kernels import native, native_library, native_session, params, row_program
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.params import ffi
from metalstep.kernels.program import Program

FILES = (*(module.__file__ for module in (native, native_library, native_session, weakref, _weakrefset)), ffi.gc.__code__.co_filename)


def interrupted_everywhere(act):
    """Call `act` once per bytecode, with the interrupt there; yields behind each."""
    act()
    with InterruptAt(within=FILES) as counting:
        act()
    for point in range(1, counting.count + 1):
        gc.disable()  # it runs others' code at a moment of its own
        with contextlib.suppress(KeyboardInterrupt), InterruptAt([point], FILES):
            act()
        gc.enable()
        yield point


@pytest.fixture
def unseen(monkeypatch):
    """The kinds of exceptions that were printed since nobody could get them."""
    kinds = set()
    monkeypatch.setattr(sys, "unraisablehook", lambda error: kinds.add(error.exc_type))
    return kinds


@pytest.fixture
def h():
    with Harness() as harness:
        yield harness


def use(device):
    view = device.create_buffer(64).numpy(np.uint8, (64,))
    plan = device.create_plan([], 1, 1)
    plan.wait(plan.run())
    return view, plan


def opened():
    NativeDevice.open("host", 3)


def closed():
    with NativeDevice.open("host", 3) as device:
        use(device)


def collected():
    use(NativeDevice.open("host", 3))


def collected_in_a_cycle():
    cycle = [NativeDevice.open("host", 3)]
    cycle += [use(cycle[0]), cycle]
    del cycle
    gc.collect()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("act", [opened, closed, collected, collected_in_a_cycle])
def test_no_device_stays_open(act, unseen, request):
    act()
    gc.collect()
    before = threads()
    gc.freeze()  # what the tests before have left need not be looked at each time
    request.addfinalizer(gc.unfreeze)
    for point in interrupted_everywhere(act):
        NativeDevice.open("host", 3).close()  # takes in what was left between the call and its result
        gc.collect()
        assert settled(before), f"the device's threads are still there after an interrupt at bytecode {point}"
    assert unseen <= {KeyboardInterrupt}


def threads():
    return len(os.listdir("/proc/self/task"))


def settled(expected):
    """Whether there are so many threads; one that was joined is listed a moment longer."""
    for _ in range(200):
        if threads() == expected:
            return True
        time.sleep(0.001)
    return False


def reader(h, wrapped):
    """A plan that copies a row of floats out of wrapped memory."""
    out, program = h.put(np.zeros((1, 64), np.float32)), Program()
    row = program.load(SLOT, 64, rows=params.MS_ROW_SELF, row_stride=64)
    program.store(row, SLOT + 1, row_stride=64)
    x = Buffer(wrapped.handle, 0, (1, 64), "float32")
    return h.device.create_plan(row_program.launches(program, h.step(1), [x, out], params.MS_ROWS_TOKENS, 1), 1, 1)


class Owner:
    """Of a page of memory."""

    def __init__(self):
        self.bytes = mmap.mmap(-1, mmap.PAGESIZE)


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_wrapped_memory_is_held_until_the_last_run_that_may_read_it_was_waited_for(h, how):
    owner = Owner()
    address = np.frombuffer(owner.bytes, np.uint8).ctypes.data
    wrapped = h.device.wrap_buffer(address, mmap.PAGESIZE, owner)
    plan, (_, other, steps) = reader(h, wrapped), slow(h)
    other.run(steps)
    plan.run()
    gone = weakref.ref(owner)
    del owner
    wrapped.close()
    if how == "closed":
        plan.close()
    else:
        del plan
    assert gone() is not None
    other.wait(other.run())
    assert gone() is None


def test_nothing_is_closed_under_an_exit_handler_and_runs_keep_what_they_read():
    """Other exit handlers use views, threads go on meanwhile, and wrapped memory of a run in flight is not let go."""
    code = """
        import atexit, mmap, sys, threading, time
        import numpy as np

        def last():
            view[...] = 2
            plan.wait(plan.run())
            print("views and plans work", flush=True)

        atexit.register(last)  # before the launcher's own, so it runs behind it
        from metalstep.kernels.native import NativeDevice
        from harness import Harness
        from test_native import slow
        from test_native_interrupts import reader

        class Owner:
            def __init__(self):
                self.bytes = mmap.mmap(-1, mmap.PAGESIZE)
            def __del__(self, write=sys.stdout.write):
                write("wrapped memory is gone")

        class Late:
            def __del__(self, view=NativeDevice.open("host", 2).create_buffer(64).numpy(np.uint8, (64,))):
                view[...] = 3

        def spin():
            while True:
                plan.wait(plan.run(100))

        def reopen():
            while True:
                NativeDevice.open("host", 2).create_buffer(64).numpy(np.uint8, (64,))[...] = 4

        sys.late = Late()
        view = NativeDevice.open("host", 2).create_buffer(64).numpy(np.uint8, (64,))
        plan = NativeDevice.open("host", 2).create_plan([], 1, 1)
        for work in (spin, reopen):
            threading.Thread(target=work, daemon=True).start()
        h, owner = Harness(2), Owner()
        wrapped = h.device.wrap_buffer(np.frombuffer(owner.bytes, np.uint8).ctypes.data, mmap.PAGESIZE, owner)
        reads = [reader(h, wrapped) for _ in range(2)]
        del owner
        _, long, steps = slow(h)
        long.run(60 * steps)
        for read in reads:
            read.run()
        reads[0].close()
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, env=env)
    assert (result.returncode, result.stdout, result.stderr) == (0, "views and plans work\n", "")
