"""How far a load and a long prompt have come, on stderr while they last."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from metalstep import loading
from metalstep.hub.progress import CLEAR_LINE

LONG = 2048  # tokens of a prompt that is worth a line
PATIENCE = 1.0  # seconds of a load that are not worth a line
INTERVAL = 0.2  # seconds between two drawings of it


@contextmanager
def load_progress(name: str) -> Iterator[None]:
    """A line on what a load does, where stderr is a terminal and the load takes longer than PATIENCE. name: of the model."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    now = [("", 0, 0)]
    ended = threading.Event()

    def heard(what: str, done: int, total: int) -> None:
        now[0] = (what, done, total)

    def draw() -> None:
        drawn, wait = False, PATIENCE
        while not ended.wait(wait):
            drawn, wait = True, INTERVAL
            print(f"{CLEAR_LINE}{load_text(name, *now[0])}", end="", file=sys.stderr, flush=True)
        if drawn:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)

    drawing = threading.Thread(target=draw, daemon=True)
    drawing.start()
    try:
        with loading.heard_by(heard):
            yield
    finally:
        ended.set()
        drawing.join()


def load_text(name: str, what: str, done: int, total: int) -> str:
    """`m.gguf: loading weights, 1.2 of 4.5 GB`."""
    size = f", {done / 1e9:.1f} of {total / 1e9:.1f} GB" if total else ""
    return f"{name}: {what or 'opening'}{size}"


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
