// x · Wᵀ on 8x8 tiles in half precision with float sums, for rows of x from one to many: sums of W · xᵀ, weights from their
// words straight into fragments and on their way before the launch in front has ended. kernels/gpu/linear.py writes the kernels,
// one per set of formats and epilogues, from what is here. Reference: kernels/linear.py.
//
// k is taken in blocks of 4 * C elements: of a tile's columns quarter q (2q, 2q + 1) stands for elements q * C on, in runs of 8
// (linear_pairs.h), four tiles a run. Simdgroups that share k take blocks by turns; the order of a row's sums is set by C, their
// number and the part of k alone.
//
// x is half when it is multiplied. It comes straight from device memory where it is half already, or through threadgroup memory,
// in units of 8 elements: all of its rows before the product (resident), or WK blocks at a time (staged). There unit (quarter,
// run) of a block has place run * 4 + quarter, so that a fragment's lanes read side by side.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "expressions.h"
#include "linear_pairs.h"

// Rows of x, of X (float or half): row r at x + row(r) * stride, where row(r) is sampled[r] if SAMPLED. `first` is the tile's,
// `last` the launch's last one, which stands in for those behind it.
template <typename X>
struct ms_half_x {
  device const X* x;
  device const int* sampled;
  device const float* norm;  // the norm's weight; unused without one
  uint stride;
  uint first;
  uint last;
};

template <bool SAMPLED, typename X>
inline device const X* ms_row(thread const ms_half_x<X>& x, uint row) {
  const uint r = min(x.first + row, x.last);
  return x.x + ulong(SAMPLED ? uint(x.sampled[r]) : r) * x.stride;
}

// What a lane has of 1024 elements of a row of x or of the norm's weight: its units of 8 are 32 apart.
struct ms_half_part {
  float4 at[8];
};
// Elements from `first` on, of which those from `end` on are 0. EIGHTS: rows are whole units, at multiples of 16 bytes.
template <int XALIGN, bool EIGHTS, typename X>
inline ms_half_part ms_read_part(device const X* p, uint first, uint end, uint lane) {
  ms_half_part part;
  MS_UNROLL for (int i = 0; i < 8; i++) {
    const uint at = first + (i / 2 * 32 + lane) * 8 + i % 2 * 4;
    if (EIGHTS) {
      part.at[i] = float4(0.0f);
      if (at < end) part.at[i] = ms_read4<XALIGN, true>(p + at, 4);
    } else {
      part.at[i] = ms_read4<XALIGN, false>(p + at, int(end) - int(at));
    }
  }
  return part;
}
inline float ms_add_squares(ms_half_part part, float sum) {
  MS_UNROLL for (int i = 0; i < 8; i++) {
    const float4 f = part.at[i];
    sum = fma(f.w, f.w, fma(f.z, f.z, fma(f.y, f.y, fma(f.x, f.x, sum))));
  }
  return sum;
}
// 1 / rms of k elements, of which a lane has the squares' sum.
inline float ms_scale_of(float sum, uint k, float eps) { return precise::rsqrt(simd_sum(sum) / float(k) + eps); }

// 1 / rms of each of BM rows, a simdgroup per row, to threadgroup memory. A barrier must follow.
template <int BM, int SIMDGROUPS, int XALIGN, bool EIGHTS, bool SAMPLED, typename X>
inline void ms_row_scales(threadgroup float* scale, thread const ms_half_x<X>& x, uint k, float eps, uint sg, uint lane) {
  for (uint row = sg; row < BM; row += SIMDGROUPS) {
    device const X* p = ms_row<SAMPLED>(x, row);
    float sum = 0.0f;
    for (uint at = 0; at < k; at += 1024) sum = ms_add_squares(ms_read_part<XALIGN, EIGHTS>(p, at, k, lane), sum);
    const float s = ms_scale_of(sum, k, eps);
    if (lane == 0) scale[row] = s;
  }
}

inline uint ms_bounded_halves(float x, float y) { return as_type<uint>(ms_halves(ms_within_half(x), ms_within_half(y))); }
// 8 elements as half, times `scale` if NORM and g if WEIGHT.
template <bool NORM, bool WEIGHT, bool SPLIT>
inline uint4 ms_unit(float4 a, float4 b, float4 ga, float4 gb, float scale) {
  if (NORM) {
    a = a * scale;
    b = b * scale;
  }
  if (WEIGHT) {
    a = a * ga;
    b = b * gb;
  }
  const uint4 unit = uint4(ms_bounded_halves(a.x, a.y), ms_bounded_halves(a.z, a.w), ms_bounded_halves(b.x, b.y),
                           ms_bounded_halves(b.z, b.w));
  return SPLIT ? ms_split(unit) : unit;
}
// The unit of row p at element `at`, in order; elements from `end` on are 0.
template <int XALIGN, bool NORM, bool WEIGHT, typename X>
inline uint4 ms_unit_of(device const X* p, device const float* norm, float scale, uint at, uint end) {
  const int left = int(end) - int(at);
  const float4 a = ms_read4<XALIGN, false>(p + at, left);
  const float4 b = ms_read4<XALIGN, false>(p + at + 4, left - 4);
  float4 ga = float4(1.0f);
  float4 gb = float4(1.0f);
  if (WEIGHT) {
    ga = ms_read4<XALIGN, false>(norm + at, left);
    gb = ms_read4<XALIGN, false>(norm + at + 4, left - 4);
  }
  return ms_unit<NORM, WEIGHT, false>(a, b, ga, gb, scale);
}
template <int XALIGN, bool EIGHTS, bool NORM, bool WEIGHT>
inline uint4 ms_unit_at(device const float* p, device const float* norm, float scale, uint at, uint end) {
  return ms_unit_of<XALIGN, NORM, WEIGHT>(p, norm, scale, at, end);
}
// A half x that is not normed stays as it is: nothing waits for it here.
template <int XALIGN, bool EIGHTS, bool NORM, bool WEIGHT>
inline uint4 ms_unit_at(device const half* p, device const float* norm, float scale, uint at, uint end) {
  if (!NORM && EIGHTS && XALIGN >= 8) {
    vec<uint, 4> unit = uint4(0u);
    if (at < end) unit = *(device const vec<uint, 4>*)(p + at);
    return unit;
  }
  return ms_unit_of<XALIGN, NORM, WEIGHT>(p, norm, scale, at, end);
}

// Place in a row of threadgroup memory of the unit that is `unit`th in order, for blocks of RUNS runs a quarter.
template <int RUNS>
inline uint ms_unit_place(uint unit) {
  const uint in = unit % (4 * RUNS);
  return unit - in + in % RUNS * 4 + in / RUNS;
}

// Elements [from, end) of `rows` rows of x, of at most ROWS, to `to`, `ld` units apart, normed if NORM (over all k); up to a whole
// block 0 follows. Simdgroups beyond the rows share them. ONE: all of x are at most 1024 elements. A barrier must come in front and
// behind.
template <
    int ROWS, int RUNS, int SIMDGROUPS, bool ONE, int XALIGN, bool EIGHTS, bool SAMPLED, bool NORM, bool WEIGHT, bool SPLIT,
    typename X>
inline void ms_stage_rows(
    threadgroup uint4* to, uint ld, thread const ms_half_x<X>& x, uint rows, uint k, uint from, uint end, float eps, uint sg,
    uint lane) {
  constexpr int TEAM = SIMDGROUPS > ROWS ? SIMDGROUPS / ROWS : 1;
  const uint units = (end - from + 32 * RUNS - 1) / (32 * RUNS) * (4 * RUNS);
  const uint mine = sg % TEAM;
  for (uint row = sg / TEAM; row < rows; row += SIMDGROUPS / TEAM) {
    device const X* p = ms_row<SAMPLED>(x, row);
    ms_half_part part;
    float4 ga = float4(1.0f);
    float4 gb = float4(1.0f);
    float scale = 1.0f;
    if (ONE) {
      part = ms_read_part<XALIGN, EIGHTS>(p, from, end, lane);
      if (WEIGHT && TEAM >= 4) {  // one unit a lane: its factors come with x
        const int left = int(end) - int(from + (mine * 32 + lane) * 8);
        ga = ms_read4<XALIGN, false>(x.norm + end - left, left);
        gb = ms_read4<XALIGN, false>(x.norm + end - left + 4, left - 4);
      }
      if (NORM) scale = ms_scale_of(ms_add_squares(part, 0.0f), k, eps);
    } else if (NORM) {
      float sum = 0.0f;
      for (uint at = 0; at < k; at += 1024) sum = ms_add_squares(ms_read_part<XALIGN, EIGHTS>(p, at, k, lane), sum);
      scale = ms_scale_of(sum, k, eps);
    }
    for (uint first = 0; first < units; first += 128) {
      if (!ONE) part = ms_read_part<XALIGN, EIGHTS>(p, from + first * 8, end, lane);
      MS_UNROLL for (int i = 0; i < 4; i++) {
        const uint unit = first + i * 32 + lane;
        if (unit < units && i % TEAM == int(mine)) {
          if (WEIGHT && !(ONE && TEAM >= 4)) {
            const int left = int(end) - int(from + unit * 8);
            ga = ms_read4<XALIGN, false>(x.norm + end - left, left);
            gb = ms_read4<XALIGN, false>(x.norm + end - left + 4, left - 4);
          }
          to[row * ld + ms_unit_place<RUNS>(unit)] =
              ms_unit<NORM, WEIGHT, SPLIT>(part.at[2 * i], part.at[2 * i + 1], ga, gb, scale);
        }
      }
    }
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------
// What a simdgroup multiplies: NR * 8 rows of each of P parts, AHEAD of its blocks on their way.
template <typename Weight, int C, int P, int NR, int AHEAD>
struct ms_half_weights {
  ms_parts<Weight, P> w;  // from the simdgroup's first row on
  uint offset[NR];        // of the lane's quarter of its rows, in elements
  typename ms_chunk_of<Weight, C>::type chunk[AHEAD * P * NR];
};

// Chunks of the block that begins at `at`, to slot `slot`. WHOLE: the range of k is whole blocks.
template <bool WHOLE, typename Weight, int C, int P, int NR, int AHEAD>
inline void ms_read_block(thread ms_half_weights<Weight, C, P, NR, AHEAD>& a, int slot, uint at, uint end, uint quarter) {
  const int left = WHOLE ? C : int(end) - int(at + quarter * C);
  MS_UNROLL for (int p = 0; p < P; p++)
    MS_UNROLL for (int i = 0; i < NR; i++)
      ms_read(a.chunk[(slot * P + p) * NR + i], a.w.part[p], a.offset[i] + at, left);
}

// Weights from `row` on (the last one, n - 1, stands in for those behind it), and the first of this split's blocks of [from, end).
template <bool WHOLE, int WK, typename Weight, int C, int P, int NR, int AHEAD>
inline void ms_begin(
    thread ms_half_weights<Weight, C, P, NR, AHEAD>& a, thread const ms_parts<Weight, P>& weights, uint row, uint n, uint k,
    uint from, uint end, uint split, uint lane) {
  const ushort2 place = ms_frag_coord(ushort(lane));
  const uint quarter = place.y / 2;
  const uint start = min(row, n - 1);
  MS_UNROLL for (int p = 0; p < P; p++) a.w.part[p] = ms_from_row(weights.part[p], start, k);
  MS_UNROLL for (int i = 0; i < NR; i++) a.offset[i] = min(uint(i * 8) + place.x, n - 1 - start) * k + quarter * C;
  MS_UNROLL for (int f = 0; f < AHEAD; f++) {
    const uint at = from + (f * WK + split) * 4 * C;
    if (at < end) ms_read_block<WHOLE>(a, f, at, end, quarter);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------
// Where the rows that a lane's tiles are of begin, in units; the first tile's are the threadgroup's `first` on.
template <int MT>
struct ms_half_rows {
  uint at[2 * MT];
};
template <bool SAMPLED, int MT, typename X>
inline ms_half_rows<MT> ms_rows_in_memory(thread const ms_half_x<X>& x, uint first, uint lane) {
  ms_half_rows<MT> rows;
  MS_UNROLL for (int i = 0; i < 2 * MT; i++) {
    const uint r = min(x.first + first + i / 2 * 8 + ms_right_coord(ushort(lane), i % 2).y, x.last);
    rows.at[i] = (SAMPLED ? uint(x.sampled[r]) : r) * (x.stride / 8);
  }
  return rows;
}
template <int MT>
inline ms_half_rows<MT> ms_rows_at(uint ld, uint first, uint last, uint lane) {
  ms_half_rows<MT> rows;
  MS_UNROLL for (int i = 0; i < 2 * MT; i++)
    rows.at[i] = min(first + i / 2 * 8 + ms_right_coord(ushort(lane), i % 2).y, last) * ld;
  return rows;
}

// Run `run` of the block at unit `at` of each row, as 4 x MT tiles; the units from `end` on are 0. PLACED: units have their
// places of threadgroup memory, else they are in order.
template <int RUNS, bool PLACED, bool SPLIT, bool WHOLE, int MT, typename P>
inline void ms_load_run(
    thread ms_half_right<4, MT>& b, P x, thread const ms_half_rows<MT>& rows, uint at, int run, uint end, uint lane) {
  const uint row = ms_right_coord(ushort(lane), 0).x;  // of k, in a tile
  const uint unit = at + (PLACED ? run * 4 + row / 2 : row / 2 * RUNS + run);
  MS_UNROLL for (int i = 0; i < MT; i++) {
    uint4 u[2];
    MS_UNROLL for (int e = 0; e < (MS_RIGHT_COLUMNS ? 1 : 2); e++) {
      u[e] = uint4(0u);
      if (WHOLE || PLACED || unit < end) u[e] = x[rows.at[2 * i + e] + unit];
      if (SPLIT) u[e] = ms_split(u[e]);
    }
    MS_UNROLL for (int t = 0; t < 4; t++) {
      half2 v = as_type<half2>(u[0][t]);
      if (!MS_RIGHT_COLUMNS) {
        const half2 w = as_type<half2>(u[1][t]);
        v = row % 2 != 0 ? half2(v.y, w.y) : half2(v.x, w.x);
      }
      ms_set(b, t * MT + i, v);
    }
  }
}

// sums += W · xᵀ of one block: its chunks of N strips of weight rows, and x from unit `at` on.
template <int C, bool PLACED, bool SPLIT, bool WHOLE, int N, int MT, typename Chunk, typename X>
inline void ms_multiply_block(
    thread ms_sums<N, MT>& sums, thread const Chunk* chunk, X x, thread const ms_half_rows<MT>& rows, uint at, uint end,
    uint lane) {
  ms_half_scale scale[N];
  MS_UNROLL for (int i = 0; i < N; i++) scale[i] = ms_half_scale_of(chunk[i]);
  // Few rows of x are read at once, that their ways overlap.
  constexpr int AT_ONCE = MT * C / 8 <= 8 ? C / 8 : 1;
  ms_half_right<4, MT> b[AT_ONCE];
  MS_UNROLL for (int run = 0; run < C / 8; run++) {
    if (run % AT_ONCE == 0) {
      MS_UNROLL for (int i = 0; i < AT_ONCE; i++) ms_load_run<C / 8, PLACED, SPLIT, WHOLE>(b[i], x, rows, at, run + i, end, lane);
    }
    ms_half_left<N, 4> a;
    MS_UNROLL for (int i = 0; i < N; i++) {
      const ms_pairs r = ms_run(chunk[i], scale[i], run);
      MS_UNROLL for (int t = 0; t < 4; t++) ms_set(a, i * 4 + t, r.pair[t]);
    }
    ms_multiply(sums, a, b[run % AT_ONCE]);
  }
}

// Takes the chunks of slot `slot` and has it read the block that begins at `next`, if there is one.
template <bool WHOLE, typename Weight, int C, int P, int NR, int AHEAD>
inline void ms_take(
    thread typename ms_chunk_of<Weight, C>::type* to, thread ms_half_weights<Weight, C, P, NR, AHEAD>& a, int slot, uint next,
    uint end, uint quarter) {
  MS_UNROLL for (int i = 0; i < P * NR; i++) to[i] = a.chunk[slot * P * NR + i];
  if (next < end) ms_read_block<WHOLE>(a, slot, next, end, quarter);
}

// sums += the product over this split's blocks of [from, end), x in device memory (PLACED false: units of a row in order) or
// resident. Unit 0 of x is element `from`.
template <bool PLACED, bool WHOLE, int WK, typename Weight, int C, int P, int NR, int AHEAD, int MT, typename X>
inline void ms_half_matmul(
    thread ms_sums<P * NR, MT>& sums, thread ms_half_weights<Weight, C, P, NR, AHEAD>& weights, X x,
    thread const ms_half_rows<MT>& rows, uint from, uint end, uint split, uint lane) {
  constexpr bool SPLIT = !PLACED && ms_is_split<Weight>::value;
  const uint quarter = ms_frag_coord(ushort(lane)).y / 2;
  for (uint step = from + split * 4 * C; step < end; step += AHEAD * WK * 4 * C)
    MS_UNROLL for (int f = 0; f < AHEAD; f++) {
      const uint at = step + f * WK * 4 * C;
      if (at < end) {
        typename ms_chunk_of<Weight, C>::type chunk[P * NR];
        ms_take<WHOLE>(chunk, weights, f, at + AHEAD * WK * 4 * C, end, quarter);
        ms_multiply_block<C, PLACED, SPLIT, WHOLE>(sums, chunk, x, rows, (at - from) / 8, (end - from) / 8, lane);
      }
    }
}

// COUNT of the UNITS units per row of BM rows of x, from element `begin` on, in order: what a thread stages.
template <
    int XALIGN, bool EIGHTS, bool SAMPLED, bool NORM, bool WEIGHT, int UNITS, int BM, int THREADS, int COUNT, typename X>
inline void ms_hold(
    thread uint4* held, thread const ms_half_x<X>& x, const threadgroup float* scales, uint begin, uint end, uint tid) {
  MS_UNROLL for (int c = 0; c < COUNT; c++) {
    const uint i = tid + c * THREADS;
    const uint row = BM * UNITS % THREADS == 0 ? i / UNITS : min(i / UNITS, uint(BM - 1));
    held[c] = ms_unit_at<XALIGN, EIGHTS, NORM, WEIGHT>(
        ms_row<SAMPLED>(x, row), x.norm, NORM ? scales[row] : 1.0f, begin + i % UNITS * 8, end);
  }
}

// The same with x staged, WK blocks at a time: `staged` has BM rows of LD units, of which the simdgroup multiplies those from
// `first` on; `scales` a factor per row if NORM.
template <
    bool WHOLE, int WK, int LD, int BM, int THREADS, int XALIGN, bool EIGHTS, bool SAMPLED, bool NORM, bool WEIGHT,
    typename Weight, int C, int P, int NR, int AHEAD, int MT, typename X>
inline void ms_half_matmul_staged(
    thread ms_sums<P * NR, MT>& sums, thread ms_half_weights<Weight, C, P, NR, AHEAD>& weights, threadgroup uint4* staged,
    const threadgroup float* scales, thread const ms_half_x<X>& x, uint first, uint from, uint end, uint split, uint tid,
    uint lane) {
  constexpr int RUNS = C / 8;
  constexpr int UNITS = WK * 4 * RUNS;  // of a row at a time
  constexpr int COUNT = (BM * UNITS + THREADS - 1) / THREADS;
  const uint quarter = ms_frag_coord(ushort(lane)).y / 2;
  const ms_half_rows<MT> rows = ms_rows_at<MT>(LD, first, BM - 1, lane);
  uint4 held[COUNT];
  for (uint step = from; step < end; step += AHEAD * WK * 4 * C)
    MS_UNROLL for (int f = 0; f < AHEAD; f++) {
      const uint begin = step + f * WK * 4 * C;
      if (begin < end) {
        // Units are read one step ahead; the very first ones here.
        if (f == 0 && step == from)
          ms_hold<XALIGN, EIGHTS, SAMPLED, NORM, WEIGHT, UNITS, BM, THREADS, COUNT>(held, x, scales, begin, end, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the units before have been read
        MS_UNROLL for (int c = 0; c < COUNT; c++) {
          const uint i = tid + c * THREADS;
          if (BM * UNITS % THREADS == 0 || i < BM * UNITS)
            staged[i / UNITS * LD + ms_unit_place<RUNS>(i % UNITS)] = ms_is_split<Weight>::value ? ms_split(held[c]) : held[c];
        }
        if (begin + WK * 4 * C < end)
          ms_hold<XALIGN, EIGHTS, SAMPLED, NORM, WEIGHT, UNITS, BM, THREADS, COUNT>(
              held, x, scales, begin + WK * 4 * C, end, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const uint at = begin + split * 4 * C;
        if (at < end) {
          typename ms_chunk_of<Weight, C>::type chunk[P * NR];
          ms_take<WHOLE>(chunk, weights, f, at + AHEAD * WK * 4 * C, end, quarter);
          ms_multiply_block<C, true, false, WHOLE>(
              sums, chunk, (const threadgroup uint4*)staged, rows, split * 4 * RUNS, 0, lane);
        }
      }
    }
}

// ---- sums over the simdgroups that share k --------------------------------------------------------------------------
// Halves are added to halves until one is left, whoever adds them: sums have the same bits wherever they meet.
// Memory of a split: [part][row of x, BM][weight row, COLUMNS], rotated along the weight rows by ms_rotated.
template <int COLUMNS>
inline uint ms_rotated(uint row, uint column) {
  return (column + row / 2 % 4 * 8) % COLUMNS;
}
template <int BM, int COLUMNS, int P, int NR, int MT>
inline void ms_exchange(
    threadgroup float* at, uint row0, uint column0, thread ms_sums<P * NR, MT>& sums, bool add, uint lane) {
  const ushort2 place = ms_frag_coord(ushort(lane));
  MS_UNROLL for (int p = 0; p < P; p++)
    MS_UNROLL for (int i = 0; i < NR; i++)
      MS_UNROLL for (int j = 0; j < MT; j++)
        MS_UNROLL for (int e = 0; e < 2; e++) {
          const uint row = row0 + j * 8 + place.y + e;
          threadgroup float& cell = at[(p * BM + row) * COLUMNS + ms_rotated<COLUMNS>(row, column0 + i * 8 + place.x)];
          if (add)
            sums.tile[(p * NR + i) * MT + j].thread_elements()[e] += cell;
          else
            cell = sums.tile[(p * NR + i) * MT + j].thread_elements()[e];
        }
}
// KEPT of WK splits' sums to memory `stride` floats apart, the others' added to them. Begins and ends with a barrier.
template <int WK, int KEPT, int BM, int COLUMNS, int P, int NR, int MT>
inline void ms_share(
    threadgroup float* to, uint stride, uint row0, uint column0, thread ms_sums<P * NR, MT>& sums, uint split, uint lane) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  MS_UNROLL for (int have = WK; have > KEPT; have /= 2)
    MS_UNROLL for (int first = 0; first < have / 2; first += KEPT) {
      const uint giver = split - (have / 2 + first);
      const uint taker = split - first;
      if (split < have && split >= have / 2 + first && giver < KEPT)
        ms_exchange<BM, COLUMNS, P, NR, MT>(to + giver * stride, row0, column0, sums, false, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (split < have / 2 && split >= first && taker < KEPT)
        ms_exchange<BM, COLUMNS, P, NR, MT>(to + taker * stride, row0, column0, sums, true, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  if (split < KEPT) ms_exchange<BM, COLUMNS, P, NR, MT>(to + split * stride, row0, column0, sums, false, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
template <int KEPT>
inline float ms_collect(const threadgroup float* from, uint stride) {
  float v[KEPT];
  MS_UNROLL for (int i = 0; i < KEPT; i++) v[i] = from[i * stride];
  MS_UNROLL for (int have = KEPT / 2; have > 0; have /= 2)
    MS_UNROLL for (int i = 0; i < have; i++) v[i] += v[i + have];
  return v[0];
}
