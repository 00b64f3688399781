"""Tiny engines for tests of what an engine does, and requests of every kind that has a path of its own through it."""
from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from families import BASE, FAMILIES, VOCAB, build
from tiny import write_model

import metalstep
from metalstep import Engine, Request, SamplingParams
from metalstep.grammar import ChoiceGrammar
from metalstep.models.cache import make_prompt_cache
from metalstep.stream import Stream

TEXT = [(7 * i + 3) % (VOCAB - 3) + 3 for i in range(200)]
CHOICES = [TEXT[:9], TEXT[9:15]]


def directory_of(name: str, path: Path) -> Path:
    """A tiny model of a family."""
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config}
    return write_model(path, build(name, quantized=False), config)


def load(name: str, path: Path, **options: Any) -> metalstep.Model:
    return metalstep.load(directory_of(name, path), strict=True, **options)[0]


def pick(tokens: list[int], logits: np.ndarray) -> tuple[int, float, np.ndarray]:
    """The second most likely token."""
    token = int(np.argsort(logits)[-2])
    return token, float(logits[token]), logits


Start = Callable[[Engine, Any], Stream]


def kinds(model: metalstep.Model, count: int) -> list[Start]:
    """One function per kind of request: submits it to the engine; the second argument is a prompt cache or None for one of its own."""

    def plain(prompt: list[int], sampling: dict | None = None, **fields: Any) -> Start:
        request = Request(prompt, SamplingParams(seed=7, **(sampling or {})), count, **fields)
        return lambda engine, _: engine.submit(request)

    def with_cache(max_kv_size: int | None) -> Start:
        def start(engine: Engine, cache: Any) -> Stream:
            own = make_prompt_cache(model, max_kv_size) if cache is None else cache
            return engine.submit(Request(TEXT[3:23], SamplingParams(seed=5, temperature=0.9), count // 2, prompt_cache=own))

        return start

    def choosing(engine: Engine, _: Any) -> Stream:
        return engine.submit(Request(TEXT[:4], max_tokens=count, grammar=ChoiceGrammar(CHOICES)))

    return [
        plain(TEXT[:5], {"temperature": 0.8, "logprobs": 3}),
        plain(TEXT[:40], {"temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3}, prefill_rows=16),
        plain(TEXT[2:12], {"prompt_logprobs": 2, "presence_penalty": 0.5}, decode_steps=4),
        plain(TEXT[4:9], keep_logits=True),
        lambda engine, _: engine.submit(Request(TEXT[6:14], max_tokens=count // 2, hand_out_logits=True), pick),
        choosing,
        with_cache(None),
        with_cache(20),
    ]


def row(output: metalstep.TokenOutput) -> tuple:
    return output.token, output.logprob, output.rank, output.top, output.finish_reason


def rows(stream: Stream) -> list[tuple]:
    """What is left of a stream."""
    return [row(output) for output in stream]


def one_step_at_a_time(request: Request) -> Request:
    return replace(request, decode_steps=1, prefill_rows=512)


def check(model: metalstep.Model, held: int = 0) -> None:
    """Nothing runs, nothing is lost, and `held` blocks of the first group are prompt caches'."""
    gc.collect()  # exceptions, and the frames in their tracebacks, name each other
    engine = model.engine
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert not engine._active and not engine._parked and not engine._turn._holder and not engine._turn._visitors
    engine._scheduler.check(engine.caches.held())
    assert stats.free_blocks + held == stats.total_blocks
