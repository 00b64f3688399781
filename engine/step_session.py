"""Steps that somebody else schedules, one ahead of the device: vLLM's scheduler asks for step N+1 before it has seen step N's tokens.

A step has two halves, `begin` and `sample`. It is one native call in the second, or, where masks take time to compute, one in each, so that
the device works meanwhile. A step's inputs wait in a stage until its turn; tokens that are not known yet are named by the place where the
device leaves them. A decode step of the same sequences as the one before it needs no inputs from the host: the device makes them.
"""
from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from metalstep import trace
from metalstep.kernels import step_load
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice, NativePlan
from metalstep.native_model import MAX_RESULTS, NativeModel
from metalstep.plan.plan import read_rows
from metalstep.plan.request_slots import RequestSlots
from metalstep.plan.step_arrays import (
    SAMPLING,
    Records,
    StepArrays,
    StepBatch,
    StepLoad,
    StepStage,
    join_records,
    words_of,
)
from metalstep.sampling import SamplingParams
from metalstep.session_trace import SessionTrace

STAGES = 2  # steps that may be under way: one runs, one waits for it


class Place:
    """Where a step leaves the token that one of its rows samples; `token` knows it once the step has been collected."""

    __slots__ = ("row", "step")

    def __init__(self, step: SessionStep, row: int):
        self.step = step
        self.row = row

    @property
    def token(self) -> int | None:
        """None while the host has not seen it."""
        return None if self.step.sampled is None else self.step.rows[self.row][0]


@dataclass(slots=True)
class Span:
    """Rows of one sequence in a step: the tokens at positions from `first` on.

    slot: the sequence's. tokens: of the rows; where `last` is given, the last row's token is what lies there and its entry here any number.
    targets: given next tokens, on which the first rows report, one each. known: tokens of the sequence, its last row's included, when that
    row samples; 0: it does not.
    """

    slot: int
    first: int
    tokens: list[int]
    last: Place | None = None
    targets: Sequence[int] = ()
    known: int = 0

    @property
    def wanted(self) -> list[int]:
        """Rows that give results, counted from the span's first."""
        rows = list(range(len(self.targets)))
        return [*rows, len(self.tokens) - 1] if self.known else rows

    @property
    def results(self) -> int:
        return len(self.targets) + (self.known > 0)


@dataclass(slots=True, eq=False)
class SessionStep:
    """A step on its way. results: rows of all spans that give results, in order.

    sampled and top: their results (MSSampled [results] and MSTopLogprob [results, 32]), logits: float32 [results, vocab] where they were
    asked for; None until `collect`.
    """

    results: int
    row: int  # of the arrays' sampled and top
    decode: bool  # each of its rows is sampled
    keep_logits: bool
    rest: NativePlan
    logits_place: Buffer
    ticket: int = 0
    sampled: np.ndarray | None = None
    top: np.ndarray | None = None
    logits: np.ndarray | None = None
    times: list[int] | None = None  # these two where steps are traced
    sizes: tuple[int, int, int] = (0, 0, 0)
    _rows: list[tuple[int, float, int, int]] | None = None

    @property
    def rows(self) -> list[tuple[int, float, int, int]]:
        """`sampled` in Python's own types: token, logprob, rank, status of each result."""
        if self._rows is None:
            assert self.sampled is not None
            self._rows = self.sampled.tolist()
        return self._rows


@dataclass(slots=True)
class StartedStep:
    """What a Forward needs to know. rows: of all spans. decode: each is one row that is sampled. context: tokens of the longest sequence.
    split: the device works before masks are known."""

    stage: StepStage
    spans: Sequence[Span]
    rows: int
    decode: bool
    context: int
    split: bool


class Forward(Protocol):
    """Computes a step's logits. The native step is one, mlx-lm's own graph another."""

    def start(self, session: StepSession, step: StartedStep) -> tuple[NativePlan, Buffer]:
        """Begin; returns the plan that does the rest of the step, and where the logits of the rows that give results will lie, float32
        [results, vocab].

        Whoever runs anything runs the stage's `load` first: `session.load(step.stage)`, or as part of a plan.
        """

    def go_on(self, rows: int, context: int) -> tuple[NativePlan, Buffer] | None:
        """As `start`, of a decode step whose inputs the device makes of the step before. None: it cannot."""

    def release(self, slot: int) -> None:
        """The slot's sequence is gone; what it alone has may go too."""

    def close(self) -> None:
        """Give back what is the forward's own. No step is under way."""


@dataclass
class NativeForward:
    """A captured model's plans."""

    native: NativeModel

    def start(self, session: StepSession, step: StartedStep) -> tuple[NativePlan, Buffer]:
        plan = self.native.plan_for(step.rows, decode=step.decode, context=step.context)
        if not step.split:
            return plan.whole(step.stage), plan.place_of_logits
        plan.forward(step.stage).run()
        return plan.sampler, plan.place_of_logits

    def go_on(self, rows: int, context: int) -> tuple[NativePlan, Buffer]:
        plan = self.native.plan_for(rows, decode=True, context=context)
        return plan.again, plan.place_of_logits

    def release(self, slot: int) -> None:
        """Blocks are the scheduler's."""

    def close(self) -> None:
        """The model is its owner's."""


@dataclass
class StepSession:
    """Steps on `device`, whose sequences live in slots of `arrays`. One thread uses it; another may `collect` what it has sampled."""

    device: NativeDevice
    arrays: StepArrays
    slots: RequestSlots
    forward: Forward
    step_load: StepLoad = step_load.launches  # the device's
    max_rows: int = field(init=False)  # of a step
    max_results: int = MAX_RESULTS  # of a step
    _free: deque[int] = field(init=False)
    _used: dict[int, int] = field(default_factory=dict)  # slot: number of the last step with rows of it
    _under_way: deque[SessionStep] = field(default_factory=deque)
    stages: list[StepStage] = field(init=False)
    _loads: dict[StepStage, NativePlan] = field(default_factory=dict)
    _stage_steps: list[SessionStep | None] = field(init=False)
    _count: int = 0  # steps that were begun
    _taken: int = 0  # of them, those whose results are there
    _taking: threading.Lock = field(default_factory=threading.Lock)  # for who takes results: held while the device is waited for

    def __post_init__(self) -> None:
        seqs, self.max_rows = self.arrays.sizes.seqs, self.arrays.sizes.rows
        self._free = deque(range(seqs))
        self._records = np.zeros(seqs, SAMPLING)  # of the slots; what counts tokens is set for each step
        self._num_prompt, self._report_top = np.zeros(seqs, np.int32), np.zeros(seqs, np.int32)
        self.stages = [self.arrays.stage(self.step_load) for _ in range(STAGES)]
        for stage in self.stages:
            stage.limits[:] = self.arrays.sizes.context
        self._stage_steps = [None] * STAGES
        opened = trace.current()
        self._trace = None if opened is None else SessionTrace(opened)
        self._latest: tuple[SessionStep, Sequence[Span]] | None = None

    # ---- sequences ----------------------------------------------------------------------------------------------------------
    def acquire(self) -> int:
        """A slot that no step under way uses. Raises: ValueError when all are taken."""
        if not self._free:
            raise ValueError(f"{self.arrays.sizes.seqs} sequences run already; release one first")
        for _ in range(len(self._free)):
            slot = self._free.popleft()
            if self._used.get(slot, -1) < self._taken:
                return slot
            self._free.append(slot)
        slot = self._free.popleft()
        with self._taking:
            while self._used[slot] >= self._taken:
                self._take()
        return slot

    def release(self, slot: int) -> None:
        """The sequence is gone; steps under way may still have rows of it."""
        self._free.append(slot)
        self.forward.release(slot)

    def fill(
        self, slot: int, sampling: SamplingParams, tokens: list[int], num_prompt: int, stop_ids: frozenset[int], *, masked: bool = False
    ) -> None:
        """Put what the device keeps for a sequence into its slot, see RequestSlots.fill. masked: its tokens have to fit `mask`."""
        self.arrays.edit(self.arrays.sequences[slot : slot + 1])[0] = (0, 0)
        record = self.slots.fill(slot, sampling, tokens, num_prompt, stop_ids)
        if masked:
            record["grammar"] = self.slots.grammar_row(slot) + 1
        self._records[slot] = record
        self._num_prompt[slot] = num_prompt
        self._report_top[slot] = sampling.prompt_logprobs or 0

    def set_blocks(self, slot: int, group: int, first: int, blocks: Sequence[int]) -> None:
        """Entries of a block table from `first` on. A step under way that reads the table does not look at new ones."""
        self.arrays.edit(self.arrays.block_tables[group, slot, first : first + len(blocks)])[:] = blocks

    def mask(self, slot: int) -> np.ndarray:
        """The mask of the next token of a `masked` sequence, uint32 [mask_words].

        Asked for and written between `begin` and `sample`, when no earlier step samples this sequence any more.
        """
        mask: np.ndarray = self.arrays.edit(self.arrays.masks[self.slots.grammar_row(slot)])
        return mask

    def load(self, stage: StepStage) -> None:
        """Put a step's inputs in place, for a Forward whose plans do not."""
        if stage not in self._loads:
            self._loads[stage] = self.device.create_plan(stage.load, self.max_rows, self.max_results)
        self._loads[stage].run()

    # ---- steps --------------------------------------------------------------------------------------------------------------
    def begin(self, spans: Sequence[Span], *, split: bool = False, keep_logits: bool = False) -> SessionStep:
        """Begin a step of up to max_rows rows and max_results results, behind those that were begun before.

        split: masks will take time; without it the device begins in `sample`.
        Raises: ValueError for more; RuntimeError with the device's text.
        """
        began = 0 if self._trace is None else trace.now()
        row = self._count % self.arrays.sizes.steps
        if len(self._under_way) == self.arrays.sizes.steps:  # the oldest has the row
            with self._taking:
                while len(self._under_way) == self.arrays.sizes.steps:
                    self._take()
        step = None
        if row and not split and self._continues(spans):
            step = self._go_on(spans, row, keep_logits)
        if step is None:
            step = self._start(spans, row, split, keep_logits)
        self._latest = step, spans
        self._under_way.append(step)
        for span in spans:
            self._used[span.slot] = self._count
        self._count += 1
        if self._trace is not None:
            self._trace.began(step, spans, began)
        return step

    def _continues(self, spans: Sequence[Span]) -> bool:
        """Whether these are the sequences of the latest step, each with the token that it samples."""
        if self._latest is None or not self._latest[0].decode or len(spans) != len(self._latest[1]):
            return False
        latest, before = self._latest
        for i, (old, new) in enumerate(zip(before, spans, strict=True)):
            last = new.last
            if last is None or last.step is not latest or last.row != i or new.slot != old.slot or new.first != old.first + 1:
                return False
            if new.targets or not new.known:
                return False
        return True

    def _go_on(self, spans: Sequence[Span], row: int, keep_logits: bool) -> SessionStep | None:
        found = self.forward.go_on(len(spans), 1 + max(span.first for span in spans))
        return None if found is None else SessionStep(len(spans), row, True, keep_logits, *found)

    def _start(self, spans: Sequence[Span], row: int, split: bool, keep_logits: bool) -> SessionStep:
        index = self._count % STAGES
        previous = self._stage_steps[index]
        if previous is not None:
            self.collect(previous)
        stage = self.stages[index]
        rows, decode, context = self._write(stage, spans)
        stage.write_results_to(row)
        self.arrays.send()
        rest, place = self.forward.start(self, StartedStep(stage, spans, rows, decode, context, split))
        step = self._stage_steps[index] = SessionStep(sum(span.results for span in spans), row, decode, keep_logits, rest, place)
        return step

    def sample(self, step: SessionStep) -> None:
        """Sample a step's rows; masks are in place. Before the next step begins."""
        began = 0 if self._trace is None else trace.now()
        self.arrays.send()
        step.ticket = step.rest.run()
        if self._trace is not None:
            self._trace.sampled(step, began, self._count)
        if step.keep_logits:
            self.collect(step)

    def collect(self, step: SessionStep) -> None:
        """Wait for a step and those before it, and take its results. Any thread may."""
        if step.sampled is not None:  # without the lock, which another thread may have until a later step is done
            return
        with self._taking:
            while step.sampled is None:
                self._take()

    def settle(self) -> None:
        """Wait for every step that was sampled."""
        with self._taking:
            while self._under_way and self._under_way[0].ticket:
                self._take()

    def _take(self) -> None:
        """The oldest step's results. Whoever sees `sampled` sees the rest of them too."""
        step = self._under_way[0]
        began = 0 if self._trace is None else trace.now()
        step.rest.wait(step.ticket)
        done = 0 if self._trace is None else trace.now()
        step.top = self.arrays.top[step.row, : step.results].copy()
        if step.keep_logits:
            step.logits = read_rows(self.device, step.logits_place, 0, step.results)
        step.sampled = self.arrays.sampled[step.row, : step.results].copy()
        self._under_way.popleft()
        self._taken += 1
        if self._trace is not None:
            self._trace.took(step, began, done)

    def close(self) -> None:
        """Wait for what is under way and give the plans back."""
        self.settle()
        for load in self._loads.values():
            load.close()
        self.forward.close()
        if self._trace is not None:
            self._trace.finish()

    def _write(self, stage: StepStage, spans: Sequence[Span]) -> tuple[int, bool, int]:
        """A step's inputs into a stage. Returns its rows, whether all are decodes, and the tokens of its longest sequence."""
        tokens: list[int] = []
        positions: list[int] = []
        seq_ids: list[int] = []
        sampled_rows: list[int] = []
        sources: list[tuple[int, int]] = []
        context = 0
        for span in spans:
            row, count = len(tokens), len(span.tokens)
            tokens += span.tokens
            end = span.first + count
            positions += range(span.first, end)
            seq_ids += [span.slot] * count
            context = max(context, end)
            if span.last is not None:
                known = span.last.token
                if known is None:
                    sources.append((row + count - 1, span.last.step.row * self.arrays.sizes.results + span.last.row))
                else:
                    tokens[-1] = known
            if span.targets:
                sampled_rows += range(row, row + len(span.targets))
            if span.known:
                sampled_rows.append(row + count - 1)
        decode = len(tokens) == len(spans) == len(sampled_rows)
        stage.write(StepBatch(tokens, positions, seq_ids, sampled_rows, self._sampling(spans), advance=decode))
        stage.sources[: len(tokens)] = -1
        for row, source in sources:
            stage.sources[row] = source
        return len(tokens), decode, context

    def _sampling(self, spans: Sequence[Span]) -> Records:
        """The records of all results, in order."""
        sampled = [span for span in spans if span.known]
        slots, known = [span.slot for span in sampled], np.array([span.known for span in sampled], np.int32)
        records: Records = words_of(self._records)[slots].reshape(-1).view(SAMPLING)
        records["counter"], records["counted"] = known - self._num_prompt[slots], known
        if all(not span.targets for span in spans):
            return records
        parts, at = [], 0
        for span in spans:
            if span.targets:
                parts.append(self.slots.report(self._records[span.slot : span.slot + 1], span.targets, int(self._report_top[span.slot])))
            if span.known:
                parts.append(records[at : at + 1])
                at += 1
        return join_records(parts)
