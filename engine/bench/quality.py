"""How far the native step's distributions are from MLX in float32."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import dequantize_model

from metalstep.bench.machine import machine
from metalstep.bench.prompts import TEXT
from metalstep.model import load

ROWS = 64  # positions compared at a time: float64 rows of the whole vocabulary


def bench_quality(model: str, text: str = TEXT, *, max_tokens: int = 1024, **options: Any) -> dict[str, Any]:
    """Logits of each position of `text`, native against eager MLX in float32 with the same weights.

    options: of metalstep.load. Returns tokens, kld_mean and kld_max (nats, of MLX's distribution to ours), top1 (fraction of
    positions with the same most likely token), perplexity of both and their ratio, rms and max difference of logits.
    Raises: ValueError for a text of fewer than two tokens; whatever load raises with strict.
    """
    eager, tokenizer = load(model, device="eager")
    with eager:
        ids = np.asarray(tokenizer.encode(text))[:max_tokens]
        if len(ids) < 2:
            raise ValueError(f"the text has {len(ids)} tokens, expected at least 2; pass a longer --text")
        # The weights' values are the same; MLX's quantised matmul takes 0.1 s per token on a CPU.
        oracle = dequantize_model(eager.eager)
        oracle.set_dtype(mx.float32)  # on a GPU the eager model has the checkpoint's own dtype
        expected = np.array(oracle(mx.array(ids)[None])[0].astype(mx.float32))
    native, _ = load(model, strict=True, **options)
    with native:
        description = native.device_description
        got = np.array(native(mx.array(ids)[None])[0])
    return {"machine": machine(), "model": model, **options, "device": description, **compare(expected, got, ids)}


def compare(expected: np.ndarray, got: np.ndarray, ids: np.ndarray) -> dict[str, float | int]:
    """Distances between logits float32 [length, vocab]; ids int [length] are the text."""
    klds, agree, ours, theirs, squares, largest = [], 0, [], [], 0.0, 0.0
    for at in range(0, len(ids), ROWS):
        p, q = (log_softmax(x[at : at + ROWS]) for x in (expected, got))
        klds.append((np.exp(p) * (p - q)).sum(-1))
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        difference = (got[at : at + ROWS] - expected[at : at + ROWS]).astype(np.float64)
        squares += float((difference**2).sum())
        largest = max(largest, float(np.abs(difference).max()))
        following = ids[at + 1 : at + 1 + len(p)]
        rows = np.arange(len(following))
        theirs.append(-p[rows, following])
        ours.append(-q[rows, following])
    kld, perplexity, reference = (np.concatenate(x) for x in (klds, ours, theirs))
    return {
        "tokens": len(ids),
        "kld_mean": float(kld.mean()),
        "kld_max": float(kld.max()),
        "top1": agree / len(ids),
        "perplexity": float(np.exp(perplexity.mean())),
        "perplexity_mlx_f32": float(np.exp(reference.mean())),
        "perplexity_ratio": float(np.exp(perplexity.mean() - reference.mean())),
        "logits_rms": (squares / expected.size) ** 0.5,
        "logits_max": largest,
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64 over the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
