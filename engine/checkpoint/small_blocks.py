"""GGUF blocks of 32 elements, taken apart: they are groups of 32 already. Source: ggml-common.h, `block_q4_0` and its siblings."""
from __future__ import annotations

import numpy as np

from metalstep.checkpoint.block_bytes import Groups, fields, half, nibbles

# Values of the 16 codes. iq4_nl and iq4_xs share theirs; mxfp4's are doubled, with half of the scale to make up for it.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
IQ4_ZERO = 128
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
MXFP4_ZERO = 12


def q4_0(raw: np.ndarray) -> Groups:
    d = half(raw, 0)
    return _quants(raw[2:]), d[None], d[None] * np.float32(-8)


def q4_1(raw: np.ndarray) -> Groups:
    return _quants(raw[4:]), half(raw, 0)[None], half(raw, 2)[None]


def q5_0(raw: np.ndarray) -> Groups:
    d = half(raw, 0)
    return _quants(raw[6:]) | _fifth_bits(raw[2:6]), d[None], d[None] * np.float32(-16)


def q5_1(raw: np.ndarray) -> Groups:
    return _quants(raw[8:]) | _fifth_bits(raw[4:8]), half(raw, 0)[None], half(raw, 2)[None]


def q8_0(raw: np.ndarray) -> Groups:
    d = half(raw, 0)
    return (raw[2:] ^ np.uint8(0x80))[None], d[None], d[None] * np.float32(-128)  # signed to unsigned, zero at 128


def iq4_nl(raw: np.ndarray) -> Groups:
    d = half(raw, 0)
    return coded(_quants(raw[2:]), IQ4_VALUES, IQ4_ZERO), d[None], d[None] * np.float32(-IQ4_ZERO)


def mxfp4(raw: np.ndarray) -> Groups:
    exponent = raw[0].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x00200000) << exponent, exponent - np.uint32(1) << np.uint32(23))  # 2^(exponent - 128)
    scale = bits.astype(np.uint32).view(np.float32)[None]
    return coded(_quants(raw[1:]), MXFP4_VALUES, MXFP4_ZERO), scale, scale * np.float32(-MXFP4_ZERO)


def coded(codes: np.ndarray, values: np.ndarray, zero: int) -> np.ndarray:
    """Codes of a codebook of integers as quants that mean `quant - zero`."""
    return (values + zero).astype(np.uint8)[codes]


def _quants(quants: np.ndarray) -> np.ndarray:
    """16 bytes: elements 0 to 15 in the low halves, 16 to 31 in the high ones."""
    return nibbles(quants).reshape(1, 32, -1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """Four bytes, a bit per element, as the fifth bit of a quant."""
    return fields(raw[:, None], 1).reshape(1, 32, -1) << np.uint8(4)
