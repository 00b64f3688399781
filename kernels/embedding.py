"""Embedding: a token's row out of the table that the output head may share, packed as a linear's weight is; or, in place of a token,
a row of the caller's own."""
from __future__ import annotations

import mlx.core as mx

from metalstep.kernels import params
from metalstep.kernels.program import Program, Register


def reference(ids: mx.array, table: mx.array, embeddings: mx.array | None = None) -> mx.array:
    """ids [rows] int32, table [vocab, width] (dequantised), embeddings [any, width] float32; returns [rows, width].

    An id t < 0 is row -(t + 1) of `embeddings`.
    """
    if embeddings is None:
        return table[ids]
    own = embeddings[mx.maximum(-(ids + 1), 0)]
    return mx.where((ids < 0)[:, None], own, table[mx.maximum(ids, 0)].astype(mx.float32))


def emit(
    program: Program,
    slot: int,
    width: int,
    vocab: int,
    bits: int,
    group_size: int,
    dtype: int,
    embeddings_slot: int,
    scales_slot: int = 0,
    biases_slot: int = 0,
) -> Register:
    """The row of this row's token.

    slot: the packed table, described as an MSLinearPart describes a weight; on a GPU its words or dense elements, with the slots of its
    scales and biases, as far as it has them. embeddings_slot: float32 [any, width], what a token t < 0 reads row -(t + 1) of; that it
    has this row is the caller's duty. A token from `vocab` on is NaN.
    """
    out = program.register(width)
    dims = [bits, group_size, dtype, vocab]
    planes = [scales_slot, biases_slot, 0, 0]
    program.emit(params.MS_OP_EMBEDDING, out, n=width, slot=slot, slot2=embeddings_slot, dims=dims, strides=planes)
    return out
