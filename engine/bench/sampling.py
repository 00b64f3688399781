"""What sampling costs: time of a decode step with filters, penalties and logprobs against a greedy one."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from metalstep.bench.engine_steps import decode_steps
from metalstep.bench.machine import machine
from metalstep.bench.prompts import TEXT, Prompts
from metalstep.bench.rounds import Progress
from metalstep.bench.statistics import ratio, summary
from metalstep.engine import Engine
from metalstep.model import Model
from metalstep.request import Request
from metalstep.sampling import SamplingParams

GREEDY, EVERYTHING = "greedy", "everything"
FILTERS: dict[str, Any] = {
    "temperature": 0.8, "top_p": 0.95, "min_p": 0.02, "top_k": 64, "xtc_probability": 0.5, "xtc_threshold": 0.05,
}  # fmt: skip
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.1, "repetition_context_size": 20, "presence_penalty": 0.2, "frequency_penalty": 0.2,
}  # fmt: skip
LOGPROBS: dict[str, Any] = {"logprobs": 20}
AHEAD = 64  # tokens that the first sequences may have when the last one has its first
SOME_TOKENS = 16  # with a bias, and as many that are banned


def parameter_sets(tokens: Sequence[int], generated: int) -> dict[str, dict[str, Any]]:
    """Fields of SamplingParams by the name of their set; the first is greedy, the last has everything on.

    tokens: distinct ids, some of which get a bias and others are banned. generated: min_tokens, so that no stop token ends a text.
    """
    biased, banned = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    adjusted = {
        **PENALTIES,
        "logit_bias": dict.fromkeys(biased, -1.0),
        "banned_token_ids": tuple(banned),
        "min_tokens": generated,
    }
    return {
        GREEDY: {},
        "temperature": {"temperature": FILTERS["temperature"]},
        "filters": FILTERS,
        "penalties": PENALTIES,
        "logprobs": LOGPROBS,
        EVERYTHING: {**FILTERS, **adjusted, **LOGPROBS},
    }


def bench_sampling(
    model: Model,
    tokenizer: Any,
    *,
    batch: int,
    context: int,
    steps: int,
    pairs: int,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Decode `batch` sequences together for `steps` steps with each set of parameters, the sets in turns, `pairs` rounds.

    context: tokens of each prompt; prompts are fresh each time and not timed. A round before the first is not counted, and every
    other round runs backwards. A sample is the median step of a round. Returns rows per set: see `row`.
    Raises: NotImplementedError for a model without a native step.
    """
    ids = [int(token) for token in tokenizer.encode(TEXT)]
    prompts = Prompts(ids)
    sets = parameter_sets(list(dict.fromkeys(ids))[: 2 * SOME_TOKENS], steps + AHEAD)
    samples: dict[str, list[float]] = {name: [] for name in sets}
    for round_number in range(pairs + 1):
        for name in list(sets) if round_number % 2 else list(sets)[::-1]:
            progress(f"round {round_number} of {pairs}: {name}")
            fields = sets[name]
            stops = frozenset(tokenizer.eos_token_ids if fields.get("min_tokens") else ())
            requests = [
                Request(prompt, SamplingParams(**fields, seed=seed), max_tokens=steps + AHEAD, stop_token_ids=stops)
                for seed, prompt in enumerate(prompts.take(batch, context))
            ]
            sample = statistics.median(step_seconds(model.engine, requests, steps)) * 1e6
            if round_number:
                samples[name].append(sample)
    return {
        "machine": machine(),
        "device": model.device_description,
        "batch": batch,
        "context": context,
        "steps": steps,
        "pairs": pairs,
        "rows": [row(name, sets[name], samples) for name in sets],
    }


def step_seconds(engine: Engine, requests: list[Request], steps: int) -> list[float]:
    """Times of `steps` decode steps of all `requests` together, once the last of them has its first token."""
    clock = time.perf_counter
    times = []
    with contextlib.closing(decode_steps(engine, requests)) as stream:
        next(stream)
        for _ in range(steps):
            before = clock()
            next(stream)
            times.append(clock() - before)
    return times


def row(name: str, fields: dict[str, Any], samples: dict[str, list[float]]) -> dict[str, Any]:
    """A set of parameters: `on` names them; step_us; ratio of its step time to greedy's (above 1 is slower) and extra_us, by which its
    median is longer."""
    ours, greedy = samples[name], samples[GREEDY]
    return {
        "name": name,
        "on": list(fields),
        "step_us": summary(ours, best="min"),
        "ratio": ratio(ours, greedy),
        "extra_us": statistics.median(ours) - statistics.median(greedy),
    }
