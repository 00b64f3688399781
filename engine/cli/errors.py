"""How the command line reports errors. Apart from the parser, so that a command without MLX does not import it."""
from __future__ import annotations

import sys


class CommandError(Exception):
    """A wrong call of the command line. hint: what to do, without the word `hint`; or None."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


def split_hint(text: str) -> tuple[str, str | None]:
    """A message of metalstep's own and what to do, which follows its last semicolon; None where there is none."""
    head, semicolon, tail = text.rpartition("; ")
    return (head, tail) if semicolon else (text, None)


def report(error: BaseException) -> None:
    """Print `error: …` and `hint: …` to stderr."""
    text = " ".join(str(error).split()) or type(error).__name__
    hint = getattr(error, "hint", None)
    if hint is None and not isinstance(error, OSError | CommandError):
        text, hint = split_hint(text)
    print(f"error: {text}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
