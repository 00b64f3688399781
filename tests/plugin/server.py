"""`metalstep serve` as a process of a test: started on a free port, waited for, and ended with its engine."""
from __future__ import annotations

import os
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from metalstep.bench.serve_process import free_port, metalstep_command

START = 300  # seconds; a machine that does nothing else needs 15
CHECK = 0.2  # seconds between looks at a server that starts
TAIL = 40  # lines of the log in an error


class Server:
    """A running server. url: without a path. process: the API server's; engine: its engine's."""

    def __init__(self, arguments: Sequence[str], log: Path, *, tls: bool = False):
        """Start it and wait until it answers. arguments: MODEL and options. Raises: RuntimeError with the end of its log."""
        port = free_port()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        self.log = log
        # Sleeping and looking into the engine are routes of vLLM's development mode.
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        command = [*metalstep_command(arguments[0], arguments[1:]), "--port", str(port)]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + START
        unchecked = ssl._create_unverified_context()
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode} before it answered:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5, context=unchecked):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(CHECK)
        raise RuntimeError(f"the server did not answer within {START} s:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL:])

    @property
    def engine(self) -> psutil.Process:
        """The process with the model: the child that takes the most memory."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(children, key=lambda child: child.memory_info().rss)

    def stop(self) -> None:
        """End it, in the end by force: nothing of it stays behind."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
