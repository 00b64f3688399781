"""Geometry of the GPU linear as data: who multiplies how much, by rows and outputs."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matvec:
    """rows: of weights per simdgroup (at most 8: each lane has one result of four rows of x), over the parts of a segment; simdgroups
    of a threadgroup; splits: of k among them."""

    rows: int
    simdgroups: int
    splits: int


@dataclass(frozen=True)
class Tiles:
    """rows of x per threadgroup (a multiple of 8); strips: of 8 weight rows per simdgroup, over the parts of a segment; columns:
    simdgroups side by side along n; splits: simdgroups that share k."""

    rows: int
    strips: int
    columns: int
    splits: int


@dataclass(frozen=True)
class Tuning:
    """Geometry as data. The first entry whose limits hold is taken, None is no limit.

    matvec: (most outputs of all segments, Matvec). tiles: (most rows of the plan, most outputs, Tiles). matvec_values and
    tile_values: by bits (16 and 32 are dense), the values that a lane reads at once, most first.
    A matvec's geometry must not depend on rows: its order of sums would, and a row's bits with it.
    """

    matvec_max_rows: int
    matvec: Sequence[tuple[int | None, Matvec]]
    tiles: Sequence[tuple[int | None, int | None, Tiles]]
    matvec_values: dict[int, Sequence[int]]
    tile_values: dict[int, Sequence[int]]


# By kind of device. Unmeasured on Apple: starting points from the shapes of public Metal kernels, where four weight rows and 16 or
# 32 values per lane are common, and from a sweep of like kernels on an H100 (there a k-split of 4 gained 25 to 42 % on outputs of 1024
# and lost on wide ones).
TUNING = {
    "apple": Tuning(
        matvec_max_rows=4,
        matvec=[(2048, Matvec(rows=4, simdgroups=4, splits=4)), (None, Matvec(rows=4, simdgroups=4, splits=1))],
        tiles=[
            (8, 4096, Tiles(rows=8, strips=2, columns=1, splits=4)),
            (8, None, Tiles(rows=8, strips=2, columns=2, splits=2)),
            (16, 4096, Tiles(rows=16, strips=2, columns=1, splits=4)),
            (16, None, Tiles(rows=16, strips=2, columns=2, splits=2)),
            (32, 4096, Tiles(rows=32, strips=2, columns=1, splits=4)),
            (32, None, Tiles(rows=32, strips=2, columns=2, splits=2)),
            (64, 4096, Tiles(rows=32, strips=2, columns=1, splits=4)),
            (64, None, Tiles(rows=32, strips=2, columns=4, splits=1)),
            (None, None, Tiles(rows=64, strips=2, columns=4, splits=1)),
        ],
        matvec_values={1: (32,), 2: (32, 16), 3: (32,), 4: (32, 16, 8), 5: (32,), 6: (32, 16), 8: (16, 8), 16: (8,), 32: (8, 4)},
        tile_values={1: (32,), 2: (16,), 3: (32,), 4: (32, 16, 8), 5: (32,), 6: (16,), 8: (16, 8), 16: (8,), 32: (8,)},
    )
}


def geometry(outputs: int, max_rows: int, *, invariant: bool = False, kind: str = "apple") -> Matvec | Tiles:
    """What multiplies `max_rows` rows by weights of `outputs` rows in all. invariant: a matvec, whatever max_rows is.

    Raises: ValueError for a kind of device without a table.
    """
    if kind not in TUNING:
        raise ValueError(f"linear: no tuning for devices of kind {kind!r}; there is one for {', '.join(TUNING)}")
    tuning = TUNING[kind]
    if invariant or max_rows <= tuning.matvec_max_rows:
        return next(shape for most, shape in tuning.matvec if most is None or outputs <= most)
    return next(
        shape
        for most_rows, most, shape in tuning.tiles
        if (most_rows is None or max_rows <= most_rows) and (most is None or outputs <= most)
    )
