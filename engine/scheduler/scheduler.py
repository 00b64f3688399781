"""Continuous batching: which rows of which sequences the next step computes, and who waits."""
from __future__ import annotations

import heapq
import itertools
from bisect import insort
from collections.abc import Callable, Iterable
from typing import Any

from metalstep.scheduler.block_tables import BlockTables
from metalstep.scheduler.kv_blocks import KVBlocks
from metalstep.scheduler.schedule import Entry, Schedule
from metalstep.scheduler.sequence import Sequence, State

MAX_AHEAD = 32  # steps of a run that is queued ahead
WATERMARK_DIVISOR = 100  # of a group's blocks, the part that an admission leaves free at most


class Scheduler:
    """First come, first served. For one thread at a time: the caller sees to that.

    A turn is `schedule`, the step, the sampled tokens appended to `Sequence.tokens`, `advance`; then `finish` for those that ended.
    A preempted sequence drops its blocks and computes its tokens again when it is its turn.
    max_seqs: sequences that run at once. max_rows, max_results: rows and result rows of a step. decode_steps: of one run, for
    sequences that do not say. on_evict: called with a sequence that is not recomputable before its blocks are given back; what it
    returns (of the blocks that KVBlocks.filled names) is kept as the sequence's snapshot. goes_ahead: see `ahead`.
    After an exception out of any method, or out of a step, `reset` makes everything whole again.
    """

    def __init__(
        self,
        blocks: KVBlocks,
        max_seqs: int = 64,
        max_rows: int = 512,
        max_results: int = 64,
        decode_steps: int = 1,
        on_evict: Callable[[Sequence], Any] | None = None,
        goes_ahead: bool = False,
    ):
        if not 1 <= max_seqs <= min(max_rows, max_results):
            raise ValueError(
                f"max_seqs is {max_seqs}, max_rows {max_rows}, max_results {max_results}; expected 1 <= max_seqs and neither "
                "of the others smaller; each sequence needs a row and a result in every step"
            )
        if not 1 <= decode_steps <= blocks.max_rows >= max_rows:
            raise ValueError(
                f"max_rows is {max_rows} and decode_steps {decode_steps}, but the KV blocks are made for {blocks.max_rows} rows of a "
                "sequence in a step; make KVBlocks with as many max_rows"
            )
        self.blocks = blocks
        self.max_seqs, self.max_rows, self.max_results, self.decode_steps = max_seqs, max_rows, max_results, decode_steps
        self.on_evict, self.goes_ahead = on_evict, goes_ahead
        self.running: list[Sequence] = []  # by arrival
        self.waiting: list[Sequence] = []  # by arrival
        self._live: dict[int, Sequence] = {}  # by arrival: added and not finished. What reset goes by
        self._arrivals = itertools.count()
        self._slots = list(range(max_seqs))  # free ones; a heap
        self._last: Schedule | None = None  # plain decodes that the next step may repeat; None after any change
        self._last_cap = 1  # decode steps that _last's sequences allow
        self._tried = (-1, -1)  # arrival of the last sequence that did not fit, and blocks.freed then

    # ---- the queue ------------------------------------------------------------------------------------------------------
    def add(self, sequence: Sequence) -> None:
        """Put it at the end of the queue. Its tables may come from `KVBlocks.fork`, else it starts with nothing computed.

        Raises: ValueError for a sequence without a token left to compute, or with numbers that no step can keep.
        """
        known, steps = len(sequence.tokens), sequence.decode_steps or self.decode_steps
        if not sequence.computed < known <= sequence.max_tokens_total:
            raise ValueError(
                f"the sequence has {known} tokens of at most {sequence.max_tokens_total}, and {sequence.computed} are computed; "
                "expected one left to compute, and no more than there may be; append a token or raise max_tokens_total"
            )
        if not (sequence.prefill_rows >= 1 and 1 <= steps <= self.blocks.max_rows):
            raise ValueError(
                f"the sequence has prefill_rows {sequence.prefill_rows} and decode_steps {steps}, expected at least 1 and from 1 to "
                f"{self.blocks.max_rows}; leave them out for the defaults"
            )
        if not sequence.tables:
            self.blocks.open(sequence)
        sequence.decode_steps = steps
        sequence.arrival = next(self._arrivals)
        self._live[sequence.arrival] = sequence
        self._last = None
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """It ended: give its slot and blocks back. Once more does nothing."""
        self._last = None
        sequence.state = State.FINISHED
        if self._live.get(sequence.arrival) is not sequence:
            return
        if sequence.slot >= 0:
            self._take_slot(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.release(sequence)
        sequence.snapshot = None
        del self._live[sequence.arrival]

    def park(self, sequence: Sequence) -> None:
        """Leave it out until `unpark`: the caller picks its next token. It may be preempted meanwhile."""
        sequence.parked = True
        self._last = None

    def unpark(self, sequence: Sequence) -> None:
        """Its token is appended: go on with it."""
        sequence.parked = False
        self._last = None

    def __contains__(self, sequence: Sequence) -> bool:
        """Whether it was added and has not been finished."""
        return self._live.get(sequence.arrival) is sequence

    @property
    def idle(self) -> bool:
        """Whether there is nothing to schedule: no sequences, or all are parked."""
        return not any(map(_has_work, self._live.values()))

    # ---- a turn ---------------------------------------------------------------------------------------------------------
    def schedule(self) -> Schedule:
        """The next step. Without entries only if `idle`, or if it reports `failed`.

        Running decodes take one row each, running prefills share what is left, then the queue is admitted in its order. Who runs
        out of blocks preempts the youngest; the oldest that has work always goes on.
        """
        last, self._last = self._last, None
        if last is not None and self._repeat(last):
            self._last = last
            return last
        out = Schedule()
        decodes, prefills = self._continue_running(out)
        more = False
        if not out.preempted and not out.failed:
            more = self._admit(out, decodes, prefills)
        out.entries = decodes + prefills
        out.rows = sum(entry.count for entry in out.entries)
        out.results = sum(entry.wanted for entry in out.entries)
        out.decode = all(entry.samples and entry.count == 1 for entry in out.entries)
        cap = 1
        if not (prefills or more or out.preempted or out.failed):
            if decodes and not any(sequence.parked for sequence in self.running):
                cap = min(entry.sequence.decode_steps or 1 for entry in decodes)
            self._last, self._last_cap = out, cap
        self._lay_out(out, cap)
        return out

    def ahead(self, schedule: Schedule) -> Schedule | None:
        """The run behind `schedule`, plain decodes that are under way, before anybody knows what they give: for a device that never waits
        for the host. Some of its sequences may have ended when its turn comes; it is run and advanced as any other then, next.

        None where something else may have to be done first, or blocks are short: some may be reserved then, for the steps to come. Only
        where the scheduler `goes_ahead`.
        """
        entries = schedule.entries
        if not schedule.decode or any(sequence.parked for sequence in self.running) or (self.waiting and self._slots):
            return None
        cap = longest = 0
        wanted = []
        for entry in entries:
            sequence, after = entry.sequence, entry.first + schedule.steps
            left = sequence.max_tokens_total - (after + 1)
            if sequence.state is not State.RUNNING or left < 1 or entry.limit <= after or sequence.copies or sequence.borrowed:
                return None
            cap = min(cap or MAX_AHEAD, sequence.decode_steps or 1)
            longest = max(longest, left)
        steps = min(cap, longest)
        windows = any(group.window for group in self.blocks.groups) or any(entry.sequence.window for entry in entries)
        if windows and schedule.steps + steps >= self.blocks.max_rows:
            return None  # behind a window there is room for the rows of one step
        for entry in entries:
            sequence, end = entry.sequence, entry.first + schedule.steps + steps
            wanted.append((sequence, min(end + 1, sequence.max_tokens_total - 1)))
        if not self._reserve_all(wanted):
            return None
        self._last = None  # what comes behind begins anew
        out = Schedule(steps=steps, rows=schedule.rows, results=schedule.results, decode=True)
        for entry in entries:
            following = Entry(entry.sequence, entry.first + schedule.steps, 1, 1, True, _limit(entry.sequence))
            out.entries.append(following)
            if following.sequence.changed:
                out.grown.append(_refresh(following))
        return out

    def advance(self, schedule: Schedule) -> None:
        """After the step: count its rows as computed, publish full blocks, give back what windows left behind.

        Tokens that were sampled must be appended by now; of several decode steps as many count as tokens were appended.
        """
        settle = self.blocks.settle
        if schedule is self._last and schedule.steps == 1:  # nothing ended or was preempted since
            for entry in schedule.entries:
                sequence = entry.sequence
                sequence.computed = computed = entry.first + 1
                if computed >= sequence.boundary:
                    settle(sequence)
            return
        for entry in schedule.entries:
            sequence = entry.sequence
            if sequence.state is not State.RUNNING:
                continue
            sequence.snapshot = None  # before computed moves: reset takes a snapshot for what it says
            if schedule.steps == 1:
                sequence.computed = entry.first + entry.count
            else:
                sequence.computed = min(len(sequence.tokens) - 1, entry.first + schedule.steps, entry.limit)
            if sequence.prompt_logprobs:
                sequence.results = max(sequence.results, min(sequence.computed, sequence.prompt_len))
            if sequence.copies:
                self.blocks.copied(sequence)
            if sequence.computed >= sequence.boundary:
                settle(sequence)

    def reset(self, held: Iterable[BlockTables] = ()) -> None:
        """After an exception at any point: every sequence that was not finished waits, in order of arrival, with nothing computed.

        held: the tables of prompt caches; nothing else holds blocks afterwards. Sequences that are not recomputable and have no
        snapshot are `lost`. Interrupted, it can be called again.
        """
        self._last = None
        live = [sequence for sequence in self._live.values() if sequence.state is not State.FINISHED]
        live.sort(key=_by_arrival)
        for sequence in live:
            if sequence.state is State.RUNNING:
                sequence.state = State.PREEMPTED
            sequence.slot = -1
            if sequence.snapshot is None:
                sequence.computed = 0
                sequence.lost = not sequence.recomputable
            else:
                sequence.computed = sequence.snapshot_tokens
            self.blocks.open(sequence)
        self.blocks.rebuild(held)
        self.running = []
        self.waiting = live
        self._slots = list(range(self.max_seqs))
        self._live = {sequence.arrival: sequence for sequence in live}

    def check(self, held: Iterable[BlockTables] = ()) -> None:
        """Raises: AssertionError when an invariant is broken. held: the tables of prompt caches."""
        running, waiting = self.running, self.waiting
        self.blocks.check([*held, *running, *waiting])
        for name, queue in (("running", running), ("waiting", waiting)):
            assert queue == sorted(queue, key=_by_arrival), f"{name} sequences are not in order of arrival"
        assert {*running, *waiting} == {*self._live.values()}, "a sequence is neither running nor waiting"
        assert len(running) + len(waiting) == len(self._live), "a sequence is running and waiting"
        assert sorted([*self._slots, *(s.slot for s in running)]) == list(range(self.max_seqs)), "slots are lost or shared"
        for sequence in running:
            assert sequence.state is State.RUNNING, f"a running sequence is {sequence.state}"
        for sequence in waiting:
            assert sequence.state in (State.WAITING, State.PREEMPTED), f"a waiting sequence is {sequence.state}"
            assert sequence.slot == -1, f"a waiting sequence has slot {sequence.slot}"
        for sequence in self._live.values():
            assert sequence.computed <= len(sequence.tokens), "more tokens are computed than there are"

    # ---- running sequences ----------------------------------------------------------------------------------------------
    def _repeat(self, last: Schedule) -> bool:
        """Move the last schedule's plain decodes on by what `advance` counted; False when more than that is to be done."""
        if self.waiting and self._slots and self.blocks.freed != self._tried[1]:
            return False
        stale = []
        for entry in last.entries:
            sequence = entry.sequence
            entry.first = first = sequence.computed
            if len(sequence.tokens) != first + 1:
                return False
            if first >= sequence.room or sequence.changed:
                stale.append(entry)
        for entry in stale:
            if not self.blocks.reserve(entry.sequence, entry.first + 1):
                return False
        last.same = True
        if self._last_cap > 1:
            self._lay_out(last, self._last_cap)
        else:
            last.grown = [_refresh(entry) for entry in stale]
        return True

    def _continue_running(self, out: Schedule) -> tuple[list[Entry], list[Entry]]:
        """Entries of running sequences, oldest first, so that only younger ones, without an entry yet, are preempted for them."""
        decodes: list[Entry] = []
        prefills: list[Entry] = []
        at_work = [sequence for sequence in self.running if _has_work(sequence)]
        num_decodes = sum(map(_decodes, at_work))
        rows, results = self.max_rows - num_decodes, self.max_results - num_decodes
        for sequence in at_work:
            if sequence.state is not State.RUNNING:
                continue
            decode = _decodes(sequence)
            count, wanted = (1, 1) if decode else _chunk(sequence, rows, results)
            if count == 0:
                continue
            oldest = not decodes and not prefills
            if not self._make_room(sequence, sequence.computed + count, oldest, out):
                if oldest:
                    out.failed.append(sequence)
                self._preempt(sequence, out)
                continue
            if decode:
                decodes.append(_entry(sequence, 1, 1))
            else:
                prefills.append(_entry(sequence, count, wanted))
                rows, results = rows - count, results - wanted
        return decodes, prefills

    def _make_room(self, sequence: Sequence, tokens: int, oldest: bool, out: Schedule) -> bool:
        """Reserve blocks for `tokens` tokens, preempting as many as it takes."""
        while not self.blocks.reserve(sequence, tokens):
            victim = self._victim(sequence, oldest)
            if victim is None:
                return False
            self._preempt(victim, out)
        return True

    def _victim(self, sequence: Sequence, oldest: bool) -> Sequence | None:
        """The youngest running sequence behind this one. For the oldest with work, also a parked one before it (it holds blocks
        for as long as its caller likes), and last a waiting one that holds blocks of a prompt cache."""
        for other in reversed(self.running):
            if other is not sequence and (oldest or other.arrival > sequence.arrival):
                return other
        if oldest:
            for other in reversed(self.waiting):
                if other is not sequence and any(other.tables):
                    return other
        return None

    def _preempt(self, sequence: Sequence, out: Schedule) -> None:
        """Back to the queue, at its place by arrival, without blocks."""
        tokens, snapshot = sequence.computed, sequence.snapshot
        if not sequence.recomputable and snapshot is None:
            self.blocks.trim_windows(sequence)  # so that restore, which knows only `tokens`, finds the same blocks filled
            snapshot = self.on_evict(sequence) if self.on_evict else None
            sequence.lost = snapshot is None
        self.blocks.release(sequence)
        if snapshot is not None:
            sequence.computed = sequence.snapshot_tokens = tokens
            sequence.snapshot = snapshot
        if sequence.slot >= 0:
            self._take_slot(sequence)
            sequence.state = State.PREEMPTED
            sequence.num_preemptions += 1
            insort(self.waiting, sequence, key=_by_arrival)
            out.preempted.append(sequence)

    def _take_slot(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        heapq.heappush(self._slots, sequence.slot)
        sequence.slot = -1

    # ---- the queue's head -----------------------------------------------------------------------------------------------
    def _admit(self, out: Schedule, decodes: list[Entry], prefills: list[Entry]) -> bool:
        """Admit from the queue, in its order, what has a slot, blocks and rows. True when only rows were missing."""
        rows = self.max_rows - len(decodes) - sum(entry.count for entry in prefills)
        results = self.max_results - len(decodes) - sum(entry.wanted for entry in prefills)
        index = 0
        while index < len(self.waiting):
            sequence = self.waiting[index]
            if sequence.lost:
                out.failed.append(sequence)
            if sequence.lost or not _has_work(sequence):
                index += 1
                continue
            if rows < 1 or results < 1:
                return True
            if not self._place(sequence, not decodes and not prefills, out):
                return False
            self.waiting.remove(sequence)
            count, wanted = _chunk(sequence, rows, results)
            prefills.append(_entry(sequence, count, wanted))
            rows, results = rows - count, results - wanted
        return False

    def _place(self, sequence: Sequence, alone: bool, out: Schedule) -> bool:
        """Give it a slot and blocks for all its tokens. alone: nothing else is in the step, so whoever holds either yields."""
        if not alone and (not self._slots or self._tried == (sequence.arrival, self.blocks.freed)):
            return False
        while not (self._slots and self._take_blocks(sequence, alone)):
            if not alone:
                self._tried = (sequence.arrival, self.blocks.freed)
                return False
            victim = self._victim(sequence, oldest=True)
            if victim is None:
                out.failed.append(sequence)
                return False
            self._preempt(victim, out)
        sequence.slot = heapq.heappop(self._slots)
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_by_arrival)
        out.admitted.append(sequence)
        if sequence.snapshot is not None:
            out.restored.append(sequence)
        out.copies += sequence.copies
        return True

    def _take_blocks(self, sequence: Sequence, alone: bool) -> bool:
        """Blocks for all its tokens and the next, the prefix cache's first. Unless alone, some stay free for those that run."""
        blocks, computed = self.blocks, sequence.computed
        empty = not any(sequence.tables)
        sequence.num_cached = 0
        if sequence.snapshot is not None:
            if not blocks.restore(sequence):
                return False
        elif computed == 0 and not _wants_prompt(sequence):
            sequence.num_cached = blocks.attach_prefix(sequence)
        tokens = max(len(sequence.tokens), min(len(sequence.tokens) + 1, sequence.max_tokens_total - 1))
        fits = alone or self._leaves_watermark(blocks.blocks_needed(sequence, tokens))
        if fits and blocks.reserve(sequence, tokens):
            return True
        if empty:
            freed = blocks.freed
            blocks.release(sequence)
            blocks.freed = freed  # what it took itself does not make it fit
            sequence.computed = computed
        return False

    def _leaves_watermark(self, needed: list[int]) -> bool:
        """Whether a block per running sequence, up to a share of the pool, stays free: an admission must not preempt at once."""
        for count, pool in zip(needed, self.blocks.pools, strict=True):
            spare = min(len(self.running), max(1, pool.num_blocks // WATERMARK_DIVISOR))
            if count + spare > pool.free_count:
                return False
        return True

    # ---- several decode steps -------------------------------------------------------------------------------------------
    def _lay_out(self, out: Schedule, cap: int) -> None:
        """Up to `cap` decode steps, fewer where blocks are short; then limits, and whose tables changed."""
        steps = 1
        if cap > 1:
            steps = min(cap, max(_remaining(entry.sequence) for entry in out.entries))
            while steps > 1 and not self._reserve_steps(out.entries, steps):
                steps //= 2
            if self.goes_ahead:
                self._reserve_steps(out.entries, steps + 1)
        out.steps = steps
        out.grown = []
        for entry in out.entries:
            if entry.sequence.changed:
                out.grown.append(_refresh(entry))

    def _reserve_steps(self, entries: list[Entry], steps: int) -> bool:
        """Blocks for `steps` decode steps of every entry, or none."""
        return self._reserve_all([(s, s.computed + min(steps, _remaining(s))) for s in (entry.sequence for entry in entries)])

    def _reserve_all(self, wanted: list[tuple[Sequence, int]]) -> bool:
        """Blocks for so many tokens of each sequence, or none."""
        wanted = [(sequence, tokens) for sequence, tokens in wanted if tokens > sequence.room]
        needed = [self.blocks.blocks_needed(sequence, tokens) for sequence, tokens in wanted]
        free = self.blocks.free_counts()
        if any(sum(column) > count for column, count in zip(zip(*needed), free)):  # noqa: B905
            return False
        return all(self.blocks.reserve(sequence, tokens) for sequence, tokens in wanted)


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _has_work(sequence: Sequence) -> bool:
    return not sequence.parked and sequence.computed < len(sequence.tokens)


def _wants_prompt(sequence: Sequence) -> bool:
    """Whether rows of its prompt still owe results."""
    return sequence.prompt_logprobs and sequence.results < sequence.prompt_len


def _decodes(sequence: Sequence) -> bool:
    return len(sequence.tokens) - sequence.computed == 1 and not _wants_prompt(sequence)


def _remaining(sequence: Sequence) -> int:
    """Tokens that it can still take; at least 1, so that a decode has a row."""
    return max(1, sequence.max_tokens_total - len(sequence.tokens))


def _chunk(sequence: Sequence, rows: int, results: int) -> tuple[int, int]:
    """Rows of its next chunk, and how many of them, from the end, give results: at most `rows` and `results`."""
    computed, known = sequence.computed, len(sequence.tokens)
    count = min(rows, sequence.prefill_rows, known - computed)
    wanted = int(computed + count == known)
    if _wants_prompt(sequence):
        wanted = max(0, computed + count - max(computed, sequence.results))
    over = max(0, wanted - results)
    return max(0, count - over), wanted - over


def _entry(sequence: Sequence, count: int, wanted: int) -> Entry:
    first = sequence.computed
    return Entry(sequence, first, count, wanted, first + count == len(sequence.tokens), _limit(sequence))


def _limit(sequence: Sequence) -> int:
    """The position below which it may write: its last token needs no place."""
    return min(sequence.max_tokens_total - 1, sequence.room)


def _refresh(entry: Entry) -> Sequence:
    """Take note of a sequence's changed tables."""
    sequence = entry.sequence
    entry.limit = _limit(sequence)
    sequence.changed = False
    return sequence
