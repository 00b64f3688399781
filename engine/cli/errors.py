"""How the command line reports errors. Apart from the parser, so that a command without MLX does not import it."""
from __future__ import annotations

import sys


class CommandError(Exception):
    """A wrong call of the command line. hint: what to do, without the word `hint`; or None."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


def report(error: BaseException) -> None:
    """Print `error: …` and `hint: …` to stderr. In metalstep's own messages what to do follows the last semicolon."""
    text = " ".join(str(error).split()) or type(error).__name__
    hint = getattr(error, "hint", None)
    if hint is None and not isinstance(error, OSError | CommandError):
        head, semicolon, tail = text.rpartition("; ")
        if semicolon:
            text, hint = head, tail
    print(f"error: {text}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
