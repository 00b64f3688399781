"""How far a download is, on stderr: a bar that a terminal redraws, or a line per tenth where stderr is none."""
from __future__ import annotations

import os
import shutil
import sys
import threading
import time

CLEAR_LINE = "\r\x1b[K"
REDRAW = 0.1  # seconds
MIN_LINE = 2.0  # seconds between lines of a download that is not on a terminal
BAR = 24  # characters


def size(nbytes: float) -> str:
    """`1.23 GB`: decimal units, as the hub shows."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 99.5 else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


class Progress:
    """Bytes of all files of a download together. `add` may be called by several threads."""

    def __init__(self, title: str, total: int, done: int = 0):
        """total: bytes of the download. done: bytes of it that were here before."""
        self.title, self.total, self.done, self._before = title, total, done, done
        quiet = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0").upper() in ("1", "ON", "YES", "TRUE")
        self._shown = not quiet and sys.stderr is not None
        self._terminal = self._shown and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._began = self._drawn = time.monotonic()
        self._tenth = 10 * done // max(total, 1)

    def begin(self) -> None:
        kept = f", {size(self.done)} of it here already" if self.done else ""
        self.say(f"downloading {self.title}: {size(self.total)}{kept}")

    def add(self, nbytes: int) -> None:
        """nbytes: just received; negative where bytes had to be thrown away."""
        with self._lock:
            self.done += nbytes
            self._before += min(nbytes, 0)
            now = time.monotonic()
            if self._terminal and now - self._drawn >= REDRAW:
                self._drawn = now
                print(f"{CLEAR_LINE}{self._line(now)}", end="", file=sys.stderr, flush=True)
            tenth = 10 * self.done // max(self.total, 1)
            if self._shown and not self._terminal and tenth > self._tenth and now - self._drawn >= MIN_LINE:
                self._drawn, self._tenth = now, tenth
                print(self._line(now), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._shown:
            print(f"{CLEAR_LINE if self._terminal else ''}{text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        seconds = time.monotonic() - self._began
        self.say(f"downloaded {size(self.done - max(self._before, 0))} in {duration(seconds)}{self._rate(seconds, ', ')}")

    def _line(self, now: float) -> str:
        share = min(self.done / max(self.total, 1), 1.0)
        seconds = now - self._began
        text = f"{share:4.0%}  {size(self.done)} of {size(self.total)}{self._rate(seconds, '  ')}"
        fresh = self.done - self._before
        if fresh > 0 and self.total > self.done:
            text += f"  {duration((self.total - self.done) * seconds / fresh)} left"
        if not self._terminal:
            return text
        bar = "#" * round(BAR * share)
        return f"[{bar:<{BAR}}] {text}"[: shutil.get_terminal_size().columns - 1]

    def _rate(self, seconds: float, before: str) -> str:
        fresh = self.done - self._before
        return f"{before}{size(fresh / seconds)}/s" if fresh > 0 and seconds >= 0.05 else ""


def duration(seconds: float) -> str:
    """`5 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
