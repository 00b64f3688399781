"""Who is in the next step: order, budgets, preemption, several steps at once, what is reported."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.scheduler import BlockTables, GroupSpec, KVBlocks, Scheduler, Sequence, State


def make(num_blocks=64, window=None, max_rows=64, **limits):
    blocks = KVBlocks([GroupSpec(window, num_blocks)], block_size=4, max_rows=max_rows)
    return Scheduler(blocks, max_rows=max_rows, **{"max_seqs": 8, "max_results": 8, **limits})


def add(scheduler, prompt, new_tokens=50, **options):
    tokens = prompt if isinstance(prompt, list) else list(range(len(scheduler._live) * 1000, len(scheduler._live) * 1000 + prompt))
    made = Sequence(tokens=tokens, prompt_len=len(tokens), max_tokens_total=len(tokens) + new_tokens, **options)
    scheduler.add(made)
    return made


def turn(scheduler, *held):
    schedule = scheduler.schedule()
    for entry in schedule.entries:
        if entry.samples:
            left = entry.sequence.max_tokens_total - len(entry.sequence.tokens)
            entry.sequence.tokens += [1] * min(schedule.steps, left)
    scheduler.advance(schedule)
    scheduler.check(held)
    return schedule


def rows(schedule):
    return [(entry.sequence, entry.first, entry.count, entry.wanted) for entry in schedule.entries]


def test_decodes_come_first_then_prefills_continue_then_the_queue_is_admitted():
    scheduler = make(max_rows=16)
    a, b = add(scheduler, 4), add(scheduler, 20)
    assert rows(turn(scheduler)) == [(a, 0, 4, 1), (b, 0, 12, 0)]
    c = add(scheduler, 30)
    assert rows(turn(scheduler)) == [(a, 4, 1, 1), (b, 12, 8, 1), (c, 0, 7, 0)]
    assert rows(turn(scheduler)) == [(a, 5, 1, 1), (b, 20, 1, 1), (c, 7, 14, 0)]


def test_a_chunk_is_no_longer_than_its_sequence_asks_for():
    scheduler = make()
    a = add(scheduler, 20, prefill_rows=6)
    assert [rows(turn(scheduler))[0][1:3] for _ in range(4)] == [(0, 6), (6, 6), (12, 6), (18, 2)]
    assert len(a.tokens) == 21


def test_prompt_logprobs_spread_over_steps_with_few_results():
    scheduler = make(max_seqs=2, max_results=4)
    add(scheduler, 1)
    b = add(scheduler, 9, prompt_logprobs=True)
    got = [rows(turn(scheduler))[-1] for _ in range(4)]
    assert got == [(b, 0, 3, 3), (b, 3, 3, 3), (b, 6, 3, 3), (b, 9, 1, 1)]


def test_the_first_in_the_queue_is_not_overtaken_by_a_smaller_one():
    scheduler = make(num_blocks=10)
    a, big, small = add(scheduler, 16), add(scheduler, 28), add(scheduler, 2)
    for _ in range(3):
        turn(scheduler)
        assert scheduler.running == [a] and scheduler.waiting == [big, small]
    scheduler.finish(a)
    turn(scheduler)
    assert scheduler.running == [big, small]


def test_an_admission_leaves_a_block_per_running_sequence():
    scheduler = make(num_blocks=6)
    add(scheduler, 8)
    b = add(scheduler, 9)
    turn(scheduler)
    assert scheduler.waiting == [b]  # three blocks are left, and it would take them all


def test_the_youngest_is_preempted_and_comes_back_first():
    scheduler = make(num_blocks=8, max_seqs=3)
    a, b, c = add(scheduler, 7), add(scheduler, 7), add(scheduler, 3)
    turn(scheduler)
    assert scheduler.running == [a, b, c]
    d = add(scheduler, 3)
    preempted = []
    while not preempted:
        preempted = turn(scheduler).preempted
    assert preempted == [c] and c.state is State.PREEMPTED and c.num_preemptions == 1
    assert scheduler.waiting == [c, d] and c.computed == 0
    while b.state is State.RUNNING:
        turn(scheduler)
    assert scheduler.running == [a] and scheduler.waiting == [b, c, d]


def test_a_preempted_sequence_finds_its_blocks_in_the_prefix_cache():
    scheduler = make(num_blocks=10)
    a, b = add(scheduler, 12), add(scheduler, 12)
    while b.state is not State.PREEMPTED:
        turn(scheduler)
    scheduler.finish(a)
    schedule = turn(scheduler)
    assert schedule.admitted == [b] and b.num_cached >= 12 and schedule.rows < 8


def test_a_parked_sequence_keeps_its_place_until_the_oldest_with_work_needs_its_blocks():
    scheduler = make(num_blocks=8)
    a, b = add(scheduler, 11), add(scheduler, 11)
    turn(scheduler)
    scheduler.park(a)
    assert rows(scheduler.schedule()) == [(b, 11, 1, 1)]
    for _ in range(20):
        schedule = turn(scheduler)
        assert [entry.sequence for entry in schedule.entries] == [b]
    assert a.state is State.PREEMPTED
    scheduler.park(b)
    assert scheduler.idle and not scheduler.schedule().entries
    scheduler.unpark(a)
    assert rows(scheduler.schedule())[0][0] is a and b.state is State.PREEMPTED


def test_an_older_sequence_that_comes_back_later_is_the_older_one_still():
    scheduler = make(num_blocks=8)
    a, b = add(scheduler, 7), add(scheduler, 7)
    turn(scheduler)
    scheduler.park(a)
    cache = BlockTables()
    scheduler.blocks.open(cache)
    assert scheduler.blocks.reserve(cache, 16)
    while a.state is State.RUNNING:
        turn(scheduler, cache)
    scheduler.blocks.release(cache)
    scheduler.unpark(a)
    assert turn(scheduler).admitted == [a]
    assert scheduler.running == [a, b]


def test_a_parked_sequence_yields_its_slot_to_the_queue():
    scheduler = make(max_seqs=1)
    a = add(scheduler, 3)
    turn(scheduler)
    scheduler.park(a)
    b = add(scheduler, 3)
    assert [entry.sequence for entry in turn(scheduler).entries] == [b]
    assert a.state is State.PREEMPTED and scheduler.waiting == [a]


def test_what_prompt_caches_leave_no_room_for_fails_alone():
    scheduler = make(num_blocks=6)
    cache = BlockTables()
    scheduler.blocks.open(cache)
    assert scheduler.blocks.reserve(cache, 16)
    a, b = add(scheduler, 9), add(scheduler, 3)
    schedule = scheduler.schedule()
    assert schedule.failed == [a] and not schedule.entries
    scheduler.finish(a)
    assert [entry.sequence for entry in scheduler.schedule().entries] == [b]
    scheduler.check([cache])


def test_a_running_sequence_that_prompt_caches_leave_no_room_for_fails():
    scheduler = make(num_blocks=6)
    a = add(scheduler, 7)
    turn(scheduler)
    cache = BlockTables()
    scheduler.blocks.open(cache)
    assert scheduler.blocks.reserve(cache, 16)
    schedule = turn(scheduler, cache)
    while not schedule.failed:
        schedule = turn(scheduler, cache)
    assert schedule.failed == [a] and not schedule.entries and len(a.tokens) == 9
    scheduler.check([cache])


def test_several_steps_only_for_decodes_alone_and_up_to_the_last_token():
    scheduler = make(decode_steps=8)
    a, b = add(scheduler, 3, new_tokens=12), add(scheduler, 3, new_tokens=5)
    assert turn(scheduler).steps == 1
    schedule = turn(scheduler)
    assert schedule.steps == 8
    assert [entry.limit for entry in schedule.entries] == [12, 7]  # the last token needs no place
    scheduler.finish(b)
    assert turn(scheduler).steps == 3
    assert len(a.tokens) == 15


def test_the_sequence_with_the_fewest_decode_steps_decides():
    scheduler = make(decode_steps=8)
    add(scheduler, 3), add(scheduler, 3, decode_steps=2)
    turn(scheduler)
    assert turn(scheduler).steps == 2


def test_parked_sequences_and_prompts_hold_decodes_to_one_step():
    scheduler = make(decode_steps=8)
    a, b = add(scheduler, 3), add(scheduler, 3)
    turn(scheduler)
    scheduler.park(b)
    assert turn(scheduler).steps == 1
    scheduler.unpark(b)
    assert turn(scheduler).steps == 8
    add(scheduler, 3)
    assert turn(scheduler).steps == 1
    assert a.computed == b.computed + 1


def test_short_of_blocks_steps_shrink_before_anyone_is_preempted():
    scheduler = make(num_blocks=5, decode_steps=8)
    a, b = add(scheduler, 5, new_tokens=20), add(scheduler, 5, new_tokens=3)
    turn(scheduler)
    schedule = turn(scheduler)
    assert schedule.steps == 4 and not schedule.preempted
    assert [entry.limit for entry in schedule.entries] == [12, 7]
    assert a.state is b.state is State.RUNNING


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 4), st.sampled_from([None, 5]))
def test_repeating_a_schedule_gives_what_a_fresh_one_gives(prompts, decode_steps, window):
    repeating, fresh = (make(window=window, decode_steps=decode_steps) for _ in range(2))
    for scheduler in (repeating, fresh):
        for prompt in prompts:
            add(scheduler, prompt)
    last = None
    for _ in range(24):
        fresh._last = None
        a, b = turn(repeating), turn(fresh)
        assert a.same == (a is last)
        last = a
        described = [
            [(e.sequence.arrival, e.first, e.count, e.wanted, e.limit, e.samples) for e in s.entries]
            + [s.steps, s.rows, s.results, s.decode, [g.arrival for g in s.grown]]
            for s in (a, b)
        ]
        assert described[0] == described[1]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.sampled_from([None, 5]))
def test_the_tables_of_a_sequence_change_only_when_it_is_named_as_grown(prompts, window):
    scheduler = make(window=window)
    for prompt in prompts:
        add(scheduler, prompt)
    known = {}
    for _ in range(20):
        schedule = scheduler.schedule()
        for sequence in schedule.grown:
            known[sequence] = list(sequence.tables[0])
        for entry in schedule.entries:
            assert known[entry.sequence] == entry.sequence.tables[0]
            if entry.samples:
                entry.sequence.tokens.append(1)
        scheduler.advance(schedule)


def test_an_evicted_sequence_that_tokens_do_not_give_again_is_saved_and_restored():
    saved = []
    scheduler = make(num_blocks=8, on_evict=lambda s: saved.append((s, scheduler.blocks.filled(s, 0))) or "content")
    a = add(scheduler, 11)
    b = add(scheduler, 11, recomputable=False, cacheable=False)
    turn(scheduler)
    blocks = list(b.tables[0])
    while b.state is State.RUNNING:
        turn(scheduler)
    assert b.snapshot == "content" and b.computed == b.snapshot_tokens == len(b.tokens) - 1
    assert saved == [(b, (blocks + saved[0][1][3:])[: -(-b.computed // 4)])]
    scheduler.reset()
    assert b.computed == b.snapshot_tokens and not b.lost
    scheduler.finish(a)
    assert scheduler.schedule().restored == [b]
    scheduler.reset()  # the step did not end: what was saved is still what counts
    assert b.computed == b.snapshot_tokens and not b.lost
    schedule = scheduler.schedule()
    assert schedule.restored == [b] and rows(schedule) == [(b, b.computed, 1, 1)]
    b.tokens.append(1)
    scheduler.advance(schedule)
    assert b.snapshot is None and not b.lost


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([None, 1, 5, 6]))
def test_a_snapshot_fits_the_blocks_that_it_goes_back_into(older, younger, window):
    scheduler = make(window=window, on_evict=lambda sequence: len(scheduler.blocks.filled(sequence, 0)))
    add(scheduler, older)
    b = add(scheduler, younger, recomputable=False, cacheable=False)
    turn(scheduler)
    cache = BlockTables()
    scheduler.blocks.open(cache)
    while b.num_preemptions == 0:  # as if a prompt cache took all that is free
        cache.tables[0] += scheduler.blocks.pools[0].allocate(scheduler.blocks.free_counts()[0])
        turn(scheduler, cache)
    scheduler.blocks.release(cache)
    schedule = scheduler.schedule()
    assert schedule.restored == [b]
    assert len(scheduler.blocks.filled(b, 0)) == b.snapshot


def test_a_snapshot_outlives_an_admission_that_does_not_fit():
    scheduler = make(num_blocks=8, on_evict=lambda sequence: "content")
    a = add(scheduler, 11)
    b = add(scheduler, 11, recomputable=False, cacheable=False)
    while b.num_preemptions == 0:
        turn(scheduler)
    computed, blocks = b.computed, scheduler.blocks
    scheduler.finish(a)
    cache = BlockTables()
    blocks.open(cache)
    assert blocks.reserve(cache, 4 * (7 - -(-computed // 4)))
    b.parked = True
    c = add(scheduler, 2)
    assert scheduler.schedule().admitted == [c]
    scheduler.unpark(b)  # its blocks are free, and the one that c may want next is not
    assert not scheduler.schedule().admitted
    assert b.computed == computed and b.snapshot == "content" and not any(b.tables)
    blocks.release(cache)
    assert scheduler.schedule().restored == [b]


def test_blocks_that_a_prompt_cache_gives_back_admit_the_queue_at_once():
    scheduler = make(num_blocks=8)
    cache = BlockTables()
    scheduler.blocks.open(cache)
    assert scheduler.blocks.reserve(cache, 16)
    a, b = add(scheduler, 3), add(scheduler, 15)
    for _ in range(3):
        assert [entry.sequence for entry in turn(scheduler, cache).entries] == [a]
    scheduler.blocks.release(cache)
    assert turn(scheduler).admitted == [b]


def test_without_a_snapshot_it_is_lost_and_reported():
    scheduler = make()
    a, b = add(scheduler, 3, recomputable=False), add(scheduler, 3)
    turn(scheduler)
    scheduler.reset()
    assert a.lost and not b.lost
    schedule = scheduler.schedule()
    assert schedule.failed == [a] and [entry.sequence for entry in schedule.entries] == [b]


def test_reset_queues_everything_again_in_order_and_keeps_what_prompt_caches_hold():
    scheduler = make(num_blocks=32, max_seqs=2)
    made = [add(scheduler, 6) for _ in range(4)]
    turn(scheduler)
    cache = BlockTables()
    scheduler.blocks.fork(made[0], cache)
    scheduler.finish(made[1])
    scheduler.schedule()
    scheduler.reset([cache])
    scheduler.check([cache])
    assert scheduler.waiting == [made[0], made[2], made[3]] and scheduler.running == []
    assert all(sequence.computed == 0 and sequence.slot == -1 for sequence in scheduler.waiting)
    assert scheduler.blocks.free_counts() == [30]


def test_finishing_twice_or_without_adding_does_nothing():
    scheduler = make()
    a = add(scheduler, 3)
    turn(scheduler)
    scheduler.finish(a)
    scheduler.finish(a)
    scheduler.finish(Sequence(tokens=[1], prompt_len=1, max_tokens_total=2))
    scheduler.check()
    assert scheduler.idle and scheduler.blocks.free_counts() == [64]


def test_wrong_options_say_what_is_wrong():
    with pytest.raises(ValueError, match="max_seqs is 8, max_rows 4"):
        make(max_rows=4)
    with pytest.raises(ValueError, match="max_seqs is 9, max_rows 64, max_results 8"):
        make(max_seqs=9)
    with pytest.raises(ValueError, match="decode_steps 65, but the KV blocks are made for 64 rows"):
        make(decode_steps=65)
    scheduler = make()
    with pytest.raises(ValueError, match="has 0 tokens of at most 50, and 0 are computed"):
        add(scheduler, [])
    with pytest.raises(ValueError, match="has 2 tokens of at most 1, and 0 are computed"):
        add(scheduler, 2, new_tokens=-1)
    for options in ({"prefill_rows": 0}, {"decode_steps": 65}):
        with pytest.raises(ValueError, match="expected at least 1 and from 1 to 64"):
            add(scheduler, 2, **options)
