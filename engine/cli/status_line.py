"""A line below a text that is being written: how fast it comes. On a terminal only."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING

from metalstep.hub.progress import CLEAR_LINE

if TYPE_CHECKING:
    from metalstep.model import Model

SECONDS = 0.2  # between two redraws
# VT100: a line below the cursor is made where there is none, then the cursor is put back to where the text goes on.
LINE_BELOW, SAVE, RESTORE, CLEAR_BELOW = "\x1bD\x1b[A", "\x1b7", "\x1b8", "\x1b[J"


class StatusLine:
    """Writes a text to stdout piece by piece, and on a terminal, if `wanted`, a line about it to stderr. Call `end` behind it.

    Where stdout is no terminal, the line is all that there is to see, and redrawn in place.
    """

    def __init__(self, model: Model, wanted: bool) -> None:
        self._model = model
        self._shown = wanted and sys.stderr is not None and sys.stderr.isatty()
        self._below = sys.stdout is not None and sys.stdout.isatty()
        self._first = self._latest = 0.0
        self._tokens = 0
        self._drawn = False
        self._text = ""

    def write(self, text: str) -> None:
        """A piece of the text that comes with a token."""
        if not self._shown:
            print(text, end="", flush=True)
            return
        now = time.perf_counter()
        self._tokens += 1
        self._first = self._first or now
        self._clear()
        print(text, end="", flush=True)
        if self._tokens > 1 and now - self._latest >= SECONDS:
            self._latest, self._text = now, self.text(now)
        if self._text:
            self._draw()

    def end(self) -> None:
        """Take the line away."""
        if self._shown:
            self._clear()

    def _clear(self) -> None:
        if self._drawn:
            self._drawn = False
            print(CLEAR_BELOW if self._below else CLEAR_LINE, end="", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        text = self._text[: shutil.get_terminal_size().columns - 1]
        drawn = f"{LINE_BELOW}{SAVE}\x1b[B\r{text}{RESTORE}" if self._below else f"{CLEAR_LINE}{text}"
        print(drawn, end="", file=sys.stderr, flush=True)
        self._drawn = True

    def text(self, now: float) -> str:
        """The line. now: by time.perf_counter."""
        seconds = now - self._first
        rate = f", {(self._tokens - 1) / seconds:.1f} tok/s" if seconds > 0 else ""
        return f"[{self._tokens:,} tokens{rate}{kv_use(self._model)}]"


def kv_use(model: Model) -> str:
    """`, KV cache 1.2 of 2,048 MB`; nothing for a model that runs eagerly."""
    if model.native is None:
        return ""
    stats = model.engine.stats(wait=False)
    return f", KV cache {stats.kv_used_bytes / 1e6:.1f} of {stats.kv_total_bytes / 1e6:,.0f} MB"
