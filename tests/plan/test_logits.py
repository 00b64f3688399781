"""Logits that a step lends out stay what they were, whoever reads them and when."""
import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from metalstep.plan.logits import HostRow, LogitsRing


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
