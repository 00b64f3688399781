"""The simulated standard library against numpy: vectors, mathematics, integers, simdgroups, tiles and atomics."""
import numpy as np
import pytest
from simulated_kernels import HEAD, NEEDS, launch, out, run

from metalstep.kernels.native import NativeDevice

pytestmark = NEEDS
N = 64  # two simdgroups
LANE = np.arange(N) % 32


@pytest.fixture
def metal():
    with NativeDevice.open("metal-sim") as device:
        yield device


@pytest.fixture(params=[0, 1, 3], autouse=True)
def order(request, monkeypatch):
    monkeypatch.setenv("METALSTEP_SIM_SEED", str(request.param))


def values(device: NativeDevice, expressions: list[str], before: str = "") -> np.ndarray:
    """float32 [expressions, N]: each expression of i, lane, x (from -4 to 4) and v (float4 of x and its powers)."""
    rows = "\n".join(f"o[{n} * {N} + i] = float({expression});" for n, expression in enumerate(expressions))
    device.add_library(
        f"""{HEAD}#include <metal_simdgroup_matrix>
        {before}
        kernel void k(device float* o [[buffer(0)]], uint i [[thread_index_in_threadgroup]],
          uint lane [[thread_index_in_simdgroup]]) {{
          const float x = (float(i) - 32.0f) / 8.0f;
          const float4 v = float4(x, x * x, x * x * x, 1.0f);
          {rows}
        }}"""
    )
    result = out(device, len(expressions) * N)
    run(device, launch("k", result, threads=N))
    return device.numpy(result, np.float32, (len(expressions), N)).copy()


X = ((np.arange(N) - 32) / 8).astype(np.float32)
V = np.stack([X, X * X, X * X * X, np.ones(N, np.float32)])
INDEX = np.arange(N)
VECTORS = {
    "v.x + v.y + v.z + v.w": V.sum(0),
    "v[2]": V[2],
    "v.xy.y * v.zw.x": V[1] * V[2],
    "(v * 2 + float4(1)).z": V[2] * 2 + 1,
    "(1 - v / 2.0f).y": 1 - V[1] / 2,
    "(-v).x": -V[0],
    "dot(v.xy, v.xy)": X * X + X**4,
    "length(float2(3.0f, 4.0f))": np.full(N, 5),
    "float4(half4(v)).z": V[2].astype(np.float16),
    "float4(v.xy, 2.0f, 3.0f).z + float3(v.xy, 5.0f).z": np.full(N, 7),
    "all(v == v) && any(v > float4(15.0f)) == (x * x > 15.0f || x * x * x > 15.0f)": np.ones(N),
    "select(v, float4(9.0f), v < float4(0.0f)).x": np.where(X < 0, 9, X),
    "clamp(v, -1.0f, 1.0f).z": np.clip(V[2], -1, 1),
    "max(v, float4(0.0f)).x + min(v, float4(0.0f)).x": X,
    "((uint4(i) << 2u) & uint4(12u) | uint4(1u)).w": (INDEX << 2) & 12 | 1,
    "(ushort4(i) % ushort4(7)).y": INDEX % 7,
    "as_type<uchar4>(0x04030201u).z": np.full(N, 3),
    "as_type<float>(as_type<uint>(x))": X,
    "as_type<half2>(as_type<uint>(half2(1.5h, 2.5h))).y": np.full(N, 2.5),
    "float3(packed_float3(v.xyz)).z": V[2],
    "sizeof(packed_float3) + 100 * sizeof(float3) + 10000 * alignof(half4)": np.full(N, 12 + 1600 + 80000),
}
INTEGERS = {
    "popcount(i)": [i.bit_count() for i in range(N)],
    "clz(i)": [32 - i.bit_length() for i in range(N)],
    "ctz(i | 64u)": [((i | 64) & -(i | 64)).bit_length() - 1 for i in range(N)],
    "clz(uchar(i)) + clz(ushort(i))": [8 + 16 - 2 * i.bit_length() for i in range(N)],
    "extract_bits(i, 1u, 3u)": INDEX >> 1 & 7,
    "extract_bits(int(i) - 32, 0u, 3u)": [((i - 32 + 4) % 8) - 4 for i in range(N)],
    "insert_bits(0u, i, 4u, 2u)": (INDEX & 3) << 4,
    "reverse_bits(i) >> 26u": [int(f"{i:06b}"[::-1], 2) for i in range(N)],
    "mulhi(i << 26u, 64u)": INDEX << 26 >> 26,
    "rotate(i, 4u)": INDEX << 4,
    "abs(int(i) - 32)": abs(INDEX - 32),
    "absdiff(i, 32u)": abs(INDEX - 32),
    "addsat(uchar(i), uchar(200))": np.minimum(INDEX + 200, 255),
    "numeric_limits<short>::max() + numeric_limits<uchar>::lowest()": np.full(N, 32767),
}
SPECIAL = {
    "isnan(NAN) + 2 * isinf(-INFINITY) + 4 * isfinite(x) + 8 * isnan(x)": np.full(N, 7),
    "max(NAN, x) + min(x, NAN) + fmax(x, NAN)": 3 * X,
    "sign(x) * sign(-2.0f)": -np.sign(X),
    "numeric_limits<half>::max()": np.full(N, 65504),
    "is_same_v<float, half> + 2 * is_same<uint, uint32_t>::value": np.full(N, 2),
}


@pytest.mark.parametrize("cases", [VECTORS, INTEGERS, SPECIAL], ids=["vectors", "integers", "special"])
def test_exact_functions(metal, cases):
    for got, (expression, expected) in zip(values(metal, list(cases)), cases.items(), strict=True):
        np.testing.assert_array_equal(got, np.asarray(expected, np.float32), err_msg=expression)


MATHS = {
    "exp": np.exp, "exp2": np.exp2, "sin": np.sin, "cos": np.cos, "tan": np.tan, "tanh": np.tanh, "sinh": np.sinh, "cosh": np.cosh,
    "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint, "fabs": np.abs, "atan": np.arctan, "asinh": np.arcsinh,
}  # fmt: skip
OF_POSITIVE = {"log": np.log, "log2": np.log2, "log10": np.log10, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x)}


@pytest.mark.parametrize("space", ["", "precise::", "fast::"])
def test_transcendental_functions(metal, space):
    """Of the C library: a few units in the last place."""
    expressions = [f"{space}{name}(x)" for name in MATHS] + [f"{space}{name}(x + 5.0f)" for name in OF_POSITIVE]
    exact = [f(X.astype(np.float64)) for f in MATHS.values()] + [f(X.astype(np.float64) + 5) for f in OF_POSITIVE.values()]
    two = {"pow(x + 5.0f, x)": (X + 5.0) ** X, "atan2(x, 2.0f)": np.arctan2(X, 2.0), "fmod(x, 1.5f)": np.fmod(X, 1.5)}
    got = values(metal, [*expressions, *(space + text for text in two)])
    np.testing.assert_allclose(got, np.array([*exact, *two.values()]), rtol=1e-6, atol=1e-7)


def test_half_functions_round_to_half(metal):
    """The type of a result is its argument's: a float result would keep more bits."""
    got = values(metal, ["exp(half(x))", "half(x) * half(1.001f) + half(1.0f)", "exp(float(half(x)))"])
    x = X.astype(np.float16)
    np.testing.assert_array_equal(got[0], np.exp(x.astype(np.float64)).astype(np.float16))
    np.testing.assert_array_equal(got[1], x * np.float16(1.001) + np.float16(1))
    assert (got[2] != got[0]).any()


def by_simdgroup(function) -> np.ndarray:
    """[N] of what `function` makes of the lanes of each simdgroup."""
    return np.concatenate([np.broadcast_to(function(INDEX[start : start + 32]), 32) for start in (0, 32)])


SIMD = {
    "simd_sum(i)": by_simdgroup(np.sum),
    "simd_product(lane < 3 ? i + 1 : 1)": by_simdgroup(lambda i: np.prod(i[:3] + 1)),
    "simd_max(float(i)) + simd_min(int(i))": by_simdgroup(lambda i: i.max() + i.min()),
    "simd_and(i | 7) + simd_or(i & 12) + simd_xor(i & 1)": by_simdgroup(
        lambda i: np.bitwise_and.reduce(i | 7) + np.bitwise_or.reduce(i & 12) + np.bitwise_xor.reduce(i & 1)
    ),
    "simd_sum(float4(i, 1, 2, 3)).w": np.full(N, 96),
    "simd_prefix_inclusive_sum(i)": by_simdgroup(np.cumsum),
    "simd_prefix_exclusive_sum(i)": by_simdgroup(lambda i: np.cumsum(i) - i),
    "simd_prefix_inclusive_product(lane % 8 == 1 ? 2.0f : 1.0f)": 2.0 ** ((LANE + 7) // 8),
    "simd_prefix_exclusive_product(lane % 8 == 1 ? 2.0f : 1.0f)": 2.0 ** ((LANE + 6) // 8),
    "simd_shuffle(i, 31 - lane)": by_simdgroup(lambda i: i[::-1]),
    "simd_shuffle_xor(i, 5)": INDEX ^ 5,
    "simd_shuffle_rotate_down(i, 3)": by_simdgroup(lambda i: np.roll(i, -3)),
    "simd_shuffle_rotate_up(i, 3)": by_simdgroup(lambda i: np.roll(i, 3)),
    "simd_shuffle_and_fill_up(i, i + 100, 2)": by_simdgroup(lambda i: np.concatenate([i[-2:] + 100, i[:-2]])),
    "simd_shuffle_and_fill_down(i, i + 100, 2)": by_simdgroup(lambda i: np.concatenate([i[2:], i[:2] + 100])),
    "simd_broadcast(i, 7) + simd_broadcast_first(i)": by_simdgroup(lambda i: i[7] + i[0]),
    "float(ulong(simd_ballot(lane % 5 == 0)) & 0xffffffu)": np.full(N, sum(1 << i for i in range(0, 24, 5))),
    "simd_any(i == 40) + 2 * simd_all(i < 32)": np.where(INDEX < 32, 2, 1),
    "popcount(ulong(simd_active_threads_mask()))": np.full(N, 32),
    "quad_sum(i) + quad_max(i)": (INDEX // 4 * 16 + 6) + INDEX // 4 * 4 + 3,
    "quad_broadcast(i, 2) + quad_shuffle_xor(i, 1)": INDEX // 4 * 4 + 2 + (INDEX ^ 1),
}


def test_simdgroup_functions(metal):
    for got, (expression, expected) in zip(values(metal, list(SIMD)), SIMD.items(), strict=True):
        np.testing.assert_array_equal(got, np.asarray(expected, np.float32), err_msg=expression)


TILES = """#include <metal_simdgroup_matrix>
template <typename T>
kernel void multiply(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device float* c [[buffer(2)]],
                     uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_matrix<T, 8, 8> x, y;
  simdgroup_load(x, a, 8);
  simdgroup_load(y, b, 8, ulong2(0, 0), true);
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8>(1.0f), twice = simdgroup_float8x8(2.0f), product;
  simdgroup_multiply_accumulate(sum, x, y, sum);
  simdgroup_multiply(product, sum, twice);
  threadgroup float t[8 * 10];
  simdgroup_store(product, t, 10);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  // As metal/ms_dialect.h places a lane's two elements.
  const ushort row = ((lane / 4) & 4) + (lane / 2) % 4, column = ((lane / 4) & 2) * 2 + (lane % 2) * 2;
  for (int n = 0; n < 2; n++)
    c[row * 8 + column + n] = t[row * 10 + column + n] == product.thread_elements()[n] ? product.thread_elements()[n] : NAN;
}
MS_INSTANCE(multiply_float, multiply<float>)
MS_INSTANCE(multiply_half, multiply<half>)
"""


@pytest.mark.parametrize("name, dtype", [("float", np.float32), ("half", np.float16)])
def test_tiles_multiply_in_float(metal, name, dtype):
    metal.add_library(HEAD + TILES)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, (8, 8)).astype(dtype) / 4 for _ in range(2))
    buffers = [out(metal, 64) for _ in range(3)]
    for buffer, array in zip(buffers, (a, b), strict=False):
        metal.numpy(buffer, dtype, (8, 8))[:] = array
    run(metal, launch(f"multiply_{name}", *buffers, threads=32))
    np.testing.assert_array_equal(metal.numpy(buffers[2], np.float32, (8, 8)), 2 * (a.astype(np.float32) @ b.T.astype(np.float32) + 1))


ATOMICS = """#include <metal_atomic>
kernel void count(device atomic_uint* u [[buffer(0)]], device atomic_float* f [[buffer(1)]], device atomic_int* s [[buffer(2)]],
                  uint i [[thread_position_in_grid]], uint lane [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint here;
  if (lane == 0) atomic_store_explicit(&here, 0, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&here, 1, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) atomic_fetch_add_explicit(&u[0], atomic_load_explicit(&here, memory_order_relaxed), memory_order_relaxed);
  atomic_fetch_max_explicit(&u[1], i, memory_order_relaxed);
  atomic_fetch_or_explicit(&u[2], 1u << (i % 32), memory_order_relaxed);
  uint seen = atomic_load_explicit(&u[3], memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(&u[3], &seen, seen + 2, memory_order_relaxed, memory_order_relaxed)) {}
  atomic_fetch_add_explicit(&f[0], 0.5f, memory_order_relaxed);
  atomic_fetch_min_explicit(&s[0], -int(i), memory_order_relaxed);
  atomic_fetch_sub_explicit(&s[1], 1, memory_order_relaxed);
  atomic_exchange_explicit(&s[2], 5, memory_order_relaxed);
}
"""


def test_atomics_are_atomic_between_threadgroups(metal):
    metal.add_library(HEAD + ATOMICS)
    buffers = [out(metal, 4) for _ in range(3)]
    for buffer in buffers:
        metal.numpy(buffer, np.uint32, (4,))[:] = 0
    groups, threads = 200, 64
    entry = launch("count", *buffers, threads=threads)
    entry.grid = (groups, 1, 1)
    run(metal, entry)
    total = groups * threads
    assert metal.numpy(buffers[0], np.uint32, (4,)).tolist() == [total, total - 1, 2**32 - 1, 2 * total]
    assert metal.numpy(buffers[1], np.float32, (1,))[0] == total / 2
    assert metal.numpy(buffers[2], np.int32, (3,)).tolist() == [1 - total, -total, 5]


# ---- bfloat as a class of its own

BFLOAT = [
    ("bfloat b = bfloat(x); o[i] = b;", True),
    ("bfloat b = 3; o[i] = b + 1;", True),  # from integers without a word
    ("float f = bfloat(x) * 2.0f; o[i] = f;", True),
    ("bfloat b = bfloat(x) * bfloat(x); o[i] = b;", True),
    ("bfloat b = bfloat(half(x)); o[i] = b;", True),
    ("bfloat b = x; o[i] = b;", False),
    ("bfloat b = half(x); o[i] = b;", False),
    ("bfloat b = bfloat(x) * 2.0f; o[i] = b;", False),
]


@pytest.mark.parametrize("body, compiles", BFLOAT)
def test_conversions_of_bfloat(metal, body, compiles):
    source = f"""{HEAD}kernel void k(device float* o [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {{
      const float x = float(i); {body} }}"""
    if compiles:
        metal.add_library(source)
    else:
        with pytest.raises(RuntimeError, match="no viable conversion"):
            metal.add_library(source)


def test_sums_of_bfloat_round(metal):
    largest = "numeric_limits<bfloat>::max()"
    got = values(metal, ["bfloat(256.0f) + bfloat(1.0f)", "bfloat(256.0f) + 1.0f", "simd_sum(bfloat(1.0f))", largest])
    np.testing.assert_array_equal(got[:, 0], np.array([256, 257, 32, (2 - 2**-7) * 2.0**127], np.float32))
