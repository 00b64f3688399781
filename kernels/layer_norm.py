"""LayerNorm as a row-program instruction. Source: Ba, Kiros & Hinton, arXiv 1607.06450, section 3."""
from __future__ import annotations

import mlx.core as mx

from metalstep.kernels import params
from metalstep.kernels.program import Program, Register


def reference(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """x [..., width], weight and bias [width] or None; `eps` is added to the variance. Sums are float32."""
    x = x.astype(mx.float32)
    centred = x - mx.mean(x, axis=-1, keepdims=True)
    y = centred * mx.rsqrt(mx.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight.astype(mx.float32)
    return y if bias is None else y + bias.astype(mx.float32)


def emit(
    program: Program, x: Register, weight: Register | None, bias: Register | None, eps: float, width: int
) -> Register:
    """Normalise each span of `width` elements of `x`; `weight` and `bias` have `width` elements."""
    out = program.register(x.size)
    program.emit(params.MS_OP_LAYER_NORM, out, x, weight, bias, n=x.size, inner=width, imm0=eps)
    return out
