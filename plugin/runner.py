"""One vLLM step: the scheduler's output becomes the engine's steps, their results become vLLM's.

Two halves, always: `execute_model` begins the forward pass and returns, `sample_tokens` adds masks and samples. Neither waits for the
device, so vLLM schedules the next step meanwhile; its input tokens are named by where the device leaves them.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from metalstep import trace
from metalstep.kernels import params
from metalstep.plugin.outputs import (
    Row,
    StepOutput,
    StepResult,
    logprob_lists,
    logprob_row,
    logprob_row_of,
    prompt_logprob_tensors,
)
from metalstep.plugin.requests import UNKNOWN, Report, RequestState, RequestTable
from metalstep.session_trace import ServedRequests
from metalstep.step_runner import FAILURES
from metalstep.step_session import Place, SessionStep, Span, StepSession

if TYPE_CHECKING:
    from vllm.config.reasoning import ReasoningConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

ALL = np.uint32(0xFFFFFFFF)


@dataclass(slots=True)
class Piece:
    """Rows [first, end) of a request in one of the engine's steps. sample: the last row's place among the step's results; -1: it samples
    nothing. prompt_row: place of the first row that reports on a prompt token; prompt_rows: how many do, one after another. reports: where
    they go; after a preemption, which another step may be under way to, the request has another such list."""

    state: RequestState
    first: int
    end: int
    sample: int = -1
    prompt_row: int = 0
    prompt_rows: int = 0
    reports: list[Report] = field(default_factory=list)


@dataclass(slots=True)
class Sample:
    """Where a step leaves a request's token: the place among its results, and the list and index that it belongs to."""

    step: SessionStep
    place: int
    tokens: list[int]
    index: int
    reports: list[Report] | None  # of its prompt, complete by now


@dataclass(slots=True)
class Work:
    """A vLLM step between its halves. packs: the engine's steps, the first one begun already. states: in the step's order."""

    states: list[RequestState]
    packs: list[list[Piece]]
    first: SessionStep


class Runner:
    """Runs what vLLM's scheduler asks for on a session. vLLM calls it from one thread.

    steps, preemptions: counted since the start, for tests and statistics.
    """

    def __init__(self, session: StepSession, *, block_ratio: int, reasoning: ReasoningConfig | None):
        self._session = session
        self._requests = RequestTable(session, block_ratio=block_ratio, reasoning=reasoning)
        self._work: Work | None = None
        self.steps = self.preemptions = 0
        opened = trace.current()
        self._trace = None if opened is None else ServedRequests(opened)

    # ---- first half ---------------------------------------------------------------------------------------------------------
    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Begin a step. Returns None, or the empty output where there is nothing to run."""
        self.preemptions += len(output.preempted_req_ids or ())
        if self._trace is not None:
            new = [new.req_id for new in output.scheduled_new_reqs]
            self._trace.changed(new=new, preempted=output.preempted_req_ids or (), finished=output.finished_req_ids)
        self._requests.update(output)
        if not output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        states = [self._requests[req_id] for req_id in output.num_scheduled_tokens]
        packs = list(self._packs(states, output.num_scheduled_tokens))
        self._work = Work(states, packs, self._begin(packs[0]))
        self.steps += 1
        return None

    def _packs(self, states: list[RequestState], counts: dict[str, int]) -> Iterator[list[Piece]]:
        """The step's rows, divided into as few of the engine's steps as hold them."""
        pack: list[Piece] = []
        rows, results = self._session.max_rows, self._session.max_results
        for state in states:
            first, last = state.computed, state.computed + counts[state.req_id]
            while first < last:
                if not rows or not results:
                    yield pack
                    pack, rows, results = [], self._session.max_rows, self._session.max_results
                end = min(last, first + rows)
                if state.reports is not None and first < state.prompt_len:  # every row of the prompt gives a result
                    end = min(end, first + results)
                piece = Piece(state, first, end)
                self._place_results(piece, self._session.max_results - results)
                pack.append(piece)
                rows -= end - first
                results -= piece.prompt_rows + (piece.sample >= 0)
                first = end
        yield pack

    def _place_results(self, piece: Piece, at: int) -> None:
        """at: results of the pieces before."""
        state = piece.state
        if state.reports is not None and piece.first < state.prompt_len - 1:
            piece.reports = state.reports
            piece.prompt_row, piece.prompt_rows = at, min(piece.end, state.prompt_len - 1) - piece.first
            at += piece.prompt_rows
        if piece.end == len(state.tokens):
            piece.sample = at

    def _begin(self, pack: list[Piece]) -> SessionStep:
        spans = [self._span(piece) for piece in pack]
        keep_logits = any(piece.state.wants_logits and (piece.sample >= 0 or piece.prompt_rows) for piece in pack)
        return self._session.begin(spans, split=any(piece.state.masked for piece in pack), keep_logits=keep_logits)

    def _span(self, piece: Piece) -> Span:
        state, first, end = piece.state, piece.first, piece.end
        tokens = state.tokens[first:end]
        return Span(
            state.slot,
            first,
            tokens,
            state.pending if tokens[-1] == UNKNOWN else None,
            state.tokens[first + 1 : first + 1 + piece.prompt_rows] if piece.prompt_rows else (),
            len(state.tokens) if piece.sample >= 0 else 0,
        )

    # ---- second half --------------------------------------------------------------------------------------------------------
    def sample_tokens(self, grammar: GrammarOutput | None) -> StepOutput | None:
        """Sample the step that was begun. grammar: masks of requests with structured output."""
        work, self._work = self._work, None
        if work is None:
            return None
        self._write_masks(work, grammar)
        steps = [work.first]
        self._session.sample(work.first)
        for pack in work.packs[1:]:
            step = self._begin(pack)
            self._session.sample(step)
            steps.append(step)
        sampled: dict[str, Sample] = {}
        for pack, step in zip(work.packs, steps, strict=True):
            for piece in pack:
                if piece.sample >= 0:
                    state = piece.state
                    sampled[state.req_id] = Sample(step, piece.sample, state.tokens, len(state.tokens), state.reports)
                    state.tokens.append(UNKNOWN)
                    state.pending = Place(step, piece.sample)
        return StepOutput(partial(self._finish, work, steps, sampled))

    def _write_masks(self, work: Work, grammar: GrammarOutput | None) -> None:
        rows = {} if grammar is None else dict(zip(grammar.structured_output_request_ids, grammar.grammar_bitmask, strict=True))
        for state in work.states:
            if not state.masked or state.computed >= len(state.tokens):
                continue
            if state.masks and state.tokens[-1] == UNKNOWN and state.pending is not None:
                self._session.collect(state.pending.step)  # whose sampler reads the mask too
                state.tokens[-1] = state.pending.token or 0
            mask = self._session.mask(state.slot)
            allowed = rows.get(state.req_id)
            if allowed is None:
                mask[:] = ALL
            else:
                words = allowed.view(np.uint32)
                mask[: len(words)], mask[len(words) :] = words[: len(mask)], 0
            for own in state.masks:
                own.apply(mask, state.tokens[: state.prompt_len], state.tokens[state.prompt_len :])

    # ---- when vLLM asks -----------------------------------------------------------------------------------------------------
    def _finish(self, work: Work, steps: list[SessionStep], sampled: dict[str, Sample]) -> ModelRunnerOutput:
        self._session.collect(steps[-1])
        for pack, step in zip(work.packs, steps, strict=True):
            for piece in pack:
                if piece.prompt_rows:
                    self._keep_reports(piece, step)
        result = StepResult(req_ids=[state.req_id for state in work.states], req_id_to_index={})
        rows: list[Row | None] = []
        for index, state in enumerate(work.states):
            req_id = state.req_id
            result.req_id_to_index[req_id] = index
            tokens: list[int] = []
            row = None
            if found := sampled.get(req_id):
                token, _, _, status = found.step.rows[found.place]
                if status == params.MS_SAMPLE_OK:
                    tokens.append(token)
                    if self._trace is not None:
                        self._trace.token(req_id)
                    row = self._logprobs(state, found.step, found.place)
                else:
                    token = 0
                    result.failed[req_id] = FAILURES[status]
                found.tokens[found.index] = token
                if found.reports and len(found.reports) == state.prompt_len - 1:
                    prompt = [self._prompt_row(state, *report) for report in found.reports]
                    result.prompt_logprobs_dict[req_id] = prompt_logprob_tensors(prompt)
                    found.reports.clear()
            result.sampled_token_ids.append(tokens)
            rows.append(row)
        result.logprobs = logprob_lists(rows)
        return result

    def _logprobs(self, state: RequestState, step: SessionStep, place: int) -> Row | None:
        count = state.params.num_logprobs
        if count is None:
            return None
        assert step.sampled is not None and step.top is not None
        result = step.sampled[place]
        if state.wants_logits:
            assert step.logits is not None
            chosen = state.params.logprob_token_ids
            return logprob_row_of(step.logits[place], int(result["token"]), int(result["rank"]), count, chosen)
        return logprob_row(result, step.top[place], count)

    def _keep_reports(self, piece: Piece, step: SessionStep) -> None:
        assert step.sampled is not None and step.top is not None
        for place in range(piece.prompt_row, piece.prompt_row + piece.prompt_rows):
            logits = None if step.logits is None else step.logits[place].copy()
            piece.reports.append((step.sampled[place], step.top[place], logits))

    def _prompt_row(self, state: RequestState, result: np.void, top: np.ndarray, logits: np.ndarray | None) -> Row:
        count = state.params.prompt_logprobs or 0
        if logits is not None and count != state.sampling.prompt_logprobs:
            return logprob_row_of(logits, int(result["token"]), int(result["rank"]), count)
        return logprob_row(result, top, count)

    def suspend(self) -> None:
        """The session is about to close; vLLM schedules nothing until `resume`."""
        self._session.settle()
        self._requests.suspend()

    def resume(self, session: StepSession) -> None:
        """Go on with another session."""
        self._session = session
        self._requests.resume(session)

    def settle(self) -> None:
        """Wait for the device."""
        self._session.settle()

    def stats(self) -> dict[str, int]:
        return {"requests": len(self._requests), "steps": self.steps, "preemptions": self.preemptions}
