"""Sampling launches with numpy arrays in and out: rows are described by sample.Parameters, which the reference takes too."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from harness import Harness
from programs import own_buffers

from metalstep.kernels import params, sample
from metalstep.kernels.sample import Parameters

SAMPLING, SAMPLED = params.record("MSSampling"), params.record("MSSampled")
TOP, BIAS, STEP = params.record("MSTopLogprob"), params.record("MSTokenBias"), params.record("MSStep")
NOTHING = np.array((-7, np.nan, 12345, 99), SAMPLED)  # of a row that did not run
NO_TOP = np.array((-7, 12345), TOP)
STRIDE = 48  # of the history
SAME_NAMES = (
    "temperature", "top_p", "min_p", "min_keep", "top_k", "xtc_probability", "xtc_threshold", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "repetition_window", "presence_window", "frequency_window", "counted", "min_tokens",
    "counter", "top",
)  # fmt: skip


@dataclass
class Tables:
    """Records of rows and the tables they point to; positions are the rows' own."""

    sampling: np.ndarray
    positions: np.ndarray
    biases: np.ndarray
    masks: np.ndarray
    history: np.ndarray
    counts: np.ndarray


@dataclass
class Result:
    """What a launch left. sampled: [steps, rows], top: [steps, rows, max_top]; without the steps where there was one."""

    sampled: np.ndarray
    top: np.ndarray
    logits: np.ndarray
    history: np.ndarray
    counts: np.ndarray
    sampling: np.ndarray


def tables(rows: Sequence[Parameters], vocab: int, *, seed: int | np.ndarray = 0, commit: bool = False) -> Tables:
    """One record and one state a row. Equal rows (the same object) share entries and masks."""
    count = len(rows)
    sampling, positions = np.zeros(count, SAMPLING), np.zeros(count, np.int32)
    history, counts = np.full((count, STRIDE), -1, np.int32), np.zeros((count, vocab), np.uint32)
    biases: list[tuple[int, float]] = [(0, 100.0)]  # outside of every range
    words = (vocab + 31) // 32
    masks = [np.zeros(words, np.uint32)]  # outside too
    ranges: dict[int, dict[str, int]] = {}

    def entries(pairs: list[tuple[int, float]]) -> tuple[int, int]:
        biases.extend(pairs)
        return len(biases) - len(pairs), len(pairs)

    for i, p in enumerate(rows):
        for name in SAME_NAMES:
            sampling[name][i] = getattr(p, name)
        if id(p) not in ranges:
            fields: dict[str, int] = {}
            fields["bias_first"], fields["bias_count"] = entries(list(p.bias.items()))
            fields["stop_first"], fields["stop_count"] = entries([(token, 7.0) for token in p.stop_tokens])
            fields["xtc_first"], fields["xtc_count"] = entries([(token, -7.0) for token in p.xtc_special_tokens])
            if p.allowed is not None:  # each of the two masks holds back a part of what is not allowed
                held = np.random.default_rng(i).random(vocab) < 0.5
                for name, bits in (("mask", p.allowed | held), ("grammar", p.allowed | ~held)):
                    packed = np.packbits(np.pad(bits, (0, 32 * words - vocab)), bitorder="little")
                    masks.append(packed.view(np.uint32))
                    fields[name] = len(masks)
            ranges[id(p)] = fields
        for name, value in ranges[id(p)].items():
            sampling[name][i] = value
        positions[i] = max(len(p.history) - 1, 0)
        history[i, : len(p.history)] = p.history
        counts[i, list(p.prompt)] |= params.MS_COUNT_IN_PROMPT
        for token, times in p.output.items():
            counts[i, token] += times
        sampling["flags"][i] = (
            params.MS_SAMPLE_PROCESSED_LOGPROBS * p.processed_logprobs
            | params.MS_SAMPLE_TEMPERATURE_FIRST * p.temperature_first
            | params.MS_SAMPLE_COMMIT * commit
        )
    sampling["target"], sampling["state"] = -1, np.arange(count)
    seeds = np.broadcast_to(np.asarray(seed, np.uint64), count)
    sampling["seed_lo"], sampling["seed_hi"] = seeds & 0xFFFFFFFF, seeds >> np.uint64(32)
    return Tables(sampling, positions, np.array(biases, BIAS), np.array(masks), history, counts)


def run(h: Harness, logits: np.ndarray, t: Tables, *, plan_rows: int | None = None, max_top: int = 8, steps: int = 1) -> Result:
    """Sample each row of `logits`, `steps` times (with the next counters, where they are more than one)."""
    rows, vocab = logits.shape
    plan_rows = plan_rows or rows
    with own_buffers(h):
        step = h.step(rows, positions=t.positions, sampling=t.sampling)
        h.device.numpy(step.step, STEP, (1,))["advance"] = steps > 1
        step = replace(
            step,
            sampled=h.put(np.full((steps, plan_rows), NOTHING, SAMPLED).view(np.uint8)),
            top=h.put(np.full((steps, plan_rows, max_top), NO_TOP, TOP).view(np.uint8)),
            biases=h.put(t.biases.view(np.uint8)),
            masks=h.put(t.masks),
            history=h.put(t.history),
            counts=h.put(t.counts),
        )
        buffer = h.put(logits.astype(np.float32, copy=False))
        sizes = dict(vocab_size=vocab, max_rows=plan_rows, max_top=max_top, history_stride=t.history.shape[1])
        launches = h.sample_launches(buffer, step, **sizes)
        if steps > 1:
            launches += h.step_advance_launches(step, block_size=16, max_rows=plan_rows)
            launches[0].barrier = launches[-1].barrier = True
        plan = h.device.create_plan(launches, plan_rows, plan_rows)
        plan.wait(plan.run(steps))
        plan.close()
        shape = (steps, plan_rows) if steps > 1 else (plan_rows,)
        return Result(
            h.get(step.sampled, SAMPLED, shape),
            h.get(step.top, TOP, (*shape, max_top)),
            h.get(buffer),
            h.get(step.history, np.int32),
            h.get(step.counts, np.uint32),
            h.get(step.sampling, SAMPLING, (rows,)),
        )


def draw(
    h: Harness, logits: np.ndarray, rows: Sequence[Parameters], *, seed: int | np.ndarray = 0, counters: Any = None, **options: Any
) -> Result:
    """The rows' samples; counters: one a row in place of the parameters' own."""
    t = tables(rows, logits.shape[1], seed=seed)
    if counters is not None:
        t.sampling["counter"] = counters
    return run(h, logits, t, **options)


def draw_many(h: Harness, logits: np.ndarray, p: Parameters, draws: int, seed: int = 0) -> np.ndarray:
    """Tokens of `draws` draws from one row of logits: 64 rows in steps of one run, each with its own counter."""
    rows = 64
    steps = max(draws // rows, 2)
    t = tables([p] * rows, len(logits), seed=seed)
    t.sampling["counter"] = np.arange(rows) * steps
    out = run(h, np.tile(logits, (rows, 1)), t, steps=steps)
    assert (out.sampled["status"] == params.MS_SAMPLE_OK).all()
    return out.sampled["token"].ravel()


def supports(processed: np.ndarray, p: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest probability of each token where thresholds are a little off: float32 sums of probabilities are."""
    near = [
        [p.top_p] if p.top_p == 1 else [p.top_p - 1e-5, p.top_p, min(p.top_p + 1e-5, 1 - 1e-9)],
        [p.min_p] if p.min_p == 0 else [p.min_p * (1 - 1e-5), p.min_p, min(p.min_p * (1 + 1e-5), 1.0)],
        [p.xtc_threshold] if p.xtc_probability == 0 else [p.xtc_threshold * f for f in (1 - 1e-5, 1, 1 + 1e-5)],
    ]
    some = [
        sample.probabilities(processed.astype(np.float64), replace(p, top_p=top_p, min_p=min_p, xtc_threshold=threshold))
        for top_p, min_p, threshold in product(*near)
    ]
    return np.min(some, 0), np.max(some, 0)


def assert_same(some: np.ndarray, others: np.ndarray) -> None:
    """Bit for bit, NaN included."""
    np.testing.assert_array_equal(np.ascontiguousarray(some).view(np.uint32), np.ascontiguousarray(others).view(np.uint32))
