"""Groups of 16 elements joined in pairs, since MLX's groups have 32. The one step of reading GGUF that changes values.

Both halves of a pair get one grid. It is laid through one half: its values are kept, and what the other half loses is
a rounding to a step that is several times finer than the half's own.
"""
from __future__ import annotations

import numpy as np

from metalstep.checkpoint.block_bytes import Groups


def join_halves(quants: np.ndarray, scales: np.ndarray, offsets: np.ndarray, levels: int) -> Groups:
    """Groups of 32 with quants of 0 to `levels` for pairs of groups of 16.

    quants: uint8 [..., blocks], 256 elements of a block in order. scales, offsets: float32 [16, blocks]: x = scale * quant + offset.
    """
    blocks = quants.shape[-1]
    quants = quants.reshape(8, 2, 16, blocks)
    scales, offsets = scales.reshape(8, 2, blocks), offsets.reshape(8, 2, blocks)
    step, through = _grid(quants, scales, offsets, levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(step > 0, 1 / step, 0).astype(np.float32)
        position = scales * inverse[:, None], (offsets - through[:, None]) * inverse[:, None]
    places = quants * position[0][:, :, None]
    places += position[1][:, :, None]
    np.rint(places, out=places)
    places = places.reshape(8, 32, blocks)
    lowest = places.min(axis=1)
    places -= lowest[:, None]
    # The grid leaves a level of room, so nothing is cut off here but what is not finite.
    np.clip(places, 0, levels, out=places)
    return places.astype(np.uint8), step, through + lowest * step


def _grid(quants: np.ndarray, scales: np.ndarray, offsets: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Step and a point of each pair's grid, float32 [8, blocks] both.

    A grid whose step is a whole fraction of one half's scale keeps that half: it errs on 16 elements, any other grid on 32. Of the three
    (through either half, or the finest that covers the range) it takes the one with the least expected squared error.
    """
    ends = np.stack([quants.min(axis=2), quants.max(axis=2)]) * scales + offsets  # [2, 8, 2, blocks]
    span = ends.max(axis=(0, 2)) - ends.min(axis=(0, 2))
    finest = span / np.float32(levels - 1)  # a level of room: rounding may widen the range by one
    sizes = np.abs(scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.floor(sizes / finest[:, None])
        steps = np.where(parts >= 1, sizes / parts, np.inf)
    errors = np.stack([steps[:, 0] ** 2 / 2, steps[:, 1] ** 2 / 2, finest**2])
    best = errors.argmin(axis=0)
    step = np.where(best == 0, steps[:, 0], np.where(best == 1, steps[:, 1], finest))
    return step.astype(np.float32), np.where(best == 1, offsets[:, 1], offsets[:, 0])
