"""Logits of a step, handed out without a copy: they stay where the step wrote them until a later step needs the place."""
from __future__ import annotations

import weakref

import numpy as np


class Logits:
    """One row of logits, float32 [vocab]. A copy is made only if it is still held when its place is overwritten."""

    __slots__ = ("__weakref__", "_values")

    def __init__(self, view: np.ndarray):
        self._values = view

    def numpy(self) -> np.ndarray:
        """The values, for reading now: the array may change with a later step."""
        return self._values

    def keep(self) -> None:
        """The place is about to be overwritten."""
        self._values = self._values.copy()


class LogitsRing:
    """The places that a plan's steps write logits to in turn. With two, a caller that drops each response before it asks for the one
    after the next never pays for a copy.

    views: float32 [sampled, vocab] each.
    """

    def __init__(self, views: list[np.ndarray]):
        self.views = views
        self._rows = [view[0] for view in views]
        self.current = 0
        self._lent: list[weakref.ref[Logits] | None] = [None] * len(views)

    def advance(self) -> int:
        """Move on to the next place, saving what is still held there; returns its number."""
        self.current = (self.current + 1) % len(self.views)
        lent = self._lent[self.current]
        if lent is not None:
            held = lent()
            if held is not None:
                held.keep()
            self._lent[self.current] = None
        return self.current

    def lend(self) -> Logits:
        """The first row of the latest step, to one caller."""
        logits = Logits(self._rows[self.current])
        self._lent[self.current] = weakref.ref(logits)
        return logits
