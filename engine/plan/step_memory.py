"""Device memory that a model's plans use in turn: values of a step in progress, and logits that somebody still reads."""
from __future__ import annotations

import weakref
from collections.abc import Collection

from metalstep.kernels.native import DeviceBuffer, NativeDevice
from metalstep.plan.logits import Logits


class StepMemory:
    """Buffers that all plans of a model have in common: steps run one after the other, and nothing in here outlives one.

    lent: rows of the latest step's logits that lie in here. Every plan calls `keep_lent` before it runs.
    """

    def __init__(self, device: NativeDevice):
        self._device = device
        self._owners: list[DeviceBuffer] = []
        self.lent: list[weakref.ref[Logits]] = []

    def take(self, nbytes: int, taken: Collection[int]) -> DeviceBuffer:
        """The smallest buffer of `nbytes` or more whose handle is not in `taken` (one plan's own), a new one where there is none."""
        fitting = [owner for owner in self._owners if owner.nbytes >= nbytes and owner.handle not in taken]
        if not fitting:
            fitting = [self._device.create_buffer(nbytes, shared=False)]
            self._owners += fitting
        return min(fitting, key=lambda owner: owner.nbytes)

    def keep_lent(self) -> None:
        """A step is about to overwrite everything: who still holds a row of logits gets it to keep."""
        if self.lent:
            for reference in self.lent:
                held = reference()
                if held is not None:
                    held.keep()
            self.lent.clear()
