"""Decode speed of metalstep and its peers on one model, measured in turns in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from metalstep.bench.machine import machine
from metalstep.bench.peers import Peer, model_for, peers_python
from metalstep.bench.statistics import ratio, summary
from metalstep.checkpoint import Checkpoint, open_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog and then walks home. "
NOT_TIMED = "loading, tokenizing, detokenizing"


def bench_decode(
    model: str,
    against: list[str],
    *,
    pairs: int,
    tokens: int,
    prompts: list[int],
    threads: int,
    peers_path: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure metalstep and `against` in turns: `pairs` rounds, in each every prompt length, in each every engine.

    prompts: tokens of the prompt, and so of the context at which decoding starts. tokens: decoded per measurement. Each engine is a
    process that loads once and idles while another is measured; a round before the first is not counted. Returns machine, engines,
    cases (per prompt and engine: TTFT in ms, decode in tok/s, and for metalstep GB/s of weights and KV cache) and ratios (metalstep
    over the peer, above 1 is faster).
    Raises: PeerError for a peer that cannot be started.
    """
    engines = ["metalstep", *against]
    max_context = max(prompts) + tokens + 1
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metalstep-bench-")))
        pythons = {engine: peers_python(engine, peers_path) for engine in engines}
        checkpoint = open_checkpoint(model)
        stack.callback(checkpoint.close)
        texts = {length: prompt_ids(checkpoint, length) for length in prompts}
        workers = {}
        for engine in engines:
            progress(f"loading {engine}")
            path = model_for(engine, checkpoint, model, scratch)
            workers[engine] = Peer(engine, pythons[engine], path, threads, max_context)
            stack.callback(workers[engine].close)
        results: dict[tuple[int, str], list[dict[str, Any]]] = {
            (length, name): [] for length in prompts for name in engines
        }
        for round_number in range(pairs + 1):
            # Every other round runs backwards: none is always the one behind a hot or a cold neighbour.
            order = engines if round_number % 2 else engines[::-1]
            for length in prompts:
                for engine in order:
                    progress(f"round {round_number} of {pairs}: {engine}, prompt of {length} tokens")
                    result = workers[engine].measure(texts[length], tokens)
                    if round_number:
                        results[length, engine].append(result)
        heads = [workers[engine].head for engine in engines]
    return {
        "machine": machine(),
        "threads": threads,
        "model": model,
        "engines": heads,
        "pairs": pairs,
        "tokens": tokens,
        "not_timed": NOT_TIMED,
        "cases": [case(name, length, runs, heads[0]) for (length, name), runs in results.items()],
        "ratios": [
            ratios(length, name, results[length, "metalstep"], results[length, name])
            for length in prompts
            for name in against
        ],
    }


def prompt_ids(checkpoint: Checkpoint, length: int) -> list[int]:
    """`length` token ids of plain English, the same for every engine."""
    tokenizer = checkpoint.tokenizer(None)
    sentence = tokenizer.encode(TEXT)
    return (sentence * (-(-length // len(sentence))))[:length]


def rate(run: dict[str, Any]) -> float:
    """Decoded tokens per second."""
    return len(run["steps_s"]) / sum(run["steps_s"])


def case(engine: str, prompt: int, runs: list[dict[str, Any]], ours: dict[str, Any]) -> dict[str, Any]:
    """One row: an engine at one prompt length. ours: metalstep's head, for its bytes per token."""
    row: dict[str, Any] = {
        "engine": engine,
        "prompt_tokens": prompt,
        "ttft_ms": summary([run["ttft_s"] * 1e3 for run in runs], best="min"),
        "decode_tok_s": summary([rate(run) for run in runs]),
        "best_step_tok_s": 1 / min(step for run in runs for step in run["steps_s"]),
    }
    if engine == "metalstep":
        # The n-th of the timed steps reads the prompt, the tokens before it and its own.
        cached = prompt + 1 + len(runs[0]["steps_s"]) / 2
        read = ours["weight_bytes"] + ours["kv_bytes"] * cached
        row["bytes_per_token"] = round(read)
        row["gb_s"] = summary([rate(run) * read / 1e9 for run in runs])
    return row


def ratios(prompt: int, against: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """metalstep over a peer: of decode rates, and of 1 / TTFT. Above 1 metalstep is faster.

    same_ids: tokens in which the greedy texts agree before they first differ; a near tie between two tokens may end it.
    """
    pairs = list(zip(ours[0]["ids"], theirs[0]["ids"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {
        "against": against,
        "prompt_tokens": prompt,
        "decode": ratio([rate(run) for run in ours], [rate(run) for run in theirs]),
        "ttft": ratio([1 / run["ttft_s"] for run in ours], [1 / run["ttft_s"] for run in theirs]),
        "same_ids": same,
    }
