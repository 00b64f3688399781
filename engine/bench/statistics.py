"""Samples of a noisy machine, summed up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

Candidate = TypeVar("Candidate")


def summary(samples: Sequence[float], best: str = "max") -> dict[str, float | int | list[float]]:
    """best, median, mean, sigma, spread ((max - min) / median), n and the samples. best: "max" for rates, "min" for times."""
    median = statistics.median(samples)
    return {
        "best": max(samples) if best == "max" else min(samples),
        "median": median,
        "mean": statistics.fmean(samples),
        "sigma": statistics.stdev(samples) if len(samples) > 1 else 0.0,
        "spread": (max(samples) - min(samples)) / median if median else 0.0,
        "n": len(samples),
        "samples": list(samples),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """ours / theirs: of the medians, and the median of the ratios of pairs measured next to each other."""
    return {
        "of_medians": statistics.median(ours) / statistics.median(theirs),
        "median_of_pairs": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def better(candidates: Sequence[Candidate], rates: Callable[[Candidate], Sequence[float]]) -> Candidate:
    """The candidate with the highest median rate, the first of equal ones."""
    return max(candidates, key=lambda candidate: statistics.median(rates(candidate)))


def common_prefixes(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far pairs of sequences agree before they first differ: median and minimum of tokens, and the fraction that agrees wholly."""
    lengths, whole = [], 0
    for a, b in zip(ours, theirs, strict=True):
        lengths.append(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)))
        whole += lengths[-1] == len(a)
    return {"median": statistics.median(lengths), "min": min(lengths), "whole": whole / len(lengths)}
