"""A child process that answers lines of JSON with lines of JSON."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


class PeerError(RuntimeError):
    """A process under measurement cannot be started or failed. hint: what to do, or None."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class JsonProcess:
    """`command`, asked over stdin and answering over stdout, one JSON object a line. Its stderr is dropped."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        """environment: all of it."""
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
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
            raise PeerError(f"{self.name}: its process ended with status {self._process.wait()} and no answer")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            hint = "make peers" if "ModuleNotFound" in answer["error"] else None
            raise PeerError(f"{self.name}: {answer['error']}", hint)
        return answer

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
