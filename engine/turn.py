"""Whose turn it is: of the threads that share an engine, one at a time runs a step, or something between two steps.

Ctrl-C may interrupt a thread between any two bytecodes. A mutex whose holder is thrown out there stays locked for good, so there is
none: the turn is one entry of a dict, which single C calls put in and take out, and whoever has waited for long looks whether the thread
whose turn it is is still here.
"""
from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TypeVar

Result = TypeVar("Result")
LOOK_SECONDS = 0.25  # a sleeper looks by itself: an interrupted thread may have left without waking anybody


class Turn:
    """One turn at a time. A thread that is interrupted in its turn, wherever, has left it."""

    def __init__(self) -> None:
        self._holder: dict[None, tuple[int, object]] = {}  # the thread whose turn it is, if there is one, and which turn
        self._visitors: dict[int, None] = {}  # threads that must get a turn before any `run` does
        self._sleepers: deque[threading.Lock] = deque()  # held by threads that sleep; released to wake them

    @property
    def mine(self) -> bool:
        """Whether the calling thread is inside of a turn."""
        return self._thread() == threading.get_ident() and _runs(sys._getframe(), Turn._take.__code__)

    @property
    def awaited(self) -> bool:
        """Whether somebody wants a turn between two runs."""
        return bool(self._visitors)

    def run(self, body: Callable[[], Result]) -> Result | None:
        """`body()` in a turn; None when it is another thread's.

        Raises: RuntimeError from inside of a turn: by a grammar's function, for one.
        """
        self._visitors.pop(threading.get_ident(), None)  # two interrupts may have left a visit of its own there
        if self._visitors:
            self._refuse_inside()
            return None
        return self._take(body)

    def visit(self, body: Callable[[], Result]) -> Result:
        """`body()` in a turn, whatever the others do: waits for the turn in progress only. Raises: as `run`."""
        me = threading.get_ident()
        results: list[Result] = []

        def visited() -> bool:
            self._visitors.pop(me, None)
            results.append(body())
            return True

        try:
            self._visitors[me] = None
            while not self._take(visited):
                self.sleep()
            return results[0]
        finally:
            if self._visitors.pop(me, me) is None:
                self._wake()

    def sleep(self, seconds: float = LOOK_SECONDS, *, idle: bool = False) -> None:
        """Until a turn ends, but no longer than `seconds`. Returns at once when it is nobody's turn, unless `idle`."""
        gate = threading.Lock()
        gate.acquire()
        self._sleepers.append(gate)
        if idle or self._holder or (self._visitors and threading.get_ident() not in self._visitors):
            if gate.acquire(timeout=seconds):
                return
            self._look()
        try:
            self._sleepers.remove(gate)
        except (ValueError, IndexError):  # another thread is about to wake it, or another one
            return

    # ---- inner workings -------------------------------------------------------------------------------------------------------
    def _take(self, body: Callable[[], Result]) -> Result | None:
        self._refuse_inside()
        me, holder = threading.get_ident(), self._holder
        try:
            try:
                turn = (me, object())
                return body() if holder.setdefault(None, turn) is turn else None
            finally:
                self._leave(me)
        finally:
            if self._thread() == me:  # an interrupt cut the first one short
                self._leave(me)

    def _refuse_inside(self) -> None:
        """For `run` and `_take`: whoever is in a turn would wait for itself."""
        if self._thread() == threading.get_ident() and _runs(sys._getframe(2), Turn._take.__code__):
            raise RuntimeError("the engine was called from inside of its own step, by a grammar's function; call it from outside")

    def _leave(self, me: int) -> None:
        if self._thread() == me:
            self._holder.pop(None, None)
            self._wake()

    def _thread(self) -> int | None:
        """The thread whose turn it is."""
        turn = self._holder.get(None)
        return None if turn is None else turn[0]

    def _wake(self) -> None:
        sleepers = self._sleepers
        while sleepers:
            try:
                gate = sleepers.popleft()
            except IndexError:  # another thread took it
                return
            gate.release()

    def _look(self) -> None:
        """Forget threads that are no longer here: of two interrupts, the second can take one out of `_take` before it has left its turn."""
        turn = self._holder.get(None)
        frames = sys._current_frames()  # behind it: whoever had this turn then, and has it still, is among them
        if turn is not None and not _runs(frames.get(turn[0]), Turn._take.__code__) and self._holder.get(None) is turn:
            self._holder.pop(None, None)
        for visitor in list(self._visitors):
            if not _runs(frames.get(visitor), Turn.visit.__code__):
                self._visitors.pop(visitor, None)


def _runs(frame: FrameType | None, code: CodeType) -> bool:
    """Whether `frame` or a caller of it runs a function."""
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
