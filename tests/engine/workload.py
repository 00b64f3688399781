"""Ragged requests with every kind of sampling, and what an engine makes of them."""
from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace

from metalstep import Engine, Request, SamplingParams

STOPS = frozenset({2})
SAMPLINGS = [
    {},
    {"temperature": 0.8, "logprobs": 3},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 5},
    {"temperature": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.05, "presence_penalty": 0.5, "presence_context_size": 8},
    {"temperature": 0.7, "logit_bias": {10: 4.0, 20: -3.0}, "banned_token_ids": (11, 12, 13), "min_tokens": 6},
    {"temperature": 1.1, "top_p": 0.95, "top_k": 100, "temperature_first": True, "processed_logprobs": True, "repetition_penalty": 1.1},
    {"repetition_penalty": 1.3, "repetition_context_size": 16, "logprobs": 2},
    {"temperature": 1.0, "allowed_token_ids": tuple(range(30, 90)), "logprobs": 1},
]


def requests(count: int, vocab_size: int, *, longest: int = 60, seed: int = 0, tokens: tuple[int, int] = (4, 14)) -> list[Request]:
    """`count` requests, the same for the same arguments."""
    draw = random.Random(seed)
    return [
        Request(
            [draw.randrange(3, vocab_size) for _ in range(draw.randint(1, longest))],
            SamplingParams(seed=draw.getrandbits(64), **SAMPLINGS[i % len(SAMPLINGS)]),
            draw.randint(*tokens),
            STOPS,
        )
        for i in range(count)
    ]


Tokens = list[tuple]


def answers(engine: Engine, wanted: Iterable[Request]) -> list[Tokens]:
    """(token, logprob, rank, top, finish_reason) of every token of every request, all submitted at once."""
    streams = [engine.submit(request) for request in wanted]
    return [[(o.token, o.logprob, o.rank, o.top, o.finish_reason) for o in stream] for stream in streams]


def alone(engine: Engine, wanted: Sequence[Request]) -> list[Tokens]:
    """The same, one request after the other, a token at a time."""
    return [answers(engine, [replace(request, decode_steps=1, prefill_rows=512)])[0] for request in wanted]


@contextmanager
def watched(engine: Engine):
    """Records (rows, steps) of every native call, and checks the scheduler's invariants after every step."""
    calls: list[tuple[int, int]] = []
    run = engine._runner.run
    step = engine._run

    def record(schedule, *more):
        calls.append((schedule.rows, schedule.steps))
        return run(schedule, *more)

    def checked():
        worked = step()
        engine._scheduler.check(engine.caches.held())
        return worked

    engine._runner.run, engine._run = record, checked
    try:
        yield calls
    finally:
        del engine._runner.run, engine._run
