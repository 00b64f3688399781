"""Ragged mixed batches for captured graphs, and mlx-lm's own logits to compare with."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from metalstep.capture.graph import Graph
from metalstep.capture.step_ops import StepCache

Row = tuple[int, int]  # (sequence, position); sequence -1 is padding
Step = list[Row]


def reference(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """mlx-lm's logits at every position, fed one token at a time: [length, vocab]."""
    cache, rows = make_prompt_cache(model), []
    for token in tokens:
        out = model(mx.array([[token]]), cache=cache)
        rows.append(getattr(out, "logits", out)[0, 0])
        mx.eval(rows[-1])
    return np.array(mx.stack(rows))


def mixed_steps(lengths: Sequence[int], rows: int, takes: Sequence[int]) -> list[Step]:
    """Steps of `rows` rows that feed sequences of these lengths: the sequences take turns with the chunk sizes in `takes` (1: a
    decode), and padding fills up."""
    at, steps, turn = [0] * len(lengths), [], 0
    while any(done < length for done, length in zip(at, lengths, strict=True)):
        step: Step = []
        for i, length in enumerate(lengths):
            take = min(length - at[i], takes[(turn + i) % len(takes)], rows - len(step))
            step += [(i, at[i] + j) for j in range(take)]
            at[i] += take
        turn += 1
        steps.append(step + [(-1, 0)] * (rows - len(step)))
    return steps


def run(graph: Graph, weights: Mapping[str, mx.array], texts: Sequence[Sequence[int]], steps: Sequence[Step]) -> dict[Row, np.ndarray]:
    """Logits by (sequence, position): of every row, or of the sampled rows (the last row of each sequence in a step)."""
    cache = StepCache(len(texts), max(map(len, texts)) + 1)
    found: dict[Row, np.ndarray] = {}
    for step in steps:
        cache.start([s for s, _ in step], [p for _, p in step])
        ids = mx.array([[texts[s][p] if s >= 0 else 0] for s, p in step], mx.int32)
        inputs = {**weights, "ids": ids, "positions": mx.array([p for _, p in step], mx.int32)}
        wanted = list(range(len(step)))
        if "rows" in graph.inputs:
            last = {s: r for r, (s, _) in enumerate(step) if s >= 0}
            wanted = [*last.values(), *[0] * graph.sampled][: graph.sampled]
            inputs["rows"] = mx.array(wanted, mx.int32)
        logits = graph.evaluate(inputs, cache)[0]
        logits = np.array(logits.reshape(logits.shape[0], -1))
        for row, r in zip(logits, wanted, strict=True):
            if step[r][0] >= 0:
                found[step[r]] = row
    return found
