// x · Wᵀ for many rows on 8x8 tiles: sums of W · xᵀ, weights from their words straight into fragments, x through
// threadgroup memory. kernels/gpu/linear.py writes the kernels, one per set of formats and epilogues, from
// what is here. Reference: kernels/linear.py.
//
// The order of k is permuted so that a lane's part of the fragments is a run of its row's words: of 4 * C elements,
// quarter q of a tile's columns (2q, 2q + 1) stands for elements q * C + 2t, q * C + 2t + 1 in tile t of C / 2.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "expressions.h"
#include "linear_weights.h"

// Rows of x, of X (float or half): row r at x + row(r) * stride, where row(r) is sampled[r] if SAMPLED. `first` is the tile's,
// `last` the launch's last one, which stands in for those behind it.
template <typename X>
struct ms_matmul_x {
  device const X* x;
  device const int* sampled;
  device const float* norm;  // the norm's weight; unused without one
  uint stride;
  uint first;
  uint last;
};

template <bool SAMPLED, typename X>
inline device const X* ms_row(thread const ms_matmul_x<X>& x, uint row) {
  const uint r = min(x.first + row, x.last);
  return x.x + ulong(SAMPLED ? uint(x.sampled[r]) : r) * x.stride;
}

// scale[row] = 1 / rms(x) of the tile's BM rows, a simdgroup per row. A barrier must follow.
template <int BM, int SIMDGROUPS, int XALIGN, bool SAMPLED, typename X>
inline void ms_row_scales(
    threadgroup float* scale, thread const ms_matmul_x<X>& x, uint k, float eps, uint sg, uint lane) {
  for (uint row = sg; row < BM; row += SIMDGROUPS) {
    device const X* p = ms_row<SAMPLED>(x, row);
    float sum = 0.0f;
    for (uint at = lane * 4; at < k; at += 128) {
      const float4 f = ms_read4<XALIGN, false>(p + at, int(k - at));
      sum = fma(f.w, f.w, fma(f.z, f.z, fma(f.y, f.y, fma(f.x, f.x, sum))));
    }
    sum = simd_sum(sum);
    if (lane == 0) scale[row] = precise::rsqrt(sum / float(k) + eps);
  }
}

// sums += W · xᵀ of NR * 8 rows of each part (from `row` on; the last one, n - 1, stands in for those behind it) and
// the BM = 8 * MT rows of x, over the elements of k that simdgroups with this `split` of WK have.
// staged: BM * (32 * WK + 4) floats for 32 elements of k per split at a time. Ends without a barrier.
template <int C, int WK, int THREADS, int XALIGN, bool SAMPLED, bool NORM, int P, int NR, int MT, typename X, typename Weight>
inline void ms_matmul(
    thread ms_sums<P * NR, MT>& sums, threadgroup float* staged, thread const ms_matmul_x<X>& x,
    thread const ms_parts<Weight, P>& weights, uint row, uint n, uint k, uint split, uint tid, uint lane) {
  constexpr int BM = 8 * MT;
  constexpr int LD = 32 * WK + 4;  // rows start four banks apart: a fragment's 32 elements [0] lie in 32 banks
  static_assert(C % 8 == 0, "8 elements of each quarter are staged at a time");
  const ushort2 place = ms_frag_coord(lane);
  const uint quarter = place.y / 2;
  ms_parts<Weight, P> w;
  const uint start = min(row, n - 1);
  MS_UNROLL for (int p = 0; p < P; p++) w.part[p] = ms_from_row(weights.part[p], start, k);
  uint offset[NR];
  MS_UNROLL for (int i = 0; i < NR; i++) offset[i] = min(uint(i * 8) + place.x, n - 1 - start) * k;
  for (uint step = 0; step < k; step += WK * 4 * C) {
    const uint at = step + (split * 4 + quarter) * C;
    typename ms_chunk_of<Weight, C>::type chunk[P * NR];
    MS_UNROLL for (int p = 0; p < P; p++)
      MS_UNROLL for (int i = 0; i < NR; i++) ms_read(chunk[p * NR + i], w.part[p], offset[i] + at, int(k) - int(at));
    MS_UNROLL for (int part = 0; part < C; part += 8) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile before has been read
      for (uint i = tid; i < BM * WK * 8; i += THREADS) {
        const uint run = i % (WK * 8);  // four elements: which half of the 8, which quarter, which split
        const uint m = i / (WK * 8);
        const uint from = step + run / 2 * C + part + run % 2 * 4;
        const int left = int(k) - int(from);
        device const X* p = ms_row<SAMPLED>(x, m);
        float4 f = float4(0.0f);
        if (left > 0) f = ms_read4<XALIGN, false>(p + from, left);
        if (NORM && left > 0) f = f * ms_read4<XALIGN, false>(x.norm + from, left);
        threadgroup float* to = staged + m * LD + run / 8 * 32 + run % 2 * 16 + run / 2 % 4 * 2;
        to[0] = f.x;
        to[1] = f.y;
        to[8] = f.z;
        to[9] = f.w;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      MS_UNROLL for (int t = 0; t < 4; t += 2) {
        ms_operands<P * NR, 2> a;
        ms_operands<2, MT> b;
        ms_load_transposed(b, staged + split * 32 + t * 8, LD, lane);
        MS_UNROLL for (int i = 0; i < P * NR; i++)
          MS_UNROLL for (int j = 0; j < 2; j++) {
            a.tile[i * 2 + j].thread_elements()[0] = ms_value(chunk[i], part + (t + j) * 2);
            a.tile[i * 2 + j].thread_elements()[1] = ms_value(chunk[i], part + (t + j) * 2 + 1);
          }
        ms_multiply(sums, a, b);
      }
    }
  }
}

// Part p's sums to `to` + p * stride: [NR * 8][8 * MT + 1], weight rows by rows of x.
template <int P, int NR, int MT>
inline void ms_share(threadgroup float* to, uint stride, thread ms_sums<P * NR, MT>& sums, uint lane) {
  const ushort2 place = ms_frag_coord(lane);
  MS_UNROLL for (int p = 0; p < P; p++)
    MS_UNROLL for (int i = 0; i < NR; i++)
      MS_UNROLL for (int j = 0; j < MT; j++) {
        threadgroup float* q = to + p * stride + (i * 8 + place.x) * (8 * MT + 1) + j * 8 + place.y;
        q[0] = sums.tile[(p * NR + i) * MT + j].thread_elements()[0];
        q[1] = sums.tile[(p * NR + i) * MT + j].thread_elements()[1];
      }
}

// The sum over the WK simdgroups that share k, whose memories are `stride` apart.
template <int WK>
inline float ms_collect(const threadgroup float* from, uint stride) {
  float sum = from[0];
  MS_UNROLL for (int i = 1; i < WK; i++) sum += from[i * stride];
  return sum;
}
