"""The arena: values alive at the same launch never share a byte, and it is no larger than it must be by much."""
from hypothesis import given
from hypothesis import strategies as st

from metalstep.plan.memory import ALIGN, Lifetime, arena_layout

lives = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 20)), max_size=30).map(
    lambda rows: [Lifetime(i, n, min(a, b), max(a, b)) for i, (n, a, b) in enumerate(rows)]
)


@given(lives)
def test_values_alive_together_do_not_overlap(lifetimes):
    offsets, size = arena_layout(lifetimes)
    for a in lifetimes:
        assert offsets[a.key] % ALIGN == 0
        assert offsets[a.key] + a.bytes <= size
        for b in lifetimes:
            if a.key < b.key and a.first <= b.last and b.first <= a.last:
                assert offsets[a.key] + a.bytes <= offsets[b.key] or offsets[b.key] + b.bytes <= offsets[a.key]


@given(lives)
def test_the_arena_is_at_most_the_sum_and_at_least_the_peak(lifetimes):
    _, size = arena_layout(lifetimes)
    rounded = [-(-life.bytes // ALIGN) * ALIGN for life in lifetimes]
    alive = [sum(n for n, life in zip(rounded, lifetimes, strict=True) if life.first <= t <= life.last) for t in range(21)]
    assert max(alive, default=0) <= size <= sum(rounded)


def test_values_that_follow_each_other_share_their_place():
    offsets, size = arena_layout([Lifetime(i, 1000, i, i) for i in range(10)])
    assert set(offsets.values()) == {0}
    assert size == 1024
