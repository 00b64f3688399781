"""MLX's own Metal kernels on simulated Metal give what MLX gives: the simulator against texts that are not the project's.

Errors are relative, in the norm over all elements. 2e-3 is half's rounding (5e-4) of a result and of what the kernel rounds
on its way; 1e-2 the same for bfloat (4e-3).
"""
import itertools
import os
import re
import shutil
import struct
import sys

import mlx.core as mx
import mlx_headers
import numpy as np
import pytest
from mlx_launch import (
    bfloat_bits,
    ceil,
    float32,
    int32,
    int64,
    kernels,
    normal,
    of_bfloat,
    relative_error,
    unwritten,
    wide,
)
from mlx_quantized import NO_QUANTIZED_BATCH, QUANTIZED, QUANTIZED_HEADERS, quantized, quantized_matmul_error

from metalstep.kernels.native import NativeDevice

pytestmark = [
    pytest.mark.skipif(sys.platform == "darwin", reason="this machine's Metal is not simulated"),
    pytest.mark.skipif(
        shutil.which(os.environ.get("METALSTEP_CLANG", "clang++")) is None,
        reason="simulated Metal needs clang++: put it on PATH or set METALSTEP_CLANG",
    ),
]
HALF, BFLOAT, FLOAT_SUMS = 2e-3, 1e-2, 1e-5


@pytest.fixture(params=[0, 3, *(pytest.param(n, marks=pytest.mark.all_instances) for n in (1, 2))])
def order(request, monkeypatch):
    """Of threads, simdgroups and threadgroups: ascending, shuffled; descending and another shuffle in the long run."""
    monkeypatch.setenv("METALSTEP_SIM_SEED", str(request.param))


@pytest.fixture
def rng(order):
    """Of every case: so each is run in every order."""
    return np.random.default_rng(0)


# ---- softmax, logsumexp

SOFTMAX = """
instantiate_kernel("f16", softmax_single_row, half)
instantiate_kernel("f16_precise", softmax_single_row, half, float)
instantiate_kernel("bf16", softmax_single_row, bfloat16_t, float)
template [[host_name("looped")]] [[kernel]] decltype(softmax_looped<half, float>) softmax_looped<half, float>;
"""


@pytest.mark.parametrize("n", [100, 512, 1000])
@pytest.mark.parametrize("kernel, tolerance", [("f16", 2e-2), ("f16_precise", HALF), ("looped", HALF), ("bf16", BFLOAT)])
def test_softmax(rng, n, kernel, tolerance):
    """f16 sums in half."""
    x = normal(rng, 3, n, scale=3)
    stored = bfloat_bits(x) if kernel == "bf16" else x
    out = unwritten(x.shape, stored.dtype.type)
    threads = 1024 if kernel == "looped" else ceil(ceil(n, 4), 32) * 32
    kernels(("softmax.h",), SOFTMAX).run(kernel, [stored, out, int32(n)], (3, 1, 1), (threads, 1, 1))
    expected = wide(mx.softmax(mx.array(of_bfloat(stored) if kernel == "bf16" else x.astype(np.float32)), axis=-1))
    assert relative_error(of_bfloat(out) if kernel == "bf16" else out, expected) <= tolerance


def test_logsumexp(rng):
    x, out = normal(rng, 3, 500, scale=3), unwritten((3,))
    kernels(("logsumexp.h",), 'instantiate_kernel("lse", logsumexp, half, float)').run(
        "lse", [x, out, int32(500)], (3, 1, 1), (128, 1, 1)
    )
    assert relative_error(out, wide(mx.logsumexp(mx.array(x).astype(mx.float32), axis=-1))) <= HALF


# ---- hadamard

HADAMARD = """
instantiate_kernel("f32", hadamard_n, float, 1024, 16, 4)
instantiate_kernel("f16", hadamard_n, half, 512, 16, 2)
"""


@pytest.mark.parametrize("kernel, n, dtype, tolerance", [("f32", 1024, np.float32, 1e-6), ("f16", 512, np.float16, HALF)])
def test_hadamard(rng, kernel, n, dtype, tolerance):
    x = normal(rng, 4, n, dtype=dtype)
    out = unwritten(x.shape, dtype)
    kernels(("hadamard.h",), HADAMARD).run(kernel, [x, out, float32(1 / np.sqrt(n))], (1, 4, 1), (n // 16, 1, 1))
    assert relative_error(out, wide(mx.hadamard_transform(mx.array(x).astype(mx.float32)))) <= tolerance


# ---- matrix with vector

GEMV = """
instantiate_kernel("f16", gemv, half, 8, 1, 1, 32, 4, 4, false, false)
instantiate_kernel("f32_axpby", gemv, float, 4, 1, 1, 32, 4, 4, false, true)
instantiate_kernel("f16_t", gemv_t, half, 1, 2, 8, 4, 4, 4, false, false)
"""
NO_BATCH = [int32(1), int32(1), int64(0), int64(0), int64(0), int32(1)]


@pytest.mark.parametrize("kernel, dtype, rows, tolerance", [("f16", np.float16, 8, HALF), ("f32_axpby", np.float32, 4, FLOAT_SUMS)])
def test_gemv(rng, kernel, dtype, rows, tolerance):
    m, k = 133, 300
    matrix, vector, bias = normal(rng, m, k, dtype=dtype), normal(rng, k, dtype=dtype), normal(rng, m, dtype=dtype)
    out = unwritten((m,), dtype)
    arguments = [matrix, vector, bias, out, int32(k), int32(m), int32(k), float32(0.5), float32(2), *NO_BATCH]
    kernels(("gemv.h",), GEMV).run(kernel, arguments, (ceil(m, rows * 4), 1, 1), (32, 1, rows))
    expected = matrix.astype(np.float64) @ vector.astype(np.float64)
    assert relative_error(out, 0.5 * expected + 2.0 * bias if "axpby" in kernel else expected) <= tolerance


def test_gemv_of_the_transpose(rng):
    k, n = 96, 32
    matrix, vector, out = normal(rng, k, n), normal(rng, k), unwritten((n,))
    arguments = [matrix, vector, matrix, out, int32(k), int32(n), int32(n), float32(1), float32(0), *NO_BATCH]
    kernels(("gemv.h",), GEMV).run("f16_t", arguments, (1, 1, 1), (32, 2, 1))
    assert relative_error(out, vector.astype(np.float64) @ matrix.astype(np.float64)) <= HALF


# ---- attention of one query

SDPA = """
instantiate_kernel("one", sdpa_vector, half, 64)
instantiate_kernel("part", sdpa_vector_2pass_1, half, 64)
instantiate_kernel("whole", sdpa_vector_2pass_2, half, 64)
"""
HAS_MASK, DO_CAUSAL, BOOL_MASK, FLOAT_MASK, HAS_SINKS, BLOCKS = 20, 22, 23, 24, 25, 26
SDPA_MASKS = {
    "none": (), "bool": (HAS_MASK, BOOL_MASK), "float": (HAS_MASK, FLOAT_MASK), "causal": (DO_CAUSAL,), "sinks": (HAS_SINKS,),
}  # fmt: skip


def sdpa(rng, mask: str, blocks: int):
    """(kernels, q, k, v, what is bound after the keys' and values' strides, expected) of 4 query heads, 2 of keys, 77 tokens."""
    heads, kv_heads, tokens, head_dim = 4, 2, 77, 64
    q, k, v = (normal(rng, 1, n, t, head_dim) for n, t in ((heads, 1), (kv_heads, tokens), (kv_heads, tokens)))
    bools = rng.random((1, heads, 1, tokens)) < 0.7 if mask == "bool" else None
    floats = normal(rng, 1, heads, 1, tokens) if mask == "float" else None
    sinks = normal(rng, heads) if mask == "sinks" else None
    options = {}
    if bools is not None:
        options["mask"] = mx.array(bools)
    if floats is not None:
        options["mask"] = mx.array(floats).astype(mx.float32)
    if sinks is not None:
        options["sinks"] = mx.array(sinks).astype(mx.float32)
    exact = [mx.array(a).astype(mx.float32) for a in (q, k, v)]
    expected = wide(mx.fast.scaled_dot_product_attention(*exact, scale=0.125, **options))
    constants = {i: i in SDPA_MASKS[mask] for i in range(HAS_MASK, BLOCKS)} | {BLOCKS: blocks}
    strides = [np.array([stride], np.uint64) for _ in range(2) for stride in (tokens * head_dim, head_dim)]
    rest = [*strides, float32(0.125), bools, floats, int32(1), int32(tokens), int32(tokens), sinks]
    return kernels(("sdpa_vector.h",), SDPA, tuple(constants.items())), q, k, v, rest, expected


@pytest.mark.parametrize("mask", SDPA_MASKS)
def test_sdpa_vector(rng, mask):
    library, q, k, v, rest, expected = sdpa(rng, mask, 32)
    out = unwritten(q.shape)
    library.run("one", [q, k, v, out, int32(2), int32(77), *rest, int32(4)], (4, 1, 1), (1024, 1, 1))
    assert relative_error(out, expected) <= HALF


@pytest.mark.parametrize("blocks", [16, 32])
@pytest.mark.parametrize("mask", ["none", "bool", "causal"])
def test_sdpa_vector_in_two_passes(rng, mask, blocks):
    """The second kernel takes multiples of 32 blocks; partial results of 16 are joined here."""
    library, q, k, v, rest, expected = sdpa(rng, mask, blocks)
    heads, head_dim = 4, 64
    parts = unwritten((heads, blocks, head_dim))
    sums, maxima = (unwritten((heads, blocks), np.float32) for _ in range(2))
    library.run("part", [q, k, v, parts, sums, maxima, None, int32(77), *rest], (2, 1, blocks), (32, 2, 1))
    if blocks == 32:
        out = unwritten(q.shape)
        library.run("whole", [parts, sums, maxima, out, int32(blocks)], (heads, 1, 1), (1024, 1, 1))
    else:
        weights = np.exp(maxima - maxima.max(1, keepdims=True))
        out = (parts * weights[:, :, None]).sum(1, dtype=np.float64) / (sums * weights).sum(1)[:, None]
    assert relative_error(out, expected.reshape(out.shape)) <= 1.5 * HALF  # parts are halves too


# ---- gated delta rule

GATED_DELTA = """
instantiate_kernel("seq", gated_delta_seq, half, 64, 64, 2, 4, 4)
instantiate_kernel("chunk", gated_delta_fused_chunk, half, 64, 64, 2, 4, 8)
"""


@pytest.mark.parametrize("kernel, rows", [("seq", 4), ("chunk", 32)])
def test_gated_delta_update(rng, kernel, rows):
    tokens, key_heads, heads, key_dim, value_dim = 19, 2, 4, 64, 64
    q, k = normal(rng, 1, tokens, key_heads, key_dim, scale=0.1), normal(rng, 1, tokens, key_heads, key_dim, dtype=np.float32)
    k = (k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(np.float16)
    v, state = normal(rng, 1, tokens, heads, value_dim), normal(rng, 1, heads, value_dim, key_dim, dtype=np.float32)
    decay, beta = ((low + (1 - low) * rng.random((1, tokens, heads))).astype(np.float16) for low in (0.8, 0.0))
    now, expected = state.astype(np.float64), np.zeros((1, tokens, heads, value_dim))
    for t, head in itertools.product(range(tokens), range(heads)):
        key, query = k[0, t, head // 2].astype(np.float64), q[0, t, head // 2].astype(np.float64)
        now[0, head] *= float(decay[0, t, head])
        now[0, head] += np.outer((v[0, t, head] - now[0, head] @ key) * float(beta[0, t, head]), key)
        expected[0, t, head] = now[0, head] @ query
    out, after = unwritten(v.shape), unwritten(state.shape, np.float32)
    library = kernels(("gated_delta_update.h",), GATED_DELTA, ((200, False),))
    library.run(kernel, [q, k, v, state, decay, beta, out, after, int32(tokens), None], (1, value_dim // rows, heads), (32, 4, 1))
    assert relative_error(out, expected) <= 1.5 * HALF
    assert relative_error(after, now) <= 1.5 * HALF


# ---- scan, sort, reduce

SCAN = """
instantiate_kernel("inclusive", contiguous_scan, float, float, CumSum<float>, 4, true, false)
instantiate_kernel("exclusive", contiguous_scan, float, float, CumSum<float>, 4, false, false)
instantiate_kernel("max_reverse", contiguous_scan, half, half, CumMax<half>, 4, true, true)
instantiate_kernel("int64", contiguous_scan, int64_t, int64_t, CumSum<int64_t>, 4, true, false)
"""


@pytest.mark.parametrize("kernel, tolerance", [("inclusive", FLOAT_SUMS), ("exclusive", FLOAT_SUMS), ("max_reverse", 0), ("int64", 0)])
def test_scan(rng, kernel, tolerance):
    x = normal(rng, 3, 1000, dtype=np.float16 if kernel == "max_reverse" else np.float32)
    if kernel == "int64":
        x = rng.integers(-(2**40), 2**40, x.shape)
    out = np.zeros_like(x)
    kernels(("scan.h",), SCAN).run(kernel, [x, out, np.array([1000], np.uint64)], (1, 3, 1), (256, 1, 1))
    sums = np.cumsum(x.astype(np.float64), 1)
    expected = {"inclusive": sums, "exclusive": sums - x, "int64": np.cumsum(x, 1)}.get(kernel)
    if expected is None:
        expected = np.maximum.accumulate(x[:, ::-1], 1)[:, ::-1]
    assert relative_error(out, expected) <= tolerance


SORT = """
instantiate_kernel("values", block_sort, float, float, false, 64, 4)
instantiate_kernel("indices", block_sort, half, uint32_t, true, 64, 4)
"""


@pytest.mark.parametrize("kernel", ["values", "indices"])
def test_sort(rng, kernel):
    x = normal(rng, 3, 200, dtype=np.float32 if kernel == "values" else np.float16)
    out = np.zeros(x.shape, np.float32 if kernel == "values" else np.uint32)
    arguments = [x, out, int32(200), int32(1), int32(1), int32(200), int32(200)]
    kernels(("sort.h",), SORT).run(kernel, arguments, (1, 3, 1), (64, 1, 1))
    np.testing.assert_array_equal(out if kernel == "values" else np.take_along_axis(x, out.astype(np.int64), 1), np.sort(x, 1))


REDUCE = """
instantiate_kernel("sum", all_reduce, float, float, Sum<float>)
instantiate_kernel("max", row_reduce_simple, half, half, Max<half>)
"""
REDUCE_HEADERS = ("atomic.h", "reduction/ops.h", "reduction/reduce_all.h", "reduction/reduce_row.h")


def test_reduce(rng):
    library, size = kernels(REDUCE_HEADERS, REDUCE), np.array([5000], np.uint64)
    x, total = normal(rng, 5000, dtype=np.float32), np.zeros(1, np.float32)
    library.run("sum", [x, total, size, size], (1, 1, 1), (256, 1, 1))
    assert relative_error(total, x.sum(dtype=np.float64)) <= FLOAT_SUMS
    x, largest = normal(rng, 8, 700), unwritten((8,))
    library.run("max", [x, largest, np.array([700], np.uint64), int64(8)], (1, 2, 1), (256, 1, 1))
    np.testing.assert_array_equal(largest, x.max(1))


# ---- quantised matrices

@pytest.mark.parametrize(
    "kernel, rows, k, n, width, grid_rows",
    [("qmv_fast", 3, 512, 24, 4, 8), ("qmv", 3, 512, 24, 4, 8), ("qmv3", 2, 320, 21, 3, 8), ("qmv_quad", 2, 64, 70, 4, 64)],
)
def test_quantized_matrix_with_vectors(rng, kernel, rows, k, n, width, grid_rows):
    stored, matrix = quantized(rng, n, k, width)
    x, out = normal(rng, rows, k), unwritten((rows, n))
    threads = (32, 1, 1) if kernel == "qmv_quad" else (32, 2, 1)
    library = kernels(QUANTIZED_HEADERS, QUANTIZED)
    library.run(kernel, [*stored, x, out, int32(k), int32(n), *NO_QUANTIZED_BATCH], (rows, ceil(n, grid_rows), 1), threads)
    assert relative_error(out, x.astype(np.float64) @ matrix.T) <= HALF


def test_quantized_matrix_of_bfloat_with_vectors(rng):
    stored, matrix = quantized(rng, 24, 512, 8, mx.bfloat16)
    x, out = bfloat_bits(normal(rng, 3, 512)), unwritten((3, 24), np.uint16)
    arguments = [*stored, x, out, int32(512), int32(24), *NO_QUANTIZED_BATCH]
    kernels(QUANTIZED_HEADERS, QUANTIZED).run("qmv_fast8", arguments, (3, 3, 1), (32, 2, 1))
    assert relative_error(of_bfloat(out), of_bfloat(x).astype(np.float64) @ matrix.T) <= BFLOAT


def test_vectors_with_a_quantized_matrix(rng):
    stored, matrix = quantized(rng, 96, 512)
    x, out = normal(rng, 2, 96), unwritten((2, 512))
    arguments = [*stored, x, out, int32(96), int32(512), *NO_QUANTIZED_BATCH]
    kernels(QUANTIZED_HEADERS, QUANTIZED).run("qvm", arguments, (2, 8, 1), (32, 2, 1))
    assert relative_error(out, x.astype(np.float64) @ matrix) <= HALF


@pytest.mark.parametrize("m, n", [(37, 40), (32, 64), (5, 33)])
def test_quantized_matmul(rng, m, n):
    assert quantized_matmul_error(rng, kernels(QUANTIZED_HEADERS, QUANTIZED), m, n) <= HALF


def test_quantized_matmul_of_bfloat(rng):
    stored, matrix = quantized(rng, 64, 128, 4, mx.bfloat16)
    x, out = bfloat_bits(normal(rng, 20, 128)), unwritten((20, 64), np.uint16)
    arguments = [*stored, x, out, int32(128), int32(64), int32(20), *NO_QUANTIZED_BATCH]
    kernels(QUANTIZED_HEADERS, QUANTIZED).run("qmm_t_bfloat", arguments, (2, 1, 1), (32, 2, 2))
    assert relative_error(of_bfloat(out), of_bfloat(x).astype(np.float64) @ matrix.T) <= BFLOAT


def test_quantized_matmul_without_a_transpose(rng):
    stored, matrix = quantized(rng, 96, 64)
    x, out = normal(rng, 20, 96), unwritten((20, 64))
    arguments = [*stored, x, out, int32(96), int32(64), int32(20), *NO_QUANTIZED_BATCH]
    kernels(QUANTIZED_HEADERS, QUANTIZED).run("qmm_n", arguments, (2, 1, 1), (32, 2, 2))
    assert relative_error(out, x.astype(np.float64) @ matrix) <= HALF


@pytest.mark.parametrize("kernel, width, group_size, dtype", [("quantize", 4, 64, np.float16), ("quantize3", 3, 32, np.float32)])
def test_quantize(rng, kernel, width, group_size, dtype):
    """Words may differ where a division ends on a half: one in a hundred at most."""
    weight = normal(rng, 8, 256, dtype=dtype)
    expected = [np.array(part) for part in mx.quantize(mx.array(weight), group_size=group_size, bits=width)]
    out = [np.zeros_like(part) for part in expected]
    groups = weight.size // (2 if width == 4 else 1) // 32
    kernels(QUANTIZED_HEADERS, QUANTIZED).run(kernel, [weight, *out], (groups, 1, 1), (32, 1, 1))
    for got, part in zip(out[1:], expected[1:], strict=True):
        assert relative_error(got, part) <= HALF
    assert (out[0] == expected[0]).mean() >= 0.99


def test_dequantize(rng):
    parts = mx.quantize(mx.array(normal(rng, 8, 256)), group_size=64, bits=4)
    out = unwritten((8, 256))
    kernels(QUANTIZED_HEADERS, QUANTIZED).run("dequantize", [*map(np.array, parts), out], (32, 1, 1), (32, 1, 1))
    assert relative_error(out, np.array(mx.dequantize(*parts, group_size=64, bits=4))) <= HALF


MXFP4 = """
instantiate_kernel("qmv", fp_qmv_fast, half, 32, 4, false)
instantiate_kernel("qmm", fp_qmm_t, half, 32, 4, false, false)
"""


@pytest.mark.parametrize("kernel, m", [("qmv", 3), ("qmm", 37)])
def test_mxfp4(rng, kernel, m):
    k, n = 512, 24
    words, scales = mx.quantize(mx.array(normal(rng, n, k)), group_size=32, bits=4, mode="mxfp4")
    matrix = wide(mx.dequantize(words, scales, group_size=32, bits=4, mode="mxfp4")).astype(np.float64)
    x, out = normal(rng, m, k), unwritten((m, n))
    sizes = [int32(k), int32(n), *([int32(m)] if kernel == "qmm" else [])]
    arguments = [np.array(words), np.array(scales), None, x, out, *sizes, *NO_QUANTIZED_BATCH[:-1]]
    grid, threads = ((m, n // 8, 1), (32, 2, 1)) if kernel == "qmv" else ((1, ceil(m, 32), 1), (32, 2, 2))
    library = kernels(("steel/gemm/gemm.h", "quantized_utils.h", "fp_quantized.h"), MXFP4)
    library.run(kernel, arguments, grid, threads)
    assert relative_error(out, x.astype(np.float64) @ matrix.T) <= HALF


# ---- attention of many queries

STEEL_HEADERS = ("steel/attn/attn.h", "steel/attn/kernels/steel_attention.h")
STEEL = 'instantiate_kernel("attention", attention, half, 32, 32, 64, 64, 4, 1, half, float)'
ALIGN_Q, ALIGN_K, STEEL_MASK, STEEL_CAUSAL, STEEL_SINKS, STEEL_OTHER = 200, 201, 300, 301, 302, 303


@pytest.mark.parametrize("tokens", [64, 77])
@pytest.mark.parametrize("causal", [False, True])
def test_steel_attention(rng, tokens, causal):
    heads, kv_heads, head_dim, tile = 2, 1, 64, 32
    q, k, v = (normal(rng, 1, n, tokens, head_dim) for n in (heads, kv_heads, kv_heads))
    tiles, rest = ceil(tokens, tile), tokens % tile
    shape = (1, heads, head_dim, tokens, tokens, heads // kv_heads)
    sizes = struct.pack("6if6i", *shape, 0.125, tiles, tiles, tokens // tile, tokens // tile, rest, rest)
    strides = [s for n in (heads, kv_heads, kv_heads, heads) for s in (n * tokens * head_dim, tokens * head_dim, head_dim)]
    parameters = np.frombuffer(sizes + struct.pack("i", 0) + struct.pack("12q", *strides), np.uint8)
    whole = rest == 0
    constants = {ALIGN_Q: whole, ALIGN_K: whole, STEEL_MASK: False, STEEL_CAUSAL: causal, STEEL_SINKS: False, STEEL_OTHER: False}
    out = unwritten(q.shape)
    library = kernels(STEEL_HEADERS, STEEL, tuple(constants.items()))
    library.run("attention", [q, k, v, out, parameters, None, None, None, None], (tiles, heads, 1), (32, 4, 1))
    exact = [mx.array(a).astype(mx.float32) for a in (q, k, v)]
    expected = mx.fast.scaled_dot_product_attention(*exact, scale=0.125, mask="causal" if causal else None)
    assert relative_error(out, wide(expected)) <= HALF


# ---- every header

# What a header takes for granted: the kernels' own .metal files include it first.
BEFORE = {
    r"steel/conv/": ("steel/conv/conv.h",),
    r"steel/gemm/kernels/": ("steel/gemm/gemm.h",),
    r"(fp_)?quantized": ("steel/gemm/gemm.h", "quantized_utils.h"),
    r"reduc": ("atomic.h", "reduction/ops.h"),
    r"indexing/": ("atomic.h",),
    r"ternary|binary|unary|copy": ("binary_ops.h", "ternary_ops.h", "unary_ops.h"),
    r"searchsorted": ("sort.h",),
}


@pytest.mark.all_instances
def test_every_header_compiles():
    """But those that use Metal 4's tensor operations, which MLX calls nax."""
    names = [name for name in mlx_headers.names() if "nax" not in name]
    assert len(names) > 80
    failures = {}
    with NativeDevice.open("metal-sim") as device:
        for name in names:
            before = next((headers for pattern, headers in BEFORE.items() if re.match(pattern, name)), ())
            try:
                device.add_library(mlx_headers.source([*before, name]))
            except RuntimeError as error:
                failures[name] = str(error)
    assert not failures
