"""Quantised matrices for MLX's kernels."""
from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_launch import MlxKernels, bits, ceil, int32, int64, normal, relative_error, unwritten, wide

QUANTIZED_HEADERS = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
QUANTIZED = """
instantiate_kernel("qmv_fast", affine_qmv_fast, half, 64, 4, false)
instantiate_kernel("qmv_fast8", affine_qmv_fast, bfloat16_t, 64, 8, false)
instantiate_kernel("qmv", affine_qmv, half, 64, 4, false)
instantiate_kernel("qmv3", affine_qmv, half, 64, 3, false)
instantiate_kernel("qmv_quad", affine_qmv_quad, half, 64, 4, 64, false)
instantiate_kernel("qvm", affine_qvm, half, 64, 4, false)
instantiate_kernel("qmm_t", affine_qmm_t, half, 64, 4, false, false)
instantiate_kernel("qmm_t_bfloat", affine_qmm_t, bfloat16_t, 64, 4, true, false)
instantiate_kernel("qmm_n", affine_qmm_n, half, 64, 4, false)
instantiate_kernel("quantize", affine_quantize, half, 64, 4)
instantiate_kernel("quantize3", affine_quantize, float, 32, 3)
instantiate_kernel("dequantize", affine_dequantize, half, 64, 4)
"""
NO_QUANTIZED_BATCH = [int32(1), int32(1), int64(0), int32(1), int32(1), int64(0), int64(0), int64(0)]


def quantized(rng, rows: int, columns: int, width: int = 4, dtype: mx.Dtype = mx.float16):
    """(words, scales, biases as stored, the matrix that they stand for) in groups of 64."""
    parts = mx.quantize(mx.array(normal(rng, rows, columns, scale=0.1)).astype(dtype), group_size=64, bits=width)
    return [bits(part) for part in parts], wide(mx.dequantize(*parts, group_size=64, bits=width)).astype(np.float64)


def quantized_matmul_error(rng, library: MlxKernels, m: int, n: int, k: int = 128) -> float:
    stored, matrix = quantized(rng, n, k)
    x, out = normal(rng, m, k), unwritten((m, n))
    arguments = [*stored, x, out, int32(k), int32(n), int32(m), *NO_QUANTIZED_BATCH]
    library.run("qmm_t", arguments, (ceil(n, 32), ceil(m, 32), 1), (32, 2, 2))
    return relative_error(out, x.astype(np.float64) @ matrix.T)
