"""Logits of a step, handed out without a copy: they stay where the step wrote them until a later step needs the place."""
from __future__ import annotations

import weakref

import numpy as np


class Logits:
    """One row of logits, float32 [vocab]. It stays where the step wrote it as long as nothing needs the place."""

    __slots__ = ("__weakref__", "_lent", "_values")

    def __init__(self, view: np.ndarray, *, lent: bool = False):
        """lent: the view's place is overwritten by and by; `keep` is called before."""
        self._values = view
        self._lent = lent

    def numpy(self) -> np.ndarray:
        """The values, for reading. From any thread, while another one runs steps."""
        while self._lent:
            values = self._values
            copied = values.copy()
            if values is self._values:  # so `keep` had not been called, and nothing had been overwritten
                return copied
        return self._values

    def keep(self) -> None:
        """The place is about to be overwritten."""
        self._values = self._values.copy()
        self._lent = False


class LogitsRing:
    """The places that a plan's steps write logits to in turn. With two, a caller that drops each response before it asks for the one
    after the next never pays for a copy.

    views: float32 [sampled, vocab] each. lent: of rows whose place is nobody's alone, where StepMemory finds them; None: the ring's own.
    """

    def __init__(self, views: list[np.ndarray], lent: list[weakref.ref[Logits]] | None = None):
        self.views = views
        self._rows = [list(view) for view in views]
        self.current = 0
        self._lent: list[list[weakref.ref[Logits]]] = [[] if lent is None else lent for _ in views]

    def advance(self) -> int:
        """Move on to the next place, saving what is still held there; returns its number."""
        self.current = (self.current + 1) % len(self.views)
        lent = self._lent[self.current]
        if lent:
            for reference in lent:
                held = reference()
                if held is not None:
                    held.keep()
            lent.clear()
        return self.current

    def lend(self, row: int) -> Logits:
        """A row of the latest step, to one caller."""
        logits = Logits(self._rows[self.current][row], lent=True)
        self._lent[self.current].append(weakref.ref(logits))
        return logits
