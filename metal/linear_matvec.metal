// x · Wᵀ for up to four rows of x at a time: each weight is read once and multiplied by all of them.
// kernels/gpu/linear.py writes the kernels, one per set of formats and epilogues, from what is here.
// Reference: kernels/linear.py.
//
// A row's result has the same bits whatever B is: the order of its sums is set by C, the threads and the k-split
// alone, and every product that is added is an fma, so that no compiler chooses which are.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "expressions.h"
#include "linear_weights.h"

// B rows of x, [k] of X (float or half) each, and the weight of the norm (unused without one).
template <int B, typename X>
struct ms_matvec_x {
  device const X* row[B];
  device const float* norm;
};

// What a simdgroup has of R rows of each of P weights times B rows of x; element (p * R + r) * B + b.
template <int P, int R, int B>
struct ms_matvec_sums {
  float at[P * R * B];
  float squares[B];  // of x
};

// Sums over the chunks at `first`, first + stride, … (elements) of k. Row r of a part is `row` + r, or the last one.
// SQUARES: sums.squares is made, too. NORM: x is multiplied by the norm's weight. XALIGN: elements at a multiple
// of which every row of x and the norm's weight start. WHOLE: k is a multiple of C.
template <int C, int XALIGN, bool WHOLE, bool SQUARES, bool NORM, int P, int R, int B, typename X, typename Weight>
inline void ms_matvec(
    thread ms_matvec_sums<P, R, B>& sums, thread const ms_matvec_x<B, X>& x, thread const ms_parts<Weight, P>& weights,
    uint row, uint n, uint k, uint first, uint stride) {
  ms_parts<Weight, P> w;
  const uint start = min(row, n - 1);
  MS_UNROLL for (int p = 0; p < P; p++) w.part[p] = ms_from_row(weights.part[p], start, k);
  uint offset[R];
  MS_UNROLL for (int r = 0; r < R; r++) offset[r] = min(uint(r), n - 1 - start) * k;
  MS_UNROLL for (int i = 0; i < P * R * B; i++) sums.at[i] = 0.0f;
  MS_UNROLL for (int b = 0; b < B; b++) sums.squares[b] = 0.0f;
  for (uint at = first; at < k; at += stride) {
    typename ms_chunk_of<Weight, C>::type chunk[P * R];
    MS_UNROLL for (int p = 0; p < P; p++)
      MS_UNROLL for (int r = 0; r < R; r++) ms_read(chunk[p * R + r], w.part[p], offset[r] + at, int(k - at));
    float dot[P * R * B];
    float total[B];
    MS_UNROLL for (int i = 0; i < P * R * B; i++) dot[i] = 0.0f;
    MS_UNROLL for (int b = 0; b < B; b++) total[b] = 0.0f;
    MS_UNROLL for (int i = 0; i < C; i += 4) {
      float4 v[P * R];
      MS_UNROLL for (int r = 0; r < P * R; r++)
        v[r] = float4(ms_unscaled(chunk[r], i), ms_unscaled(chunk[r], i + 1), ms_unscaled(chunk[r], i + 2),
                      ms_unscaled(chunk[r], i + 3));
      const int left = int(k - at) - i;
      float4 g = float4(1.0f);
      if (NORM) g = ms_read4<XALIGN, WHOLE>(x.norm + at + i, left);
      MS_UNROLL for (int b = 0; b < B; b++) {
        float4 f = ms_read4<XALIGN, WHOLE>(x.row[b] + at + i, left);
        if (SQUARES) sums.squares[b] = fma(f.w, f.w, fma(f.z, f.z, fma(f.y, f.y, fma(f.x, f.x, sums.squares[b]))));
        total[b] = fma(f.w, g.w, fma(f.z, g.z, fma(f.y, g.y, fma(f.x, g.x, total[b]))));
        if (NORM) f = f * g;
        MS_UNROLL for (int r = 0; r < P * R; r++)
          dot[r * B + b] =
              fma(f.w, v[r].w, fma(f.z, v[r].z, fma(f.y, v[r].y, fma(f.x, v[r].x, dot[r * B + b]))));
      }
    }
    MS_UNROLL for (int r = 0; r < P * R; r++)
      MS_UNROLL for (int b = 0; b < B; b++)
        sums.at[r * B + b] = ms_add(chunk[r], dot[r * B + b], total[b], sums.at[r * B + b]);
  }
}

// The lanes' sums, added, to threadgroup memory: P * R * B at `to`, and the squares at `squares`.
template <bool SQUARES, int P, int R, int B>
inline void ms_share(
    threadgroup float* to, threadgroup float* squares, thread const ms_matvec_sums<P, R, B>& sums, uint lane) {
  MS_UNROLL for (int i = 0; i < P * R * B; i++) {
    const float sum = simd_sum(sums.at[i]);
    if (lane == 0) to[i] = sum;
  }
  if (SQUARES) {
    MS_UNROLL for (int b = 0; b < B; b++) {
      const float sum = simd_sum(sums.squares[b]);
      if (lane == 0) squares[b] = sum;
    }
  }
}

// The sum over the KS simdgroups that share k, whose memories are `stride` apart.
template <int KS>
inline float ms_collect(const threadgroup float* from, int stride) {
  float sum = from[0];
  MS_UNROLL for (int i = 1; i < KS; i++) sum += from[i * stride];
  return sum;
}
