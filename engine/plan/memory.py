"""The arena: one device buffer for all values of a plan, laid out by when each is first written and last read."""
from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

ALIGN = 256  # bytes: what a Metal buffer offset needs, and four cache lines


@dataclass(frozen=True)
class Lifetime:
    """`key` needs `bytes` from launch `first` (which writes it) to launch `last` (the last that reads it), both included."""

    key: Hashable
    bytes: int
    first: int
    last: int


def arena_layout(lifetimes: list[Lifetime]) -> tuple[dict[Hashable, int], int]:
    """Offsets in bytes by key, and the arena's size. Values alive at the same launch never overlap.

    Largest first, each at the lowest offset that is free for its whole life (Pisarchyk & Lee, arXiv 2001.03288, greedy by size).
    """
    placed: list[tuple[int, int, Lifetime]] = []  # start, end, lifetime
    offsets: dict[Hashable, int] = {}
    size = 0
    for life in sorted(lifetimes, key=lambda life: (-life.bytes, life.first)):
        at = 0
        for start, end, other in sorted(placed, key=lambda p: p[0]):
            if other.last < life.first or life.last < other.first:
                continue
            if at + life.bytes <= start:
                break
            at = max(at, end)
        end = at + -(-life.bytes // ALIGN) * ALIGN
        placed.append((at, end, life))
        offsets[life.key] = at
        size = max(size, end)
    return offsets, size
