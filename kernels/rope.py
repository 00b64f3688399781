"""Rotary position embedding, in two instructions: the angles of a row, once per step and configuration, and a rotation by them.

Source: Su et al., arXiv 2104.09864, section 3.4.2. Half-split pairs (i, i + dims/2), or neighbours (2i, 2i + 1) when `traditional`.
"""
from __future__ import annotations

import mlx.core as mx

from metalstep.kernels import params
from metalstep.kernels.program import Program, Register


def reference(
    x: mx.array, positions: mx.array, dims: int, traditional: bool, base: float | None, scale: float, freqs: mx.array | None
) -> mx.array:
    """x [rows, heads, head_dim], positions [rows] in tokens; the first `dims` of each head turn by position * scale / freq,
    freq being freqs[i] or base ** (2i / dims)."""
    half = dims // 2
    if freqs is None:
        assert base is not None
        freqs = base ** (mx.arange(half, dtype=mx.float32) / half)
    angle = (positions.astype(mx.float32) * scale)[:, None, None] / freqs
    cos, sin = mx.cos(angle), mx.sin(angle)
    turned = x[..., :dims].astype(mx.float32)
    if traditional:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return mx.concatenate([turned, x[..., dims:].astype(mx.float32)], axis=-1)


def emit_angles(program: Program, dims: int, base: float | None, scale: float, freqs: Register | None) -> Register:
    """cos and sin of the row's position, dims/2 elements each. With `freqs` (dims/2 elements) `base` is not used."""
    out = program.register(dims)
    program.emit(params.MS_OP_ROPE_ANGLES, out, None, freqs, n=dims // 2, imm0=base or 0.0, imm1=scale)
    return out


def emit(program: Program, x: Register, angles: Register, head_dim: int, traditional: bool) -> Register:
    """Rotate each head of `x` by `angles` (of `emit_angles`); what lies behind the rotated dims is copied."""
    out = program.register(x.size)
    program.emit(
        params.MS_OP_ROPE, out, x, angles, n=x.size, inner=head_dim, dims=[angles.size // 2, int(traditional), 0, 0]
    )
    return out
