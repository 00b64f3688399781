"""Geometry of the GPU linear as data: who multiplies how much, by format, rows, outputs and inputs. linear_tables has the tables."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

THREADGROUP_BYTES = 32768
MAX_THREADS = 1024
SIMD_WIDTH = 32
MAX_TILE_ROWS = 256
MAX_TILES = 64  # 8x8 sums of a simdgroup: two registers of a lane each
MAX_AHEAD = 8


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
class HalfTiles(Tiles):
    """Tiles in half precision. splits: a power of two. words: of 8 values that a lane reads at once (by fours where values have four
    bits); ahead: such reads on their way; staged: x goes through threadgroup memory by steps, not straight from device memory (where
    it is half and needs no norm) or all at once (else, where it fits). bands: simdgroups side by side along the rows of x."""

    words: int
    ahead: int
    staged: bool = False
    bands: int = 1

    @property
    def simdgroups(self) -> int:
        return self.columns * self.bands * self.splits


Shape = Matvec | Tiles


@dataclass(frozen=True)
class Entry:
    """bits (16 and 32 are dense), rows of a plan, outputs of all segments and inputs k that a shape is for: at most, None is any. planes:
    parts of k whose sums another kernel adds up, where the linear is one whose consumer can."""

    shape: Shape
    bits: int | None = None
    rows: int | None = None
    outputs: int | None = None
    k: int | None = None
    planes: int = 1

    def holds(self, bits: int, rows: int, outputs: int, k: int) -> bool:
        limits = ((self.bits, bits), (self.rows, rows), (self.outputs, outputs), (self.k, k))
        return all(most is None or value <= most for most, value in limits)


@dataclass(frozen=True)
class Tuning:
    """A kind of device's table. Of entries the first that holds is taken.

    invariant: entries for plans in which a row's bits do not depend on its batch; their shapes differ by rows in nothing that changes
    the order of a row's sums: matvecs by nothing, half tiles by rows, strips and columns. norm_rows: (most inputs k, rows of a plan up
    to which a norm over k belongs inside of the linears that read it). library_rows: rows from which on a library multiplies, where a
    device has one; None: never. matvec_values and tile_values: by bits, the values that a lane reads at once, most first.
    """

    kind: str
    entries: Sequence[Entry]
    invariant: Sequence[Entry]
    norm_rows: Sequence[tuple[int | None, int]]
    library_rows: int | None
    matvec_values: Mapping[int, Sequence[int]]
    tile_values: Mapping[int, Sequence[int]]

    def entry(self, outputs: int, k: int, max_rows: int, bits: int = 4, *, invariant: bool = False) -> Entry:
        """What multiplies `max_rows` rows of k inputs by weights of `outputs` rows in all, of at most `bits` bits. invariant: a row's bits
        depend on its values alone."""
        entries = self.invariant if invariant else self.entries
        return next(e for e in entries if e.holds(bits, max_rows, outputs, k))

    def planes(self, outputs: int, k: int, max_rows: int, bits: int = 4, *, invariant: bool = False) -> int:
        """Planes of a linear whose results are added to a residual and normed over: parts of k whose sums that kernel adds up; 1 is none,
        as wherever the norm belongs inside of the next linears."""
        if max_rows <= self.most_normed(outputs, invariant=invariant):
            return 1
        return self.entry(outputs, k, max_rows, bits, invariant=invariant).planes

    def most_normed(self, k: int, *, invariant: bool = False) -> int:
        """Rows of a plan up to which a norm over k belongs inside of the linears that read it; in invariant plans all or none."""
        rows = next((rows for most, rows in self.norm_rows if most is None or k <= most), 0)
        return (1 << 31 if rows else 0) if invariant else rows


def invalid(shape: Shape) -> str:
    """What makes a shape impossible for segments of one weight (or of two, as gate and up, where strips is 1), or ""."""
    if any(not isinstance(value, int) or value < 0 for value in dataclasses.asdict(shape).values()):
        return "has a number that is none"
    if isinstance(shape, Matvec):
        if not 1 <= shape.rows <= 8 or shape.splits < 1 or shape.simdgroups < 1 or shape.simdgroups % shape.splits:
            return "has no rows, more than 8 of them, or splits that do not divide its simdgroups"
        return "has more than 32 simdgroups" if shape.simdgroups * SIMD_WIDTH > MAX_THREADS else ""
    if shape.rows % 8 or not shape.rows or shape.strips < 1 or shape.columns < 1 or shape.splits < 1:
        return "has rows that are no multiple of 8, or nothing to multiply"
    bands = shape.bands if isinstance(shape, HalfTiles) else 1
    if bands < 1 or shape.rows % (8 * bands):
        return "has rows that are no multiple of 8 in each band"
    if shape.columns * shape.splits * bands * SIMD_WIDTH > MAX_THREADS:
        return "has more than 32 simdgroups"
    strips = max(2, shape.strips)
    if isinstance(shape, HalfTiles):
        if shape.splits & (shape.splits - 1) or shape.words not in (1, 2, 4) or not 1 <= shape.ahead <= MAX_AHEAD:
            return f"has splits that are no power of two, words other than 1, 2 and 4, nothing ahead, or more than {MAX_AHEAD}"
        if shape.splits > 1 and 4 * shape.rows * shape.columns * strips * 8 > THREADGROUP_BYTES:
            return "has more sums than threadgroup memory holds"
        if shape.staged and 16 * (4 * shape.words * shape.splits + 4) * 8 * bands > THREADGROUP_BYTES:
            return "stages more of x than threadgroup memory holds"
    else:
        sums = shape.splits * shape.columns * strips * 8 * (shape.rows + 1)
        if 4 * (max(shape.rows * (32 * shape.splits + 4), sums) + shape.rows) > THREADGROUP_BYTES:
            return "has more of x or more sums than threadgroup memory holds"
    if shape.rows > MAX_TILE_ROWS or shape.rows // (8 * bands) * strips > MAX_TILES:
        return f"has more than {MAX_TILE_ROWS} rows, or more than {MAX_TILES} sums of 8x8 in a simdgroup"
    return ""
