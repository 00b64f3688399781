"""What a KV scheme costs or gains in time: decode over long contexts and time to first token, schemes in turns in one process."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from metalstep.bench.engine_steps import decode_steps
from metalstep.bench.machine import machine
from metalstep.bench.prompts import Prompts
from metalstep.bench.statistics import ratio, summary
from metalstep.model import Model, load
from metalstep.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from metalstep.request import Request
from metalstep.sampling import SamplingParams

PLAIN = "none"  # what the others are measured against
NOT_TIMED = "loading, making contexts, tokenizing, detokenizing"
Progress = Callable[[str], None]


def bench_kv(
    model: str,
    schemes: Sequence[str],
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    prompts: Sequence[int],
    rounds: int,
    steps: int,
    options: dict[str, Any] | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure `schemes` and "none" in turns: `rounds` rounds, in each every case, in each every scheme.

    batches, contexts: decode cases, so many sequences of so many tokens each, every one in blocks of its own; their tokens are one
    prompt's. prompts: lengths of fresh prompts whose time to first token is measured. steps: decode steps of a sample. options: what
    models are loaded with. A round before the first is not counted. Returns machine, schemes (bytes per token of each) and rows: per
    case and scheme decode tok/s of all sequences together or TTFT in ms, and the speed over that of "none" (above 1 is faster).
    Raises: ValueError for a model without a native step; what `load` raises for a scheme.
    """
    names = list(dict.fromkeys([PLAIN, *schemes]))
    longest = max([context + (rounds + 2) * steps for context in contexts] + [length + 1 for length in prompts])
    with contextlib.ExitStack() as stack:
        models: dict[str, Model] = {}
        for name in names:
            progress(f"loading {name}")
            loaded, tokenizer = load(model, kv_scheme=name, strict=True, max_context=longest, **(options or {}))
            models[name] = stack.enter_context(loaded)
        fresh = Prompts.of(tokenizer)
        rows = []
        for context in contexts:
            files = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) / "context.safetensors" for name in names}
            prompt = fresh.take(1, context)[0]
            for name in names:
                progress(f"{context} tokens of context with {name}")
                _save_context(models[name], prompt, files[name])
            for batch in batches:
                samples = _decode(models, files, prompt[-1], batch, rounds, steps, progress)
                rows += _rows({"what": "decode", "batch": batch, "context": context}, samples, higher=True)
        for length in prompts:
            ttft = _ttft(models, fresh, length, rounds, progress)
            rows += _rows({"what": "ttft", "batch": 1, "context": length}, ttft, higher=False)
        about = {name: loaded.explain()["kv"] for name, loaded in models.items()}
        device = models[PLAIN].device_description
    return {
        "machine": machine(),
        "model": model,
        "device": device,
        "rounds": rounds,
        "steps": steps,
        "not_timed": NOT_TIMED,
        "schemes": {name: {key: kv[key] for key in ("effective", "bytes_per_token", "capacity")} for name, kv in about.items()},
        "rows": rows,
    }


def _save_context(model: Model, prompt: list[int], file: Path) -> None:
    """All of a prompt's tokens but the last, as a prompt cache in a file."""
    cache = make_prompt_cache(model)
    request = Request(prompt[:-1], SamplingParams(seed=0), max_tokens=1, prompt_cache=cache)
    for _ in model.engine.submit(request):
        pass
    cache.trim(1)  # the token that was sampled
    save_prompt_cache(file, cache)


def _decode(
    models: dict[str, Model], files: dict[str, Path], token: int, batch: int, rounds: int, steps: int, progress: Progress
) -> dict[str, list[float]]:
    """Decoded tokens per second, by scheme."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        running: dict[str, Generator[None, None, None]] = {}
        for name, model in models.items():
            caches = [load_prompt_cache(files[name]) for _ in range(batch)]  # from the file, so that each has blocks of its own
            requests = [Request([token], SamplingParams(seed=0), prompt_cache=cache) for cache in caches]
            running[name] = stack.enter_context(contextlib.closing(decode_steps(model.engine, requests)))
            next(running[name])
        for number in range(-1, rounds):
            for name in _turn(list(models), number):
                progress(f"batch {batch}, round {number + 1} of {rounds}, {name}")
                start = time.perf_counter()
                for _ in range(steps):
                    next(running[name])
                if number >= 0:
                    samples[name].append(batch * steps / (time.perf_counter() - start))
    return samples


def _ttft(models: dict[str, Model], fresh: Prompts, length: int, rounds: int, progress: Progress) -> dict[str, list[float]]:
    """Milliseconds to the first token of a fresh prompt, by scheme."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    for number in range(-1, rounds):
        prompt = fresh.take(1, length)[0]
        for name in _turn(list(models), number):
            progress(f"prompt of {length}, round {number + 1} of {rounds}, {name}")
            start = time.perf_counter()
            with contextlib.closing(models[name].engine.submit(Request(prompt, SamplingParams(seed=0), max_tokens=1))) as stream:
                next(stream)
            if number >= 0:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


def _turn(names: list[str], number: int) -> list[str]:
    """Another scheme begins each round."""
    start = number % len(names)
    return names[start:] + names[:start]


def _rows(case: dict[str, Any], samples: dict[str, list[float]], *, higher: bool) -> list[dict[str, Any]]:
    """higher: samples are rates, else times."""
    rows = []
    for name, own in samples.items():
        plain = samples[PLAIN]
        speed = ratio(own, plain) if higher else ratio(plain, own)
        rows.append({**case, "scheme": name, **summary(own, best="max" if higher else "min"), "speed": speed})
    return rows
