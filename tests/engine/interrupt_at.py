"""Ctrl-C between two bytecodes of choice, or wherever something is collected."""
from __future__ import annotations

import gc
import sys
from collections.abc import Collection
from pathlib import Path
from types import CodeType

import metalstep

PACKAGE = tuple({str(Path(metalstep.__file__).parent), str(Path(metalstep.__file__).resolve().parent)})


def drop_interrupted(dropped: list) -> None:
    """Clear a list. Ctrl-C comes in every function written in Python that this calls, right at its beginning."""

    def trace(*_):
        raise KeyboardInterrupt

    before = sys.gettrace()
    gc.disable()  # it calls functions that are others' (Hypothesis has one)
    sys.settrace(trace)
    try:
        dropped.clear()
    finally:
        sys.settrace(before)
        gc.enable()


class InterruptAt:
    """Raises KeyboardInterrupt right before the n-th bytecodes that the thread runs in metalstep's own modules, for every n of `points`.

    Signals arrive at fewer places: between some bytecodes the interpreter never looks.
    """

    def __init__(self, points: Collection[int] = ()):
        self.points = frozenset(points)
        self.count = 0
        self.places: dict[tuple[CodeType, int], list[int]] = {}  # when each bytecode ran

    def __enter__(self) -> InterruptAt:
        self._before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 traces bytecodes only if a frame asked for it before settrace
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame, event, argument):
        if event == "call":
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            self.count += 1
            if not self.points:
                self.places.setdefault((frame.f_code, frame.f_lasti), []).append(self.count)
            elif self.count in self.points:
                raise KeyboardInterrupt
        return self._trace
