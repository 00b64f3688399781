"""Attention over the paged KV cache: every row of the step against the cached positions of its own sequence.

Softmax is streamed over chunks of the context (Milakov & Gimelshein, arXiv 1805.02867); the chunks depend on a row's context
alone, so a row's result does not depend on what else is in the step.

Packed planes (kernels/kv_codec.py) are read as they are. Of turbo codecs, a query is rotated once and scored against codes, a score
times its key's scale; the weighed sum of codes is rotated back once. On the host device a rotated query becomes integers of 15 bits
and a sign, and the codebook of keys integers of a byte: scores are exact integer sums, up to 3e-3 of a key from the codebook itself.
A vector that was not finite has NaN for its scale, and so have all rows that see it for their result.
"""
from __future__ import annotations

import mlx.core as mx

from metalstep.kernels import check, params
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.step import StepBuffers

THREADS = 128


def reference(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    position: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: mx.array | None,
    seq_window: int = 0,
    keep: int = 0,
) -> mx.array:
    """One row, in float32: q [num_q_heads, head_dim], keys [num_kv_heads, context, head_dim], values likewise. The row sees
    positions up to its own, the last `window` of them if window > 0; of these, if seq_window > 0, the sequence's first `keep` and
    the last seq_window - keep (one at least). Returns [num_q_heads, value_dim]."""
    group = q.shape[0] // keys.shape[0]
    seen = visible(position, window, seq_window, keep)
    keys = mx.repeat(keys[:, seen].astype(mx.float32), group, axis=0)
    values = mx.repeat(values[:, seen].astype(mx.float32), group, axis=0)
    scores = (keys @ q.astype(mx.float32)[:, :, None])[:, :, 0] * scale
    if softcap:
        scores = mx.tanh(scores / softcap) * softcap
    if sinks is not None:
        scores = mx.concatenate([scores, sinks.astype(mx.float32)[:, None]], axis=1)
    weights = mx.softmax(scores, axis=-1)
    weights = weights if sinks is None else weights[:, :-1]
    return (weights[:, None] @ values)[:, 0]


def visible(position: int, window: int, seq_window: int, keep: int) -> mx.array:
    """The positions that a row at `position` sees, ascending, int32: of a layer with `window`, in a sequence with seq_window and keep."""
    first = max(0, position + 1 - window) if window else 0
    recent = position + 1 - max(1, seq_window - keep) if 0 < seq_window <= position else 0
    return mx.array([p for p in range(first, position + 1) if p < keep or p >= recent], mx.int32)


def launches(
    q: Buffer,
    q_offset: int,
    q_row_stride: int,
    k_plane: Buffer,
    v_plane: Buffer,
    out: Buffer,
    step: StepBuffers,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    block_size: int,
    k_codec: KVCodec,
    v_codec: KVCodec,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Buffer | None = None,
    max_rows: int,
    group: int = 0,
) -> list[Launch]:
    """Attend with q (float32 rows of num_q_heads * head_dim elements from `q_offset`, `q_row_stride` elements apart) over the planes.

    Units: window in positions (0: all; step.sequences has each sequence's own), q_offset and q_row_stride in elements.
    k_codec, v_codec: of the planes, whose sizes say where their scales lie (kernels/kv_codec.py).
    group: of the layers that share this one's block tables.
    Raises: ValueError for head counts that do not divide, or heads that a codec does not take.
    """
    check.divides("attention", "num_q_heads", num_q_heads, "num_kv_heads", num_kv_heads)
    k_codec.check_dim(head_dim)
    v_codec.check_dim(value_dim)
    constants = params.pack(
        "MSAttentionParams",
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        block_size=block_size,
        k_codec=k_codec.code,
        v_codec=v_codec.code,
        k_scales=k_codec.scales_at(k_plane.nbytes, head_dim),
        v_scales=v_codec.scales_at(v_plane.nbytes, value_dim),
        window=window,
        q_offset=q_offset,
        q_row_stride=q_row_stride,
        has_sinks=int(sinks is not None),
        scale=scale,
        softcap=softcap,
    )
    tables = step.block_tables[group]
    bindings = [
        step.step, step.positions, step.seq_ids, tables, q, k_plane, v_plane, out, sinks or step.step, step.sequences,
    ]  # fmt: skip
    return [Launch("attention", bindings, constants, grid=(max_rows, num_kv_heads, 1), threads=(THREADS, 1, 1))]
