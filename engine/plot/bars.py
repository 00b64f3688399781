"""Grouped bars that lie on their side: a group per case, a bar per contender, a line from its lowest to its highest sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from metalstep.plot.file import check_plot, is_svg
from metalstep.plot.svg import COLOURS, FRAME, GRID, finish, line, nice_ticks, page, text

WIDTH, RIGHT, TOP, BOTTOM = 900, 70, 84, 64
BAR, GAP = 14, 12  # heights of a bar and between groups
CHARACTER, MOST_LABEL = 7.2, 330  # width of a label's character, and of the labels at most


@dataclass(frozen=True)
class Bar:
    """low, high: of the samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bars:
    """groups: their labels. series: name of each, and its bar per group, None where it was not measured there. axis: what a length is,
    with its unit. about: model, machine and date, below the title."""

    title: str
    about: str
    axis: str
    groups: Sequence[str]
    series: Sequence[tuple[str, Sequence[Bar | None]]]


def write_bars(path: str, chart: Bars) -> None:
    """Raises: as check_plot; OSError."""
    check_plot(path)
    if is_svg(path):
        Path(path).write_text(svg(chart), "utf-8")
    else:
        _png(path, chart)


def svg(chart: Bars) -> str:
    left = min(MOST_LABEL, max((len(label) for label in chart.groups), default=0) * CHARACTER) + 24
    group_height = BAR * len(chart.series) + GAP
    height = TOP + group_height * len(chart.groups) + BOTTOM
    ticks = nice_ticks(0, max((bar.high for _, bars in chart.series for bar in bars if bar), default=1.0))

    def place(value: float) -> float:
        return left + (WIDTH - RIGHT - left) * value / ticks[-1]

    bottom = height - BOTTOM
    parts = [*page(WIDTH, height, chart.title), text(WIDTH / 2, 46, chart.about, "middle", size=12, fill="#666")]
    for tick in ticks:
        parts.append(line(f"M{place(tick):.1f} {TOP}V{bottom}", GRID))
        parts.append(text(place(tick), bottom + 18, f"{tick:,.10g}", "middle"))
    parts += _legend(chart, left)
    for i, label in enumerate(chart.groups):
        top = TOP + GAP / 2 + i * group_height
        parts.append(text(left - 8, top + BAR * len(chart.series) / 2 + 4, label, "end"))
        for j, (name, bars) in enumerate(chart.series):
            bar, y = bars[i], top + j * BAR
            if bar is None:
                continue
            words = f"{label}, {name}: {bar.value:.4g} ({bar.low:.4g} to {bar.high:.4g})"
            parts.append(
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{max(place(bar.value) - left, 0.5):.1f}" height="{BAR - 2}" '
                f'fill="{COLOURS[j % len(COLOURS)]}"><title>{escape(words)}</title></rect>'
            )
            parts.append(line(f"M{place(bar.low):.1f} {y + BAR / 2 - 1:.1f}H{place(bar.high):.1f}", "#222", ' stroke-width="1.5"'))
            parts.append(text(place(bar.high) + 5, y + BAR - 3, f"{bar.value:,.4g}", size=11, fill="#444"))
    parts.append(line(f"M{left:.1f} {TOP}V{bottom}H{WIDTH - RIGHT}", FRAME, ' fill="none"'))
    parts.append(text((left + WIDTH - RIGHT) / 2, height - 22, chart.axis, "middle"))
    return finish(parts)


def _legend(chart: Bars, left: float) -> list[str]:
    parts, x = [], left
    for j, (name, _) in enumerate(chart.series):
        parts.append(f'<rect x="{x:.1f}" y="60" width="12" height="12" fill="{COLOURS[j % len(COLOURS)]}"/>')
        parts.append(text(x + 18, 71, name))
        x += 42 + CHARACTER * len(name)
    return parts


def _png(path: str, chart: Bars) -> None:
    from matplotlib.figure import Figure

    count = len(chart.series)
    figure = Figure(figsize=(WIDTH / 100, (TOP + BOTTOM + (BAR * count + GAP) * len(chart.groups)) / 100), dpi=150, layout="constrained")
    axes = figure.subplots()
    for j, (name, bars) in enumerate(chart.series):
        there = [(i + (j + 0.5) / count * 0.8 - 0.4, bar) for i, bar in enumerate(bars) if bar]
        widths = [bar.value for _, bar in there]
        errors = [[bar.value - bar.low for _, bar in there], [bar.high - bar.value for _, bar in there]]
        axes.barh([y for y, _ in there], widths, 0.8 / count, xerr=errors, label=name, color=COLOURS[j % len(COLOURS)])
    axes.set(xlabel=chart.axis, yticks=range(len(chart.groups)), yticklabels=chart.groups)
    figure.suptitle(f"{chart.title}\n{chart.about}", fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})
