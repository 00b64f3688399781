"""Devices that the tests of a file share."""
from contextlib import ExitStack

import pytest
from gpu_harness import GpuHarness
from harness import Harness


@pytest.fixture(scope="module")
def by_threads():
    """A device by its number of threads."""
    devices = {threads: Harness(threads) for threads in (1, 2, 3)}
    yield devices
    for harness in devices.values():
        harness.device.close()


@pytest.fixture(scope="module")
def h(by_threads):
    """The device of two threads."""
    return by_threads[2]


@pytest.fixture(scope="module")
def g():
    """A GPU: the Mac's own, or simulated Metal."""
    with GpuHarness() as harness:
        yield harness


@pytest.fixture(scope="module")
def host():
    """The host device, on one thread, to compare a GPU with."""
    with Harness(1) as harness:
        yield harness


@pytest.fixture(autouse=True)
def buffers_of_one_test(request):
    """What a test puts on a device that its file shares goes with the test."""
    with ExitStack() as stack:
        for name in ("h", "g", "host"):
            if name in request.fixturenames:
                stack.enter_context(request.getfixturevalue(name).scratch())
        yield
