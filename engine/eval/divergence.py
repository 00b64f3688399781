"""How far one model's distributions are from another's, position by position."""

from __future__ import annotations

from typing import Any

import numpy as np

from metalstep.bench.quality import log_softmax

ROWS = 64  # positions compared at a time: float64 rows of the whole vocabulary


class Divergence:
    """Takes in logits of the same positions from a reference and from another model, chunk by chunk; keeps a few numbers of each.

    KLD is that of the reference's distribution to the other's, over the whole vocabulary, in nats.
    """

    def __init__(self) -> None:
        self._klds: list[np.ndarray] = []
        self._agree: list[np.ndarray] = []
        self._reference_nll: list[np.ndarray] = []
        self._nll: list[np.ndarray] = []

    def add(self, reference: np.ndarray, logits: np.ndarray, following: np.ndarray) -> None:
        """reference, logits: float32 [positions, vocab]. following: the tokens behind the first of them, one fewer at a text's end."""
        for at in range(0, len(reference), ROWS):
            p, q = log_softmax(reference[at : at + ROWS]), log_softmax(logits[at : at + ROWS])
            self._klds.append((np.exp(p) * (p - q)).sum(-1))
            self._agree.append(p.argmax(-1) == q.argmax(-1))
            tokens = following[at : at + ROWS]
            rows = np.arange(len(tokens))
            self._reference_nll.append(-p[rows, tokens])
            self._nll.append(-q[rows, tokens])

    def klds(self) -> np.ndarray:
        """Of each position, in the order in which they came."""
        return np.concatenate(self._klds)

    def result(self) -> dict[str, Any]:
        """positions; kld (mean, standard error of the mean, median, p95, p99, max), top1 (fraction with the same most likely token) and its
        standard error; perplexity of both, standard errors, and their ratio with the standard error of the paired difference.

        Standard errors take positions as independent.
        """
        kld, agree, reference, nll = (np.concatenate(x) for x in (self._klds, self._agree, self._reference_nll, self._nll))
        top1 = float(agree.mean())
        return {
            "positions": len(kld),
            "kld_mean": float(kld.mean()),
            "kld_stderr": standard_error(kld),
            "kld_median": float(np.median(kld)),
            "kld_p95": float(np.percentile(kld, 95)),
            "kld_p99": float(np.percentile(kld, 99)),
            "kld_max": float(kld.max()),
            "top1": top1,
            "top1_stderr": float(np.sqrt(top1 * (1 - top1) / len(agree))),
            **_perplexity("perplexity", nll),
            **_perplexity("perplexity_reference", reference),
            **_perplexity("perplexity_ratio", nll - reference),
        }


def standard_error(values: np.ndarray) -> float:
    """Of the mean; 0 of a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _perplexity(name: str, nll: np.ndarray) -> dict[str, float]:
    value = float(np.exp(nll.mean()))
    return {name: value, f"{name}_stderr": value * standard_error(nll)}
