"""Logits that a step lends out stay what they were, whoever reads them and when."""
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from split_memory import SplitDevice

from metalstep.kernels.launch import Buffer
from metalstep.plan import logits
from metalstep.plan.logits import HostRow, LogitsRing, rows_of


@given(places=st.integers(1, 3), keep=st.lists(st.booleans(), min_size=1, max_size=20))
def test_lent_rows_outlive_the_steps_behind_them(places, keep):
    values = [np.full((2, 5), np.nan, np.float32) for _ in range(places)]
    ring = LogitsRing([list(map(HostRow, place)) for place in values])
    lent = []
    for step, kept in enumerate(keep):
        values[ring.advance()][:] = [[step], [-step]]
        rows = [ring.lend(row) for row in (0, 1)]
        if kept:
            lent.append((step, rows))
    for step, rows in lent:
        assert [set(row.numpy().tolist()) for row in rows] == [{step}, {-step}]


def test_a_thread_that_reads_while_another_one_runs_steps_reads_one_step():
    place, lent, mixed = np.zeros((1, 100_000), np.float32), [], []
    ring = LogitsRing([[HostRow(place[0])]])
    done = threading.Event()

    def read():
        while not done.is_set() or lent:
            if lent:
                step, logits = lent.pop()
                values = logits.numpy()
                if not (values == step).all():
                    mixed.append((step, np.unique(values)))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2000):
        ring.advance()
        place[:] = step
        if len(lent) < 3:
            lent.append((step, ring.lend(0)))
    done.set()
    reader.join()
    assert not mixed


@given(
    room=st.integers(0, 12),
    most=st.integers(0, 12),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=30),
)
def test_rows_of_a_device_outlive_its_steps_whether_it_has_memory_for_them_or_not(room, most, steps):
    """room: buffers that the device can still give. steps: whether each one's row is kept, and which of those kept before is dropped."""
    with SplitDevice.open("host", 1) as device, pytest.MonkeyPatch.context() as patch:
        owner = device.create_buffer(2 * 4 * 5, shared=False)
        create, asked = device.create_buffer, itertools.count()

        def create_buffer(nbytes, *, shared=True):
            if next(asked) >= room:
                raise MemoryError("the GPU has no more")
            return create(nbytes, shared=shared)

        patch.setattr(device, "create_buffer", create_buffer)
        patch.setattr(logits, "MOST_KEPT", most)
        place = Buffer(owner.handle, 0, (2, 5), "float32")
        ring, kept, most_kept = LogitsRing([rows_of(device, place, 2, 5)]), [], 0
        for number, (keeps, dropped) in enumerate(steps):
            ring.advance()
            owner.write(np.repeat(np.array([number, -number], np.float32), 5))
            lent = [ring.lend(row) for row in (0, 1)]
            if keeps:
                kept.append((number, lent))
                most_kept = max(most_kept, 2 * len(kept))
            elif dropped < len(kept):
                del kept[dropped]
            del lent
        ring.advance()
        for number, rows in kept:
            assert [set(row.numpy().tolist()) for row in rows] == [{number}, {-number}]
        assert next(asked) <= min(room + 1, most, most_kept)
