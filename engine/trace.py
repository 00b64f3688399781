"""METALSTEP_TRACE=FILE: what happens and when, as Chrome trace events, which Perfetto and chrome://tracing open.

The file is a JSON array that grows by one write per step, so that it can be read whatever ended the process: the format allows that the
closing bracket is missing. Format: "Trace Event Format", docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""
from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
import warnings
from contextlib import suppress
from typing import Any

from metalstep.memory_size import memory_size

FILE, LAUNCHES, LIMIT = "METALSTEP_TRACE", "METALSTEP_TRACE_LAUNCHES", "METALSTEP_TRACE_LIMIT"
DEFAULT_LIMIT = "256MB"  # about an hour of single steps; Perfetto opens up to about 1 GB
END = b"\n]\n"
OPENED = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK  # a named pipe is refused, where it would wait for a reader

logger = logging.getLogger("metalstep")
_open: list[Trace] = []  # this process's, and where it is forked its parent's


def current() -> Trace | None:
    """This process's trace; None where METALSTEP_TRACE is not set. Opens it.

    A second process with the same setting writes to the same name with its process id in it.
    Raises: ValueError for a file that cannot be written, or a setting that does not fit.
    """
    path = os.environ.get(FILE)
    launches = os.environ.get(LAUNCHES, "0") not in ("", "0")
    if not path:
        if launches:
            raise ValueError(f"{LAUNCHES} is set and {FILE} is not, expected the trace's file; set {FILE}=trace.json")
        return None
    path = os.path.abspath(path)
    if not _open or _open[0].pid != os.getpid() or _open[0].asked != path:
        for old in _open:
            old.close()
        _open[:] = [Trace(path, launches, memory_size(LIMIT, os.environ.get(LIMIT, DEFAULT_LIMIT)))]
        atexit.register(_open[0].close)
    _open[0].launches = launches
    return _open[0]


class Trace:
    """An open trace file. asked: the path that it was asked for; path: the one that it has. launches: whether launches are timed.

    Any thread may write, an interrupt may fall anywhere: events go out with one system call. A write that fails, and the limit of bytes,
    end the trace with one warning and nothing else.
    """

    def __init__(self, path: str, launches: bool, limit: int) -> None:
        self.asked, self.launches, self.limit = path, launches, limit
        self.pid = os.getpid()
        self.path, self._file = _create(path)
        self._threads: dict[int, int] = {}
        self._ended = False  # END stands at the end of the file
        self.size = 0
        self._write(b"[\n" + _line(self.metadata("process_name", f"metalstep {self.pid}")))

    # ---- events --------------------------------------------------------------------------------------------------------------
    def metadata(self, name: str, value: str, thread: int = 0) -> dict[str, Any]:
        return {"ph": "M", "name": name, "pid": self.pid, "tid": thread, "ts": 0, "args": {"name": value}}

    def span(self, name: str, began: int, ended: int, **arguments: Any) -> dict[str, Any]:
        """Something that this thread did. Times: ns of time.perf_counter_ns, as in the others."""
        duration = max(0, ended - began) / 1e3
        return {**self._event("X", name, began), "dur": duration, **({"args": arguments} if arguments else {})}

    def counter(self, name: str, at: int, **values: float) -> dict[str, Any]:
        return {**self._event("C", name, at), "args": values}

    def part(self, phase: str, name: str, number: int, at: int, *, of: str = "request", **arguments: Any) -> dict[str, Any]:
        """Of a request, or what else `of` names: phase "b" begins a part of it, "e" ends it, "n" is an instant."""
        return {**self._event(phase, name, at), "cat": of, "id": f"{self.pid}.{number}", "args": arguments}

    def _event(self, phase: str, name: str, at: int) -> dict[str, Any]:
        return {"ph": phase, "name": name, "pid": self.pid, "tid": self._threads.get(threading.get_ident(), 0), "ts": at / 1e3}

    # ---- the file --------------------------------------------------------------------------------------------------------------
    def enter(self) -> None:
        """Make the calling thread known. Before any event of it."""
        if threading.get_ident() not in self._threads:
            thread = threading.get_native_id()
            self._threads[threading.get_ident()] = thread
            self.write([self.metadata("thread_name", threading.current_thread().name, thread)])

    def write(self, events: list[dict[str, Any]]) -> None:
        """Append them, as they stand."""
        if self._file is None or not events:
            return
        data = b"".join(b",\n" + _line(event) for event in events)
        if self.size + len(data) > self.limit:
            self._stop(f"the trace {self.path} ends here, at its limit of {self.limit:,} bytes; set {LIMIT}=1GB for a longer one")
            return
        self._write(data)

    def _write(self, data: bytes) -> None:
        file, size = self._file, self.size
        if file is None or os.getpid() != self.pid:
            return
        try:
            if self._ended:
                os.ftruncate(file, size)  # before the next line, so that an interrupt between them costs nothing
                self._ended = False
            written = os.write(file, data)
        except OSError as error:
            self._stop(f"the trace {self.path} ends here: {error.strerror or error}; free some space or name another file in {FILE}")
            return
        if written < len(data):
            with suppress(OSError):
                os.ftruncate(file, size)
            self._stop(f"the trace {self.path} ends here: no space left on device; free some space or name another file in {FILE}")
            return
        self.size = size + written

    def finish(self) -> None:
        """Close the array; a later event opens it again."""
        if self._file is not None and not self._ended and os.getpid() == self.pid:
            with suppress(OSError):
                self.size = os.fstat(self._file).st_size  # an interrupt, or two threads at once, may have kept `_write` from counting
                self._ended = True
                os.write(self._file, END)

    def close(self) -> None:
        """Nothing more is written."""
        self.finish()
        if self._file is not None and os.getpid() == self.pid:
            file, self._file = self._file, None
            os.close(file)

    def _stop(self, why: str) -> None:
        self.close()
        try:
            warnings.warn(why, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # warnings are errors here, and a trace must not end what it watches
            logger.warning(why)


def now() -> int:
    """ns, of the clock that events have."""
    return time.perf_counter_ns()


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()


def _create(path: str) -> tuple[str, int | None]:
    """Create the file, under another name where another process writes it. Raises: ValueError."""
    root, extension = os.path.splitext(path)
    for name in (path, f"{root}.{os.getpid()}{extension}"):
        file = -1
        try:
            file = os.open(name, OPENED, 0o644)
            if _lock(file):
                os.ftruncate(file, 0)
                return name, file
            os.close(file)
        except OSError as error:
            if file >= 0:
                os.close(file)
            text = error.strerror or str(error)
            raise ValueError(f"{FILE} is {name}, which cannot be written: {text}; name a file in a folder that exists") from None
    raise ValueError(f"{FILE} is {path}, and other processes write it already; name another file")


def _lock(file: int) -> bool:
    """Take the file for this process until it ends, or until a fork of it does."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
