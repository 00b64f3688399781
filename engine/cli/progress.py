"""How much of a long prompt is processed, on stderr while it is."""

from __future__ import annotations

import sys
import time

LONG = 2048  # tokens of a prompt that is worth a line
CLEAR_LINE = "\r\x1b[K"


class PromptProgress:
    """A prompt_progress_callback: one line that a terminal redraws, or a line per tenth where stderr is none and `lines` is set."""

    def __init__(self, lines: bool):
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._lines = lines
        self._began = time.perf_counter()
        self._first: int | None = None  # tokens already processed at the first call: cached ones cost no time
        self._tenth = 0

    def __call__(self, done: int, total: int) -> None:
        if self._first is None:
            self._first, self._began = done, time.perf_counter()
        if total < LONG:
            return
        if self._terminal:
            print(CLEAR_LINE if done >= total else f"{CLEAR_LINE}{self._text(done, total)}", end="", file=sys.stderr, flush=True)
        elif self._lines and 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            print(self._text(done, total), file=sys.stderr, flush=True)

    def _text(self, done: int, total: int) -> str:
        text = f"prompt: {done:,} of {total:,} tokens"
        seconds, fresh = time.perf_counter() - self._began, done - (self._first or 0)
        return f"{text}, {fresh / seconds:.0f} tok/s" if fresh > 0 and seconds > 0 else text
