"""Barriers: enough for every true dependency, and none without one."""
from hypothesis import given
from hypothesis import strategies as st

from metalstep.kernels.launch import Buffer
from metalstep.plan.hazards import Access, barriers, overlap

regions = st.tuples(st.integers(1, 2), st.integers(0, 6), st.integers(1, 3)).map(
    lambda t: Buffer(t[0], 4 * t[1], (t[2],), "float32")
)
accesses = st.lists(st.builds(Access, st.lists(regions, max_size=3), st.lists(regions, max_size=2)), max_size=12)


def conflict(a: Access, b: Access) -> bool:
    touched = [*b.reads, *b.writes]
    return any(overlap(w, t) for w in a.writes for t in touched) or any(overlap(r, w) for r in a.reads for w in b.writes)


@given(accesses)
def test_conflicting_launches_have_a_barrier_between_them(steps):
    marks = barriers(steps)
    for i, first in enumerate(steps):
        for j in range(i + 1, len(steps)):
            if conflict(first, steps[j]):
                assert any(marks[i + 1 : j + 1])


@given(accesses)
def test_every_barrier_has_a_reason(steps):
    marks = barriers(steps)
    since = 0
    for j, mark in enumerate(marks):
        if mark:
            assert any(conflict(steps[i], steps[j]) for i in range(since, j))
            since = j


def test_neighbours_in_one_buffer_do_not_wait():
    left, right = Buffer(1, 0, (4,), "float32"), Buffer(1, 16, (4,), "float32")
    assert barriers([Access([], [left]), Access([], [right]), Access([left, right], [])]) == [False, False, True]
