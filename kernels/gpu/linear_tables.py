"""Tuning tables of the GPU linear: their JSON, the packaged ones (tuning/<kind>.json), and the one that METALSTEP_TUNING names, which
takes the place of the one of its kind."""
from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from metalstep.kernels.gpu.linear_tuning import Entry, HalfTiles, Matvec, Shape, Tiles, Tuning, invalid

KINDS = ("apple", "nvidia")
SHAPES: Mapping[str, type[Matvec] | type[Tiles]] = {"matvec": Matvec, "tiles": Tiles, "half_tiles": HalfTiles}
PLANES = (1, 2, 4, 8, 16)
BITS = (1, 2, 3, 4, 5, 6, 8, 16, 32)  # of weights that kernels read


def table(kind: str) -> Tuning:
    """The table of a kind of device: METALSTEP_TUNING's, else the packaged one.

    Raises: ValueError for an unknown kind, or that names METALSTEP_TUNING's file where it is no table or cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"linear: no tuning for devices of kind {kind!r}; there is one for {', '.join(KINDS)}")
    path = named()
    if path and (tuning := _named(path)).kind == kind:
        return tuning
    return _packaged(kind)


def named() -> str | None:
    """The file that METALSTEP_TUNING names, if it names one. Raises: ValueError that names it where it is no table."""
    path = os.environ.get("METALSTEP_TUNING")
    if path:
        _named(path)
    return path or None


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


@functools.cache
def _packaged(kind: str) -> Tuning:
    return load((resources.files("metalstep.kernels.gpu") / "tuning" / f"{kind}.json").read_text(encoding="utf-8"))


@functools.cache
def _named(path: str) -> Tuning:
    try:
        return read(Path(path))
    except ValueError as error:
        raise ValueError(f"METALSTEP_TUNING={error}; unset METALSTEP_TUNING, or make a new table with `metalstep tune`") from None


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
