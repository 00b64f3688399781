"""A plan on a device: launches resolved once, run on the step's arrays by one native call for one step or several."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice, NativePlan
from metalstep.plan.logits import Logits, LogitsRing
from metalstep.plan.lower import Lowered
from metalstep.plan.step_arrays import StepArrays, StepBatch
from metalstep.plan.target import PlanShape


class Plan:
    """The native plan of one lowered graph, the step's arrays and where its logits are.

    A plan of one row has two places for logits and uses them in turn (see LogitsRing).
    """

    def __init__(self, device: NativeDevice, lowered: Lowered, arrays: StepArrays, shape: PlanShape):
        self.shape = shape
        self.arrays = arrays
        self.launches = lowered.launches
        self.arena_bytes = lowered.arena.nbytes
        self._memory = lowered.memory
        launches = [entry.launch for entry in lowered.launches]
        places = [lowered.logits]  # in the arena, where another step's values may overlap them
        if shape.tokens == 1:
            owners = [device.create_buffer(lowered.logits.nbytes) for _ in range(2)]
            places = [replace(lowered.logits, handle=owner.handle, offset=0) for owner in owners]
        self._native = [
            device.create_plan(_rebound(launches, lowered.logits, place), shape.tokens, shape.sampled) for place in places
        ]
        rows = (shape.sampled, lowered.logits.shape[1])
        lent = None if shape.tokens == 1 else self._memory.lent
        self._ring = LogitsRing([device.numpy(place, np.float32, rows) for place in places], lent)

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
        native.wait(native.run(steps))

    def profile(self) -> list[int]:
        """Nanoseconds of each launch in one step on what the arrays hold, barriers included."""
        return self._prepare().profile()

    def _prepare(self) -> NativePlan:
        """The native plan that runs next, with nothing in its way."""
        self.arrays.rewind()
        self._memory.keep_lent()
        return self._native[self._ring.advance()]

    def close(self) -> None:
        for native in self._native:
            native.close()


def _rebound(launches: list[Launch], old: Buffer, new: Buffer) -> list[Launch]:
    """The launches with buffer `new` where they bind `old`."""
    return [replace(x, bindings=[new if buffer == old else buffer for buffer in x.bindings]) for x in launches]
