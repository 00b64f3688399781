"""One native call for a schedule: its rows into the step's arrays, its results back into the requests."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metalstep.kernels import params
from metalstep.native_model import NativeModel
from metalstep.plan.plan import Part, Plan, Run
from metalstep.plan.step_arrays import Records, StepBatch, join_records
from metalstep.request import PromptLogprob, TokenOutput
from metalstep.running_request import RunningRequest
from metalstep.scheduler import Entry, Schedule, Sequence

FAILURES = {
    params.MS_SAMPLE_NOT_FINITE: (
        "the model's logits are not finite, so no token can be sampled; its weights or the prompt drive it out of range"
    ),
    params.MS_SAMPLE_NOTHING_ALLOWED: (
        "no token is allowed: the grammar, allowed and banned ids, biases or min_tokens leave none; allow at least one"
    ),
}


@dataclass
class Ahead:
    """A run that was queued before its turn."""

    schedule: Schedule
    run: Run


class StepRunner:
    """Runs schedules on the native model. steps (native calls), prompt_tokens, cached_tokens and generated_tokens count since the start.

    prepared, submitted, done: when the latest step's arrays were filled, its native call queued and done, by time.perf_counter_ns.
    time_launches: let `launch_times` have kernel, ops and ns of each launch of the latest step, if that was one step; it waits for each.
    """

    def __init__(self, native: NativeModel):
        self._native, self._arrays, self._slots = native, native.arrays, native.slots
        self._fence = native.device.create_plan([], 1, 1)
        self._loaded = False  # the arrays hold the next step of the last schedule, if that was a decode
        self._ahead: Ahead | None = None
        self._taken_up: Ahead | None = None  # by `ahead`
        self.held_back: list[RunningRequest] = []  # by the latest step: they wait for their callers. Who parks them takes them out
        self.steps = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.prepared = self.submitted = self.done = 0
        self.time_launches = False
        self.launch_times: list[tuple[str, str, int]] = []

    def drain(self) -> None:
        """Let what an interrupted step left in the device's queue finish, and forget it and what the arrays hold."""
        self._loaded, self._ahead, self._taken_up, self.held_back = False, None, None, []
        self._fence.wait(self._fence.run(1))
        self._arrays.rewind()

    def ahead(self) -> Schedule | None:
        """The schedule that is under way already, which `run` is for next; None: there is none, or nobody wants what it gives any more."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or all(entry.sequence.request is None for entry in ahead.schedule.entries):
            return None
        self._taken_up = ahead
        return ahead.schedule

    def run(self, schedule: Schedule, more: Callable[[Schedule], Schedule | None] | None = None) -> list[RunningRequest]:
        """Run the schedule's rows and hand the results out; returns the requests that have ended.

        more: says what surely follows a schedule. It is queued while the last results of this one are not there yet, so that the device
        has something to do while they are handed out, and waits for `ahead`.
        """
        self.steps += 1
        taken_up, self._taken_up = self._taken_up, None
        going_on: list[RunningRequest | None] = [entry.sequence.request for entry in schedule.entries]
        if taken_up is None or taken_up.schedule is not schedule:
            run = self._start(schedule)
        else:
            run = taken_up.run
            self.launch_times = []
            self.prepared = time.perf_counter_ns()
        ended: list[RunningRequest] = []
        for part in run.parts:
            if more is not None and part is run.parts[-1] and not self.time_launches:
                self._go_ahead(schedule, run, going_on, more)
            run.wait(part)
            self.done = time.perf_counter_ns()
            ended += self._take_decoded(going_on, run, part) if schedule.decode else self._take_mixed(schedule, run, part.row)
        self.submitted = min(max(run.submitted, self.prepared), self.done)
        grammars = any(running is not None and running.request.grammar is not None for running in going_on)
        self._loaded = schedule.decode and not grammars and self._ahead is None
        return ended

    def _start(self, schedule: Schedule) -> Run:
        """Put everything in place and queue it."""
        for sequence in schedule.admitted:
            self._fill_slot(sequence)
        for sequence in schedule.restored:
            self._restore(sequence)
        for copy in schedule.copies:
            self._native.cache.copy_block(*copy)
        for sequence in schedule.grown:
            self._write_tables(sequence)
        if schedule.same and self._loaded:
            self._continue(schedule)
        else:
            self._load(schedule)
        plan = self._plan(schedule)
        self._loaded, self.launch_times = False, []
        self.prepared = time.perf_counter_ns()
        if not self.time_launches or schedule.steps > 1:
            return plan.start(schedule.steps)
        run, times = plan.profiled()  # which waits for each launch
        self.launch_times = [(e.launch.kernel, " ".join(e.ops), ns) for e, ns in zip(plan.launches, times, strict=True)]
        return run

    def _plan(self, schedule: Schedule) -> Plan:
        context = max(entry.first + entry.count for entry in schedule.entries) + schedule.steps - 1
        return self._native.plan_for(schedule.rows, decode=schedule.decode, context=context)

    def _go_ahead(
        self, schedule: Schedule, run: Run, going_on: list[RunningRequest | None], more: Callable[[Schedule], Schedule | None]
    ) -> None:
        """Queue what follows, if every request goes on and nothing is done between two steps for any of them. The device has made its
        inputs when its turn comes, but for the ends of tables that grow."""
        kept = len(run.parts) == 1 and run.plan.shape.tokens == 1  # logits: they have a place that the next run leaves alone
        for running in going_on:
            if running is None or not running.steady or running.error is not None:
                return
            if running.request.keep_logits and not (kept and running.taken == len(running.outputs)):
                return
        following = more(schedule)
        if following is None:
            return
        for sequence in following.grown:
            self._write_tables(sequence)
        if following.grown:
            limits = [entry.limit for entry in following.entries]
            self._arrays.edit(self._arrays.limits[: len(limits)])[:] = limits
        self._ahead = Ahead(following, self._plan(following).start(following.steps))

    def _continue(self, schedule: Schedule) -> None:
        """The arrays hold this step's rows already: step_advance wrote them, up to the ends of the tables that it knew."""
        if schedule.grown:
            entries = schedule.entries
            self._arrays.move_on([entry.first for entry in entries], [entry.limit for entry in entries])

    # ---- before ------------------------------------------------------------------------------------------------------------
    def _load(self, schedule: Schedule) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        seq_ids: list[int] = []
        sampled_rows: list[int] = []
        records: list[np.ndarray] = []
        limits: list[int] = []
        for entry in schedule.entries:
            sequence, first, count = entry.sequence, entry.first, entry.count
            self.prompt_tokens += max(0, min(first + count, sequence.prompt_len) - first)
            row = len(tokens)
            tokens += sequence.tokens[first : first + count]
            if first < sequence.prompt_len and sequence.request.request.embeddings is not None:
                self._own_embeddings(sequence, tokens, row, first, count)
            positions += range(first, first + count)
            seq_ids += [sequence.slot] * count
            if entry.wanted:
                sampled_rows += range(row + count - entry.wanted, row + count)
                records.append(self._records(sequence.request, entry))
                limits += [entry.limit] * entry.wanted
        self._arrays.write(StepBatch(tokens, positions, seq_ids, sampled_rows, join_records(records), limits, schedule.decode))

    def _fill_slot(self, sequence: Sequence) -> None:
        """What the device keeps for a request that got a slot."""
        running: RunningRequest = sequence.request
        request, before = running.request, running.before
        tokens = sequence.tokens
        if before:  # penalties see this request's tokens, not what its prompt cache had
            tokens = [-1] * before + tokens[before:]
        running.record = self._slots.fill(sequence.slot, request.sampling, tokens, sequence.prompt_len, request.stop_token_ids)
        place = self._arrays.sequences[sequence.slot : sequence.slot + 1]
        self._arrays.edit(place)[0] = (sequence.window, sequence.keep)
        if running.cached_tokens < 0:
            running.cached_tokens = sequence.num_cached
            self.cached_tokens += sequence.num_cached

    def _restore(self, sequence: Sequence) -> None:
        for group, layers in enumerate(sequence.snapshot):
            count = len(next(iter(layers.values()))[0])  # behind them, blocks for the tokens to come
            self._native.cache.write_blocks(sequence.live(group)[:count], layers)

    def _write_tables(self, sequence: Sequence) -> None:
        for group, table in enumerate(sequence.tables):
            self._arrays.edit(self._arrays.block_tables[group, sequence.slot, : len(table)])[:] = table

    def _own_embeddings(self, sequence: Sequence, tokens: list[int], row: int, first: int, count: int) -> None:
        embeddings = sequence.request.request.embeddings
        begin = sequence.prompt_len - len(embeddings)  # behind what a prompt cache holds
        start, end = max(first, begin), min(first + count, sequence.prompt_len)
        places = range(row + start - first, row + max(start, end) - first)
        own = self._arrays.edit(self._arrays.embeddings[places.start : places.stop])
        own[:] = embeddings[start - begin : start - begin + len(places)]
        tokens[places.start : places.stop] = [-(at + 1) for at in places]

    def _records(self, running: RunningRequest, entry: Entry) -> Records:
        """SAMPLING records of an entry's result rows: prompt rows report on the next prompt token, the last row may sample."""
        sequence, record = running.sequence, running.record
        record["counter"] = len(sequence.tokens) - sequence.prompt_len
        record["counted"] = len(sequence.tokens)
        if entry.samples and running.request.grammar is not None:
            self._fill_grammar(running)
        if entry.wanted == 1 and entry.samples:
            return record
        end = entry.first + entry.count
        targets = sequence.tokens[end - entry.wanted + 1 : end + 1 - entry.samples]
        report = self._slots.report(record, targets, running.request.sampling.prompt_logprobs or 0)
        return join_records([report, record]) if entry.samples else report

    def _fill_grammar(self, running: RunningRequest) -> None:
        grammar, row = running.request.grammar, self._slots.grammar_row(running.sequence.slot)
        assert grammar is not None
        try:
            grammar.fill_bitmask(self._arrays.edit(self._arrays.masks[row]))
            running.record["grammar"] = row + 1
        except Exception as error:  # the caller's code: its own request alone ends
            running.error = error
            running.record["grammar"] = 0

    # ---- behind ------------------------------------------------------------------------------------------------------------
    def _take_decoded(self, going_on: list[RunningRequest | None], run: Run, part: Part) -> list[RunningRequest]:
        """Results of decode steps. going_on: the step's requests, None for those that have ended, some before it was their turn."""
        ended = []
        results = self._arrays.sampled[part.row : part.row + part.steps, : len(going_on)].T.tolist()
        for i, running in enumerate(going_on):
            if running is None:
                continue
            if running.plain and running.error is None:
                over = self._take_plain(running, results[i])
            else:
                over = any(self._take(running, result, run, step, i) for step, result in enumerate(results[i], part.row))
            if over:
                ended.append(running)
                going_on[i] = None
        return ended

    def _take_mixed(self, schedule: Schedule, run: Run, at: int) -> list[RunningRequest]:
        """Results of a step with prompts in it, in row `at` of the arrays."""
        ended, row = [], 0
        results = self._arrays.sampled[at, : schedule.results].tolist()
        collects = any(entry.sequence.request.collect for entry in schedule.entries)
        logits = run.plan.logits(0, schedule.results, place=run.place) if collects else None
        for entry in schedule.entries:
            sequence = entry.sequence
            running: RunningRequest = sequence.request
            first = entry.first + entry.count - entry.wanted - running.before  # position in the request's own prompt
            for position in range(first, first + entry.wanted):
                sampled = entry.samples and position == first + entry.wanted - 1
                if running.collect:
                    if position >= 0 and logits is not None:
                        running.logits[position] = logits[row]
                elif not sampled and 1 <= position + 1 < len(running.prompt_logprobs):
                    token, logprob, rank, _ = results[row]
                    top = self._top(at, row, running.request.sampling.prompt_logprobs or 0)
                    running.prompt_logprobs[position + 1] = PromptLogprob(token, logprob, rank, top)
                if sampled and self._take(running, results[row], run, at, row):
                    ended.append(running)
                row += 1
        return ended

    def _take_plain(self, running: RunningRequest, results: list[tuple[int, float, int, int]]) -> bool:
        """As `_take`, of several tokens of a request that wants nothing else."""
        tokens, longest = running.sequence.tokens, running.sequence.max_tokens_total
        outputs, stops = running.outputs, running.request.stop_token_ids
        before = len(outputs)
        finish = None
        for token, logprob, rank, status in results:
            if status:
                running.error = RuntimeError(FAILURES[status])
                break
            tokens.append(token)
            if token in stops:
                finish = "stop"
            elif len(tokens) >= longest:
                finish = "length"
            outputs.append(TokenOutput(token, logprob, rank, None, finish))
            if finish:
                break
        self.generated_tokens += len(outputs) - before
        return finish is not None or running.error is not None

    def _take(self, running: RunningRequest, result: tuple[int, float, int, int], run: Run, step: int, row: int) -> bool:
        """One sampled token; True: the request has ended. Interrupted, RunningRequest.restore takes back what has no output yet."""
        if running.collect:
            running.logits[-1] = run.logits(row)
        if running.error is not None or running.collect:
            return True
        request, tokens = running.request, running.sequence.tokens
        token, logprob, rank, status = result
        if request.hand_out_logits:
            if not running.waits:
                running.handed = (len(tokens), run.logits(row))
            self.held_back.append(running)
            return False
        if status:
            running.error = RuntimeError(FAILURES[status])
            return True
        tokens.append(token)
        finish = running.finish_reason(token, len(tokens))
        if request.grammar is not None:
            running.grammar_moves = True
            try:
                request.grammar.accept(token)
                finish = finish or ("stop" if request.grammar.is_terminated else None)
            except Exception as error:  # the caller's code
                tokens.pop()
                running.error = error
                return True
        logits = run.lend_logits(row) if request.keep_logits else None
        top = self._top(step, row, request.sampling.logprobs) if request.sampling.logprobs else None
        running.outputs.append(TokenOutput(token, logprob, rank, top, finish, logits))
        self.generated_tokens += 1
        if request.grammar is not None:
            running.grammar_moves = False
        if finish is not None:
            return True
        if logits is not None and running.waits:
            self.held_back.append(running)
        return False

    def _top(self, step: int, row: int, count: int) -> list[tuple[int, float]]:
        return [pair for pair in self._arrays.top[step, row, :count].tolist() if pair[0] >= 0]
