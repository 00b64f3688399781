"""Requests of one engine, driven step by step by one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from metalstep.engine import Engine
from metalstep.request import Request, TokenOutput


def engine_steps(engine: Engine, requests: Sequence[Request]) -> Generator[list[list[TokenOutput]], None, None]:
    """Submit `requests` together; each `next` waits for one native call and gives what is new for each of them.

    Ends when all have ended; closing the generator cancels those that have not. Raises: what ends a request.
    """
    streams = [engine.submit(request) for request in requests]
    try:
        while waiting := [stream for stream in streams if not stream.finished]:
            engine.wait(waiting)
            new: list[list[TokenOutput]] = []
            for stream in streams:
                new.append([])
                while (output := stream.poll()) is not None:
                    new[-1].append(output)
            yield new
    finally:
        for stream in streams:
            stream.close()


def decode_steps(engine: Engine, requests: Sequence[Request]) -> Generator[None, None, None]:
    """As `engine_steps`, but the first `next` takes in all prompts; each one behind it is a decode of all requests."""
    with contextlib.closing(engine_steps(engine, requests)) as steps:
        begun = [False] * len(requests)
        while not all(begun):
            begun = [known or bool(new) for known, new in zip(begun, next(steps), strict=True)]
        yield
        for _ in steps:
            yield
