"""Devices that the tests of a file share."""
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
