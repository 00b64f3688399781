"""Shapes of the GPU linear that `metalstep tune` tries."""
from __future__ import annotations

from collections.abc import Sequence

from metalstep.kernels.gpu.linear_tuning import Entry, HalfTiles, Matvec, Shape, Tiles, invalid


def candidates(kind: str, outputs: int, k: int, max_rows: int) -> list[Entry]:
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
        tried += [(32, 4, cs, 1, True, 1) for cs in ((1, 4), (2, 2), (4, 1), (4, 2))]
    else:
        tried = [(32, 4, cs, 1, False, 1) for cs in ((1, 4), (1, 8), (2, 4))] if rows == 64 else [(128, 4, (4, 1), 1, True, 2)]
        tried += [(64, 4, cs, 1, False, 1) for cs in ((1, 4), (1, 8), (2, 2), (2, 4))]
        tried += [(64, 4, cs, 1, True, 1) for cs in ((1, 4), (2, 2), (4, 1), (4, 2))]
    return [HalfTiles(r, strips, *cs, words, ahead, staged, bands) for r, strips, cs, ahead, staged, bands in tried for words in (2, 4)]
