"""A plan on a device: launches resolved once, run on the step's arrays by one native call for one step or several."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice, NativePlan
from metalstep.plan.logits import Logits, LogitsRing
from metalstep.plan.lower import Lowered
from metalstep.plan.step_arrays import StepArrays, StepBatch, StepStage
from metalstep.plan.target import PlanShape


class Plan:
    """The native plan of one lowered graph, the step's arrays and where its logits are.

    A plan of one row has two places for logits and uses them in turn (see LogitsRing). submitted: when the latest `replay` was queued, by
    time.perf_counter_ns.
    """

    submitted = 0

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
        owners = [self._device.create_buffer(logits.nbytes) for _ in range(2)]
        return [replace(logits, handle=owner.handle, offset=0) for owner in owners]

    @cached_property
    def _ring(self) -> LogitsRing:
        rows = (self.shape.sampled, self._lowered.logits.shape[1])
        lent = None if self.shape.tokens == 1 else self._memory.lent
        return LogitsRing([self._device.numpy(place, np.float32, rows) for place in self._places], lent)

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

    @property
    def logits(self) -> np.ndarray:
        """What the latest step left: float32 [max_sampled, vocab], valid until the next step of any plan."""
        return self._ring.views[self._ring.current]

    def lend_logits(self, row: int) -> Logits:
        """A row of the latest step's logits, for longer than the next step."""
        return self._ring.lend(row)

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
        self.replay()
        return self.arrays.sampled[0, : len(batch.sampled_rows)]

    def replay(self, steps: int = 1) -> None:
        """`steps` steps on what the arrays hold already, in one native call; more than one when MSStep.advance is set."""
        native = self._prepare()
        ticket = native.run(steps)
        self.submitted = time.perf_counter_ns()
        native.wait(ticket)

    @cached_property
    def place_of_logits(self) -> np.ndarray:
        """Where a step with inputs from a stage leaves its logits: float32 [max_sampled, vocab], valid until the next step of any plan."""
        return self._device.numpy(self._lowered.logits, np.float32, (self.shape.sampled, self._lowered.logits.shape[1]))

    def profile(self) -> list[int]:
        """Nanoseconds of each launch in one step on what the arrays hold, barriers included."""
        return self._prepare().profile()

    def _prepare(self) -> NativePlan:
        """The native plan that runs next, with nothing in its way."""
        self.arrays.rewind()
        self._memory.keep_lent()
        return self._native[self._ring.advance()]

    def close(self) -> None:
        made = self.__dict__
        for native in [*made.get("_native", ()), *self._of_stages.values(), *filter(None, map(made.get, ("sampler", "again")))]:
            native.close()


def _rebound(launches: list[Launch], old: Buffer, new: Buffer) -> list[Launch]:
    """The launches with buffer `new` where they bind `old`."""
    return [replace(x, bindings=[new if buffer == old else buffer for buffer in x.bindings]) for x in launches]
