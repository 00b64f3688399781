"""Geometry of the GPU linear as data: who multiplies how much, by kind of device, format, rows, outputs and inputs.

The tables are kernels/gpu/tuning/<kind>.json; METALSTEP_TUNING names a file that takes the place of the one of its kind.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

KINDS = ("apple", "nvidia")
THREADGROUP_BYTES = 32768
MAX_THREADS = 1024
SIMD_WIDTH = 32


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
SHAPES: Mapping[str, type[Matvec] | type[Tiles]] = {"matvec": Matvec, "tiles": Tiles, "half_tiles": HalfTiles}


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


_used: dict[str, Tuning] = {}


def load(text: str) -> Tuning:
    """The table that `dump` wrote. Raises: ValueError that says where it is not one."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"linear: a tuning table that is no JSON: {error}") from None
    names = {field.name for field in dataclasses.fields(Tuning)}
    if not isinstance(data, dict) or set(data) != names:
        raise ValueError(f"linear: a tuning table has the fields {', '.join(sorted(names))}, not {', '.join(sorted(data))}")
    if data["kind"] not in KINDS:
        raise ValueError(f"linear: a tuning table of kind {data['kind']!r}, expected one of {', '.join(KINDS)}")
    for name in ("entries", "invariant"):
        data[name] = [_entry(f"{name}[{i}]", entry) for i, entry in enumerate(data[name])]
        if not data[name] or not data[name][-1].holds(32, 1 << 31, 1 << 31, 1 << 31):
            raise ValueError(f"linear: the last of {name} in a tuning table must hold for all weights and rows")
    for name in ("matvec_values", "tile_values"):
        data[name] = {int(bits): tuple(values) for bits, values in data[name].items()}
    data["norm_rows"] = [(most, rows) for most, rows in data["norm_rows"]]
    return Tuning(**data)


def _entry(where: str, data: dict[str, Any]) -> Entry:
    given = dict(data)
    try:
        shape = dict(given.pop("shape"))
        made = SHAPES[shape.pop("type")](**shape)
        entry = Entry(made, **given)
    except (KeyError, TypeError) as error:
        raise ValueError(f"linear: {where} of a tuning table: {error}") from None
    problem = invalid(made)
    if problem:
        raise ValueError(f"linear: {where} of a tuning table: {made} {problem}")
    return entry


def dump(tuning: Tuning) -> str:
    """JSON, an entry a line."""

    def entry(e: Entry) -> str:
        name = next(name for name, kind in SHAPES.items() if type(e.shape) is kind)
        limits = {key: value for key, value in changed(e).items() if key != "shape"}
        return json.dumps({**limits, "shape": {"type": name, **changed(e.shape)}})

    def changed(x: Entry | Shape) -> dict[str, Any]:
        return {f.name: value for f in dataclasses.fields(x) if (value := getattr(x, f.name)) != f.default}

    lines = []
    for field in dataclasses.fields(tuning):
        value = getattr(tuning, field.name)
        entries = ",".join(f"\n    {entry(e)}" for e in value) if field.name in ("entries", "invariant") else ""
        lines.append(f'  "{field.name}": ' + (f"[{entries}\n  ]" if entries else json.dumps(value)))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def invalid(shape: Shape) -> str:
    """What makes a shape impossible for segments of one weight, or ""."""
    if any(not isinstance(value, int) or value < 0 for value in dataclasses.asdict(shape).values()):
        return "has a number that is none"
    if isinstance(shape, Matvec):
        if not 1 <= shape.rows <= 8 or shape.splits < 1 or shape.simdgroups % shape.splits:
            return "has more than 8 rows, or splits that do not divide its simdgroups"
        return "has more than 32 simdgroups" if shape.simdgroups * SIMD_WIDTH > MAX_THREADS else ""
    if shape.rows % 8 or not shape.rows or shape.strips < 1 or shape.columns < 1 or shape.splits < 1:
        return "has rows that are no multiple of 8, or nothing to multiply"
    if shape.columns * shape.splits * (shape.bands if isinstance(shape, HalfTiles) else 1) * SIMD_WIDTH > MAX_THREADS:
        return "has more than 32 simdgroups"
    if isinstance(shape, HalfTiles):
        if shape.bands < 1 or shape.rows % (8 * shape.bands):
            return "has rows that are no multiple of 8 in each band"
        if shape.splits & (shape.splits - 1) or shape.words not in (1, 2, 4) or shape.ahead < 1:
            return "has splits that are no power of two, words other than 1, 2 and 4, or nothing ahead"
        if shape.splits > 1 and 4 * shape.rows * shape.columns * shape.strips * 8 > THREADGROUP_BYTES:
            return "has more sums than threadgroup memory holds"
    return ""


@functools.cache
def _packaged(kind: str) -> Tuning:
    return load((resources.files("metalstep.kernels.gpu") / "tuning" / f"{kind}.json").read_text(encoding="utf-8"))


@functools.cache
def _named(path: str) -> Tuning:
    return load(Path(path).read_text(encoding="utf-8"))


def table(kind: str) -> Tuning:
    """The table of a kind of device: the one of `use`, else that of METALSTEP_TUNING, else the packaged one.

    Raises: ValueError for an unknown kind or a file that is no table; OSError for one that cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"linear: no tuning for devices of kind {kind!r}; there is one for {', '.join(KINDS)}")
    if kind in _used:
        return _used[kind]
    path = os.environ.get("METALSTEP_TUNING")
    if path and (named := _named(path)).kind == kind:
        return named
    return _packaged(kind)


def use(tuning: Tuning) -> None:
    """From now on the table of its kind."""
    _used[tuning.kind] = tuning


@contextlib.contextmanager
def using(tuning: Tuning) -> Iterator[None]:
    """Within it, the table of its kind."""
    before = _used.get(tuning.kind)
    _used[tuning.kind] = tuning
    try:
        yield
    finally:
        if before is None:
            del _used[tuning.kind]
        else:
            _used[tuning.kind] = before


def entry(kind: str, outputs: int, k: int, max_rows: int, bits: int = 4, *, invariant: bool = False) -> Entry:
    """What multiplies `max_rows` rows of k inputs by weights of `outputs` rows in all, of at most `bits` bits. invariant: a row's bits
    depend on its values alone."""
    tuning = table(kind)
    entries = tuning.invariant if invariant else tuning.entries
    return next(e for e in entries if e.holds(bits, max_rows, outputs, k))


def geometry(kind: str, outputs: int, k: int, max_rows: int, bits: int = 4, *, invariant: bool = False) -> Shape:
    """The shape of `entry`. Raises: ValueError for a kind of device without a table."""
    return entry(kind, outputs, k, max_rows, bits, invariant=invariant).shape


def planes(kind: str, outputs: int, k: int, max_rows: int, bits: int = 4, *, invariant: bool = False) -> int:
    """Planes of a linear whose results are added to a residual and normed over: parts of k whose sums that kernel adds up; 1 is none,
    as wherever the norm belongs inside of the next linears."""
    if max_rows <= norm_rows(kind, outputs, invariant=invariant):
        return 1
    return entry(kind, outputs, k, max_rows, bits, invariant=invariant).planes


def norm_rows(kind: str, k: int, *, invariant: bool = False) -> int:
    """Rows of a plan up to which a norm over k belongs inside of the linears that read it; in invariant plans all or none."""
    rows = next((rows for most, rows in table(kind).norm_rows if most is None or k <= most), 0)
    return (1 << 31 if rows else 0) if invariant else rows


def candidates(kind: str, outputs: int, k: int, max_rows: int, bits: int = 4) -> list[Entry]:
    """Shapes that are worth trying for a linear, with planes where its consumer may add them up; all are possible."""
    shapes = _apple_candidates(max_rows) if kind == "apple" else _nvidia_candidates(max_rows)
    possible = [shape for shape in shapes if not invalid(shape)]
    fitting = [shape for shape in possible if _blocks(shape) <= k] or possible
    return [
        Entry(shape, planes=planes)
        for shape in fitting
        for planes in (1, 2, 4, 8)
        if planes == 1 or (isinstance(shape, HalfTiles) and outputs <= 8192 and _blocks(shape) * planes <= 2 * k)
    ]


def _blocks(shape: Shape) -> int:
    """Elements of k that its simdgroups take at a time, of four bits each; 0 where none is ever without work."""
    return 32 * shape.words * shape.splits if isinstance(shape, HalfTiles) else 0


def _apple_candidates(max_rows: int) -> Sequence[Shape]:
    if max_rows <= 4:
        return [Matvec(r, n, s) for r in (2, 4, 8) for n in (2, 4, 8) for s in (1, 2, 4) if s <= n]
    rows = sorted({min(32, 8 * -(-max_rows // 8)), 64 if max_rows > 32 else 8 * -(-max_rows // 8)})
    return [Tiles(r, 2, c, s) for r in rows for c, s in ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1))]


def _nvidia_candidates(max_rows: int) -> Sequence[Shape]:
    """As those that were the best or near it on an H100: (columns, splits) by rows, strips, and where x comes from."""
    rows = next((r for r in (8, 16, 32, 64) if max_rows <= r), 128)
    if rows <= 16:
        tried = [(rows, 2, cs, ahead, False, 1) for cs in ((1, 4), (1, 8), (1, 16), (2, 2), (2, 4)) for ahead in (1, 2)]
        tried += [(rows, 4, cs, 1, False, 1) for cs in ((1, 4), (1, 8), (2, 4))]
    elif rows == 32:
        tried = [(32, strips, cs, 1, False, 1) for strips in (2, 4) for cs in ((1, 4), (1, 8), (2, 2), (2, 4))]
        tried += [(32, 4, cs, 1, True, 1) for cs in ((2, 2), (4, 1), (4, 2))]
    else:
        tried = [(32, 4, cs, 1, False, 1) for cs in ((1, 4), (1, 8), (2, 4))] if rows == 64 else [(128, 4, (4, 1), 1, True, 2)]
        tried += [(64, 4, cs, 1, False, 1) for cs in ((1, 4), (1, 8), (2, 2), (2, 4))]
        tried += [(64, 4, cs, 1, True, 1) for cs in ((1, 4), (2, 2), (4, 1), (4, 2))]
    return [HalfTiles(r, strips, *cs, words, ahead, staged, bands) for r, strips, cs, ahead, staged, bands in tried for words in (2, 4)]
