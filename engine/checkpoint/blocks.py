"""GGUF's quantised blocks as MLX's affine triplets: x = scale * quant + bias, groups of 32, quants packed into uint32 words.

Formats whose scales cover 32 elements keep their values bit for bit. The K quants with scales per 16 (q2_k, q3_k, q6_k) are converted:
see regroup.py for how, docs/models.md for how far off.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metalstep.checkpoint import k_blocks, small_blocks
from metalstep.checkpoint.block_bytes import Groups

GROUP_SIZE = 32  # elements of an affine group, whatever the block
CHUNK = 1 << 16  # elements that are worked on at once: their float32 values stay in a core's cache
# Bits of the converted formats are the fewest that add less than 5 % to the format's own squared error (docs/models.md).
# A converted tensor's scales become float16 where that moves the values of every row by less than this, in steps of its grids (root mean
# square of each group's worst element).
HALF_TOLERANCE = 1 / 8


@dataclass(frozen=True)
class BlockFormat:
    """size: elements of a block. nbytes: of a block. bits: of a quant in the affine group. exact: values are the format's own.

    dtype: what scales usually need. unpack: blocks side by side (block_bytes.py) into groups.
    """

    size: int
    nbytes: int
    bits: int
    unpack: Callable[[np.ndarray], Groups]
    exact: bool = True
    dtype: str = "float16"


def _converted(size: int, nbytes: int, bits: int, unpack: Callable[[np.ndarray, int], Groups]) -> BlockFormat:
    levels = (1 << bits) - 1
    return BlockFormat(size, nbytes, bits, lambda raw: unpack(raw, levels), exact=False)


FORMATS = {
    "q4_0": BlockFormat(32, 18, 4, small_blocks.q4_0),
    "q4_1": BlockFormat(32, 20, 4, small_blocks.q4_1),
    "q5_0": BlockFormat(32, 22, 5, small_blocks.q5_0),
    "q5_1": BlockFormat(32, 24, 5, small_blocks.q5_1),
    "q8_0": BlockFormat(32, 34, 8, small_blocks.q8_0),
    "q2_k": _converted(256, 84, 5, k_blocks.q2_k),
    "q3_k": _converted(256, 110, 5, k_blocks.q3_k),
    "q4_k": BlockFormat(256, 144, 4, k_blocks.q4_k, dtype="float32"),
    "q5_k": BlockFormat(256, 176, 5, k_blocks.q5_k, dtype="float32"),
    "q6_k": _converted(256, 210, 8, k_blocks.q6_k),
    "iq4_nl": BlockFormat(32, 18, 8, small_blocks.iq4_nl),
    "iq4_xs": BlockFormat(256, 136, 8, k_blocks.iq4_xs, dtype="float32"),
    "mxfp4": BlockFormat(32, 17, 5, small_blocks.mxfp4),
}


@dataclass(frozen=True)
class Affine:
    """words: uint32 [n, k * bits / 32]. scales, biases: [n, k / 32], both float16 where that is enough, or float32."""

    words: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


@np.errstate(over="ignore", invalid="ignore")  # scales that are not finite stay so, and a damaged file may have them anywhere
def affine(stored: np.ndarray, format: str, rows: np.ndarray | None = None) -> Affine:
    """Blocks as MLX's triplet. stored: uint8 [n, blocks of a row, nbytes]. rows: which of them, in order; None for all."""
    spec = FORMATS[format]
    count = len(stored) if rows is None else len(rows)
    groups = stored.shape[1] * spec.size // GROUP_SIZE
    words = np.empty((count, groups * spec.bits), np.uint32)
    scales, biases = np.empty((count, groups), np.float32), np.empty((count, groups), np.float32)
    at_once = max(1, CHUNK // (groups * GROUP_SIZE))
    for first in range(0, count, at_once):
        part = slice(first, min(first + at_once, count))
        raw = stored[part] if rows is None else stored[rows[part]]
        quants, *planes = spec.unpack(np.ascontiguousarray(raw.reshape(-1, spec.nbytes).T))
        lines = np.ascontiguousarray(quants.reshape(-1, quants.shape[-1]).T).reshape(len(raw), -1)
        words[part] = pack(lines, spec.bits)
        for plane, out in zip(planes, (scales, biases), strict=True):
            out[part] = plane.T.reshape(len(raw), groups)
    return Affine(words, *_narrowed(scales, biases, spec))


def pack(quants: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, k] -> uint32 [n, k * bits / 32], as MLX packs: a stream of bits, the lowest first."""
    if bits == 8:
        return quants.view(np.uint32)
    # Eight quants in the bytes of a uint64: pairs are put together, then pairs of pairs, then the two halves.
    x = quants.view(np.uint64)
    for lane in (8, 16, 32):
        keep = np.uint64(sum(((1 << lane) - 1) << at for at in range(0, 64, 2 * lane)))
        x = x & keep | (x & ~keep) >> np.uint64((8 - bits) * lane // 8)
    return x.view(np.uint8).reshape(len(quants), -1, 8)[..., :bits].reshape(len(quants), -1).view(np.uint32)


def _narrowed(scales: np.ndarray, biases: np.ndarray, spec: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """As float16 where values stay as they are, or nearly so for a format that is converted anyway."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16), biases.astype(np.float16)
    if spec.exact:
        same = all(np.array_equal(half.astype(np.float32), own) for half, own in zip(halves, (scales, biases), strict=True))
        return halves if same else (scales, biases)
    shift = halves[1].astype(np.float32) - biases
    worst = np.maximum(np.abs(shift), np.abs(shift + (halves[0].astype(np.float32) - scales) * np.float32((1 << spec.bits) - 1)))
    moved, steps = (np.square(values.astype(np.float64)).sum(axis=1) for values in (worst, scales))
    return halves if (moved <= HALF_TOLERANCE**2 * steps).all() else (scales, biases)
