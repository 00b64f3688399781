"""GGUF's quantised blocks, and the same weights as MLX's affine triplets. Source: ggml-common.h, `block_q4_0` and its siblings.

A block holds 32 elements of a row: a float16 scale, for q4_1 a float16 minimum, then the quants. MLX keeps one uint32 array of
packed quants with scales and biases beside it, so that x = scale * quant + bias with unsigned quants.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK_SIZE = 32  # elements


@dataclass(frozen=True)
class BlockFormat:
    """nbytes: of a block. quants: offset of the quants in it. zero_point: the quant that means zero, None with a stored minimum."""

    bits: int
    nbytes: int
    quants: int
    zero_point: int | None


FORMATS = {
    "q4_0": BlockFormat(bits=4, nbytes=18, quants=2, zero_point=8),
    "q4_1": BlockFormat(bits=4, nbytes=20, quants=4, zero_point=None),
    "q8_0": BlockFormat(bits=8, nbytes=34, quants=2, zero_point=128),
}


def words(blocks: np.ndarray, format: str) -> np.ndarray:
    """MLX's packed quants: blocks uint8 [n, k / 32, nbytes] -> uint32 [n, k * bits / 32]."""
    spec = FORMATS[format]
    quants = blocks[..., spec.quants :]
    if spec.bits == 8:
        packed = quants ^ np.uint8(0x80)  # signed to unsigned, zero at 128
    else:
        # A byte of the block holds elements i and i + 16, a byte of MLX elements 2i and 2i + 1.
        low, high = quants & np.uint8(15), quants >> np.uint8(4)
        packed = np.concatenate([low[..., 0::2] | low[..., 1::2] << 4, high[..., 0::2] | high[..., 1::2] << 4], axis=-1)
    return np.ascontiguousarray(packed).reshape(blocks.shape[0], -1).view(np.uint32)


def scales(blocks: np.ndarray) -> np.ndarray:
    """Blocks uint8 [n, k / 32, nbytes] -> float32 [n, k / 32]."""
    return _halves(blocks, 0)


def biases(blocks: np.ndarray, format: str) -> np.ndarray:
    """Blocks uint8 [n, k / 32, nbytes] -> float32 [n, k / 32], exact (a float16 could overflow for q8_0)."""
    spec = FORMATS[format]
    if spec.zero_point is None:
        return _halves(blocks, 2)
    return _halves(blocks, 0) * np.float32(-spec.zero_point)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)
