"""Host devices that the tests of a file share."""
import pytest
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
