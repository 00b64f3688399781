"""A small server on a step session: it schedules requests in random pieces, a few steps ahead of what it has seen."""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from random import Random

import numpy as np
from workload import Tokens

from metalstep import Request
from metalstep.kernels import params
from metalstep.kv_cache import BLOCK_SIZE
from metalstep.step_session import Place, SessionStep, Span, StepSession

UNKNOWN = -1


@dataclass(eq=False)
class Running:
    """tokens: the last may be UNKNOWN, it lies at `pending` then. computed: tokens that steps have had. blocks: per group."""

    request: Request
    tokens: list[int]
    blocks: list[list[int]]
    slot: int = -1
    computed: int = 0
    pending: Place | None = None
    outputs: Tokens = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    prompt: list[tuple] = field(default_factory=list)
    done: bool = False

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def rows_left(self) -> int:
        """Rows that may run: none behind the last token that the request may have."""
        if self.done or len(self.tokens) - self.prompt_len >= (self.request.max_tokens or 0):
            return 0
        return len(self.tokens) - self.computed


@dataclass
class Piece:
    """Rows of a step. first_result: among the step's results; prompt_rows: that report on the prompt; samples: the last row does."""

    running: Running
    span: Span
    first_result: int
    prompt_rows: int
    samples: bool


class Driver:
    """session: nobody else's. num_blocks: of its cache, numbered over all groups. random: makes every choice.

    lag: steps that may be under way before the oldest is looked at. rows: the most of a piece. whole_prompts: prompts are not divided.
    preempts: now and then a sequence loses its slot and its blocks and begins again. taker: a thread that asks for a step's results as soon
    as it is sampled, as vLLM's executor has one.
    """

    def __init__(
        self,
        session: StepSession,
        num_blocks: int,
        random: Random,
        *,
        lag: int = 3,
        rows: int = 64,
        whole_prompts: bool = False,
        preempts: bool = False,
        taker: Executor | None = None,
    ):
        self.session, self.random, self.taker = session, random, taker
        self.lag, self.rows, self.whole_prompts, self.preempts = lag, rows, whole_prompts, preempts
        self.slots = session.arrays.sizes.seqs
        self.groups = session.arrays.sizes.groups
        self.free = list(range(1, num_blocks))
        self.under_way: deque[tuple[SessionStep, list[Piece]]] = deque()
        self.most_under_way = 0

    def run(self, requests: Sequence[Request]) -> list[Running]:
        """All requests to their ends. Whatever happens, no slot is left taken."""
        everything = [Running(request, list(request.prompt), [[] for _ in range(self.groups)]) for request in requests]
        try:
            self._serve(deque(everything), [])
        finally:
            for running in everything:
                if running.slot >= 0:
                    self._leave(running)
            self.session.settle()
        return everything

    def _serve(self, waiting: deque[Running], running: list[Running]) -> None:
        while waiting or running or self.under_way:
            while waiting and len(running) < self.slots and self.random.random() < 0.7:
                running.append(self._enter(waiting.popleft()))
            if self.preempts and running and self.random.random() < 0.1:
                self._preempt(running, waiting)
            ready = [x for x in running if self._may_run(x)]
            chosen = self.random.sample(ready, self.random.randint(1, len(ready))) if ready else []
            if chosen:
                self._step(chosen)
            while len(self.under_way) > self.lag or (self.under_way and not any(x.rows_left for x in running)):
                self._look()
            running[:] = [x for x in running if not x.done]

    def _may_run(self, running: Running) -> bool:
        if running.request.grammar is not None:
            while running.tokens[-1] == UNKNOWN and not running.done:
                self._look()
        return running.rows_left > 0

    def _enter(self, running: Running) -> Running:
        request, session = running.request, self.session
        running.slot = session.acquire()
        masked = request.grammar is not None
        session.fill(running.slot, request.sampling, running.tokens, running.prompt_len, request.stop_token_ids, masked=masked)
        return running

    def _leave(self, running: Running) -> None:
        """Its steps may be under way: what comes later writes to its blocks later."""
        self.session.release(running.slot)
        for group, blocks in enumerate(running.blocks):
            self.free += blocks
            running.blocks[group] = []
        running.slot = -1

    def _preempt(self, running: list[Running], waiting: deque[Running]) -> None:
        while self.under_way:
            self._look()
        victim = self.random.choice(running)
        running.remove(victim)
        if not victim.done:
            self._leave(victim)
            victim.computed, victim.pending, victim.prompt = 0, None, []
            waiting.appendleft(victim)

    # ---- a step -------------------------------------------------------------------------------------------------------------
    def _step(self, chosen: list[Running]) -> None:
        """Rows of the chosen ones in as many of the session's steps as they need."""
        pack: list[Piece] = []
        rows, results = self.rows, self.session.max_results
        for running in chosen:
            left = running.rows_left
            count = left if self.whole_prompts or self.random.random() < 0.3 else self.random.randint(1, left)
            while count:
                if not rows or not results:
                    self._run(pack)
                    pack, rows, results = [], self.rows, self.session.max_results
                size = min(count, rows if not self.whole_prompts else count)
                if running.request.sampling.prompt_logprobs is not None:
                    size = min(size, results)
                pack.append(self._piece(running, size, self.session.max_results - results))
                rows, results, count = max(rows - size, 0), results - pack[-1].span.results, count - size
        self._run(pack)

    def _piece(self, running: Running, count: int, first_result: int) -> Piece:
        first, end = running.computed, running.computed + count
        self._grow(running, end)
        tokens = running.tokens[first:end]
        span = Span(running.slot, first, tokens, running.pending if tokens[-1] == UNKNOWN else None)
        prompt_rows = 0
        if running.request.sampling.prompt_logprobs is not None and first < running.prompt_len - 1:
            prompt_rows = min(end, running.prompt_len - 1) - first
            span.targets = running.tokens[first + 1 : first + 1 + prompt_rows]
        samples = end == len(running.tokens)
        if samples:
            span.known = len(running.tokens)
        running.computed = end
        return Piece(running, span, first_result, prompt_rows, samples)

    def _grow(self, running: Running, tokens: int) -> None:
        for group, blocks in enumerate(running.blocks):
            more = [self.free.pop(self.random.randrange(len(self.free))) for _ in range(len(blocks), -(-tokens // BLOCK_SIZE))]
            self.session.set_blocks(running.slot, group, len(blocks), more)
            blocks.extend(more)

    def _run(self, pack: list[Piece]) -> None:
        keep = any(piece.running.request.keep_logits for piece in pack)
        step = self.session.begin([piece.span for piece in pack], split=self.random.random() < 0.5, keep_logits=keep)
        for piece in pack:
            if piece.samples and piece.running.request.grammar is not None:
                piece.running.request.grammar.fill_bitmask(self.session.mask(piece.running.slot))
        self.session.sample(step)
        if self.taker is not None:
            self.taker.submit(self.session.collect, step)
        for piece in pack:
            if piece.samples:
                piece.running.tokens.append(UNKNOWN)
                piece.running.pending = Place(step, piece.first_result + piece.prompt_rows)
        self.under_way.append((step, pack))
        self.most_under_way = max(self.most_under_way, len(self.under_way))

    # ---- its results --------------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        step, pack = self.under_way.popleft()
        self.session.collect(step)
        assert step.sampled is not None and step.top is not None
        for piece in pack:
            running, at = piece.running, piece.first_result
            for row in range(at, at + piece.prompt_rows):
                token, logprob, rank, status = step.sampled[row].tolist()
                assert status == params.MS_SAMPLE_OK
                running.prompt.append((token, logprob, rank, self._top(step, row, running.request.sampling.prompt_logprobs)))
            if piece.samples and not running.done:
                self._take(running, step, at + piece.prompt_rows, piece.span.first + len(piece.span.tokens))

    def _take(self, running: Running, step: SessionStep, row: int, position: int) -> None:
        """position: of the token."""
        assert step.sampled is not None
        request, (token, logprob, rank, status) = running.request, step.sampled[row].tolist()
        assert status == params.MS_SAMPLE_OK
        running.tokens[position] = token
        finish = "stop" if token in request.stop_token_ids else None
        if request.grammar is not None:
            request.grammar.accept(token)
            finish = finish or ("stop" if request.grammar.is_terminated else None)
        if finish is None and position + 1 - running.prompt_len == request.max_tokens:
            finish = "length"
        top = self._top(step, row, request.sampling.logprobs) if request.sampling.logprobs else None
        running.outputs.append((token, logprob, rank, top, finish))
        if request.keep_logits:
            assert step.logits is not None
            running.logits.append(step.logits[row])
        if finish:
            running.done = True
            self._leave(running)

    def _top(self, step: SessionStep, row: int, count: int) -> list[tuple[int, float]]:
        assert step.top is not None
        return [pair for pair in step.top[row, :count].tolist() if pair[0] >= 0]


def outputs(driver: Driver, requests: Sequence[Request]) -> list[Tokens]:
    """What the requests give."""
    return [running.outputs for running in driver.run(requests)]
