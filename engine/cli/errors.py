"""How the command line reports errors. Apart from the parser, so that a command without MLX does not import it."""
from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable

HINTS = dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "check its permissions, or name a place that can be used")
HINTS |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or write to another disk")
DEBUG = "METALSTEP_DEBUG"  # the variable that --debug sets, so that processes which a command starts have it too
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class CommandError(Exception):
    """A wrong call of the command line. hint: what to do, without the word `hint`; or None."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def split_hint(text: str) -> tuple[str, str | None]:
    """A message of metalstep's own and what to do, which follows its last semicolon; None where there is none."""
    head, semicolon, tail = text.rpartition("; ")
    return (head, tail) if semicolon else (text, None)


def of_system(error: OSError) -> tuple[str, str | None]:
    """An error of the operating system without its number, and what to do; None where the error says it."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    text = f"{' and '.join(names)}: {error.strerror}" if names else str(error.strerror)
    return " ".join(text.split()), HINTS.get(error.errno or 0)


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that somebody who typed `word` may have meant; None where none is like it."""
    found = difflib.get_close_matches(word, list(known), 1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, word: str, known: Iterable[str], more: str) -> CommandError:
    """`word` is none of `known`. what: as in `no command`. more: the call that lists what there is."""
    names = list(known)
    meant = closest(word, names)
    hint = f"did you mean {meant}? `{more}` describes them" if meant else more
    return CommandError(f"{what} {word!r}, expected one of {', '.join(names)}", hint)


def printable(text: str) -> str:
    """`text` without what a terminal obeys instead of showing it: names and metadata of models may come from anybody."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def report(error: BaseException) -> None:
    """Print `error: …` and `hint: …` to stderr, behind the traceback where that is wanted."""
    if debugging():
        traceback.print_exception(error)
    text = printable(" ".join(str(error).split())) or type(error).__name__
    hint = getattr(error, "hint", None)
    if isinstance(error, OSError) and error.strerror:
        text, own = of_system(error)
        hint = hint or own
    elif hint is None and not isinstance(error, CommandError):
        text, hint = split_hint(text)
    print(f"error: {text}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)


def report_bug(error: BaseException) -> None:
    """Print what no user's mistake explains: an exception that nobody meant to be seen."""
    if debugging():
        traceback.print_exception(error)
        hint = "`metalstep doctor --report FILE` writes what a maintainer needs beside this traceback"
    else:
        hint = "--debug shows where; `metalstep doctor --report FILE` writes what else a maintainer needs"
    text = printable(" ".join(f"{type(error).__name__}: {error}".split())).removesuffix(":")
    print(f"error: {text}. This is a bug in metalstep.\nhint: {hint}", file=sys.stderr)
