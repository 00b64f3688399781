"""The inputs of a decode step of one sequence: what the sequence keeps is written once, a token's own few numbers each step.

Between two steps the weights have swept the caches, so every line of Python runs cold: memoryviews touch less code than numpy.
"""
from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from metalstep.plan.plan import SAMPLING, Plan
from metalstep.sampling import SamplingParams

SAMPLED = struct.Struct("<ifII")  # MSSampled: token, logprob, rank, status
COUNTER = list(SAMPLING.names or ()).index("counter")  # words of MSSampling before it


class DecodeInputs:
    """Writes the arrays of a one-row `plan` and reads its result."""

    def __init__(self, plan: Plan):
        arrays = plan.arrays
        self._plan = plan
        self._arrays = arrays
        self._tokens, self._positions, self._slot_mapping = arrays.tokens.data, arrays.positions.data, arrays.slot_mapping.data
        self._sampling = arrays.sampling.view(np.uint32).data
        self._sampled = arrays.sampled.view(np.uint8).data

    def step(
        self, owner: object, sampling: SamplingParams, blocks: Sequence[int], token: int, position: int, slot: int, counter: int
    ) -> tuple[int, float, int, int]:
        """Run one step; returns token, logprob, rank and status.

        owner: names the sequence and the length of `blocks`; the arrays are filled anew when it differs from the last step's.
        """
        arrays = self._arrays
        if arrays.owner != owner:
            arrays.fill_one(sampling, blocks)
            arrays.owner = owner
        self._tokens[0] = token
        self._positions[0] = position
        self._slot_mapping[0] = slot
        self._sampling[COUNTER] = counter
        self._plan.replay()
        return SAMPLED.unpack_from(self._sampled)
