"""Sampling inside the step: bias, penalties and masks, filters as mlx-lm or vLLM order them, one counter-based draw per row.

Sources: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), Philox 4x32-10; Keskar et al., arXiv 1909.05858,
section 4.1, repetition penalty; Holtzman et al., arXiv 1904.09751, top_p; Nguyen et al., arXiv 2407.01082, min_p.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.step import StepBuffers

THREADS = 256


def launches(
    logits: Buffer, step: StepBuffers, *, vocab_size: int, max_rows: int, max_top: int, history_stride: int
) -> list[Launch]:
    """One MSSampled per sampled row, from logits [num_sampled, vocab_size] float32 and the row's MSSampling.

    max_rows: rows of the results from one step of a run to the next. max_top: columns of step.top; history_stride: of step.history.
    Written: step.sampled and step.top at row MSStep.index; with MS_SAMPLE_PROCESSED_LOGPROBS the row of logits; with
    MS_SAMPLE_COMMIT the state's row of step.history and step.counts.
    The kernel knows no table's length: entries, states, masks and targets within them are the caller's to ensure.
    """
    constants = params.pack(
        "MSSampleParams", vocab_size=vocab_size, max_rows=max_rows, max_top=max_top, history_stride=history_stride
    )
    bindings = [
        step.step, logits, step.sampling, step.sampled, step.top, step.positions, step.sampled_rows, step.biases, step.masks,
        step.history, step.counts,
    ]  # fmt: skip
    return [Launch("sample", bindings, constants, grid=(max_rows, 1, 1), threads=(THREADS, 1, 1))]


# ---- reference ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Parameters:
    """MSSampling by its fields' names, with what its ranges, masks and state point to.

    history: tokens of positions 0 to the row's own. prompt and output: occurrences by token that the state's counts hold, for
    the first `counted` positions. allowed: bool [vocab_size], both masks.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    min_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: Sequence[int] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_window: int = 0
    presence_window: int = 0
    frequency_window: int = 0
    history: Sequence[int] = ()
    prompt: Mapping[int, int] = field(default_factory=dict)
    output: Mapping[int, int] = field(default_factory=dict)
    counted: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    stop_tokens: Sequence[int] = ()
    min_tokens: int = 0
    counter: int = 0
    allowed: np.ndarray | None = None
    top: int = 0
    processed_logprobs: bool = False
    temperature_first: bool = False


@dataclass(frozen=True)
class Reference:
    """What a row gives. processed: the logits that are drawn from. probabilities: of each token to be sampled.

    logprobs and ranks: what is reported of each token. top: tokens and logprobs. All arrays are [vocab_size], float64 or int64.
    """

    status: int
    processed: np.ndarray
    probabilities: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top: list[tuple[int, float]]


def reference(logits: np.ndarray, p: Parameters) -> Reference:
    """What the kernel computes of one row of logits [vocab_size], in float64, written to be read."""
    own = np.asarray(logits, np.float64)
    nothing = np.zeros(len(own))
    if np.isnan(own).any() or own.max() in (np.inf, -np.inf):
        return Reference(params.MS_SAMPLE_NOT_FINITE, own, nothing, nothing, nothing, [])
    processed = process(own, p)
    if processed.max() == -np.inf:
        return Reference(params.MS_SAMPLE_NOTHING_ALLOWED, processed, nothing, nothing, nothing, [])
    logprobs = _log_softmax(processed if p.processed_logprobs else own)
    order = _descending(logprobs)
    ranks = np.empty(len(own), np.int64)
    ranks[order] = np.arange(1, len(own) + 1)
    top = [(int(token), float(logprobs[token])) for token in order[: p.top] if logprobs[token] > -np.inf]
    return Reference(params.MS_SAMPLE_OK, processed, probabilities(processed, p), logprobs, ranks, top)


def process(logits: np.ndarray, p: Parameters) -> np.ndarray:
    """Bias, then repetition, presence and frequency penalties as mlx-lm has them, then stop tokens and masks."""
    x = np.array(logits, np.float64)
    for token, bias in p.bias.items():
        x[token] += bias
    everything = {**p.prompt, **p.output}
    for token in _seen(p, p.repetition_window, everything):
        x[token] = x[token] * p.repetition_penalty if x[token] < 0 else x[token] / p.repetition_penalty
    for token in _seen(p, p.presence_window, p.output):
        x[token] -= p.presence_penalty
    for token, times in _seen(p, p.frequency_window, p.output).items():
        x[token] -= times * p.frequency_penalty
    if p.counter < p.min_tokens:
        x[list(p.stop_tokens)] = -np.inf
    return x if p.allowed is None else np.where(p.allowed, x, -np.inf)


def probabilities(logits: np.ndarray, p: Parameters) -> np.ndarray:
    """Of each token to be sampled from processed logits, before it is known which side xtc's coin shows."""
    if p.temperature == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
    without = _filtered(logits, p, xtc=False)
    if p.xtc_probability == 0:
        return without
    return p.xtc_probability * _filtered(logits, p, xtc=True) + (1 - p.xtc_probability) * without


def _seen(p: Parameters, window: int, counts: Mapping[int, int]) -> dict[int, int]:
    """Occurrences by token in the last `window` tokens, or in the counts and what lies behind them."""
    seen = {} if window else dict(counts)
    for token in p.history[max(len(p.history) - window, 0) :] if window else p.history[p.counted :]:
        if token >= 0:  # else the caller's own embedding
            seen[token] = seen.get(token, 0) + 1
    return seen


def _filtered(x: np.ndarray, p: Parameters, xtc: bool) -> np.ndarray:
    """The distribution after the filters: mlx-lm's order, or vLLM's, which tempers first and takes top_p last."""
    if p.temperature_first:
        x = _min_p(x / p.temperature, p)
        x = _top_k(_xtc(x, p) if xtc else x, p)
        return np.exp(_log_softmax(_top_p(x, p, ties=False)))
    x = _min_p(_top_p(x, p, ties=True), p)
    x = _top_k(_xtc(x, p) if xtc else x, p)
    return np.exp(_log_softmax(x / p.temperature))


def _top_p(x: np.ndarray, p: Parameters, ties: bool) -> np.ndarray:
    """The most likely tokens that together have top_p. ties: and all that are as likely as the last of them."""
    if p.top_p >= 1:
        return x
    order = _descending(x)
    mass = np.exp(_log_softmax(x))[order]
    kept = order[np.cumsum(mass) - mass < p.top_p]
    return np.where(x >= x[kept[-1]] if ties else np.isin(np.arange(len(x)), kept), x, -np.inf)


def _min_p(x: np.ndarray, p: Parameters) -> np.ndarray:
    """Tokens of at least min_p times the largest probability, and the first min_keep."""
    if p.min_p == 0:
        return x
    keep = x >= x.max() + np.log(p.min_p)
    keep[_descending(x)[: max(p.min_keep, 1)]] = True
    return np.where(keep, x, -np.inf)


def _xtc(x: np.ndarray, p: Parameters) -> np.ndarray:
    """Without those that are more likely than the least likely of the tokens above the threshold."""
    above = np.exp(_log_softmax(x)) > p.xtc_threshold
    drop = x > x[above].min(initial=np.inf)
    drop[list(p.xtc_special_tokens)] = False
    return np.where(drop, -np.inf, x)


def _top_k(x: np.ndarray, p: Parameters) -> np.ndarray:
    """The first top_k tokens, equal ones by index."""
    out = np.array(x)
    out[_descending(x)[p.top_k or len(x) :]] = -np.inf
    return out


def _descending(x: np.ndarray) -> np.ndarray:
    return np.argsort(-x, kind="stable")


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())
