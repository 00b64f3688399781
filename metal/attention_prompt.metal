// Attention of a prompt's rows over the paged cache with products in half precision, whose sums are float. Reference:
// kernels/attention.py. Sources: online softmax, arXiv 1805.02867; tiles of it, arXiv 2205.14135 and 2307.08691; a maximum that
// is renewed only where weights would grow too large, as in FlashAttention 4.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "kv_codec.h"
#include "attention.h"
#include "attention_planes.h"
#include "attention_rows.h"
#include "attention_prompt.h"

// A threadgroup has a tile of neighbouring rows and H query heads of one kv head. Rows of the tile that follow one another, of one
// sequence and at positions that follow one another, are a run; a run's rows times H are the rows of its matrices. A simdgroup has
// R tiles of 8 matrix rows with all of their elements. BK positions at a time go through threadgroup memory, which has three parts:
// while one is multiplied, the next two are on their way, keys and values in turn.
//
// T: see ms_planes; no float32. D, DV: elements of a key and of a value, D a multiple of 16. Out: half or float. SHARE: threadgroups
// that registers are to be left for. Where keys or values are in rotated space, queries are rotated before and results back behind.

inline vec<int, 4> ms_packed_view(ms_view v) { return vec<int, 4>(v.keep_lo, v.keep_hi, v.lo, v.hi); }
inline ms_view ms_unpacked_view(vec<int, 4> from) {
  ms_view v;
  v.keep_lo = from.x;
  v.keep_hi = from.y;
  v.lo = from.z;
  v.hi = from.w;
  return v;
}

struct ms_run {
  int first;  // row of the tile
  int rows;
};

// Weights are 2^(score - m), m being at most MS_RISE below the highest score of the row so far: they stay among a half's normal ones,
// and up to 2^MS_RISE; where one would be beyond, m becomes MS_REST below it.
#define MS_RISE 14.0f
#define MS_REST 6.0f

// A simdgroup's part of a run.
template <int R, int NK, int NV>
struct ms_prompt_rows {
  ms_half_left<R, 2> q[NK / 2];
  ms_sums<R, 1> o[NV];
  float m[R];
  float s[R];       // of this lane's columns
};

// Two of a column of tiles, from tile k on.
template <int K>
inline ms_half_right<2, 1> ms_two_of(thread ms_half_right<K, 1>& column, int k) {
  ms_half_right<2, 1> two;
  two.tile[0] = column.tile[k];
  two.tile[1] = column.tile[k + 1];
  return two;
}

// Scores by elements [FROM, TO), in tiles of 8, KC at a time.
template <int FROM, int TO, int KC, int KT, int LD, int R>
inline void ms_score(thread ms_sums<R, 1>* scores, thread ms_half_left<R, 2>* q, const threadgroup half* keys, uint lane) {
  MS_UNROLL for (int k = FROM; k < TO; k += KC) {
    ms_half_right<KC, 1> key[KT];
    MS_UNROLL for (int i = 0; i < KT; i++) ms_load_transposed(key[i], keys + i * 8 * LD + k * 8, LD, ushort(lane));
    MS_UNROLL for (int c = 0; c < KC; c += 2)
      MS_UNROLL for (int i = 0; i < KT; i++) {
        ms_half_right<2, 1> two = ms_two_of(key[i], c);
        ms_multiply(scores[i], q[(k + c) / 2], two);
      }
  }
}

// Values' elements [FROM, TO), in tiles of 8, VC at a time, by weights of KH times 16 positions.
template <int FROM, int TO, int VC, int KH, int LD, int R>
inline void ms_weigh(thread ms_sums<R, 1>* o, thread ms_half_left<R, 2>* weights, const threadgroup half* values, uint lane) {
  MS_UNROLL for (int v = FROM; v < TO; v += VC) {
    ms_half_right<KH * 2, 1> value[VC];
    MS_UNROLL for (int i = 0; i < VC; i++) ms_load(value[i], values + (v + i) * 8, LD, ushort(lane));
    MS_UNROLL for (int k = 0; k < KH; k++)
      MS_UNROLL for (int i = 0; i < VC; i++) {
        ms_half_right<2, 1> two = ms_two_of(value[i], k * 2);
        ms_multiply(o[v + i], weights[k], two);
      }
  }
}

// Grid: [kv heads * slices, tiles of rows, Z]: threadgroups of the same tile have every Z-th of its runs, if it may have several.
template <typename T, typename Out, int D, int DV, bool CAPPED, int H, int R, int NSG, int BK, int SHARE>
[[kernel, max_total_threads_per_threadgroup(NSG * 32 * SHARE)]] void attention_prompt(
    constant MSStep& step                [[buffer(0)]],
    device const int* positions          [[buffer(1)]],   // [num_tokens]; a row sees positions up to its own
    device const int* seq_ids            [[buffer(2)]],   // [num_tokens], row of block_tables
    device const int* block_tables       [[buffer(3)]],   // [num_seqs, max_blocks]
    device const MSSequence* sequences   [[buffer(4)]],   // [num_seqs]
    device const float* q                [[buffer(5)]],   // rows of [num_q_heads, D]
    device const typename ms_codec<typename ms_cache<T>::key>::stored* k_plane    [[buffer(6)]],  // [block, kv_head, block_size, D]
    device const typename ms_codec<typename ms_cache<T>::value>::stored* v_plane  [[buffer(7)]],  // [block, kv_head, block_size, DV]
    device Out* out                      [[buffer(8)]],   // [num_tokens, num_q_heads, DV]
    device const float* sinks            [[buffer(9)]],   // [num_q_heads]
    constant MSGpuAttentionParams& p     [[buffer(10)]],
    uint3 at     [[threadgroup_position_in_grid]],
    uint3 grid   [[threadgroups_per_grid]],
    uint tid     [[thread_index_in_threadgroup]],
    uint sg      [[simdgroup_index_in_threadgroup]],
    uint lane    [[thread_index_in_simdgroup]]) {
  constexpr int TR = NSG * R * 8 / H;  // rows of the step
  constexpr int NK = D / 8, NV = DV / 8, KT = BK / 8, THREADS = NSG * 32;
  constexpr int VC = NV % 4 == 0 ? 4 : 2, KC = NK % 4 == 0 ? 4 : 2;  // tiles of values, and of keys' elements, at a time
  using KeyCodec = typename ms_cache<T>::key;
  using ValueCodec = typename ms_cache<T>::value;
  using Key = ms_layout<KeyCodec, D>;
  using Value = ms_layout<ValueCodec, DV>;
  using KeyShares = ms_shares<D, BK, THREADS>;
  using ValueShares = ms_shares<DV, BK, THREADS>;
  constexpr int LONG = D > DV ? D : DV, LD = LONG + 8, PART = BK * LD;  // rows apart by other banks
  // Rotations: rows of floats that a simdgroup has at a time.
  constexpr int OWN = 3 * PART / 2 / NSG, LF = LONG + 4, FIT = OWN / LF;
  constexpr int TURN = FIT >= 4 ? 4 : (FIT >= 2 ? 2 : 1);
  static_assert(TR >= 1 && D % 16 == 0 && DV % 8 == 0 && BK % 16 == 0 && BK <= THREADS, "whole tiles");
  static_assert(FIT >= 1 || (!Key::turbo && !Value::turbo), "room for a row");
  threadgroup half parts[3 * PART];
  threadgroup vec<int, 4> views[TR];
  threadgroup int begins[TR];
  threadgroup uint broken[BK];

  const int tiles = (int(step.num_tokens) + TR - 1) / TR, row0 = (tiles - 1 - int(at.y)) * TR;  // the longest contexts first
  if (row0 < 0) return;
  const int rows = min(TR, int(step.num_tokens) - row0), last = row0 + rows - 1;
  // A tile whose ends may be those of one run is not shared: others are gone before they have looked at its rows.
  const bool one = seq_ids[row0] == seq_ids[last] && positions[last] - positions[row0] == rows - 1;
  const uint sharing = one ? 1u : grid.z;
  if (at.z >= sharing) return;
  if (int(tid) < rows) {
    const int row = row0 + int(tid);
    views[tid] = ms_packed_view(ms_view_of(positions[row], seq_ids[row], step, sequences, p));
    begins[tid] = tid == 0 || seq_ids[row] != seq_ids[row - 1] || positions[row] != positions[row - 1] + 1 ? 1 : 0;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int group = int(p.num_q_heads / p.num_kv_heads), slices = (group + H - 1) / H;
  const uint kv_head = at.x / uint(slices);
  const int first_head = int(kv_head) * group + int(at.x) % slices * H;
  const int heads = min(H, int(kv_head + 1) * group - first_head);
  const int matrix_row = int(sg) * (R * 8);
  const ushort2 mine = ms_frag_coord(ushort(lane));
  const float scale = ms_query_scale(p);
  threadgroup float* own = (threadgroup float*)parts + int(sg) * OWN;

  int number = 0;
  ms_run run;
  for (run.first = 0; run.first < rows; run.first += run.rows, number++) {
    int end = rows;
    for (int row = int(lane); row < rows; row += 32)
      if (row > run.first && begins[row] != 0) end = min(end, row);
    run.rows = simd_min(end) - run.first;
    if (uint(number) % sharing != at.z) continue;
    const int seq = seq_ids[row0 + run.first];
    ms_span span = ms_no_span();
    for (int j = int(lane); j < run.rows; j += 32)
      ms_join(span, ms_unpacked_view(views[run.first + j]));
    span.lo = simd_min(span.lo);
    span.hi = simd_max(span.hi);
    span.whole_lo = simd_max(span.whole_lo);
    span.whole_hi = simd_min(span.whole_hi);
    span.keep_lo = simd_min(span.keep_lo);
    span.keep_hi = simd_max(span.keep_hi);
    span.lo = min(span.lo, span.hi);  // nothing is seen: both 0
    const bool active = matrix_row < run.rows * H;

    // 1. Queries, scaled; rotated in memory where keys are.
    ms_prompt_rows<R, NK, NV> t;
    MS_UNROLL for (int r = 0; r < R; r++) {
      const int i = matrix_row + r * 8 + mine.x, j = i / H, g = i % H;
      const bool there = j < run.rows && g < heads;
      const int row = row0 + run.first + (there ? j : 0);
      t.m[r] = MS_NEG;
      t.s[r] = 0.0f;
      if (Key::turbo) continue;
      device const float* from = q + p.q_offset + ulong(row) * p.q_row_stride + ulong(first_head + (there ? g : 0)) * D + mine.y;
      MS_UNROLL for (int k = 0; k < NK; k++) {
        const vec<float, 2> pair = *(device const vec<float, 2>*)(from + k * 8);
        ms_set(t.q[k / 2], r * 2 + k % 2, half2(ms_half_of(there ? pair.x * scale : 0.0f), ms_half_of(there ? pair.y * scale : 0.0f)));
      }
    }
    if (Key::turbo) {
      MS_UNROLL for (int r = 0; active && r < R; r++)
        for (int c = 0; c < 8; c += TURN) {
          MS_UNROLL for (int n = 0; n < TURN; n++) {
            const int i = matrix_row + r * 8 + c + n, j = i / H, g = i % H;
            const bool there = j < run.rows && g < heads;
            device const float* from = q + p.q_offset + ulong(row0 + run.first + (there ? j : 0)) * p.q_row_stride +
                                       ulong(first_head + (there ? g : 0)) * D;
            for (int d = int(lane); d < D; d += 32) own[n * LF + d] = there ? from[d] * scale : 0.0f;
            ms_rotate<Key::turbo ? D : 32>(own + n * LF, ms_kv_seeds[0], lane);
          }
          simdgroup_barrier(mem_flags::mem_threadgroup);
          if (mine.x >= c && mine.x < c + TURN) {
            const threadgroup float* from = own + (mine.x - c) * LF + mine.y;
            MS_UNROLL for (int k = 0; k < NK; k++)
              ms_set(t.q[k / 2], r * 2 + k % 2, half2(ms_half_of(from[k * 8]), ms_half_of(from[k * 8 + 1])));
          }
          simdgroup_barrier(mem_flags::mem_threadgroup);
        }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    MS_UNROLL for (int v = 0; v < NV; v++) ms_clear(t.o[v]);

    // 2. Positions, BK at a time: kept ones, then those from the first row's first to the last row's own.
    const ms_pages pages = ms_pages_of(block_tables + ulong(uint(max(seq, 0))) * step.max_blocks, p);
    const ms_plane<KeyCodec> keys = ms_plane_of<KeyCodec, D>(k_plane, p.k_scales, kv_head, p.block_shift);
    const ms_plane<ValueCodec> values = ms_plane_of<ValueCodec, DV>(v_plane, p.v_scales, kv_head, p.block_shift);
    ms_fetched<KeyCodec, D, KeyShares::count> key_shares;
    ms_fetched<ValueCodec, DV, ValueShares::count> value_shares;
    int first = min(span.keep_lo, span.lo) / BK * BK, next = ms_tile_after<BK>(span, first);
    ms_places<BK> places;  // of the tile to be fetched
    if (first < span.hi) {
      ms_find(places, pages, span, first);
      ms_fetch<KeyShares, LD>(key_shares, parts, keys, places, pages, int(tid));
      ms_copies_end();
      ms_fetch<ValueShares, LD>(value_shares, parts + PART, values, places, pages, int(tid));
      ms_copies_end();
      ms_leave<KeyShares, LD>(key_shares, parts, int(tid));
      if (next < span.hi) ms_find(places, pages, span, next);
    }
    int at_keys = 0;
    while (first < span.hi) {
      const bool whole = first >= span.whole_lo && first + BK <= span.whole_hi, more = next < span.hi;
      const int at_values = at_keys == 2 * PART ? 0 : at_keys + PART, at_next = at_values == 2 * PART ? 0 : at_values + PART;
      ms_copies_wait<1>();
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (more) ms_fetch<KeyShares, LD>(key_shares, parts + at_next, keys, places, pages, int(tid));
      ms_copies_end();
      ms_sums<R, 1> scores[KT];
      if (active) {
        MS_UNROLL for (int i = 0; i < KT; i++) ms_clear(scores[i]);
        ms_score<0, NK / KC / 2 * KC, KC, KT, LD>(scores, t.q, parts + at_keys, lane);
        ms_leave<ValueShares, LD>(value_shares, parts + at_values, int(tid));
        ms_score<NK / KC / 2 * KC, NK, KC, KT, LD>(scores, t.q, parts + at_keys, lane);
      } else {
        ms_leave<ValueShares, LD>(value_shares, parts + at_values, int(tid));
      }

      ms_copies_wait<1>();
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const int after = ms_tile_after<BK>(span, next);
      if (more) {
        ms_fetch<ValueShares, LD>(value_shares, parts + at_keys, values, places, pages, int(tid));
        if (after < span.hi) ms_find(places, pages, span, after);
      }
      ms_copies_end();
      if (!whole) {
        ms_mark_broken<DV, LD, BK, THREADS>(parts + at_values, broken, int(tid));
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      if (active) {
        // 3. Scores become weights.
        if (CAPPED) {
          MS_UNROLL for (int k = 0; k < KT; k++)
            MS_UNROLL for (int r = 0; r < R; r++)
              MS_UNROLL for (int e = 0; e < 2; e++)
                scores[k].tile[r].thread_elements()[e] = ms_capped(scores[k].tile[r].thread_elements()[e], p.softcap);
        }
        if (!whole) {
          MS_UNROLL for (int r = 0; r < R; r++) {
            const int j = (matrix_row + r * 8 + mine.x) / H;
            const ms_view view = ms_unpacked_view(views[run.first + min(j, run.rows - 1)]);
            MS_UNROLL for (int k = 0; k < KT; k++)
              MS_UNROLL for (int e = 0; e < 2; e++) {
                const int column = k * 8 + mine.y + e;
                float score = scores[k].tile[r].thread_elements()[e];
                if (broken[column] != 0) score = ms_nan();
                if (!ms_sees(view, first + column)) score = MS_NEG;
                scores[k].tile[r].thread_elements()[e] = score;
              }
          }
        }
        float most[R];
        bool rises = false;
        MS_UNROLL for (int r = 0; r < R; r++) {
          most[r] = MS_NEG;
          MS_UNROLL for (int k = 0; k < KT; k++)
            MS_UNROLL for (int e = 0; e < 2; e++) most[r] = max(most[r], scores[k].tile[r].thread_elements()[e]);
          rises = rises || most[r] > t.m[r] + MS_RISE;
        }
        if (simd_any(rises)) {
          MS_UNROLL for (int r = 0; r < R; r++) {
            const float highest = ms_row_max(most[r]);
            const float m = highest > t.m[r] + MS_RISE ? highest - MS_REST : t.m[r];
            const float left = ms_weight(t.m[r], m);
            t.m[r] = m;
            t.s[r] *= left;
            MS_UNROLL for (int v = 0; v < NV; v++)
              MS_UNROLL for (int e = 0; e < 2; e++) t.o[v].tile[r].thread_elements()[e] *= left;
          }
        }
        ms_half_left<R, 2> weights[KT / 2];
        MS_UNROLL for (int r = 0; r < R; r++)
          MS_UNROLL for (int k = 0; k < KT; k++) {
            const float a = ms_weight(scores[k].tile[r].thread_elements()[0], t.m[r]);
            const float b = ms_weight(scores[k].tile[r].thread_elements()[1], t.m[r]);
            t.s[r] += a + b;
            ms_set(weights[k / 2], r * 2 + k % 2, half2(half(a), half(b)));
          }
        // 4. Values by their weights.
        ms_weigh<0, NV / VC / 2 * VC, VC, KT / 2, LD>(t.o, weights, parts + at_values, lane);
        ms_leave<KeyShares, LD>(key_shares, parts + at_next, int(tid));
        ms_weigh<NV / VC / 2 * VC, NV, VC, KT / 2, LD>(t.o, weights, parts + at_values, lane);
      } else {
        ms_leave<KeyShares, LD>(key_shares, parts + at_next, int(tid));
      }
      at_keys = at_next;
      first = next;
      next = after;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // 5. The rows' results; what is in rotated space goes back through memory.
    float factor[R];
    MS_UNROLL for (int r = 0; r < R; r++) {
      const int i = matrix_row + r * 8 + mine.x, g = i % H;
      const bool sees = ms_unpacked_view(views[run.first + min(i / H, run.rows - 1)]).hi > 0;
      const float sum = ms_row_sum(t.s[r]);
      const float sink = p.has_sinks != 0 ? sinks[first_head + (g < heads ? g : 0)] : 0.0f;
      factor[r] = sees ? ms_last_factor(t.m[r], sum, p.has_sinks != 0, sink) : ms_nan();
    }
    if (!Value::turbo) {
      if (!active) continue;
      MS_UNROLL for (int r = 0; r < R; r++) {
        const int i = matrix_row + r * 8 + mine.x, j = i / H, g = i % H;
        if (j >= run.rows || g >= heads) continue;
        device Out* to = out + (ulong(row0 + run.first + j) * p.num_q_heads + ulong(first_head + g)) * DV + mine.y;
        MS_UNROLL for (int v = 0; v < NV; v++)
          ms_leave_results(to + v * 8, t.o[v].tile[r].thread_elements()[0] * factor[r], t.o[v].tile[r].thread_elements()[1] * factor[r]);
      }
      continue;
    }
    MS_UNROLL for (int r = 0; active && r < R; r++)
      for (int c = 0; c < 8; c += TURN) {
        if (mine.x >= c && mine.x < c + TURN) {
          threadgroup float* to = own + (mine.x - c) * LF + mine.y;
          MS_UNROLL for (int v = 0; v < NV; v++)
            MS_UNROLL for (int e = 0; e < 2; e++) to[v * 8 + e] = t.o[v].tile[r].thread_elements()[e] * factor[r];
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        MS_UNROLL for (int n = 0; n < TURN; n++) {
          const int i = matrix_row + r * 8 + c + n, j = i / H, g = i % H;
          ms_rotate_back<Value::turbo ? DV : 32>(own + n * LF, ms_kv_seeds[1], lane);
          if (j >= run.rows || g >= heads) continue;
          device Out* to = out + (ulong(row0 + run.first + j) * p.num_q_heads + ulong(first_head + g)) * DV;
          for (int d = int(lane); d < DV; d += 32) ms_leave_result(to + d, own[n * LF + d]);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
      }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
