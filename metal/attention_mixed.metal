// Attention of several rows of a sequence together over the paged cache. Reference: kernels/attention.py. Sources:
// online softmax, arXiv 1805.02867; its tiles in threadgroup memory, arXiv 2205.14135.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "attention.h"

// A threadgroup has a tile of neighbouring rows and H query heads of one kv head. Rows of the tile that follow one
// another and have the same sequence are a run; a run's rows times H are the rows of its matrices, so that all heads of
// a run of one row share a read too. BK positions at a time go through threadgroup memory, first their keys, then their
// values: scores = q k^T and out = weights v are products of 8x8 tiles. Positions that no row of the run sees are not
// read.
//
// D, DV: elements of a key and of a value. A simdgroup has R tiles of 8 matrix rows, and of the elements of keys and
// values one of DS parts; NSG simdgroups. Rows of a sequence may come in any order; a row's bits depend on its run.

struct ms_run {
  int first;  // row of the tile
  int rows;
  int seq;
};

// What all threads know of what a run's rows see.
struct ms_span {
  int lo;          // first position that any row sees, kept ones aside
  int hi;
  int whole_lo;    // positions [whole_lo, whole_hi) are seen by all of them
  int whole_hi;
  int keep_lo;
  int keep_hi;
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
  ms_span s;
  s.lo = 0x7fffffff;
  s.hi = 0;
  s.whole_lo = 0;
  s.whole_hi = 0x7fffffff;
  s.keep_lo = 0x7fffffff;
  s.keep_hi = 0;
  for (int j = run.first; j < run.first + run.rows; j++) {
    const ms_view v = ms_view_at(views, j);
    s.whole_lo = max(s.whole_lo, v.lo);
    s.whole_hi = min(s.whole_hi, v.hi);
    if (v.hi == 0) continue;
    s.lo = min(s.lo, v.lo);
    s.hi = max(s.hi, v.hi);
    if (v.keep_lo == v.keep_hi) continue;
    s.keep_lo = min(s.keep_lo, v.keep_lo);
    s.keep_hi = max(s.keep_hi, v.keep_hi);
  }
  return s;
}

// BK positions of a plane into threadgroup memory, as they are stored; zeros where `needed` has none.
template <typename T, int W, int LD, int BK, int THREADS>
inline void ms_fill(threadgroup T* tile, ms_pages<T> pages, device const T* plane, int first, bool whole,
                    const threadgroup uint* needed, int tid) {
  for (int i = tid; i < BK * (W / 4); i += THREADS) {
    const int k = i / (W / 4), at = i % (W / 4) * 4;
    threadgroup T* to = tile + k * LD + at;
    if (whole || needed[k] != 0) {
      const vec<T, 4> four = *(device const vec<T, 4>*)(plane + ms_place(pages, first + k) * W + at);
      to[0] = four.x;
      to[1] = four.y;
      to[2] = four.z;
      to[3] = four.w;
    } else {
      MS_UNROLL for (int e = 0; e < 4; e++) to[e] = T(0.0f);
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

// Over the lanes that hold one row of a tile: their numbers differ in bits that leave ms_frag_coord's row as it is.
inline float ms_row_max(float x) {
  MS_UNROLL for (ushort bit = 1; bit < 32; bit *= 2)
    if (ms_frag_coord(bit).x == 0) x = max(x, simd_shuffle_xor(x, bit));
  return x;
}
inline float ms_row_sum(float x) {
  MS_UNROLL for (ushort bit = 1; bit < 32; bit *= 2)
    if (ms_frag_coord(bit).x == 0) x += simd_shuffle_xor(x, bit);
  return x;
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
template <typename T, int D, int DV, int H, int R, int NSG, int DS, int BK>
[[kernel, max_total_threads_per_threadgroup(NSG * 32)]] void attention_mixed(
    constant MSStep& step                [[buffer(0)]],
    device const int* positions          [[buffer(1)]],   // [num_tokens]; a row sees positions up to its own
    device const int* seq_ids            [[buffer(2)]],   // [num_tokens], row of block_tables
    device const int* block_tables       [[buffer(3)]],   // [num_seqs, max_blocks]
    device const MSSequence* sequences   [[buffer(4)]],   // [num_seqs]
    device const float* q                [[buffer(5)]],   // rows of [num_q_heads, D]
    device const T* k_plane              [[buffer(6)]],   // [block, kv_head, block_size, D]
    device const T* v_plane              [[buffer(7)]],   // [block, kv_head, block_size, DV]
    device float* out                    [[buffer(8)]],   // [num_tokens, num_q_heads, DV]
    device const float* sinks            [[buffer(9)]],   // [num_q_heads]
    constant MSGpuAttentionParams& p     [[buffer(10)]],
    uint3 at     [[threadgroup_position_in_grid]],
    uint3 grid   [[threadgroups_per_grid]],
    uint tid     [[thread_index_in_threadgroup]],
    uint sg      [[simdgroup_index_in_threadgroup]],
    uint lane    [[thread_index_in_simdgroup]]) {
  constexpr int M = NSG / DS * R * 8, TR = M / H;  // matrix rows, rows of the step
  constexpr int NK = D / 8 / DS, NV = DV / 8 / DS, KT = BK / 8;
  constexpr int LD = (D > DV ? D : DV) + 16 / int(sizeof(T));  // apart by other banks
  constexpr int THREADS = NSG * 32;
  static_assert(NSG % DS == 0 && TR >= 1 && TR <= THREADS && BK <= THREADS, "a tile of rows");
  static_assert(D % (8 * DS) == 0 && DV % (8 * DS) == 0, "parts of whole tiles");
  threadgroup T tile[BK * LD];
  threadgroup float partial[DS > 1 ? NSG * R * BK * 8 : 1];
  threadgroup int views[TR * 4];
  threadgroup int seqs[TR];
  threadgroup uint needed[BK];
  threadgroup uint broken[BK];

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
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int group = int(p.num_q_heads / p.num_kv_heads), slices = (group + H - 1) / H;
  const uint kv_head = at.x / uint(slices);
  const int first_head = int(kv_head) * group + int(at.x) % slices * H;
  const int heads = min(H, int(kv_head + 1) * group - first_head);
  const int part = int(sg) % DS, first_matrix_row = int(sg) / DS * (R * 8);
  const ushort2 mine = ms_frag_coord(ushort(lane));
  const float scale = ms_query_scale(p);

  int number = 0;
  ms_run run;
  for (run.first = 0; run.first < rows; run.first += run.rows, number++) {
    run.seq = seqs[run.first];
    run.rows = 1;
    while (run.first + run.rows < rows && seqs[run.first + run.rows] == run.seq) run.rows++;
    if (uint(number) % grid.z != at.z) continue;
    const ms_span span = ms_span_of(views, run);
    const bool active = first_matrix_row < run.rows * H;

    // 1. Queries: this simdgroup's part of its rows, scaled.
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
          t.q[k].tile[r].thread_elements()[e] = there ? from[k * 8 + e] * scale : 0.0f;
    }
    MS_UNROLL for (int v = 0; v < NV; v++) ms_clear(t.o[v]);

    // 2. Positions, BK at a time: kept ones, then those from the first row's first to the last row's own.
    device const int* table = block_tables + ulong(uint(max(run.seq, 0))) * step.max_blocks;
    const ms_pages<T> pages = ms_pages_of(k_plane, v_plane, table, kv_head, D, DV, p);
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
      ms_fill<T, D, LD, BK, THREADS>(tile, pages, pages.keys, first, whole, needed, int(tid));
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
      ms_fill<T, DV, LD, BK, THREADS>(tile, pages, pages.values, first, whole, needed, int(tid));
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (!whole) {
        ms_mark_broken<T, DV, LD, BK, THREADS>(tile, broken, int(tid));
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

    // 5. The rows' results.
    if (active) {
      MS_UNROLL for (int r = 0; r < R; r++) {
        const int i = first_matrix_row + r * 8 + mine.x, j = i / H, g = i % H;
        const bool there = j < run.rows && g < heads;
        const float sum = ms_row_sum(t.s[r]);
        const int head = first_head + (there ? g : 0);
        const float sink = p.has_sinks != 0 ? sinks[head] : 0.0f;
        const float factor = t.view[r].hi > 0 ? ms_last_factor(t.m[r], sum, p.has_sinks != 0, sink) : ms_nan();
        device float* to = out + (ulong(row0 + run.first + (there ? j : 0)) * p.num_q_heads + ulong(head)) * DV +
                           part * NV * 8 + mine.y;
        MS_UNROLL for (int v = 0; v < NV; v++)
          MS_UNROLL for (int e = 0; e < 2; e++)
            if (there) to[v * 8 + e] = t.o[v].tile[r].thread_elements()[e] * factor;
      }
    }
  }
}
