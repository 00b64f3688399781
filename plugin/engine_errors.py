"""How the server's process learns why the engine's process ended: vLLM itself only says that it did, and its traceback scrolls away."""
from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from metalstep.cli.errors import split_hint

# Names a file, for the processes below `metalstep serve`: nothing for users to set.
VARIABLE = "METALSTEP_ENGINE_ERRORS"
LOGGER = "vllm.v1.engine.core"  # which logs the exception that ends an engine


class EngineErrors(logging.Handler):
    """Appends each exception that its logger reports to a file: a line of JSON with `error` and `hint`."""

    def __init__(self, path: str):
        super().__init__(logging.ERROR)
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(describe(record.exc_info[1])) + "\n")
            except OSError:
                self.handleError(record)


def install() -> None:
    """In a process below `metalstep serve`: keep what ends its engine. Elsewhere, and when called again: nothing."""
    path = os.environ.get(VARIABLE)
    logger = logging.getLogger(LOGGER)
    if path and not any(isinstance(handler, EngineErrors) for handler in logger.handlers):
        logger.addHandler(EngineErrors(path))


def read(path: str) -> tuple[str, str | None] | None:
    """Of the first exception that was written: the message and what to do. None if there is none."""
    try:
        line = Path(path).read_text().split("\n", 1)[0]
        found = json.loads(line)
        return found["error"], found["hint"]
    except (OSError, ValueError):
        return None


def describe(error: BaseException) -> dict[str, str | None]:
    """The error as one line and, of metalstep's own, what to do apart from it."""
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("metalstep."):
        text, hint = split_hint(text)
        return {"error": text, "hint": hint}
    return {"error": f"{type(error).__name__}: {text}" if text else type(error).__name__, "hint": None}
