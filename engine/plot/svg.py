"""What pictures share: the page, texts, axes' round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

COLOURS = ("#1f5fa8", "#d97b29", "#4f9d52", "#a8437b", "#7a6bb8", "#6b6b6b")
GRID, FRAME = "#e5e5e5", "#444"
FLOOR = 1e-12  # of what is drawn on a logarithmic axis, which has no place for 0


def page(width: float, height: float, title: str) -> list[str]:
    """The first parts: a white page, which dark pages show as it is, and its title."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        text(width / 2, 26, title, "middle", size=15),
    ]


def text(x: float, y: float, words: str, anchor: str = "start", *, size: int | None = None, fill: str | None = None) -> str:
    size_part = f' font-size="{size}"' if size else ""
    fill_part = f' fill="{fill}"' if fill else ""
    anchor_part = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{anchor_part}{size_part}{fill_part}>{escape(words)}</text>'


def line(path: str, stroke: str, extra: str = "") -> str:
    return f'<path d="{path}" stroke="{stroke}"{extra}/>'


def finish(parts: Sequence[str]) -> str:
    return "\n".join([*parts, "</svg>", ""])


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten that enclose the values, at least one apart."""
    if not values:
        return -3, 0
    low = math.floor(math.log10(max(min(values), FLOOR)))
    high = math.ceil(math.log10(max(*values, FLOOR)))
    return low, max(high, low + 1)


def nice_ticks(low: float, high: float) -> list[float]:
    """About six round numbers from `low` to the first that is not below `high`."""
    raw = max(high - low, 1e-9) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    count = math.ceil((high - low) / step - 1e-9)
    return [low + i * step for i in range(count + 1)]
