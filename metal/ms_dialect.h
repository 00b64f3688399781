// Where Metal, the CPU simulator and CUDA differ. Every .metal file includes it after <metal_stdlib>; on Metal and in the
// simulator it is the whole of the portability layer.
#ifndef METALSTEP_DIALECT_H
#define METALSTEP_DIALECT_H
#include <metal_simdgroup_matrix>

#ifndef MS_SIM
// One pipeline: the kernel, or instance of a template, that hosts find by `name`.
#define MS_INSTANCE(name, ...) template [[host_name(#name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
#endif
#define MS_UNROLL _Pragma("clang loop unroll(full)")

// Less than any score or logit that takes part: infinities and NaN are for data that was already bad.
#define MS_NEG (-1e30f)

// ---- launches that overlap --------------------------------------------------------------------------------------------
// On CUDA a launch may begin before the one in front of it has ended. Until MS_WAIT_PREVIOUS it reads only what that one does not
// write: weights, tables, and what launches further in front have left, for which every threadgroup of that one has waited before it
// lets the next begin by MS_LAUNCH_NEXT, which stands behind its own wait. `pointer` and what ms_waited returns are read only behind the
// wait; a kernel that has none of this waits at its very beginning.
#define MS_WAIT_PREVIOUS(pointer)
#define MS_LAUNCH_NEXT
template <typename T>
inline constant T& ms_waited(constant T& x) {
  return x;
}
template <typename T>
inline device T* ms_waited(device T* x) {
  return x;
}

// Eight halves of device memory to threadgroup memory, both at a multiple of 16 bytes, perhaps while the thread goes on: they are there
// once ms_copies_wait<N> has returned, which waits for all but the newest N groups of the thread's copies (ms_copies_end ends a
// group), and for other threads behind a barrier.
inline void ms_copy8(threadgroup half* to, device const half* from) {
  const vec<half, 4> low = *(device const vec<half, 4>*)from, high = *(device const vec<half, 4>*)(from + 4);
  *(threadgroup vec<half, 4>*)to = low;
  *(threadgroup vec<half, 4>*)(to + 4) = high;
}
inline void ms_copies_end() {}
template <int N>
inline void ms_copies_wait() {}

// An address that is computed once: compilers may not take its parts into what is computed from it.
inline const threadgroup uint* ms_address(const threadgroup uint* x) { return x; }

// Bytes of a (0 to 3) and b (4 to 7): byte j is the one that bits 4 j to 4 j + 2 of `which` name.
inline uint ms_choose_bytes(uint a, uint b, uint which) {
  const ulong both = (ulong(b) << 32) | a;
  uint r = 0;
  MS_UNROLL for (int j = 0; j < 4; j++) r |= uint((both >> (((which >> (4 * j)) & 7u) * 8)) & 255) << (8 * j);
  return r;
}

// (a & mask) | bits
inline uint ms_and_or(uint a, uint mask, uint bits) { return (a & mask) | bits; }

// Both rounded.
inline half2 ms_halves(float x, float y) { return half2(half(x), half(y)); }

// ---- products of 8x8 tiles --------------------------------------------------------------------------------------------
// The element that a lane holds in thread_elements()[0] of an 8x8 tile: .x its row, .y its column; [1] is the next column.
inline ushort2 ms_frag_coord(ushort lane) {
  const ushort quad = lane / 4;
  return ushort2((quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2);
}

// R x C tiles of a simdgroup, row-major; ms_operands are factors, ms_sums what products are added to.
template <int R, int C>
struct ms_operands {
  simdgroup_matrix<float, 8, 8> tile[R * C];
};
template <int R, int C>
struct ms_sums {
  simdgroup_matrix<float, 8, 8> tile[R * C];
};

template <int R, int C>
inline void ms_clear(thread ms_sums<R, C>& sums) {
  MS_UNROLL for (int i = 0; i < R * C; i++) sums.tile[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
}

// Tiles from threadgroup memory whose rows are `ld` elements apart.
template <int R, int C, typename T>
inline void ms_load(thread ms_operands<R, C>& to, const threadgroup T* from, int ld, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int r = 0; r < R; r++)
    MS_UNROLL for (int c = 0; c < C; c++) {
      const threadgroup T* p = from + (r * 8 + at.x) * ld + c * 8 + at.y;
      to.tile[r * C + c].thread_elements()[0] = float(p[0]);
      to.tile[r * C + c].thread_elements()[1] = float(p[1]);
    }
}

// The same of the transpose: memory holds [C * 8][R * 8].
template <int R, int C, typename T>
inline void ms_load_transposed(thread ms_operands<R, C>& to, const threadgroup T* from, int ld, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int r = 0; r < R; r++)
    MS_UNROLL for (int c = 0; c < C; c++) {
      const threadgroup T* p = from + (c * 8 + at.y) * ld + r * 8 + at.x;
      to.tile[r * C + c].thread_elements()[0] = float(p[0]);
      to.tile[r * C + c].thread_elements()[1] = float(p[ld]);
    }
}

// Factors in half precision, whose sums are float as well. A lane has two elements of a tile: of a left factor those at
// ms_frag_coord and in the next column, of a right factor those at ms_right_coord, in one row or, if MS_RIGHT_COLUMNS, in one
// column.
template <int R, int K>
struct ms_half_left {
  simdgroup_matrix<half, 8, 8> tile[R * K];
};
template <int K, int C>
struct ms_half_right {
  simdgroup_matrix<half, 8, 8> tile[K * C];
};
#define MS_RIGHT_COLUMNS false
inline ushort2 ms_right_coord(ushort lane, int e) {
  const ushort2 at = ms_frag_coord(lane);
  return ushort2(at.x, ushort(at.y + e));
}

// A lane's elements of tile i.
template <int R, int K>
inline void ms_set(thread ms_half_left<R, K>& to, int i, half2 v) {
  to.tile[i].thread_elements()[0] = v.x;
  to.tile[i].thread_elements()[1] = v.y;
}
template <int K, int C>
inline void ms_set(thread ms_half_right<K, C>& to, int i, half2 v) {
  to.tile[i].thread_elements()[0] = v.x;
  to.tile[i].thread_elements()[1] = v.y;
}

// A lane's pair of a tile at ms_frag_coord, as of sums, for ms_set of a right factor.
inline half2 ms_right_pair(half2 v) { return v; }

// Tiles from threadgroup memory, or of the transpose of what it holds. `from` and `ld` are multiples of 8 elements.
template <int R, int K>
inline void ms_load(thread ms_half_left<R, K>& to, const threadgroup half* from, int ld, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int i = 0; i < R * K; i++) {
    const threadgroup half* p = from + (i / K * 8 + at.x) * ld + i % K * 8 + at.y;
    ms_set(to, i, half2(p[0], p[1]));
  }
}
template <int R, int K>
inline void ms_load_transposed(thread ms_half_left<R, K>& to, const threadgroup half* from, int ld, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int i = 0; i < R * K; i++) {
    const threadgroup half* p = from + (i % K * 8 + at.y) * ld + i / K * 8 + at.x;
    ms_set(to, i, half2(p[0], p[ld]));
  }
}
template <int K, int C>
inline void ms_load(thread ms_half_right<K, C>& to, const threadgroup half* from, int ld, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int i = 0; i < K * C; i++) {
    const threadgroup half* p = from + (i / C * 8 + at.x) * ld + i % C * 8 + at.y;
    ms_set(to, i, half2(p[0], p[1]));
  }
}
template <int K, int C>
inline void ms_load_transposed(thread ms_half_right<K, C>& to, const threadgroup half* from, int ld, ushort lane) {
  const ushort2 at = ms_frag_coord(lane);
  MS_UNROLL for (int i = 0; i < K * C; i++) {
    const threadgroup half* p = from + (i % C * 8 + at.y) * ld + i / C * 8 + at.x;
    ms_set(to, i, half2(p[0], p[ld]));
  }
}

// sums += a * b
template <int R, int C, int K>
inline void ms_multiply(thread ms_sums<R, C>& sums, thread ms_half_left<R, K>& a, thread ms_half_right<K, C>& b) {
  MS_UNROLL for (int k = 0; k < K; k++)
    MS_UNROLL for (int r = 0; r < R; r++)
      MS_UNROLL for (int c = 0; c < C; c++)
        simdgroup_multiply_accumulate(sums.tile[r * C + c], a.tile[r * K + k], b.tile[k * C + c], sums.tile[r * C + c]);
}
template <int R, int C, int K>
inline void ms_multiply(thread ms_sums<R, C>& sums, thread ms_operands<R, K>& a, thread ms_operands<K, C>& b) {
  MS_UNROLL for (int k = 0; k < K; k++)
    MS_UNROLL for (int r = 0; r < R; r++)
      MS_UNROLL for (int c = 0; c < C; c++)
        simdgroup_multiply_accumulate(sums.tile[r * C + c], a.tile[r * K + k], b.tile[k * C + c], sums.tile[r * C + c]);
}

#endif
