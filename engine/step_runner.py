"""One native call for a schedule: its rows into the step's arrays, its results back into the requests."""
from __future__ import annotations

import time

import numpy as np

from metalstep.kernels import params
from metalstep.native_model import NativeModel
from metalstep.plan.plan import Plan
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


class StepRunner:
    """Runs schedules on the native model. steps (native calls), prompt_tokens, cached_tokens and generated_tokens count since the start.

    prepared, submitted, done: when the latest step's arrays were filled, its native call queued and done, by time.perf_counter_ns.
    time_launches: let `launch_times` have kernel, ops and ns of each launch of the latest step, if that was one step; it waits for each.
    """

    def __init__(self, native: NativeModel):
        self._native, self._arrays, self._slots = native, native.arrays, native.slots
        self._fence = native.device.create_plan([], 1, 1)
        self._loaded = False  # the arrays hold the next step of the last schedule, if that was a decode
        self.held_back: list[RunningRequest] = []  # by the latest step: they wait for their callers
        self.steps = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.prepared = self.submitted = self.done = 0
        self.time_launches = False
        self.launch_times: list[tuple[str, str, int]] = []

    def drain(self) -> None:
        """Let what an interrupted step left in the device's queue finish, and forget what the arrays hold."""
        self._loaded = False
        self._fence.wait(self._fence.run(1))

    def run(self, schedule: Schedule) -> list[RunningRequest]:
        """Run the schedule's rows and hand the results out; returns the requests that have ended."""
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
        context = max(entry.first + entry.count for entry in schedule.entries) + schedule.steps - 1
        plan = self._native.plan_for(schedule.rows, decode=schedule.decode, context=context)
        self.steps += 1
        self.held_back = []
        self._loaded = False
        self.prepared = time.perf_counter_ns()
        if self.time_launches and schedule.steps == 1:
            self._profile(plan)
        else:
            self.launch_times = []
            plan.replay(schedule.steps)
        self.done = time.perf_counter_ns()
        self.submitted = min(max(plan.submitted, self.prepared), self.done)
        self._loaded = schedule.decode and not any(entry.sequence.request.request.grammar for entry in schedule.entries)
        return self._take_decoded(schedule, plan) if schedule.decode else self._take_mixed(schedule, plan)

    def _profile(self, plan: Plan) -> None:
        """The same step, which waits for each of its launches."""
        times = plan.profile()
        self.launch_times = [(e.launch.kernel, " ".join(e.ops), ns) for e, ns in zip(plan.launches, times, strict=True)]

    def _continue(self, schedule: Schedule) -> None:
        """The arrays hold this step's rows already: step_advance wrote them, up to the ends of the tables that it knew."""
        entries = schedule.entries
        self._arrays.limits[: len(entries)] = [entry.limit for entry in entries]
        if schedule.grown:
            self._arrays.place([entry.first for entry in entries])

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
        self._arrays.sequences[sequence.slot] = (sequence.window, sequence.keep)
        if running.cached_tokens < 0:
            running.cached_tokens = sequence.num_cached
            self.cached_tokens += sequence.num_cached

    def _restore(self, sequence: Sequence) -> None:
        for group, layers in enumerate(sequence.snapshot):
            count = len(next(iter(layers.values()))[0])  # behind them, blocks for the tokens to come
            self._native.cache.write_blocks(sequence.live(group)[:count], layers)

    def _write_tables(self, sequence: Sequence) -> None:
        for group, table in enumerate(sequence.tables):
            self._arrays.block_tables[group, sequence.slot, : len(table)] = table

    def _own_embeddings(self, sequence: Sequence, tokens: list[int], row: int, first: int, count: int) -> None:
        embeddings = sequence.request.request.embeddings
        begin = sequence.prompt_len - len(embeddings)  # behind what a prompt cache holds
        for i in range(max(first, begin), min(first + count, sequence.prompt_len)):
            at = row + i - first
            self._arrays.embeddings[at] = embeddings[i - begin]
            tokens[at] = -(at + 1)

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
            grammar.fill_bitmask(self._arrays.masks[row])
            running.record["grammar"] = row + 1
        except Exception as error:  # the caller's code: its own request alone ends
            running.error = error
            running.record["grammar"] = 0

    # ---- behind ------------------------------------------------------------------------------------------------------------
    def _take_decoded(self, schedule: Schedule, plan: Plan) -> list[RunningRequest]:
        """Results of decode steps: up to K tokens for each request."""
        ended = []
        count = len(schedule.entries)
        steps = [self._arrays.sampled[k, :count].tolist() for k in range(schedule.steps)]
        for i, entry in enumerate(schedule.entries):
            running = entry.sequence.request
            for k, results in enumerate(steps):
                if self._take(running, results[i], plan, k, i):
                    ended.append(running)
                    break
        return ended

    def _take_mixed(self, schedule: Schedule, plan: Plan) -> list[RunningRequest]:
        """Results of a step with prompts in it."""
        ended, row = [], 0
        results = self._arrays.sampled[0, : schedule.results].tolist()
        for entry in schedule.entries:
            sequence = entry.sequence
            running: RunningRequest = sequence.request
            self.prompt_tokens += max(0, min(entry.first + entry.count, sequence.prompt_len) - entry.first)
            first = entry.first + entry.count - entry.wanted - running.before  # position in the request's own prompt
            for position in range(first, first + entry.wanted):
                sampled = entry.samples and position == first + entry.wanted - 1
                if running.collect:
                    if position >= 0:
                        running.logits[position] = plan.logits[row].copy()
                elif not sampled and 1 <= position + 1 < len(running.prompt_logprobs):
                    token, logprob, rank, _ = results[row]
                    top = self._top(0, row, running.request.sampling.prompt_logprobs or 0)
                    running.prompt_logprobs[position + 1] = PromptLogprob(token, logprob, rank, top)
                if sampled and self._take(running, results[row], plan, 0, row):
                    ended.append(running)
                row += 1
        return ended

    def _take(self, running: RunningRequest, result: tuple[int, float, int, int], plan: Plan, step: int, row: int) -> bool:
        """One sampled token; True: the request has ended. Interrupted, RunningRequest.restore takes back what has no output yet."""
        if running.collect:
            running.logits[-1] = plan.logits[row].copy()
        if running.error is not None or running.collect:
            return True
        request, tokens = running.request, running.sequence.tokens
        token, logprob, rank, status = result
        if request.hand_out_logits:
            if not running.waits:
                running.handed = (len(tokens), plan.logits[row].copy())
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
        logits = plan.lend_logits(row) if request.keep_logits else None
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
