"""A mirror and the device's memory: whatever the host edits is there after a send, what the device wrote stays, and where the host sees the
memory nothing is sent."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from split_memory import SplitDevice

from metalstep.kernels.native import NativeDevice
from metalstep.plan.mirror import GAP, Mirror

NBYTES = 6 * GAP
QUIET = range(2 * GAP, 5 * GAP)
edits = st.lists(
    st.tuples(st.integers(0, NBYTES - 1), st.integers(0, 300)).map(lambda e: (e[0], min(e[0] + e[1], NBYTES))), min_size=1, max_size=12
)


@pytest.fixture(scope="module", params=[NativeDevice, SplitDevice])
def device(request):
    with request.param.open("host", 1) as opened:
        yield opened


@given(rounds=st.lists(edits, min_size=1, max_size=4), written=edits, seed=st.integers(0, 99))
def test_what_was_edited_is_on_the_device_and_the_rest_is_left_alone(device, rounds, written, seed):
    """written: by the device, outside of what it leaves to the host."""
    owner = device.create_buffer(NBYTES, shared=False)
    mirror = Mirror(device, owner, NBYTES, QUIET)
    view, draw = mirror.view(np.uint8, (NBYTES,), 0), np.random.default_rng(seed)
    expected = np.zeros(NBYTES, np.uint8)
    for first, end in written:
        if end <= QUIET.start or first >= QUIET.stop:
            expected[first:end] = 200
            owner.write(expected[first:end], first)
    for parts in rounds:
        for first, end in parts:
            values = draw.integers(0, 256, end - first, np.uint8)
            mirror.edit(view[first:end])[:] = expected[first:end] = values
        assert mirror.is_sent is (device.unified or all(first == end for first, end in parts))
        mirror.send()
        assert mirror.is_sent
    np.testing.assert_array_equal(owner.read(np.uint8, (NBYTES,)), expected)
    owner.close()


def test_neighbours_are_sent_together_where_the_device_writes_nothing():
    with SplitDevice.open("host", 1) as device:
        mirror = Mirror(device, device.create_buffer(NBYTES, shared=False), NBYTES, QUIET)
        view = mirror.view(np.uint8, (NBYTES,), 0)
        for at, writes in ((0, 3), (QUIET.start, 1)):
            device.writes.clear()
            for i in range(3):
                mirror.edit(view[at + 100 * i : at + 100 * i + 4])[:] = 1
            mirror.send()
            assert len(device.writes) == writes


def test_only_edit_gives_something_to_write_to(device):
    mirror = Mirror(device, device.create_buffer(64, shared=False), 64, range(0))
    view = mirror.view(np.int32, (4, 4), 0)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    mirror.edit(view[1:3])[:] = 7
    assert view.sum() == 56
    for other in (view[:, 1], np.zeros(4, np.int32), view.T):
        with pytest.raises(ValueError, match="no contiguous part of these 64"):
            mirror.edit(other)
