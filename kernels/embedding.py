"""Embedding: a token's row out of the table that the output head may share, packed as a linear's weight is."""
from __future__ import annotations

import mlx.core as mx

from metalstep.kernels import params
from metalstep.kernels.program import Program, Register


def reference(ids: mx.array, table: mx.array) -> mx.array:
    """ids [rows] int32, table [vocab, width] (dequantised); returns [rows, width]."""
    return table[ids]


def emit(program: Program, slot: int, width: int, vocab: int, bits: int, group_size: int, dtype: int) -> Register:
    """The row of this row's token; `slot` holds the packed table, described as an MSLinearPart describes a weight."""
    out = program.register(width)
    program.emit(params.MS_OP_EMBEDDING, out, n=width, slot=slot, dims=[bits, group_size, dtype, vocab])
    return out
