"""Geometry of the GPU linear as data: who multiplies how much, by kind of device, format, rows, outputs and inputs.

The tables are kernels/gpu/tuning/<kind>.json; METALSTEP_TUNING names a file that takes the place of the one of its kind.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
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
MAX_TILE_ROWS = 256
MAX_TILES = 64  # 8x8 sums of a simdgroup: two registers of a lane each
MAX_AHEAD = 8
PLANES = (1, 2, 4, 8, 16)
BITS = (1, 2, 3, 4, 5, 6, 8, 16, 32)  # of weights that kernels read


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
    """The table that `dump` wrote. Raises: ValueError that names the field and what is expected there."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("tuning table: it is nested too deeply, expected an object of fields") from None
    except ValueError as error:  # numbers of too many digits, too
        raise ValueError(f"tuning table: no JSON: {error}") from None
    names = [field.name for field in dataclasses.fields(Tuning)]
    data = _object("it", data, names, names)
    if data["kind"] not in KINDS:
        raise _wrong("kind", data["kind"], f"one of {', '.join(KINDS)}")
    return Tuning(
        kind=data["kind"],
        entries=_entries("entries", data["entries"]),
        invariant=_entries("invariant", data["invariant"]),
        norm_rows=[_norm_rows(f"norm_rows[{i}]", pair) for i, pair in enumerate(_list("norm_rows", data["norm_rows"]))],
        library_rows=_limit("library_rows", data["library_rows"]),
        matvec_values=_values("matvec_values", data["matvec_values"], 4),
        tile_values=_values("tile_values", data["tile_values"], 8),
    )


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    of = {dict: "an object", list: "a list", bool: json.dumps(value) if isinstance(value, bool) else "", type(None): "null"}
    return ValueError(f"tuning table: {where} is {of.get(type(value)) or format(repr(value), '.40')}, expected {expected}")


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    return value


def _object(where: str, value: Any, required: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, value, f"an object with the fields {', '.join(known)}")
    for name in required:
        if name not in value:
            raise ValueError(f"tuning table: {where} has no field {name}, expected {', '.join(known)}")
    for name in value:
        if name not in known:
            raise ValueError(f"tuning table: {where} has a field {name!r:.40}, expected {', '.join(known)}")
    return value


def _integer(where: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise _wrong(where, value, f"an integer of {least} or more")
    return value


def _limit(where: str, value: Any) -> int | None:
    return None if value is None else _integer(where, value)


def _norm_rows(where: str, value: Any) -> tuple[int | None, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise _wrong(where, value, "a pair of inputs k (or null) and rows")
    return _limit(f"{where}[0]", value[0]), _integer(f"{where}[1]", value[1], 0)


def _values(where: str, value: Any, multiple: int) -> dict[int, tuple[int, ...]]:
    """multiple: of what the kernels multiply at a time."""
    names = [str(bits) for bits in BITS]
    found = {}
    for name, values in _object(where, value, names, names).items():
        # Quantised values are read by whole words of one group; the smallest groups are of 16, those of nvfp4.
        bits, at = int(name), f"{where}[{name}]"
        allowed = [v for v in (32, 16, 8, 4) if v % multiple == 0 and (bits >= 16 or v * bits % 32 == 0)]
        if not isinstance(values, list) or not values or any(type(v) is not int or v not in allowed for v in values):
            raise _wrong(at, values, f"a list of some of {', '.join(map(str, allowed))}, without others")
        if any(a <= b for a, b in itertools.pairwise(values)):
            raise ValueError(f"tuning table: {at} is {values!r:.40}, expected the most first, and none twice")
        if bits == 4 and values[-1] > 16:
            raise ValueError(f"tuning table: {at} is {values}, expected 16 or fewer as the last: groups of nvfp4 have no more")
        found[bits] = tuple(values)
    return found


def _entries(where: str, value: Any) -> list[Entry]:
    entries = [_entry(f"{where}[{i}]", entry) for i, entry in enumerate(_list(where, value))]
    if not entries or not entries[-1].holds(32, 1 << 31, 1 << 31, 1 << 31):
        raise ValueError(f"tuning table: the last of {where} must hold for all weights and rows, expected one without limits")
    return entries


def _entry(where: str, value: Any) -> Entry:
    data = _object(where, value, ["shape"], [field.name for field in dataclasses.fields(Entry)])
    shape = _shape(f"{where}.shape", data["shape"])
    limits = {name: _limit(f"{where}.{name}", data.get(name)) for name in ("bits", "rows", "outputs", "k")}
    planes = data.get("planes", 1)
    if type(planes) is not int or planes not in PLANES:
        raise _wrong(f"{where}.planes", planes, f"one of {', '.join(map(str, PLANES))}")
    if planes > 1 and not isinstance(shape, HalfTiles):
        raise ValueError(f"tuning table: {where}.planes is {planes}, expected 1: only half_tiles have more")
    return Entry(shape, planes=planes, **limits)


def _shape(where: str, value: Any) -> Shape:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in SHAPES:
        at, found = (f"{where}.type", kind) if isinstance(value, dict) else (where, value)
        raise _wrong(at, found, f"{'one' if isinstance(value, dict) else 'an object whose type is one'} of {', '.join(SHAPES)}")
    fields = dataclasses.fields(SHAPES[kind])
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    given = {name: field for name, field in _object(where, value, required, ["type", *(f.name for f in fields)]).items() if name != "type"}
    for name, field in given.items():
        if name != "staged":
            _integer(f"{where}.{name}", field)
        elif not isinstance(field, bool):
            raise _wrong(f"{where}.{name}", field, "true or false")
    shape = SHAPES[kind](**given)
    problem = invalid(shape)
    if problem:
        raise ValueError(f"tuning table: {where} {problem}: {shape!s:.200}")
    return shape


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


def read(file: Path) -> Tuning:
    """The table of a file. Raises: ValueError that names the file, also where it cannot be read."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        return load(file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{file}: no tuning table, which is JSON in UTF-8, but other bytes") from None
    except OSError as error:
        raise ValueError(f"{file}: no tuning table can be read there ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_named() -> str | None:
    """The file that METALSTEP_TUNING names, if it names one. Raises: ValueError that names it where it is no table."""
    path = os.environ.get("METALSTEP_TUNING")
    if path:
        _named(path)
    return path or None


@functools.cache
def _packaged(kind: str) -> Tuning:
    return load((resources.files("metalstep.kernels.gpu") / "tuning" / f"{kind}.json").read_text(encoding="utf-8"))


@functools.cache
def _named(path: str) -> Tuning:
    try:
        return read(Path(path))
    except ValueError as error:
        raise ValueError(f"METALSTEP_TUNING={error}; unset METALSTEP_TUNING, or make a new table with `metalstep tune`") from None


def table(kind: str) -> Tuning:
    """The table of a kind of device: the one of `use`, else that of METALSTEP_TUNING, else the packaged one.

    Raises: ValueError for an unknown kind, or that names METALSTEP_TUNING's file where it is no table or cannot be read.
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
