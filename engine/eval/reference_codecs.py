"""llama.cpp's q8_0 and q4_0 as caches to compare with: keys and values are rounded through the codec before they are stored as float32.

Nothing is stored in fewer bytes: what a step reads is, within a prompt's chunk too, what such a cache would hold. Blocks of 32 elements
along a vector, each with a float16 scale. Source: ggml-org/llama.cpp, ggml/src/ggml-quants.c, quantize_row_q8_0 and quantize_row_q4_0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.program import Program, Register

BLOCK = 32  # elements that share a scale
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}  # name: bytes of a block, its scale included
SMALLEST = float(np.finfo(np.float32).tiny)  # step that is divided by; the inverse of smaller ones may be infinite, and the scale is 0

Rounding = Callable[[Program, Register, int], Register]


def vector_bytes(name: str, dim: int) -> int:
    """Bytes of a vector of `dim` elements in a cache of this codec."""
    return dim // BLOCK * BLOCK_BYTES[name]


def check_dim(name: str, dim: int) -> None:
    """Raises: ValueError for vectors that are no whole blocks."""
    if dim % BLOCK:
        raise ValueError(f"{name} takes vectors of a multiple of {BLOCK} elements, and these have {dim}; leave it out of the schemes")


def reference(name: str, x: np.ndarray) -> np.ndarray:
    """x, float32 [..., dim], as a reader of the cache sees it, float32. Of a block's elements of largest magnitude the positive counts."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    if name == "q8_0":
        step = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    else:
        high, low = blocks.max(-1, keepdims=True), blocks.min(-1, keepdims=True)
        step = np.where(high >= -low, high, low) / np.float32(-8)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=np.abs(step) >= SMALLEST)
    stored = step.astype(np.float16).astype(np.float32)
    if name == "q8_0":
        codes = np.rint(blocks * inverse)
    else:
        codes = np.minimum(np.float32(15), np.trunc(blocks * inverse + np.float32(8.5))) - np.float32(8)
    return (codes * stored).reshape(x.shape)


def emit(name: str, program: Program, x: Register, dim: int) -> Register:
    """Vectors of `dim` elements, rounded as `reference` does."""
    check_dim(name, dim)

    def blocks(op: int, *operands: Register | float) -> Register:
        return _apply(program, op, x.size // BLOCK, *operands)

    def elements(op: int, *operands: Register | float) -> Register:
        return _apply(program, op, x.size, *operands)

    def reduced(register: Register, combine: int) -> Register:
        out = program.register(x.size // BLOCK)
        program.emit(params.MS_OP_REDUCE, out, register, n=out.size, inner=BLOCK, dims=[combine, 0, 0, 0])
        return out

    def spread(register: Register) -> Register:
        out = program.register(x.size)
        program.strided(params.MS_OP_GATHER, out, register, 0, [register.size, BLOCK], [1, 0], params.MS_ASSIGN)
        return out

    if name == "q8_0":
        step = blocks(params.MS_OP_DIV, reduced(elements(params.MS_OP_ABS, x), params.MS_MAX), 127.0)
    else:
        high, low = reduced(x, params.MS_MAX), reduced(x, params.MS_MIN)
        is_high = blocks(params.MS_OP_GE, high, blocks(params.MS_OP_NEG, low))
        step = blocks(params.MS_OP_DIV, blocks(params.MS_OP_SELECT, is_high, high, low), -8.0)
    is_normal = blocks(params.MS_OP_GE, blocks(params.MS_OP_ABS, step), SMALLEST)
    inverse = blocks(params.MS_OP_SELECT, is_normal, blocks(params.MS_OP_DIV, 1.0, step), 0.0)
    stored = blocks(params.MS_OP_TO_F16, step)
    scaled = elements(params.MS_OP_MUL, x, spread(inverse))
    if name == "q8_0":
        codes = elements(params.MS_OP_ROUND, scaled)
    else:
        codes = elements(params.MS_OP_TRUNC, elements(params.MS_OP_ADD, scaled, 8.5))
        codes = elements(params.MS_OP_SUB, elements(params.MS_OP_MIN, codes, 15.0), 8.0)
    return elements(params.MS_OP_MUL, codes, spread(stored))


def _apply(program: Program, op: int, size: int, *operands: Register | float) -> Register:
    out = program.register(size)
    program.emit(op, out, *operands, n=size)
    return out
