"""Ctrl-C between two bytecodes of choice, or wherever something is collected."""
from __future__ import annotations

import dis
import functools
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
    """Raises KeyboardInterrupt right before the n-th bytecodes that the thread runs in the files `within` (metalstep's own), for every n of
    `points`: the first anywhere, though between some bytecodes the interpreter never looks for signals; those behind it at the next place
    where it does, since CPython's own clean-up is not made for another one in its middle.
    """

    def __init__(self, points: Collection[int] = (), within: tuple[str, ...] = PACKAGE):
        self.points = sorted(set(points), reverse=True)
        self.count = 0
        self.places: dict[tuple[CodeType, int], list[int]] = {}  # when each bytecode ran
        self._within = within
        self._counts = not points
        self._raised = 0

    def __enter__(self) -> InterruptAt:
        self._before = sys.gettrace(), sys.getprofile()
        if len(self.points) > 1:
            sys.setprofile(self._profile)
        sys._getframe().f_trace_opcodes = True  # Python 3.12 traces bytecodes only if a frame asked for it before settrace
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before[1])  # which would put the other one back
        sys.settrace(self._before[0])

    def _trace(self, frame, event, argument):
        if event == "call":
            if not frame.f_code.co_filename.startswith(self._within):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            self.count += 1
            if self._counts:
                self.places.setdefault((frame.f_code, frame.f_lasti), []).append(self.count)
            elif self.points and self.count >= self.points[-1] and (not self._raised or frame.f_lasti in looks(frame.f_code)):
                self.points.pop()
                self._raised += 1
                raise KeyboardInterrupt
        return self._trace

    def _profile(self, frame, event, argument):
        """The interpreter takes away a trace function that has raised."""
        if self._raised and self.points and sys.gettrace() is None:
            sys.settrace(self._trace)
            while frame is not None:
                if frame.f_code.co_filename.startswith(self._within):
                    frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = self._trace, True, False
                frame = frame.f_back


@functools.cache
def looks(code: CodeType) -> frozenset[int]:
    """Where the interpreter looks for signals: behind calls, at the beginning and at jumps back."""
    found, before = set(), ""
    for instruction in dis.get_instructions(code):
        if before.startswith(("CALL", "RESUME")) or "BACKWARD" in before:
            found.add(instruction.offset)
        if "BACKWARD" in instruction.opname:
            found.add(instruction.argval)
        before = instruction.opname
    return frozenset(found)
