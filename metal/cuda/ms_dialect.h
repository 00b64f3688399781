// ../ms_dialect.h for CUDA: 8x8 tiles on tensor cores. A lane holds row lane / 4, columns 2 (lane % 4) and the next one, as the
// tensor cores' own fragments do.
#ifndef METALSTEP_DIALECT_H
#define METALSTEP_DIALECT_H
#define MS_UNROLL _Pragma("unroll")
#define MS_NEG (-1e30f)

// The pointer passes through, so that no load of it is moved in front of the wait; that it is one to device memory must be said again.
#define MS_WAIT_PREVIOUS(pointer)                              \
  asm volatile(CU_WAIT : "+l"(pointer) : : "memory"); \
  __builtin_assume(__isGlobal(pointer))
#define MS_LAUNCH_NEXT asm volatile(CU_LAUNCH : : : "memory")
template <typename T>
inline T* ms_waited(T* x) {
  asm volatile("" : "+l"(x) : : "memory");
  __builtin_assume(__isGlobal(x));
  return x;
}
template <typename T>
inline T& ms_waited(T& x) {
  return *ms_waited(&x);
}

// 16 bytes of device memory to threadgroup memory while the thread goes on.
inline void ms_copy8(half* to, const half* from);  // below
inline void ms_copies_end() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N>
inline void ms_copies_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

inline const uint* ms_address(const uint* shared) {
  asm("" : "+l"(shared));
  __builtin_assume(__isShared(shared));
  return shared;
}
inline uint ms_choose_bytes(uint a, uint b, uint which) { return __byte_perm(a, b, which); }
// One instruction: of two constants the compiler would make two.
inline uint ms_and_or(uint a, uint mask, uint bits) {
  uint r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}
inline half2 ms_halves(float x, float y) {
  uint r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
  return as_type<half2>(r);
}

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

// Half precision: a tile is one register, and four of them are a tensor core's operand as they are.
template <int R, int K>
struct ms_half_left {
  uint tile[R * K];
};
template <int K, int C>
struct ms_half_right {
  uint tile[K * C];
};
#define MS_RIGHT_COLUMNS true
inline ushort2 ms_right_coord(ushort lane, int e) { return ushort2(ushort(lane % 4 * 2 + e), ushort(lane / 4)); }
template <int R, int K>
inline void ms_set(ms_half_left<R, K>& to, int i, half2 v) {
  to.tile[i] = as_type<uint>(v);
}
template <int K, int C>
inline void ms_set(ms_half_right<K, C>& to, int i, half2 v) {
  to.tile[i] = as_type<uint>(v);
}

inline half2 ms_right_pair(half2 v) {
  uint r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(as_type<uint>(v)));
  return as_type<half2>(r);
}

inline uint ms_shared_address(const void* p) { return uint(__cvta_generic_to_shared(p)); }
inline void ms_copy8(half* to, const half* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(ms_shared_address(to)), "l"(from) : "memory");
}
// COUNT tiles, four at a time: lane i gives the address of row i % 8 of tile i / 8. Tile i is at row i / COLUMNS, column i % COLUMNS of
// what memory holds, or i % COLUMNS and i / COLUMNS if FLIPPED; TRANSPOSED: its elements are exchanged likewise.
template <int COUNT, int COLUMNS, bool FLIPPED, bool TRANSPOSED>
inline void ms_load_tiles(uint* to, const half* from, int ld, ushort lane) {
  MS_UNROLL for (int first = 0; first < COUNT; first += 4) {
    const int i = min(first + lane / 8, COUNT - 1);
    const int row = FLIPPED ? i % COLUMNS : i / COLUMNS, column = FLIPPED ? i / COLUMNS : i % COLUMNS;
    const uint at = ms_shared_address(from + (row * 8 + lane % 8) * ld + column * 8);
    uint r[4];
    if (TRANSPOSED)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(at)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(at)
                   : "memory");
    MS_UNROLL for (int j = 0; j < 4; j++)
      if (first + j < COUNT) to[first + j] = r[j];
  }
}
template <int R, int K>
inline void ms_load(ms_half_left<R, K>& to, const half* from, int ld, ushort lane) {
  ms_load_tiles<R * K, K, false, false>(to.tile, from, ld, lane);
}
template <int R, int K>
inline void ms_load_transposed(ms_half_left<R, K>& to, const half* from, int ld, ushort lane) {
  ms_load_tiles<R * K, K, true, true>(to.tile, from, ld, lane);
}
template <int K, int C>
inline void ms_load(ms_half_right<K, C>& to, const half* from, int ld, ushort lane) {
  ms_load_tiles<K * C, C, false, true>(to.tile, from, ld, lane);
}
template <int K, int C>
inline void ms_load_transposed(ms_half_right<K, C>& to, const half* from, int ld, ushort lane) {
  ms_load_tiles<K * C, C, true, false>(to.tile, from, ld, lane);
}

// 16 rows; k 16 (ms_mma16) or 8 (ms_mma8) elements.
inline void ms_mma16(float2& c0, float2& c1, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c0.x), "+f"(c0.y), "+f"(c1.x), "+f"(c1.y)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
inline void ms_mma8(float2& c0, float2& c1, uint a0, uint a1, uint b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c0.x), "+f"(c0.y), "+f"(c1.x), "+f"(c1.y)
               : "r"(a0), "r"(a1), "r"(b0));
}
template <int R, int C, int K>
inline void ms_multiply(ms_sums<R, C>& sums, ms_half_left<R, K>& a, ms_half_right<K, C>& b) {
  MS_UNROLL for (int k = 0; k < K; k += 2)
    MS_UNROLL for (int r = 0; r < R; r += 2)
      MS_UNROLL for (int c = 0; c < C; c++) {
        constexpr bool EVEN = R % 2 == 0;
        float2 none = float2(0.0f);
        const bool two = EVEN || r + 1 < R;
        const int below = two ? r + 1 : r;
        float2& c0 = sums.tile[r * C + c].elements;
        float2& c1 = two ? sums.tile[below * C + c].elements : none;
        const uint a0 = a.tile[r * K + k], a1 = two ? a.tile[below * K + k] : 0u;
        if (k + 1 < K) {
          const uint a2 = a.tile[r * K + (k + 1) % K], a3 = two ? a.tile[below * K + (k + 1) % K] : 0u;
          ms_mma16(c0, c1, a0, a1, a2, a3, b.tile[k * C + c], b.tile[(k + 1) % K * C + c]);
        } else {
          ms_mma8(c0, c1, a0, a1, b.tile[k * C + c]);
        }
      }
}

#endif
