"""Residual add followed by RMSNorm, in one launch. Source: Zhang & Sennrich, arXiv 1910.07467, section 4."""
from __future__ import annotations

import math

import mlx.core as mx

from metalstep.kernels import check, params
from metalstep.kernels.launch import Buffer, Launch

# Kernels by device and dtype. The host device computes in float32 throughout.
KERNELS = {
    "host": {"float32": "add_rms_norm"},
    "metal": {"float32": "add_rms_norm_float", "float16": "add_rms_norm_half", "bfloat16": "add_rms_norm_bfloat"},
}
THREADS = 256  # per row, whatever its length: the order of the sum depends on hidden_size alone. Not tuned on a device


def reference(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """What the kernel computes, written to be read. Never tuned; returns (out, new residual)."""
    residual = (x.astype(mx.float32) + residual.astype(mx.float32)).astype(x.dtype)
    h = residual.astype(mx.float32)
    scale = mx.rsqrt(mx.mean(h * h, axis=-1, keepdims=True) + eps)
    return (h * scale * weight.astype(mx.float32)).astype(x.dtype), residual


def launches(
    x: Buffer, residual: Buffer, weight: Buffer, out: Buffer, eps: float, device: str = "host"
) -> list[Launch]:
    """Add `x` into `residual` in place; write the normalised sum to `out`. No row, no launch.

    Shapes: x, residual and out [tokens, hidden_size]; weight [hidden_size]. None of them overlap.
    Dtypes: one for all: float32, and on metal float16 or bfloat16; arithmetic is float32.
    Units:  eps is added to the mean square, so it has the unit of x squared.
    Raises: ValueError for a shape, dtype, eps or device that does not fit.
    """
    op = "add_rms_norm"
    if device not in KERNELS:
        raise ValueError(f"{op}: device is {device!r}, expected {' or '.join(KERNELS)}")
    if len(x.shape) != 2 or x.shape[1] < 1:
        raise ValueError(f"{op}: x has shape {x.shape}, expected (tokens, hidden_size) with a hidden_size of 1 or more")
    tokens, hidden_size = x.shape
    check.shape(op, "residual", residual, x.shape, "x's shape")
    check.shape(op, "weight", weight, (hidden_size,), "x's last axis")
    check.shape(op, "out", out, x.shape, "x's shape")
    check.dtype(op, "x", x, list(KERNELS[device]))
    for name, buffer in {"residual": residual, "weight": weight, "out": out}.items():
        check.dtype(op, name, buffer, [x.dtype])
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps is {eps}, expected a finite number, 0 or more")
    if tokens == 0:
        return []
    constants = params.pack("AddRMSNormParams", hidden_size=hidden_size, eps=eps)
    kernel = KERNELS[device][x.dtype]
    return [Launch(kernel, [x, residual, weight, out], constants, (tokens, 1, 1), (THREADS, 1, 1))]
