// ../ms_dialect.h for CUDA: 8x8 tiles on tensor cores. A lane holds row lane / 4, columns 2 (lane % 4) and the next one, as the
// tensor cores' own fragments do.
#ifndef METALSTEP_DIALECT_H
#define METALSTEP_DIALECT_H
#define MS_UNROLL _Pragma("unroll")
#define MS_NEG (-1e30f)

inline ushort2 ms_frag_coord(ushort lane) { return ushort2(lane / 4, lane % 4 * 2); }

namespace metal {
template <typename T, int R, int C>
struct simdgroup_matrix {
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  vec<T, 2>& thread_elements() { return elements; }
};
template <typename T, int N>
inline simdgroup_matrix<T, N, N> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, N, N> m;
  m.elements = vec<T, 2>(v);
  return m;
}
}  // namespace metal

template <int R, int C>
struct ms_operands {
  simdgroup_matrix<float, 8, 8> tile[R * C];
};
template <int R, int C>
struct ms_sums {
  simdgroup_matrix<float, 8, 8> tile[R * C];
};

template <int R, int C>
inline void ms_clear(ms_sums<R, C>& sums) {
  MS_UNROLL for (int i = 0; i < R * C; i++) sums.tile[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
}
template <int R, int C, typename T>
inline void ms_load(ms_operands<R, C>& to, const T* from, int ld, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int r = 0; r < R; r++)
    MS_UNROLL for (int c = 0; c < C; c++) {
      const T* p = from + (r * 8 + at.x) * ld + c * 8 + at.y;
      to.tile[r * C + c].elements = float2(float(p[0]), float(p[1]));
    }
}
template <int R, int C, typename T>
inline void ms_load_transposed(ms_operands<R, C>& to, const T* from, int ld, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int r = 0; r < R; r++)
    MS_UNROLL for (int c = 0; c < C; c++) {
      const T* p = from + (c * 8 + at.y) * ld + r * 8 + at.x;
      to.tile[r * C + c].elements = float2(float(p[0]), float(p[ld]));
    }
}

// x in the tensor cores' 19-bit format, and what that leaves: products of both halves are as exact as float32's to 2^-21.
inline uint ms_high(float x) {
  uint r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
inline uint ms_low(float x) { return ms_high(x - __uint_as_float(ms_high(x))); }
// c0 (rows 0-7) and c1 (rows 8-15) += a * b; the k order is columns 0, 2, 4, 6, 1, 3, 5, 7 on both sides.
inline void ms_mma(thread float2& c0, thread float2& c1, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c0.x), "+f"(c0.y), "+f"(c1.x), "+f"(c1.y)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int R, int C, int K>
inline void ms_multiply(ms_sums<R, C>& sums, ms_operands<R, K>& a, ms_operands<K, C>& b) {
  const uint lane = cu::thread_in_group() % 32;
  const uint from = lane % 4 * 8 + lane / 8, odd = lane / 4 % 2;  // who holds row 2 (lane % 4), column lane / 4
  MS_UNROLL for (int k = 0; k < K; k++)
    MS_UNROLL for (int c = 0; c < C; c++) {
      const float2 v = b.tile[k * C + c].elements;
      float column[2];
      MS_UNROLL for (int e = 0; e < 2; e++) {
        const float x = __shfl_sync(CU_ALL, v.x, from + 4 * e), y = __shfl_sync(CU_ALL, v.y, from + 4 * e);
        column[e] = odd ? y : x;
      }
      const uint b0 = ms_high(column[0]), b1 = ms_high(column[1]), l0 = ms_low(column[0]), l1 = ms_low(column[1]);
      MS_UNROLL for (int r = 0; r < R; r += 2) {
        const float2 u = a.tile[r * K + k].elements;
        const float2 w = r + 1 < R ? a.tile[(r + 1 < R ? r + 1 : r) * K + k].elements : float2(0.0f);
        float2 none = float2(0.0f);
        thread float2& c0 = sums.tile[r * C + c].elements;
        thread float2& c1 = r + 1 < R ? sums.tile[(r + 1 < R ? r + 1 : r) * C + c].elements : none;
        ms_mma(c0, c1, ms_high(u.x), ms_high(w.x), ms_high(u.y), ms_high(w.y), l0, l1);
        ms_mma(c0, c1, ms_low(u.x), ms_low(w.x), ms_low(u.y), ms_low(w.y), b0, b1);
        ms_mma(c0, c1, ms_high(u.x), ms_high(w.x), ms_high(u.y), ms_high(w.y), b0, b1);
      }
    }
}

#endif
