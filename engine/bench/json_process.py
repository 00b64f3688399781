"""A child process that answers lines of JSON with lines of JSON."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

LAST_WORDS = 2000  # bytes of stderr in an error


class PeerError(RuntimeError):
    """A process under measurement cannot be started or failed. hint: what to do, or None."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class JsonProcess:
    """`command`, asked over stdin and answering over stdout, one JSON object a line. Its stderr is heard of when it ends unasked."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        """environment: all of it."""
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=dict(environment),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request. Raises: PeerError with the process's own text when it answers {"error"} or has ended."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise PeerError(f"{self.name}: its process has ended") from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that it says. Raises: as `ask`."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self.name}: its process ended with status {self._process.wait()} and no answer{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            hint = "make peers" if "ModuleNotFound" in answer["error"] else None
            raise PeerError(f"{self.name}: {answer['error']}", hint)
        return answer

    def _last_words(self) -> str:
        """The end of what it wrote to stderr."""
        size = self._stderr.seek(0, 2)
        self._stderr.seek(max(0, size - LAST_WORDS))
        text = self._stderr.read().decode(errors="replace").strip()
        return f": {text}" if text else ""

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()
