"""Products of tiles in half precision: every way to fill them, against numpy."""
from __future__ import annotations

import numpy as np
import pytest

from metalstep.kernels.launch import KernelCode, Launch

SHAPES = [(1, 1, 1), (2, 2, 2), (2, 1, 4), (4, 3, 2), (1, 2, 3), (3, 4, 1)]  # tiles of rows, columns and k
FILLS = ("load", "load_transposed", "set")

BODY = """
template <int R, int K, int LD>
inline void fill_load(thread ms_half_left<R, K>& to, const threadgroup half* from, ushort lane) { ms_load(to, from, LD, lane); }
template <int R, int K, int LD>
inline void fill_load_transposed(thread ms_half_left<R, K>& to, const threadgroup half* from, ushort lane) {
  ms_load_transposed(to, from, LD, lane);
}
template <int R, int K, int LD>
inline void fill_set(thread ms_half_left<R, K>& to, const threadgroup half* from, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int i = 0; i < R * K; i++) {
    const threadgroup half* p = from + (i / K * 8 + at.x) * LD + i % K * 8 + at.y;
    ms_set(to, i, half2(p[0], p[1]));
  }
}
template <int K, int C, int LD>
inline void fill_load(thread ms_half_right<K, C>& to, const threadgroup half* from, ushort lane) { ms_load(to, from, LD, lane); }
template <int K, int C, int LD>
inline void fill_load_transposed(thread ms_half_right<K, C>& to, const threadgroup half* from, ushort lane) {
  ms_load_transposed(to, from, LD, lane);
}
template <int K, int C, int LD>
inline void fill_set(thread ms_half_right<K, C>& to, const threadgroup half* from, ushort lane) {
  MS_UNROLL for (int i = 0; i < K * C; i++) {
    const ushort2 a = ms_right_coord(lane, 0), b = ms_right_coord(lane, 1);
    const threadgroup half* p = from + i / C * 8 * LD + i % C * 8;
    ms_set(to, i, half2(p[a.x * LD + a.y], p[b.x * LD + b.y]));
  }
}

kernel void NAME(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]], device float* out [[buffer(2)]],
                 uint lane [[thread_index_in_simdgroup]]) {
  MS_WAIT_PREVIOUS(a);
  MS_WAIT_PREVIOUS(b);
  MS_LAUNCH_NEXT;
  threadgroup half left[LEFT_ROWS * LEFT_LD];
  threadgroup half right[RIGHT_ROWS * RIGHT_LD];
  for (uint i = lane; i < LEFT_ROWS * LEFT_LD; i += 32) left[i] = half(a[i]);
  for (uint i = lane; i < RIGHT_ROWS * RIGHT_LD; i += 32) right[i] = half(b[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  ms_half_left<R, K> x;
  ms_half_right<K, C> y;
  ms_sums<R, C> sums;
  ms_clear(sums);
  fill_LEFT<R, K, LEFT_LD>(x, left, ushort(lane));
  fill_RIGHT<K, C, RIGHT_LD>(y, right, ushort(lane));
  ms_multiply(sums, x, y);
  const ushort2 at = ms_frag_coord(ushort(lane));
  for (int i = 0; i < R * C; i++)
    for (int e = 0; e < 2; e++) out[(i / C * 8 + at.x) * (C * 8) + i % C * 8 + at.y + e] = sums.tile[i].thread_elements()[e];
}
"""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("left", FILLS)
@pytest.mark.parametrize("right", FILLS)
def test_a_product_of_half_tiles_is_that_of_its_factors(g, shape, left, right):
    """Small integers: half precision has them exactly, and float their sums. Rows of memory are longer than those of the tiles."""
    rows, columns, k = (8 * n for n in shape)
    numbers = np.random.default_rng(rows + 3 * columns + 7 * k)
    a, b = numbers.integers(-9, 10, (rows, k)), numbers.integers(-9, 10, (k, columns))
    held = [(a.T if left == "load_transposed" else a), (b.T if right == "load_transposed" else b)]
    padded = [np.pad(x, [(0, 0), (0, 8)], constant_values=99).astype(np.float32) for x in held]
    name = f"half_tiles_{'_'.join(map(str, shape))}_{left}_{right}"
    text = BODY.replace("NAME", name).replace("fill_LEFT", f"fill_{left}").replace("fill_RIGHT", f"fill_{right}")
    for word, value in {
        "LEFT_ROWS": padded[0].shape[0], "LEFT_LD": padded[0].shape[1], "RIGHT_ROWS": padded[1].shape[0], "RIGHT_LD": padded[1].shape[1],
        "<R, K": f"<{shape[0]}, {shape[2]}", "<K, C": f"<{shape[2]}, {shape[1]}", "<R, C": f"<{shape[0]}, {shape[1]}",
        "R * C": shape[0] * shape[1], "i / C": f"i / {shape[1]}", "i % C": f"i % {shape[1]}", "(C * 8)": columns,
    }.items():  # fmt: skip
        body = text.index("kernel void")
        text = text[:body] + text[body:].replace(word, str(value))
    out = g.empty((rows, columns))
    code = KernelCode(("step_load",), text)
    g.run([Launch(name, [g.put(padded[0]), g.put(padded[1]), out], b"", (1, 1, 1), (32, 1, 1), code=code)], 1)
    np.testing.assert_array_equal(g.get(out), (a @ b).astype(np.float32))
