"""Parts of GGUF's quantised blocks, blocks side by side: byte i of every block is one row, so that numpy's loops are long.

raw: uint8 [bytes of a block, blocks]. Groups: quants uint8 [groups, 32, blocks], scales and biases float32 [groups, blocks], so that
x = scale * quant + bias. Source: ggml-common.h and ggml-quants.c.
"""
from __future__ import annotations

import numpy as np

# A block's quants, and scales and biases of its groups of 32.
Groups = tuple[np.ndarray, np.ndarray, np.ndarray]


def half(raw: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as float32 [blocks]."""
    return word(raw, at).view(np.float16).astype(np.float32)


def word(raw: np.ndarray, at: int) -> np.ndarray:
    """The two bytes at `at` of every block, as uint16 [blocks]."""
    return raw[at] | raw[at + 1].astype(np.uint16) << np.uint16(8)


def nibbles(quants: np.ndarray) -> np.ndarray:
    """uint8 [..., n, blocks] -> [..., 2, n, blocks]: low halves, then high halves."""
    return np.stack([quants & np.uint8(15), quants >> np.uint8(4)], axis=-3)


def fields(quants: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n, blocks] -> [..., 8 / bits, n, blocks]: the lowest `bits` bits of each byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
    return quants[..., None, :, :] >> shifts & np.uint8((1 << bits) - 1)
