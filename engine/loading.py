"""How far a load has come, for whoever listens: the command line shows it, and nobody listens otherwise."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Of (what is done, bytes done of it, bytes of it in all); the bytes are 0 where they say nothing.
Listener = Callable[[str, int, int], None]
_state: ContextVar[_Loading | None] = ContextVar("metalstep_loading", default=None)


class _Loading:
    def __init__(self, listener: Listener):
        self.listener = listener
        self.what, self.done, self.total = "", 0, 0

    def tell(self) -> None:
        self.listener(self.what, min(self.done, self.total), self.total)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """While it is entered, `listener` hears of every load of this thread."""
    token = _state.set(_Loading(listener))
    try:
        yield
    finally:
        _state.reset(token)


def stage(what: str, total: int = 0) -> None:
    """What is done from now on. total: the bytes of which `advance` tells, about."""
    if loading := _state.get():
        loading.what, loading.done, loading.total = what, 0, total
        loading.tell()


def advance(nbytes: int) -> None:
    """So many bytes more are done."""
    if loading := _state.get():
        loading.done += nbytes
        loading.tell()
