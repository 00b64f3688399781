"""Blocks of a sequence in several groups: all or nothing, windows, prefix hits, copy-on-write, snapshots."""
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metalstep.scheduler import BlockTables, GroupSpec, KVBlocks, Sequence

SIZE = 4
WINDOWS = st.lists(st.sampled_from([None, None, 1, 3, 4, 9]), min_size=1, max_size=3)
OWN = st.sampled_from([(0, 0), (0, 0), (1, 0), (5, 0), (9, 2), (9, 8)])


def make(windows, num_blocks=64, max_rows=8):
    return KVBlocks([GroupSpec(window, num_blocks) for window in windows], SIZE, max_rows)


def sequence(tokens, **options):
    return Sequence(tokens=list(tokens), prompt_len=len(tokens), max_tokens_total=1000, **options)


def opened(blocks, tokens, **options):
    made = sequence(tokens, **options)
    blocks.open(made)
    return made


def compute(blocks, made, to, rows=8):
    """What a scheduler does for the rows up to position `to`."""
    while made.computed < to:
        count = min(rows, to - made.computed)
        assert blocks.reserve(made, made.computed + count)
        assert made.room >= made.computed + count
        made.computed += count
        blocks.settle(made)


def visible(blocks, held, position, group):
    """Positions before `position` that the row at `position` sees."""
    window = blocks.groups[group].window
    return [
        p for p in range(position)
        if (window is None or p > position - window)
        and (not held.window or p < held.keep or p > position - (held.window - held.keep))
    ]  # fmt: skip


@given(WINDOWS, OWN, st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_exactly_the_blocks_that_later_rows_see_are_held(windows, own, chunks):
    blocks = make(windows)
    made = opened(blocks, [0] * 200, window=own[0], keep=own[1])
    for rows in chunks:
        compute(blocks, made, made.computed + rows)
        blocks.trim_windows(made)
        blocks.check([made])
        for group in range(len(windows)):
            seen = {p // SIZE for p in visible(blocks, made, made.computed, group)}
            needed = {i for i in range(-(-made.computed // SIZE)) if i in seen or i == made.computed // SIZE}
            live = {i for i in made.live_indices(group) if i * SIZE < made.computed}
            assert needed <= live, "a row's block is gone"
            later = {p // SIZE for at in range(made.computed, made.computed + 30) for p in visible(blocks, made, at, group)}
            assert live <= later | needed, "a block is held that no row sees"
            assert made.live(group) == [made.tables[group][i] for i in made.live_indices(group)]
            assert blocks.fits(made, made.room)
    blocks.release(made)
    assert blocks.free_counts() == [64] * len(windows)


@given(WINDOWS, OWN, st.integers(1, 12), st.integers(1, 100))
def test_what_fits_is_computed_alone_and_nothing_is_taken_for_what_does_not(windows, own, num_blocks, tokens):
    blocks = make(windows, num_blocks)
    made = opened(blocks, [0] * tokens, window=own[0], keep=own[1])
    if blocks.fits(made, tokens):
        compute(blocks, made, tokens)
    else:
        before = blocks.free_counts()
        assert not blocks.reserve(made, tokens)
        assert blocks.free_counts() == before and not any(made.tables)
    if not own[0]:
        assert blocks.fits(made, tokens) or tokens > blocks.capacity_tokens


def test_the_capacity_is_that_of_the_smallest_group_that_a_window_does_not_free():
    assert KVBlocks([GroupSpec(None, 10), GroupSpec(None, 7)], SIZE, 8).capacity_tokens == 28
    assert KVBlocks([GroupSpec(None, 10), GroupSpec(5, 4)], SIZE, 8).capacity_tokens == 40
    assert KVBlocks([GroupSpec(None, 10), GroupSpec(5, 3)], SIZE, 8).capacity_tokens == 12
    assert KVBlocks([GroupSpec(5, 4)], SIZE, 8).capacity_tokens == sys.maxsize


def test_reserve_is_all_or_nothing_over_groups():
    blocks = KVBlocks([GroupSpec(None, 5), GroupSpec(None, 2)], SIZE)
    made = opened(blocks, [0])
    assert blocks.blocks_needed(made, 9) == [3, 3]
    assert not blocks.reserve(made, 9)
    assert blocks.free_counts() == [5, 2]
    assert blocks.reserve(made, 8)
    assert blocks.free_counts() == [3, 0]


@given(WINDOWS, OWN, st.integers(1, 60), st.integers(0, 60), st.integers(1, 10))
def test_a_prefix_hit_is_the_longest_one_with_every_visible_block(windows, own, computed, common, more):
    blocks = make(windows)
    first = opened(blocks, range(100), window=own[0], keep=own[1])
    compute(blocks, first, computed)
    tables = [list(table) for table in first.tables]
    common = min(common, computed)
    second = opened(blocks, [*range(common), *range(500, 500 + more)], window=own[0], keep=own[1])
    hit = blocks.attach_prefix(second)
    blocks.check([first, second])
    assert hit == second.computed and hit % SIZE == 0 and hit < len(second.tokens)
    for group, table in enumerate(tables):
        for i in second.live_indices(group):
            assert second.tables[group][i] == table[i] or first.gone(group, i)
        assert all(second.tables[group][i] == 0 for i in range(hit // SIZE) if second.gone(group, i))
        seen = visible(blocks, second, hit, group)
        assert {p // SIZE for p in seen} <= set(second.live_indices(group))
        assert all(p < common for p in seen)  # what no row sees does not matter
    if not own[0] and any(window != 1 for window in windows):  # nothing in the middle is missing, and nothing was evicted
        assert hit == min(common, len(second.tokens) - 1) // SIZE * SIZE
    compute(blocks, second, len(second.tokens))
    for group, pool in enumerate(blocks.pools):
        for i in second.live_indices(group):
            assert i >= len(second.tokens) // SIZE or pool.find(second.digests[i]) is not None, "a full block is not published"
    blocks.release(first)
    blocks.release(second)
    blocks.check([])


def test_a_window_group_needs_only_the_blocks_before_the_prefix_end():
    blocks = KVBlocks([GroupSpec(None, 8), GroupSpec(5, 5)], SIZE, max_rows=4)
    first = opened(blocks, range(16))
    compute(blocks, first, 16, rows=4)
    blocks.release(first)
    taker = opened(blocks, range(100, 109))
    assert blocks.reserve(taker, 9)  # evicts the window group's oldest blocks
    second = opened(blocks, range(16))
    assert blocks.attach_prefix(second) == 12
    assert second.heads == [0, 2]
    assert second.tables[1][:2] == [0, 0]


def test_blocks_that_a_fork_never_had_are_not_published_for_it():
    blocks = make([4])
    first = opened(blocks, range(60), cacheable=False)
    compute(blocks, first, 20)
    second = sequence(range(60))
    blocks.fork(first, second)
    blocks.settle(second)
    assert [blocks.pools[0].find(digest) for digest in second.digests] == [None] * 4 + second.live(0)


def test_a_different_window_salt_or_an_uncacheable_sequence_gets_no_hit():
    blocks = make([None])
    first = opened(blocks, range(16))
    compute(blocks, first, 16)
    for options in ({"salt": b"x"}, {"window": 12}, {"cacheable": False}):
        assert blocks.attach_prefix(opened(blocks, range(16), **options)) == 0
    assert blocks.attach_prefix(opened(blocks, range(16))) == 12


@given(WINDOWS, st.integers(1, 40), st.data())
def test_a_fork_copies_the_block_that_it_writes_into_and_shares_the_others(windows, computed, data):
    blocks = make(windows)
    first = opened(blocks, range(60))
    compute(blocks, first, computed)
    length = data.draw(st.integers(1, computed))
    probe = BlockTables()
    assume(blocks.can_continue(first, probe, length))
    second = sequence(range(60))
    blocks.fork(first, second, length)
    blocks.check([first, second])
    shared = [list(table) for table in second.tables]
    free, needed = blocks.free_counts(), blocks.blocks_needed(second, length + 1)
    assert blocks.reserve(second, length + 1)
    assert blocks.free_counts() == [a - b for a, b in zip(free, needed, strict=True)]
    blocks.check([first, second])
    partial = length % SIZE != 0
    assert [copy.group for copy in second.copies] == (list(range(len(windows))) if partial else [])
    for group, source, target in second.copies:
        assert source == shared[group][length // SIZE] and target == second.tables[group][length // SIZE]
        assert blocks.pools[group].references(target) == 1 and not blocks.pools[group].published(target)
    for group, table in enumerate(shared):
        assert table[: length // SIZE] == second.tables[group][: length // SIZE]
    blocks.copied(second)
    blocks.check([first, second])


def test_a_sole_holder_of_a_published_block_copies_if_it_can_and_else_unpublishes():
    for spare, copies in ((1, 1), (0, 0)):
        blocks = KVBlocks([GroupSpec(None, 1 + spare)], SIZE)
        first = opened(blocks, range(8))
        compute(blocks, first, 4)
        second = sequence(range(8))
        blocks.fork(first, second, 2)
        blocks.release(first)
        assert blocks.reserve(second, 4)
        assert len(second.copies) == copies
        blocks.check([second])
        third = opened(blocks, range(8))
        assert blocks.attach_prefix(third) == 4 * copies


def test_a_fork_behind_a_window_is_refused():
    blocks = make([4])
    first = opened(blocks, range(60))
    compute(blocks, first, 20)
    with pytest.raises(ValueError, match="cannot continue from token 9 of 20 cached ones"):
        blocks.fork(first, sequence(range(60)), 9)
    with pytest.raises(ValueError, match="first 21 of 20 cached tokens"):
        blocks.fork(first, sequence(range(60)), 21)


@given(WINDOWS, OWN, st.integers(1, 60))
def test_a_restored_sequence_has_as_many_filled_blocks_in_the_same_places(windows, own, computed):
    blocks = make(windows)
    made = opened(blocks, range(100), window=own[0], keep=own[1], recomputable=False)
    compute(blocks, made, computed)
    blocks.trim_windows(made)
    filled = [len(blocks.filled(made, group)) for group in range(len(windows))]
    gone = [[made.gone(group, i) for i in range(-(-computed // SIZE))] for group in range(len(windows))]
    blocks.release(made)
    made.computed = computed
    assert blocks.restore(made)
    blocks.check([made])
    assert filled == [len(blocks.filled(made, group)) for group in range(len(windows))]
    assert gone == [[made.gone(group, i) for i in range(-(-computed // SIZE))] for group in range(len(windows))]


def test_rebuild_keeps_what_is_held_and_nothing_else():
    blocks = make([None, 4])
    first = opened(blocks, range(60))
    compute(blocks, first, 20)
    cache = BlockTables()
    blocks.fork(first, cache)
    blocks.pools[0]._blank.clear()  # as after an interrupt
    blocks.rebuild([cache])
    blocks.check([cache])
    assert blocks.attach_prefix(opened(blocks, range(60))) == 0


def test_wrong_options_say_what_is_wrong():
    with pytest.raises(ValueError, match="no groups"):
        KVBlocks([])
    with pytest.raises(ValueError, match="window is 0 positions"):
        GroupSpec(0, 4)
    with pytest.raises(ValueError, match="window of 4 positions keeps the first 4"):
        BlockTables(window=4, keep=4)
