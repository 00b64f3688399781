"""What is to be done once nobody has an object any more."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref


class Watch(ref[Any]):
    """An object, weakly. When it is collected, in any thread and in the middle of anything, `dropped(watch)` is called; `message`
    is what is to be done then.

    With `dropped` a queue's `append` that is one C call, into which Ctrl-C cannot fall. `weakref.finalize` and `__del__` run bytecodes, and
    Python prints and forgets an interrupt among them: what they would have given back would be lost.
    """

    __slots__ = ("message",)
    message: Callable[[], None]

    def __new__(cls, watched: object, message: Callable[[], None], dropped: Callable[[Watch], Any]) -> Watch:
        return super().__new__(cls, watched, dropped)

    def __init__(self, watched: object, message: Callable[[], None], dropped: Callable[[Watch], Any]) -> None:
        self.message = message
