"""GGUF's K quants and iq4_xs, blocks of 256 elements, taken apart. Source: ggml-common.h, `block_q4_K` and its siblings.

q4_k, q5_k and iq4_xs are eight groups of 32 as they are. q2_k, q3_k and q6_k have scales per 16 elements: see regroup.py.
"""
from __future__ import annotations

import numpy as np

from metalstep.checkpoint.block_bytes import Groups, fields, half, nibbles, word
from metalstep.checkpoint.regroup import join_halves
from metalstep.checkpoint.small_blocks import IQ4_VALUES, IQ4_ZERO, coded


def q4_k(raw: np.ndarray) -> Groups:
    return nibbles(raw[16:].reshape(4, 32, -1)).reshape(8, 32, -1), *_scales_and_minima(raw)


def q5_k(raw: np.ndarray) -> Groups:
    low = nibbles(raw[48:].reshape(4, 32, -1)).reshape(8, 32, -1)
    return low | fields(raw[16:48], 1) << np.uint8(4), *_scales_and_minima(raw)


def iq4_xs(raw: np.ndarray) -> Groups:
    codes = nibbles(raw[8:].reshape(8, 16, -1)).reshape(8, 32, -1)
    low = nibbles(raw[4:8, None]).reshape(8, -1)
    high = word(raw, 2)[None] >> np.arange(0, 16, 2, dtype=np.uint16)[:, None] & np.uint16(3)
    scales = (low | high.astype(np.uint8) << np.uint8(4)).astype(np.float32) - np.float32(32)
    scales *= half(raw, 0)
    return coded(codes, IQ4_VALUES, IQ4_ZERO), scales, scales * np.float32(-IQ4_ZERO)


def q2_k(raw: np.ndarray, levels: int) -> Groups:
    scales = half(raw, 80) * (raw[:16] & np.uint8(15)).astype(np.float32)
    minima = half(raw, 82) * (raw[:16] >> np.uint8(4)).astype(np.float32)
    return join_halves(fields(raw[16:80].reshape(2, 32, -1), 2), scales, -minima, levels)


def q3_k(raw: np.ndarray, levels: int) -> Groups:
    low = fields(raw[32:96].reshape(2, 32, -1), 2).reshape(8, 32, -1)
    sixteen = np.concatenate([raw[96:104] & np.uint8(15), raw[96:104] >> np.uint8(4)])
    sixteen |= fields(raw[104:108], 2).reshape(16, -1) << np.uint8(4)
    scales = half(raw, 108) * (sixteen.astype(np.float32) - np.float32(32))
    return join_halves(low | fields(raw[:32], 1) << np.uint8(2), scales, scales * np.float32(-4), levels)


def q6_k(raw: np.ndarray, levels: int) -> Groups:
    low = nibbles(raw[:128].reshape(2, 64, -1)).reshape(8, 32, -1)
    high = fields(raw[128:192].reshape(2, 32, -1), 2).reshape(8, 32, -1)
    scales = half(raw, 208) * raw[192:208].view(np.int8).astype(np.float32)
    return join_halves(low | high << np.uint8(4), scales, scales * np.float32(-32), levels)


def _scales_and_minima(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of q4_k and q5_k: eight 6-bit scales and eight 6-bit minima in 12 bytes."""
    first, second, mixed = raw[4:8], raw[8:12], raw[12:16]
    top = np.uint8(0x30)
    scales = np.concatenate([first & np.uint8(63), mixed & np.uint8(15) | first >> np.uint8(2) & top])
    minima = np.concatenate([second & np.uint8(63), mixed >> np.uint8(4) | second >> np.uint8(2) & top])
    return half(raw, 0) * scales.astype(np.float32), -(half(raw, 2) * minima.astype(np.float32))
