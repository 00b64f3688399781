"""Samples of a noisy machine, summed up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


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
