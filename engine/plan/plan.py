"""A plan on a device: launches resolved once, run on the step's arrays by one native call for one step or several."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice, NativePlan
from metalstep.plan.logits import Logits, LogitsRing, rows_of
from metalstep.plan.lower import Lowered
from metalstep.plan.step_arrays import StepArrays, StepBatch, StepStage
from metalstep.plan.target import PlanShape


class Plan:
    """The native plan of one lowered graph, the step's arrays and where its logits are.

    A plan of one row has two places for logits and uses them in turn (see LogitsRing).
    """

    def __init__(self, device: NativeDevice, lowered: Lowered, arrays: StepArrays, shape: PlanShape):
        self.shape = shape
        self.arrays = arrays
        self.launches = lowered.launches
        self._device, self._lowered = device, lowered
        self._of_stages: dict[tuple[str, StepStage], NativePlan] = {}
        self.arena_bytes = lowered.arena.nbytes
        self._memory = lowered.memory

    @cached_property
    def _native(self) -> list[NativePlan]:
        """The whole step, once per place of logits."""
        launches, logits = [entry.launch for entry in self.launches], self._lowered.logits
        return [
            self._device.create_plan(_rebound(launches, logits, place), self.shape.tokens, self.shape.sampled) for place in self._places
        ]

    @cached_property
    def _places(self) -> list[Buffer]:
        logits = self._lowered.logits
        if self.shape.tokens > 1:
            return [logits]  # in the arena, where another step's values may overlap them
        owners = [self._device.create_buffer(logits.nbytes, shared=False) for _ in range(2)]
        return [replace(logits, handle=owner.handle, offset=0) for owner in owners]

    @cached_property
    def _ring(self) -> LogitsRing:
        lent = None if self.shape.tokens == 1 else self._memory.lent
        return LogitsRing([rows_of(self._device, place, self.shape.sampled, place.shape[1]) for place in self._places], lent)

    def whole(self, stage: StepStage) -> NativePlan:
        """The step, with inputs from a stage. It makes no inputs of a next one."""
        return self._staged("whole", stage)

    def forward(self, stage: StepStage) -> NativePlan:
        """The step up to its logits, for a step whose masks are known late; `sampler` does the rest."""
        return self._staged("forward", stage)

    @cached_property
    def sampler(self) -> NativePlan:
        """What is behind `forward`."""
        return self._device.create_plan(self._launches(["sample"]), self.shape.tokens, self.shape.sampled)

    @cached_property
    def again(self) -> NativePlan:
        """The step of the same sequences, each with the token that the step before has sampled, where that had MSStep.advance set."""
        return self._served(self._behind(self._launches(["step_advance"])))

    def _staged(self, part: str, stage: StepStage) -> NativePlan:
        key = (part, stage)
        if key not in self._of_stages:
            launches = self._behind(stage.load, sample=part == "whole")
            self._of_stages[key] = self._served(launches)
        return self._of_stages[key]

    def _served(self, launches: list[Launch]) -> NativePlan:
        """A plan of steps that a server asks for. Of the host's threads one row takes all but one: it waits for memory, which so many
        threads keep as busy, and the server's own processes need a processor to bring each token to its reader."""
        plan = self._device.create_plan(launches, self.shape.tokens, self.shape.sampled)
        threads = self._device.info.threads
        if self.shape.tokens == 1 and threads > 1:
            plan.limit_threads(threads - 1)
        return plan

    def _behind(self, inputs: list[Launch], *, sample: bool = True) -> list[Launch]:
        """The step's launches, behind those that make its inputs."""
        first, *others = [entry.launch for entry in self.launches if entry.ops not in (["sample"], ["step_advance"])]
        return [*inputs, replace(first, barrier=True), *others, *(self._launches(["sample"]) if sample else [])]

    def _launches(self, ops: list[str]) -> list[Launch]:
        return [entry.launch for entry in self.launches if entry.ops == ops]

    def compile(self, stages: Sequence[StepStage] = ()) -> None:
        """Make what runs: the step that makes its own next inputs, or those of `stages`. Else the first run does."""
        for stage in stages:
            self.whole(stage)
        if stages and self.shape.tokens == self.shape.sampled:
            self.again  # noqa: B018
        if not stages:
            self._native  # noqa: B018

    def logits(self, first: int = 0, count: int | None = None, *, place: int | None = None) -> np.ndarray:
        """A copy of rows that the latest step left, float32 [count, vocab]; None: all. place: see Run."""
        buffer = self._places[self._ring.current if place is None else place]
        return read_rows(self._device, buffer, first, self.shape.sampled - first if count is None else count)

    def lend_logits(self, row: int, place: int) -> Logits:
        """A row of logits, for longer than the next step in the same place."""
        return self._ring.lend(row, place)

    def run(self, batch: StepBatch) -> np.ndarray:
        """One step; returns the sampled rows' results (SAMPLED), valid until the next step of any plan.

        Raises: ValueError for more rows than the plan has room for; RuntimeError with the device's text.
        """
        if len(batch.tokens) > self.shape.tokens or len(batch.sampled_rows) > self.shape.sampled:
            raise ValueError(
                f"a step of {len(batch.tokens)} rows, {len(batch.sampled_rows)} of them sampled, on a plan for up to "
                f"{self.shape.tokens} and {self.shape.sampled}"
            )
        self.arrays.write(batch)
        first = self.replay()
        return self.arrays.sampled[first, : len(batch.sampled_rows)]

    def replay(self, steps: int = 1) -> int:
        """`steps` steps on what the arrays hold already, more than one when MSStep.advance is set; returns the first one's row of
        `sampled`."""
        run = self.start(steps)
        for part in run.parts:
            run.wait(part)
        return run.parts[0].row

    def start(self, steps: int) -> Run:
        """As `replay`, without waiting. A GPU goes on with the parts behind it while one's results are taken, each half of what is left, so
        that little is when the last is done."""
        place, native = self._prepare()
        row = self.arrays.next_results(steps)
        self.arrays.send()
        parts = []
        for count in self._parts(steps):
            parts.append(Part(row, count, native.run(count)))
            row += count
        return Run(self, native, place, parts, time.perf_counter_ns())

    def _parts(self, steps: int) -> list[int]:
        """The host device computes with the processors that would take the results meanwhile: it has one part."""
        if self._device.kind == "host":
            return [steps]
        parts = []
        while steps > 1:
            parts.append(steps // 2)
            steps -= steps // 2
        return [*parts, steps]

    def profile(self) -> list[int]:
        """Nanoseconds of each launch in one step on what the arrays hold, barriers included."""
        return self.profiled()[1]

    def profiled(self) -> tuple[Run, list[int]]:
        """One step on what the arrays hold, done, and `profile` of it."""
        place, native = self._prepare()
        row = self.arrays.next_results(1)
        self.arrays.send()
        queued = time.perf_counter_ns()
        times = native.profile()
        return Run(self, native, place, [Part(row, 1, 0)], queued), times

    @property
    def place_of_logits(self) -> Buffer:
        """Where a step with inputs from a stage leaves its logits: float32 [max_sampled, vocab], valid until the next step of any plan."""
        return self._lowered.logits

    def _prepare(self) -> tuple[int, NativePlan]:
        """The native plan that runs next, with nothing in its way, and the number of its place of logits."""
        self._memory.keep_lent()
        place = self._ring.advance()
        return place, self._native[place]

    def close(self) -> None:
        made = self.__dict__
        if "_ring" in made:
            self._ring.close()
        for native in [*made.get("_native", ()), *self._of_stages.values(), *filter(None, map(made.get, ("sampler", "again")))]:
            native.close()


class Part(NamedTuple):
    """Steps that are waited for together. row: of `sampled`, the first one's results."""

    row: int
    steps: int
    ticket: int


@dataclass(frozen=True, eq=False)
class Run:
    """Steps that are under way. place: of their logits, among the plan's. submitted: when they were queued, by time.perf_counter_ns."""

    plan: Plan
    native: NativePlan
    place: int
    parts: list[Part]
    submitted: int

    def wait(self, part: Part) -> None:
        """Until its results, and those of the parts before it, are there."""
        if part.ticket:
            self.native.wait(part.ticket)

    def logits(self, row: int) -> np.ndarray:
        """A copy of the last step's row of logits, float32 [vocab]."""
        return self.plan.logits(row, 1, place=self.place)[0]

    def lend_logits(self, row: int) -> Logits:
        """The same without a copy, for longer than the next step."""
        return self.plan.lend_logits(row, self.place)


def read_rows(device: NativeDevice, logits: Buffer, first: int, count: int) -> np.ndarray:
    """A copy of rows of `logits`, float32 [rows, vocab], when what was queued before is done."""
    vocab_size = logits.shape[1]
    return device.read(replace(logits, offset=logits.offset + 4 * first * vocab_size), np.float32, (count, vocab_size))


def _rebound(launches: list[Launch], old: Buffer, new: Buffer) -> list[Launch]:
    """The launches with buffer `new` where they bind `old`."""
    return [replace(x, bindings=[new if buffer == old else buffer for buffer in x.bindings]) for x in launches]
