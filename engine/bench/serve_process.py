"""A server under measurement: a child process with an HTTP port and a log."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metalstep.bench.json_process import PeerError
from metalstep.bench.process_tree import Usage, cpu_seconds, usage

READY_TIMEOUT = 600.0  # seconds; a first start may compile
POLL = 0.05


class ServerProcess:
    """`command` with `--host` and `--port` behind it. Close it, or use it in a with statement.

    ready_s: from its start to the first 200 of /health, after `wait_ready`. log: the file that has its stdout and stderr.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ):
        """environment: on top of this process's own. port: None takes a free one."""
        self.name = name
        self.port = port or free_port()
        self.log = log
        self.ready_s = 0.0
        with log.open("w") as file:
            self._started = time.perf_counter()
            # A session of its own: a signal to it reaches every process of the server, and Ctrl-C here none of them.
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait for /health. Raises: PeerError when the server ends or `timeout` seconds pass, with its own last error."""
        while not self.healthy():
            if self.status is not None:
                raise PeerError(
                    f"{self.name} ended with status {self.status} before it was ready: {last_error(self.log)}", self._command_hint()
                )
            if time.perf_counter() - self._started > timeout:
                raise PeerError(f"{self.name} was not ready within {timeout:.0f} s: {last_error(self.log)}")
            time.sleep(POLL)
        self.ready_s = time.perf_counter() - self._started

    def healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        """(status, body). Raises: OSError where nothing answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise OSError(f"{self.name}: {path} gave no answer ({type(error).__name__}: {error})") from error
        finally:
            connection.close()

    def model_name(self) -> str:
        """The name that requests give the model."""
        models: list[dict[str, Any]] = json.loads(self.get("/v1/models")[1])["data"]
        return str(models[0]["id"])

    def version(self) -> str:
        """vLLM's version, as the server says."""
        return str(json.loads(self.get("/version")[1])["version"])

    def usage(self) -> list[Usage]:
        """Of every process of the server, the one that was started first."""
        return usage(self.pid)

    def cpu_seconds(self) -> float:
        """Processor time of every process of the server so far."""
        return cpu_seconds(self.pid)

    def idle_cpu(self, seconds: float) -> float:
        """The share of one core, as 0.01 for 1 %, that the server takes in the next `seconds` in which nobody asks it anything."""
        before, started = self.cpu_seconds(), time.perf_counter()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / (time.perf_counter() - started)

    def close(self) -> None:
        """End it, and every process that it started."""
        if self.status is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def _command_hint(self) -> str | None:
        return "metalstep setup vllm" if "No module named 'vllm'" in self.log.read_text(errors="replace") else None

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def metalstep_command(model: str, flags: Sequence[str]) -> list[str]:
    """`metalstep serve` with this Python. flags: of vLLM's server."""
    return [sys.executable, "-m", "metalstep.cli.main", "serve", model, *flags]


def free_port() -> int:
    """A TCP port that nobody listens on at 127.0.0.1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def last_error(log: Path) -> str:
    """The line of a log that says what went wrong: the last exception's or, where there is none, its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(\w+Error|Exception|error): ", line)]
    # vLLM says the cause first, and ends with an error that only refers to it.
    causes = [line for line in errors if "root cause" not in line]
    return (causes or errors or lines or ["it printed nothing"])[-1][-500:]
