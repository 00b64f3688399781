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

// sums += a * b
template <int R, int C, int K>
inline void ms_multiply(thread ms_sums<R, C>& sums, thread ms_operands<R, K>& a, thread ms_operands<K, C>& b) {
  MS_UNROLL for (int k = 0; k < K; k++)
    MS_UNROLL for (int r = 0; r < R; r++)
      MS_UNROLL for (int c = 0; c < C; c++)
        simdgroup_multiply_accumulate(sums.tile[r * C + c], a.tile[r * K + k], b.tile[k * C + c], sums.tile[r * C + c]);
}

#endif
