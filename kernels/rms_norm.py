"""RMSNorm as a row-program instruction. Source: Zhang & Sennrich, arXiv 1910.07467, section 4."""
from __future__ import annotations

import mlx.core as mx

from metalstep.kernels import params
from metalstep.kernels.program import Program, Register


def reference(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x [..., width], weight [width] or None; `eps` is added to the mean square. Sums are float32."""
    x = x.astype(mx.float32)
    y = x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight.astype(mx.float32)


def emit(program: Program, x: Register, weight: Register | None, eps: float, width: int) -> Register:
    """Normalise each span of `width` elements of `x`; `weight` has `width` elements."""
    out = program.register(x.size)
    program.emit(params.MS_OP_RMS_NORM, out, x, weight, n=x.size, inner=width, imm0=eps)
    return out
