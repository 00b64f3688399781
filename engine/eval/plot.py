"""Divergence against memory as a picture: a point per scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from metalstep.plot.file import check_plot, is_svg
from metalstep.plot.svg import COLOURS, FLOOR, FRAME, GRID, decades, finish, nice_ticks, page, text

WIDTH, HEIGHT = 900, 560
LEFT, RIGHT, TOP, BOTTOM = 80, 30, 50, 60  # margins
COLOUR = COLOURS[0]
CHARACTER = 7.4  # width of a label's character
X_LABEL = "bytes of KV cache per token"
Y_LABEL = "mean KL divergence from the float16 cache, nats"


@dataclass(frozen=True)
class Point:
    """A scheme. error: standard error of y."""

    label: str
    x: float
    y: float
    error: float


def points_of(result: dict[str, Any]) -> list[Point]:
    """The schemes of evaluate_kv's result that are not the same as float16 to the last bit."""
    rows = [row for row in result["rows"] if row["kld_mean"] > FLOOR]
    return [Point(row["scheme"], row["kv_bytes_per_token"], row["kld_mean"], row["kld_stderr"]) for row in rows]


def write_plot(path: str, result: dict[str, Any]) -> None:
    """Raises: as check_plot; OSError."""
    check_plot(path)
    title = f"{result['model']}: {result['tokens']:,} tokens in windows of {result['context']:,}"
    points, reference = points_of(result), float(result["reference"]["kv_bytes_per_token"])
    if is_svg(path):
        Path(path).write_text(svg(title, points, reference), "utf-8")
    else:
        _png(path, title, points, reference)


def svg(title: str, points: Sequence[Point], reference: float) -> str:
    """A scatter plot with a logarithmic y axis. reference: bytes of the float16 cache, where a line is drawn."""
    x_ticks = nice_ticks(0, max([reference, *(point.x for point in points)]))
    low, high = decades([point.y for point in points])
    x_max = x_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_max
        down = (high - math.log10(max(y, FLOOR))) / (high - low)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * min(max(down, 0.0), 1.0)

    bottom = HEIGHT - BOTTOM
    parts = page(WIDTH, HEIGHT, title)
    for x in x_ticks:
        at, _ = place(x, 1)
        parts.append(f'<path d="M{at:.1f} {TOP}V{bottom}" stroke="{GRID}"/>')
        parts.append(text(at, bottom + 18, f"{x:,.0f}", "middle"))
    for exponent in range(low, high + 1):
        _, at = place(0, 10.0**exponent)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{exponent}</text>')
    at, _ = place(reference, 1)
    parts.append(f'<path d="M{at:.1f} {TOP}V{bottom}" stroke="#888" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{at - 6:.1f}" y="{TOP + 16}" text-anchor="end" fill="#666">float16</text>')
    parts.append(f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{bottom - TOP}" fill="none" stroke="{FRAME}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">{X_LABEL}</text>')
    parts.append(f'<text transform="translate(20 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{Y_LABEL}</text>')
    # Left, right and baseline of what labels must not cover: points, and the labels so far.
    taken = [(x - 6, x + 6, y + 4) for x, y in (place(point.x, point.y) for point in points)]
    for point in sorted(points, key=lambda point: (-point.y, point.x)):
        x, y = place(point.x, point.y)
        _, above = place(point.x, point.y + point.error)
        _, below = place(point.x, max(point.y - point.error, 10.0**low))
        parts.append(f'<path d="M{x:.1f} {above:.1f}V{below:.1f}" stroke="{COLOUR}"/>')
        words = f"{escape(point.label)}: {point.y:.3g}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOUR}"><title>{words}</title></circle>')
        width = CHARACTER * len(point.label)
        left, baseline = _label_place(x, y, width, taken)
        if baseline != y + 4:  # moved away: a line says whose it is
            parts.append(f'<path d="M{x:.1f} {y:.1f}L{left if left > x else left + width:.1f} {baseline - 4:.1f}" stroke="#999"/>')
        parts.append(f'<text x="{left:.1f}" y="{baseline:.1f}">{escape(point.label)}</text>')
    return finish(parts)


def _label_place(x: float, y: float, width: float, taken: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Left end and baseline of a label beside its point, the first place that no other label has."""
    steps = (0, -13, 13, -26, 26, -39, 39, -52, 52)
    tries = [(left, y + 4 + step) for step in steps for left in (x + 8 + abs(step) / 4, x - 8 - width - abs(step) / 4)]
    inside = [(left, base) for left, base in tries if left > LEFT and left + width < WIDTH - RIGHT] or tries
    free = [
        (left, base)
        for left, base in inside
        if all(left > r or left + width < l or abs(base - b) >= 13 for l, r, b in taken)  # noqa: E741
    ]
    left, base = (free or inside)[0]
    taken.append((left, left + width, base))
    return left, base


def _png(path: str, title: str, points: Sequence[Point], reference: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=150)
    axes = figure.subplots()
    for point in points:
        axes.errorbar(point.x, point.y, yerr=point.error, fmt="o", color=COLOUR)
        axes.annotate(point.label, (point.x, point.y), xytext=(6, 3), textcoords="offset points", fontsize=8)
    axes.axvline(reference, color="#888888", linestyle="--")
    axes.set(title=title, xlabel=X_LABEL, ylabel=Y_LABEL, yscale="log", xlim=(0, None))
    axes.grid(color=GRID)
    figure.savefig(path)
