// Attention of several rows of a sequence together over the paged cache. Reference: kernels/attention.py. Sources:
// online softmax, arXiv 1805.02867; its tiles in threadgroup memory, arXiv 2205.14135.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "kv_codec.h"
#include "attention.h"
#include "attention_planes.h"
#include "attention_rows.h"

// A threadgroup has a tile of neighbouring rows and H query heads of one kv head. Rows of the tile that follow one
// another and have the same sequence are a run; a run's rows times H are the rows of its matrices, so that all heads of
// a run of one row share a read too. BK positions at a time go through threadgroup memory, first their keys, then their
// values: scores = q k^T and out = weights v are products of 8x8 tiles. Positions that no row of the run sees are not
// read.
//
// D, DV: elements of a key and of a value. A simdgroup has R tiles of 8 matrix rows, and of the elements of keys and
// values one of DS parts; NSG simdgroups. Rows of a sequence may come in any order; a row's bits depend on its run.
// T: see ms_planes; Out: float or half. Packed keys and values are unpacked into the tile as floats, BK positions of one kv head and no more;
// where they are in rotated space, queries are rotated in the tile's memory before the first, and results back after the last.

struct ms_run {
  int first;  // row of the tile
  int rows;
  int seq;
};

inline ms_view ms_view_at(const threadgroup int* views, int row) {
  ms_view v;
  v.keep_lo = views[row * 4];
  v.keep_hi = views[row * 4 + 1];
  v.lo = views[row * 4 + 2];
  v.hi = views[row * 4 + 3];
  return v;
}

inline ms_span ms_span_of(const threadgroup int* views, ms_run run) {
  ms_span s = ms_no_span();
  for (int j = run.first; j < run.first + run.rows; j++) ms_join(s, ms_view_at(views, j));
  return s;
}

// Elements from `at` on of the vector at `place`, into threadgroup memory: four floats, or eight that are unpacked.
template <int W, typename C, typename To>
inline void ms_fill_from(threadgroup To* to, ms_plane<C> plane, ulong place, uint block_shift, int at, const threadgroup float* table) {
  const vec<C, 4> four = *(device const vec<C, 4>*)(plane.codes + place * W + at);
  to[0] = To(four.x);
  to[1] = To(four.y);
  to[2] = To(four.z);
  to[3] = To(four.w);
}
template <int W, int CODEC>
inline void ms_fill_from(threadgroup float* to, ms_plane<ms_packed<CODEC>> plane, ulong place, uint block_shift, int at,
                         const threadgroup float* table) {
  float elements[8];
  const float scale = ms_unpack<W, 8, false>(plane, place, block_shift, at, table, elements);
  MS_UNROLL for (int e = 0; e < 8; e++) to[e] = ms_layout<ms_packed<CODEC>, W>::turbo ? scale * elements[e] : elements[e];
}

// BK positions of a plane into threadgroup memory, floats as they are stored, others unpacked; zeros where `needed` has none.
template <int W, int LD, int BK, int THREADS, typename C, typename To>
inline void ms_fill(threadgroup To* tile, ms_pages pages, ms_plane<C> plane, int first, bool whole, const threadgroup uint* needed,
                    const threadgroup float* table, int tid) {
  constexpr int E = ms_layout<C, W>::packed ? 8 : 4;
  for (int i = tid; i < BK * (W / E); i += THREADS) {
    const int k = i / (W / E), at = i % (W / E) * E;
    threadgroup To* to = tile + k * LD + at;
    if (whole || needed[k] != 0) {
      ms_fill_from<W>(to, plane, ms_place(pages, first + k), pages.shift, at, table);
    } else {
      MS_UNROLL for (int e = 0; e < E; e++) to[e] = To(0.0f);
    }
  }
}

// An element that is not finite would reach rows that do not see it, as 0 times it: it becomes zero, and its position
// is marked as broken for those that do.
template <typename T, int W, int LD, int BK, int THREADS>
inline void ms_mark_broken(threadgroup T* tile, threadgroup uint* broken, int tid) {
  constexpr int L = THREADS / BK;  // lanes of a position
  static_assert(L <= 32 && (L & (L - 1)) == 0, "lanes of one simdgroup");
  threadgroup T* row = tile + tid / L * LD;
  uint found = 0;
  for (int i = tid % L; i < W; i += L) {
    if ((as_type<uint>(float(row[i])) & 0x7f800000u) != 0x7f800000u) continue;
    row[i] = T(0.0f);
    found = 1;
  }
  MS_UNROLL for (int d = L / 2; d > 0; d /= 2) found |= simd_shuffle_xor(found, ushort(d));
  if (tid % L == 0) broken[tid / L] = found;
}

// A simdgroup's part of a run: R tiles of 8 matrix rows, NK and NV tiles of elements.
template <int R, int NK, int NV>
struct ms_matrix_rows {
  ms_operands<R, 1> q[NK];
  ms_sums<R, 1> o[NV];
  ms_view view[R];  // of the lane's row in each tile
  float m[R];
  float s[R];       // of this lane's columns
};

// Grid: [kv heads * slices, tiles of rows, Z]: threadgroups of the same tile have every Z-th of its runs.
template <typename T, int D, int DV, int H, int R, int NSG, int DS, int BK, typename Out>
[[kernel, max_total_threads_per_threadgroup(NSG * 32)]] void attention_mixed(
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
  constexpr int M = NSG / DS * R * 8, TR = M / H;  // matrix rows, rows of the step
  constexpr int NK = D / 8 / DS, NV = DV / 8 / DS, KT = BK / 8;
  using Tile = typename ms_cache<T>::tile;
  using KeyCodec = typename ms_cache<T>::key;
  using ValueCodec = typename ms_cache<T>::value;
  using Key = ms_layout<KeyCodec, D>;
  using Value = ms_layout<ValueCodec, DV>;
  constexpr int LD = (D > DV ? D : DV) + 16 / int(sizeof(Tile));  // apart by other banks
  constexpr int THREADS = NSG * 32;
  static_assert(NSG % DS == 0 && TR >= 1 && TR <= THREADS && BK <= THREADS, "a tile of rows");
  static_assert(D % (8 * DS) == 0 && DV % (8 * DS) == 0, "parts of whole tiles");
  threadgroup Tile tile[BK * LD];
  threadgroup float partial[DS > 1 ? NSG * R * BK * 8 : 1];
  threadgroup int views[TR * 4];
  threadgroup int seqs[TR];
  threadgroup uint needed[BK];
  threadgroup uint broken[BK];
  threadgroup float key_table[Key::table];
  threadgroup float value_table[Value::table];

  const int row0 = int(at.y) * TR, rows = min(TR, int(step.num_tokens) - row0);
  if (rows <= 0) return;
  if (int(tid) < rows) {
    const int row = row0 + int(tid);
    const ms_view v = ms_view_of(positions[row], seq_ids[row], step, sequences, p);
    views[tid * 4] = v.keep_lo;
    views[tid * 4 + 1] = v.keep_hi;
    views[tid * 4 + 2] = v.lo;
    views[tid * 4 + 3] = v.hi;
    seqs[tid] = seq_ids[row];
  }
  ms_fill_table<KeyCodec, D>(key_table, int(tid));
  ms_fill_table<ValueCodec, DV>(value_table, int(tid));
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int group = int(p.num_q_heads / p.num_kv_heads), slices = (group + H - 1) / H;
  const uint kv_head = at.x / uint(slices);
  const int first_head = int(kv_head) * group + int(at.x) % slices * H;
  const int heads = min(H, int(kv_head + 1) * group - first_head);
  const int part = int(sg) % DS, first_matrix_row = int(sg) / DS * (R * 8);
  const ushort2 mine = ms_frag_coord(ushort(lane));
  const float scale = ms_query_scale(p);
  threadgroup float* floats = (threadgroup float*)tile;  // where it is one of floats

  int number = 0;
  ms_run run;
  for (run.first = 0; run.first < rows; run.first += run.rows, number++) {
    run.seq = seqs[run.first];
    run.rows = 1;
    while (run.first + run.rows < rows && seqs[run.first + run.rows] == run.seq) run.rows++;
    if (uint(number) % grid.z != at.z) continue;
    const ms_span span = ms_span_of(views, run);
    const bool active = first_matrix_row < run.rows * H;

    // 1. Queries: this simdgroup's part of its rows, scaled; rotated in the tile's memory where keys are.
    ms_matrix_rows<R, NK, NV> t;
    MS_UNROLL for (int r = 0; r < R; r++) {
      const int i = first_matrix_row + r * 8 + mine.x, j = i / H, g = i % H;
      const bool there = j < run.rows && g < heads;
      t.view[r] = ms_view_at(views, run.first + min(j, run.rows - 1));
      if (!there) t.view[r].hi = t.view[r].lo = t.view[r].keep_hi = t.view[r].keep_lo = 0;
      t.m[r] = MS_NEG;
      t.s[r] = 0.0f;
      device const float* from = q + p.q_offset + ulong(row0 + run.first + (there ? j : 0)) * p.q_row_stride +
                                 ulong(first_head + (there ? g : 0)) * D + part * NK * 8 + mine.y;
      MS_UNROLL for (int k = 0; k < NK; k++)
        MS_UNROLL for (int e = 0; e < 2; e++)
          t.q[k].tile[r].thread_elements()[e] = there && !Key::turbo ? from[k * 8 + e] * scale : 0.0f;
    }
    for (int row = 0; Key::turbo && row < run.rows * H; row += BK) {
      for (int i = row + int(sg); i < min(row + BK, run.rows * H); i += NSG) {
        const int g = i % H;
        if (g >= heads) continue;
        device const float* from = q + p.q_offset + ulong(row0 + run.first + i / H) * p.q_row_stride + ulong(first_head + g) * D;
        threadgroup float* to = floats + (i - row) * LD;
        for (int d = int(lane); d < D; d += 32) to[d] = from[d] * scale;
        ms_rotate<Key::turbo ? D : 32>(to, ms_kv_seeds[0], lane);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      MS_UNROLL for (int r = 0; r < R; r++) {
        const int i = first_matrix_row + r * 8 + mine.x - row;
        if (i < 0 || i >= BK || t.view[r].hi == 0) continue;
        const threadgroup float* from = floats + i * LD + part * NK * 8 + mine.y;
        MS_UNROLL for (int k = 0; k < NK; k++)
          MS_UNROLL for (int e = 0; e < 2; e++) t.q[k].tile[r].thread_elements()[e] = from[k * 8 + e];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    MS_UNROLL for (int v = 0; v < NV; v++) ms_clear(t.o[v]);

    // 2. Positions, BK at a time: kept ones, then those from the first row's first to the last row's own.
    device const int* table = block_tables + ulong(uint(max(run.seq, 0))) * step.max_blocks;
    const ms_pages pages = ms_pages_of(table, p);
    const ms_plane<KeyCodec> keys = ms_plane_of<KeyCodec, D>(k_plane, p.k_scales, kv_head, p.block_shift);
    const ms_plane<ValueCodec> values = ms_plane_of<ValueCodec, DV>(v_plane, p.v_scales, kv_head, p.block_shift);
    const int recent = span.lo / BK * BK;
    int first = min(span.keep_lo, span.lo) / BK * BK;
    for (; first < span.hi; first += BK) {
      if (first < recent && first >= span.keep_hi) first = recent;
      const bool whole = first >= span.whole_lo && first + BK <= span.whole_hi;
      if (!whole) {
        if (int(tid) < BK) {
          uint any = 0;
          for (int j = run.first; j < run.first + run.rows; j++)
            any |= uint(ms_sees(ms_view_at(views, j), first + int(tid)));
          needed[tid] = any;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint any = 0;
        for (int k = 0; k < BK; k++) any |= needed[k];
        if (any == 0) {
          threadgroup_barrier(mem_flags::mem_threadgroup);  // before `needed` is written again
          continue;
        }
      }
      ms_fill<D, LD, BK, THREADS>(tile, pages, keys, first, whole, needed, key_table, int(tid));
      threadgroup_barrier(mem_flags::mem_threadgroup);
      ms_sums<R, KT> scores;
      if (active) {
        ms_clear(scores);
        MS_UNROLL for (int k = 0; k < NK; k++) {
          ms_operands<1, KT> key;
          ms_load_transposed(key, tile + (part * NK + k) * 8, LD, ushort(lane));
          ms_multiply(scores, t.q[k], key);
        }
        if (DS > 1) {
          MS_UNROLL for (int i = 0; i < R * KT; i++)
            MS_UNROLL for (int e = 0; e < 2; e++)
              partial[(int(sg) * R * KT + i) * 64 + int(lane) * 2 + e] = scores.tile[i].thread_elements()[e];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      ms_fill<DV, LD, BK, THREADS>(tile, pages, values, first, whole, needed, value_table, int(tid));
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (!whole) {
        ms_mark_broken<Tile, DV, LD, BK, THREADS>(tile, broken, int(tid));
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      if (active) {
        if (DS > 1) {  // the same sum in every part
          MS_UNROLL for (int i = 0; i < R * KT; i++)
            MS_UNROLL for (int e = 0; e < 2; e++) {
              float sum = 0.0f;
              MS_UNROLL for (int d = 0; d < DS; d++)
                sum += partial[((int(sg) - part + d) * R * KT + i) * 64 + int(lane) * 2 + e];
              scores.tile[i].thread_elements()[e] = sum;
            }
        }
        // 3. Scores become weights under a new maximum.
        ms_operands<R, KT> weights;
        MS_UNROLL for (int r = 0; r < R; r++) {
          float most = MS_NEG;
          MS_UNROLL for (int k = 0; k < KT; k++)
            MS_UNROLL for (int e = 0; e < 2; e++) {
              const int column = k * 8 + mine.y + e;
              float score = ms_capped(scores.tile[r * KT + k].thread_elements()[e], p.softcap);
              if (!whole) {
                if (!ms_sees(t.view[r], first + column)) {
                  score = MS_NEG;
                } else if (broken[column] != 0) {
                  score = ms_nan();
                }
              }
              scores.tile[r * KT + k].thread_elements()[e] = score;
              most = max(most, score);
            }
          most = max(t.m[r], ms_row_max(most));
          const float left = ms_weight(t.m[r], most);
          t.m[r] = most;
          float sum = 0.0f;
          MS_UNROLL for (int k = 0; k < KT; k++)
            MS_UNROLL for (int e = 0; e < 2; e++) {
              const float weight = ms_weight(scores.tile[r * KT + k].thread_elements()[e], most);
              weights.tile[r * KT + k].thread_elements()[e] = weight;
              sum += weight;
            }
          t.s[r] = fma(t.s[r], left, sum);
          MS_UNROLL for (int v = 0; v < NV; v++)
            MS_UNROLL for (int e = 0; e < 2; e++) t.o[v].tile[r].thread_elements()[e] *= left;
        }
        // 4. Values by their weights.
        MS_UNROLL for (int v = 0; v < NV; v++) {
          ms_operands<KT, 1> value;
          ms_load(value, tile + (part * NV + v) * 8, LD, ushort(lane));
          ms_multiply(t.o[v], weights, value);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    // 5. The rows' results; what is in rotated space goes back through the tile's memory.
    float factor[R];
    if (active) {
      MS_UNROLL for (int r = 0; r < R; r++) {
        const int g = (first_matrix_row + r * 8 + mine.x) % H;
        const float sum = ms_row_sum(t.s[r]);
        const float sink = p.has_sinks != 0 ? sinks[first_head + (g < heads ? g : 0)] : 0.0f;
        factor[r] = t.view[r].hi > 0 ? ms_last_factor(t.m[r], sum, p.has_sinks != 0, sink) : ms_nan();
      }
    }
    if (!Value::turbo) {
      if (!active) continue;
      MS_UNROLL for (int r = 0; r < R; r++) {
        const int i = first_matrix_row + r * 8 + mine.x, j = i / H, g = i % H;
        if (j >= run.rows || g >= heads) continue;
        device Out* to = out + (ulong(row0 + run.first + j) * p.num_q_heads + ulong(first_head + g)) * DV + part * NV * 8 + mine.y;
        MS_UNROLL for (int v = 0; v < NV; v++)
          MS_UNROLL for (int e = 0; e < 2; e++) ms_leave_result(to + v * 8 + e, t.o[v].tile[r].thread_elements()[e] * factor[r]);
      }
      continue;
    }
    for (int row = 0; row < run.rows * H; row += BK) {
      MS_UNROLL for (int r = 0; r < R; r++) {
        const int i = first_matrix_row + r * 8 + mine.x - row;
        if (!active || i < 0 || i >= BK) continue;
        threadgroup float* to = floats + i * LD + part * NV * 8 + mine.y;
        MS_UNROLL for (int v = 0; v < NV; v++)
          MS_UNROLL for (int e = 0; e < 2; e++) to[v * 8 + e] = t.o[v].tile[r].thread_elements()[e] * factor[r];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = row + int(sg); i < min(row + BK, run.rows * H); i += NSG) {
        const int g = i % H;
        if (g >= heads) continue;
        threadgroup float* from = floats + (i - row) * LD;
        device Out* to = out + (ulong(row0 + run.first + i / H) * p.num_q_heads + ulong(first_head + g)) * DV;
        ms_rotate_back<Value::turbo ? DV : 32>(from, ms_kv_seeds[1], lane);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int d = int(lane); d < DV; d += 32) ms_leave_result(to + d, from[d]);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}
