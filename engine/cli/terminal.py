"""Lines from a terminal or a pipe, and Ctrl-C while an answer is written."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from types import FrameType
from typing import Any


class Lines:
    """What the user types. A prompt is shown only on a terminal; a pipe is read line by line."""

    def __init__(self) -> None:
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not UTF-8 is an error of its line, not the end
        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() then has editing and a history

    def line(self, prompt: str) -> str:
        """One line without its end. Raises: EOFError at the end of input."""
        if sys.stdin is None:  # closed by the caller
            raise EOFError
        if self.terminal and sys.stdout.isatty():
            return input(prompt)
        if self.terminal:  # stdout is a file: it gets answers and no prompts
            print(prompt, end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        return text.rstrip("\r\n")

    def message(self) -> str:
        """One line, with those that follow a line's trailing backslash. Raises: EOFError."""
        lines = [self.line("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self.line("… "))
            except EOFError:
                break
        return "\n".join(lines)

    def until(self, end: str) -> str:
        """All lines before one that is `end`, or before the end of input."""
        lines = []
        try:
            while (line := self.line("… ")).strip() != end:
                lines.append(line)
        except EOFError:
            pass
        return "\n".join(lines)


class Interrupts:
    """While it is entered, the first Ctrl-C sets `asked`, so that a step is never cut in two; the next one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
