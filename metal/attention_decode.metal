// Attention of rows by themselves over the paged cache. Reference: kernels/attention.py. Sources: online softmax,
// arXiv 1805.02867; contexts in pieces, https://pytorch.org/blog/flash-decoding.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "attention.h"

// A threadgroup has one row, one piece of its context and H query heads of one kv head, which share what is read.
// D, DV: elements of a key and of a value; LPT lanes have a position together, each lane U positions at a time; NSG
// simdgroups, whose results are merged HM heads at a time.
//
// A piece is split_len of the row's visible positions, counted from the first it sees: where it is cut, and in which
// order it is summed, depends on the row alone. A row of one piece is finished here; the others' pieces are left in
// `workspace`: float32 [rows, q heads, splits, DV] of weighted values, [rows, q heads, splits, 2] of maximum and sum.

// Lanes have chunks of four elements in turn, so that lanes beside each other read what lies side by side.
template <int D, int LPT>
struct ms_chunks {
  static constant constexpr int all = D / 4;
  static constant constexpr int lane = (all + LPT - 1) / LPT;
  static constant constexpr int elements = lane * 4;
  static constant constexpr bool even = all % LPT == 0;
};

// A lane's part of H heads.
template <int H, int EK, int EV>
struct ms_heads {
  float q[H * EK];
  float o[H * EV];
  float m[H];
  float s[H];
};

// The row's own key and value where they are not read from the cache; position -1: nowhere.
template <typename T>
struct ms_newest {
  int position;
  const threadgroup T* key;
  const threadgroup T* value;
};

template <typename T, int D, int LPT>
inline void ms_read_lane(device const T* from, int l, thread float* to) {
  using Chunks = ms_chunks<D, LPT>;
  MS_UNROLL for (int c = 0; c < Chunks::lane; c++) {
    const int chunk = c * LPT + l;
    if (Chunks::even || chunk < Chunks::all) {
      ms_read4(from + chunk * 4, to + c * 4);
    } else {
      MS_UNROLL for (int e = 0; e < 4; e++) to[c * 4 + e] = 0.0f;
    }
  }
}

template <typename T, int D, int LPT>
inline void ms_copy_lane(const threadgroup T* from, int l, thread float* to) {
  using Chunks = ms_chunks<D, LPT>;
  MS_UNROLL for (int c = 0; c < Chunks::lane; c++) {
    const int chunk = c * LPT + l;
    MS_UNROLL for (int e = 0; e < 4; e++) {
      to[c * 4 + e] = Chunks::even || chunk < Chunks::all ? float(from[chunk * 4 + e]) : 0.0f;
    }
  }
}

template <typename T, int D, int LPT>
inline void ms_read_position(device const T* plane, ulong place, bool own, const threadgroup T* newest, int l,
                             thread float* to) {
  if (own) {
    ms_copy_lane<T, D, LPT>(newest, l, to);
  } else {
    ms_read_lane<T, D, LPT>(plane + place * D, l, to);
  }
}

// Visible positions [begin, end) of the row, counted from the first that it sees.
template <typename T, int D, int DV, int H, int LPT, int U, int NSG, bool NEW>
inline void ms_attend(thread ms_heads<H, ms_chunks<D, LPT>::elements, ms_chunks<DV, LPT>::elements>& t, ms_view view,
                      int begin, int end, ms_pages<T> pages, ms_newest<T> newest, float softcap, int sg, int lane) {
  constexpr int EK = ms_chunks<D, LPT>::elements, EV = ms_chunks<DV, LPT>::elements, TPS = 32 / LPT;
  const int sub = lane / LPT, l = lane % LPT, kept = view.keep_hi - view.keep_lo;
  MS_UNROLL for (int g = 0; g < H; g++) {
    t.m[g] = MS_NEG;
    t.s[g] = 0.0f;
    MS_UNROLL for (int i = 0; i < EV; i++) t.o[g * EV + i] = 0.0f;
  }
  for (int first = begin + sg * TPS * U; first < end; first += NSG * TPS * U) {
    float score[U * H];
    ulong place[U];
    bool own[U];
    MS_UNROLL for (int u = 0; u < U; u++) {
      const int j = min(first + u * TPS + sub, end - 1);  // behind the end the last one again, without a weight
      const int position = j < kept ? view.keep_lo + j : view.lo + (j - kept);
      own[u] = NEW && position == newest.position;
      place[u] = ms_place(pages, position);
      float key[EK];
      ms_read_position<T, D, LPT>(pages.keys, place[u], own[u], newest.key, l, key);
      MS_UNROLL for (int g = 0; g < H; g++) {
        float sum = 0.0f;
        MS_UNROLL for (int i = 0; i < EK; i++) sum = fma(key[i], t.q[g * EK + i], sum);
        score[u * H + g] = sum;
      }
    }
    MS_UNROLL for (int u = 0; u < U; u++) {
      const bool there = first + u * TPS + sub < end;
      MS_UNROLL for (int g = 0; g < H; g++) {
        float sum = score[u * H + g];
        MS_UNROLL for (int d = LPT / 2; d > 0; d /= 2) sum += simd_shuffle_xor(sum, ushort(d));
        score[u * H + g] = there ? ms_capped(sum, softcap) : MS_NEG;
      }
    }
    MS_UNROLL for (int g = 0; g < H; g++) {
      float most = t.m[g];
      MS_UNROLL for (int u = 0; u < U; u++) most = max(most, score[u * H + g]);
      const float left = ms_weight(t.m[g], most);
      t.m[g] = most;
      float sum = 0.0f;
      MS_UNROLL for (int u = 0; u < U; u++) {
        score[u * H + g] = ms_weight(score[u * H + g], most);
        sum += score[u * H + g];
      }
      t.s[g] = fma(t.s[g], left, sum);
      MS_UNROLL for (int i = 0; i < EV; i++) t.o[g * EV + i] *= left;
    }
    MS_UNROLL for (int u = 0; u < U; u++) {
      float value[EV];
      ms_read_position<T, DV, LPT>(pages.values, place[u], own[u], newest.value, l, value);
      MS_UNROLL for (int g = 0; g < H; g++) {
        MS_UNROLL for (int i = 0; i < EV; i++) {
          t.o[g * EV + i] = fma(score[u * H + g], value[i], t.o[g * EV + i]);
        }
      }
    }
  }
}

// What simdgroups leave for the threadgroup: HM heads' sums.
template <int DV, int HM, int NSG>
struct ms_shared {
  threadgroup float* o;  // [NSG, HM, DV]
  threadgroup float* m;  // [NSG, HM]
  threadgroup float* s;  // [NSG, HM]
};

// One result of what the lanes of a simdgroup that have different positions hold, of heads [first, first + HM).
template <int DV, int H, int HM, int LPT, int NSG, int EK, int EV>
inline void ms_merge_lanes(thread ms_heads<H, EK, EV>& t, int first, ms_shared<DV, HM, NSG> all, int sg, int lane) {
  using Chunks = ms_chunks<DV, LPT>;
  const int sub = lane / LPT, l = lane % LPT;
  MS_UNROLL for (int i = 0; i < HM; i++) {
    const int g = first + i;
    if (g >= H) break;
    float most = t.m[g];
    MS_UNROLL for (int d = LPT; d < 32; d *= 2) most = max(most, simd_shuffle_xor(most, ushort(d)));
    const float left = ms_weight(t.m[g], most);
    float sum = t.s[g] * left;
    MS_UNROLL for (int d = LPT; d < 32; d *= 2) sum += simd_shuffle_xor(sum, ushort(d));
    MS_UNROLL for (int e = 0; e < EV; e++) {
      t.o[g * EV + e] *= left;
      MS_UNROLL for (int d = LPT; d < 32; d *= 2) t.o[g * EV + e] += simd_shuffle_xor(t.o[g * EV + e], ushort(d));
    }
    if (sub == 0) {
      MS_UNROLL for (int c = 0; c < Chunks::lane; c++) {
        const int chunk = c * LPT + l;
        if (Chunks::even || chunk < Chunks::all) {
          MS_UNROLL for (int e = 0; e < 4; e++) all.o[(sg * HM + i) * DV + chunk * 4 + e] = t.o[g * EV + c * 4 + e];
        }
      }
      if (l == 0) {
        all.m[sg * HM + i] = most;
        all.s[sg * HM + i] = sum;
      }
    }
  }
}

// Where a threadgroup's results go.
struct ms_target {
  ulong row;
  int first_head;  // of H
  int heads;       // how many of them exist
  int piece;
  int pieces;      // of the row; 1: the result is final
};

// One result of what the simdgroups hold of heads [first, first + HM), written out.
template <int DV, int HM, int NSG>
inline void ms_merge_simdgroups(ms_shared<DV, HM, NSG> all, int first, ms_target to, uint rows, device float* out,
                                device const float* sinks, device float* workspace, constant MSGpuAttentionParams& p,
                                int tid) {
  for (int i = tid; i < min(HM, to.heads - first) * DV; i += NSG * 32) {
    const int g = i / DV, d = i % DV;
    float most = MS_NEG;
    MS_UNROLL for (int j = 0; j < NSG; j++) most = max(most, all.m[j * HM + g]);
    float sum = 0.0f, value = 0.0f;
    MS_UNROLL for (int j = 0; j < NSG; j++) {
      const float left = ms_weight(all.m[j * HM + g], most);
      sum = fma(all.s[j * HM + g], left, sum);
      value = fma(all.o[(j * HM + g) * DV + d], left, value);
    }
    const int in_model = to.first_head + first + g;
    const ulong head = to.row * p.num_q_heads + ulong(in_model);
    if (to.pieces == 1) {
      const float sink = p.has_sinks != 0 ? sinks[in_model] : 0.0f;
      out[head * DV + d] = value * ms_last_factor(most, sum, p.has_sinks != 0, sink);
      continue;
    }
    const ulong part = head * p.splits + ulong(to.piece);
    workspace[part * DV + d] = value;
    if (d == 0) {
      device float* sums = workspace + ulong(rows) * p.num_q_heads * p.splits * DV;
      sums[part * 2] = most;
      sums[part * 2 + 1] = sum;
    }
  }
}

// All that a threadgroup's simdgroups hold, written out; every thread comes here.
template <int DV, int H, int HM, int LPT, int NSG, int EK, int EV>
inline void ms_merge(thread ms_heads<H, EK, EV>& t, ms_shared<DV, HM, NSG> all, ms_target to, uint rows,
                     device float* out, device const float* sinks, device float* workspace,
                     constant MSGpuAttentionParams& p, int tid, int sg, int lane) {
  MS_UNROLL for (int first = 0; first < H; first += HM) {
    if (first > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    ms_merge_lanes<DV, H, HM, LPT, NSG, EK, EV>(t, first, all, sg, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ms_merge_simdgroups<DV, HM, NSG>(all, first, to, rows, out, sinks, workspace, p, tid);
  }
}

// Pieces of what a row sees.
inline int ms_pieces(int seen, constant MSGpuAttentionParams& p) {
  const int pieces = (seen + int(p.split_len) - 1) / int(p.split_len);
  return max(1, min(pieces, int(p.splits)));
}

// How a threadgroup finds its work: heads in slices of H, so that H is the same for all of them.
template <int H>
inline ms_target ms_target_of(uint3 at, ms_view view, constant MSGpuAttentionParams& p) {
  const int group = int(p.num_q_heads / p.num_kv_heads), slices = (group + H - 1) / H;
  const int first = int(at.x) % slices * H;
  ms_target to;
  to.row = at.z;
  to.first_head = int(at.x) / slices * group + first;
  to.heads = min(H, group - first);
  to.piece = int(at.y);
  to.pieces = ms_pieces(ms_seen(view), p);
  return to;
}

template <int DV, int NSG>
inline void ms_fill_nan(ms_target to, device float* out, constant MSGpuAttentionParams& p, int tid) {
  device float* row = out + (to.row * p.num_q_heads + ulong(to.first_head)) * DV;
  for (int i = tid; i < to.heads * DV; i += NSG * 32) row[i] = ms_nan();
}

// Grid: [kv heads * slices, splits, rows].
template <typename T, int D, int DV, int H, int LPT, int U, int NSG, int HM>
[[kernel, max_total_threads_per_threadgroup(NSG * 32)]] void attention_decode(
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
    device float* workspace              [[buffer(10)]],
    constant MSGpuAttentionParams& p     [[buffer(11)]],
    uint3 at     [[threadgroup_position_in_grid]],
    uint3 grid   [[threadgroups_per_grid]],
    uint tid     [[thread_index_in_threadgroup]],
    uint sg      [[simdgroup_index_in_threadgroup]],
    uint lane    [[thread_index_in_simdgroup]]) {
  constexpr int EK = ms_chunks<D, LPT>::elements, EV = ms_chunks<DV, LPT>::elements;
  threadgroup float all_o[NSG * HM * DV];
  threadgroup float all_m[NSG * HM];
  threadgroup float all_s[NSG * HM];
  if (at.z >= step.num_tokens) return;
  const int seq = seq_ids[at.z], l = int(lane) % LPT;
  const ms_view view = ms_view_of(positions[at.z], seq, step, sequences, p);
  const ms_target to = ms_target_of<H>(at, view, p);
  const int seen = ms_seen(view);
  if (to.piece >= to.pieces) return;
  if (seen == 0) {
    ms_fill_nan<DV, NSG>(to, out, p, int(tid));
    return;
  }
  const uint kv_head = uint(to.first_head) / (p.num_q_heads / p.num_kv_heads);
  device const int* table = block_tables + ulong(seq) * step.max_blocks;
  ms_heads<H, EK, EV> t;
  const float scale = ms_query_scale(p);
  MS_UNROLL for (int g = 0; g < H; g++) {
    const int head = to.first_head + min(g, to.heads - 1);  // where there is none another's, which is not written
    ms_read_lane<float, D, LPT>(q + p.q_offset + to.row * p.q_row_stride + ulong(head) * D, l, t.q + g * EK);
    MS_UNROLL for (int i = 0; i < EK; i++) t.q[g * EK + i] *= scale;
  }
  ms_newest<T> none;
  none.position = -1;
  none.key = nullptr;
  none.value = nullptr;
  const int begin = to.piece * int(p.split_len);
  const int end = to.piece == to.pieces - 1 ? seen : begin + int(p.split_len);
  const ms_pages<T> pages = ms_pages_of(k_plane, v_plane, table, kv_head, D, DV, p);
  ms_attend<T, D, DV, H, LPT, U, NSG, false>(t, view, begin, end, pages, none, p.softcap, int(sg), int(lane));
  ms_shared<DV, HM, NSG> all;
  all.o = all_o;
  all.m = all_m;
  all.s = all_s;
  ms_merge<DV, H, HM, LPT, NSG, EK, EV>(t, all, to, grid.z, out, sinks, workspace, p, int(tid), int(sg), int(lane));
}

// Element i of a head that `inverse` norms, and angles rotate, where there are any.
inline float ms_prepared(device const float* x, int i, float inverse, device const float* weight, bool weighted,
                         device const float* angles, constant MSGpuAttentionParams& p) {
  const float own = weighted ? x[i] * inverse * weight[i] : x[i] * inverse;
  const int dims = int(p.rope_dims), half_dims = dims / 2;
  if (i >= dims) return own;
  const bool second = p.traditional != 0 ? (i & 1) != 0 : i >= half_dims;
  const int pair = p.traditional != 0 ? i ^ 1 : (second ? i - half_dims : i + half_dims);
  const int angle = p.traditional != 0 ? i / 2 : (second ? i - half_dims : i);
  const float other = weighted ? x[pair] * inverse * weight[pair] : x[pair] * inverse;
  const float c = angles[angle], s = angles[half_dims + angle];
  return second ? fma(other, s, own * c) : fma(own, c, -(other * s));
}

// What a head's elements are multiplied by, by all lanes of a simdgroup.
template <int D>
inline float ms_norm_scale(device const float* x, uint norm, float eps, int lane) {
  float sum = 0.0f;
  for (int i = lane; i < D; i += 32) sum = fma(x[i], x[i], sum);
  sum = simd_sum(sum);
  return norm != MS_HEAD_NORM_NONE ? precise::rsqrt(sum / float(D) + eps) : 1.0f;
}

// Every row is the newest of its own sequence: its queries and keys are normed and rotated here, and its keys and
// values written where slot_mapping says. They are seen as the cache holds them, but without reading it: no threadgroup
// waits for another. A row whose slot is negative sees its own keys and values too.
template <typename T, int D, int DV, int H, int LPT, int U, int NSG, int HM>
[[kernel, max_total_threads_per_threadgroup(NSG * 32)]] void attention_decode_inside(
    constant MSStep& step                [[buffer(0)]],
    device const int* positions          [[buffer(1)]],
    device const int* seq_ids            [[buffer(2)]],
    device const int* block_tables       [[buffer(3)]],
    device const MSSequence* sequences   [[buffer(4)]],
    device const float* q                [[buffer(5)]],
    device T* k_plane                    [[buffer(6)]],
    device T* v_plane                    [[buffer(7)]],
    device float* out                    [[buffer(8)]],
    device const float* sinks            [[buffer(9)]],
    device float* workspace              [[buffer(10)]],
    device const int* slot_mapping       [[buffer(11)]],  // [num_tokens]; negative: not written
    device const float* angles           [[buffer(12)]],  // [num_tokens, rope_dims], cosines then sines
    device const float* new_k            [[buffer(13)]],  // rows of [num_kv_heads, D]
    device const float* new_v            [[buffer(14)]],  // rows of [num_kv_heads, DV]
    device const float* q_weight         [[buffer(15)]],  // [D]
    device const float* k_weight         [[buffer(16)]],  // [D]
    constant MSGpuAttentionParams& p     [[buffer(17)]],
    uint3 at     [[threadgroup_position_in_grid]],
    uint3 grid   [[threadgroups_per_grid]],
    uint tid     [[thread_index_in_threadgroup]],
    uint sg      [[simdgroup_index_in_threadgroup]],
    uint lane    [[thread_index_in_simdgroup]]) {
  constexpr int EK = ms_chunks<D, LPT>::elements, EV = ms_chunks<DV, LPT>::elements;
  threadgroup float all_o[NSG * HM * DV];
  threadgroup float all_m[NSG * HM];
  threadgroup float all_s[NSG * HM];
  threadgroup float queries[H * D];
  threadgroup T key[D];
  threadgroup T value[DV];
  if (at.z >= step.num_tokens) return;
  const int seq = seq_ids[at.z], l = int(lane) % LPT;
  const ms_view view = ms_view_of(positions[at.z], seq, step, sequences, p);
  const ms_target to = ms_target_of<H>(at, view, p);
  const int seen = ms_seen(view);
  if (to.piece >= to.pieces) return;
  const uint group = p.num_q_heads / p.num_kv_heads, kv_head = uint(to.first_head) / group;
  device const float* row_angles = angles + to.row * p.rope_dims;
  const bool newest_here = to.piece == to.pieces - 1;

  // 1. Query heads, the key and the value: a simdgroup each, in turn.
  const int slot = slot_mapping[at.z];
  const bool writes = newest_here && slot >= 0 && uint(to.first_head) == kv_head * group;
  const uint in_cache = uint(max(slot, 0)), in_block = in_cache & ((1u << p.block_shift) - 1);
  const ulong block = in_cache >> p.block_shift;
  const ulong place = ((block * p.num_kv_heads + kv_head) << p.block_shift) + in_block;
  const int tasks = newest_here ? to.heads + 2 : to.heads;
  for (int task = int(sg); task < tasks; task += NSG) {
    if (task < to.heads) {
      device const float* x = q + p.q_offset + to.row * p.q_row_stride + ulong(to.first_head + task) * D;
      const float inverse = ms_norm_scale<D>(x, p.q_norm, p.q_eps, int(lane)), scale = ms_query_scale(p);
      const bool weighted = p.q_norm == MS_HEAD_NORM_WEIGHT;
      for (int i = int(lane); i < D; i += 32)
        queries[task * D + i] = ms_prepared(x, i, inverse, q_weight, weighted, row_angles, p) * scale;
    } else if (task == to.heads) {
      device const float* x = new_k + p.k_offset + to.row * p.k_row_stride + ulong(kv_head) * D;
      const float inverse = ms_norm_scale<D>(x, p.k_norm, p.k_eps, int(lane));
      const bool weighted = p.k_norm == MS_HEAD_NORM_WEIGHT;
      for (int i = int(lane); i < D; i += 32) {
        key[i] = T(ms_prepared(x, i, inverse, k_weight, weighted, row_angles, p));
        if (writes) k_plane[place * D + i] = key[i];
      }
    } else {
      device const float* x = new_v + p.v_offset + to.row * p.v_row_stride + ulong(kv_head) * DV;
      for (int i = int(lane); i < DV; i += 32) {
        value[i] = T(x[i]);
        if (writes) v_plane[place * DV + i] = value[i];
      }
    }
  }
  if (seen == 0) {
    ms_fill_nan<DV, NSG>(to, out, p, int(tid));
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 2. The piece.
  device const int* table = block_tables + ulong(seq) * step.max_blocks;
  ms_heads<H, EK, EV> t;
  MS_UNROLL for (int g = 0; g < H; g++)
    ms_copy_lane<float, D, LPT>(queries + min(g, to.heads - 1) * D, l, t.q + g * EK);
  ms_newest<T> newest;
  newest.position = view.hi - 1;
  newest.key = key;
  newest.value = value;
  const int begin = to.piece * int(p.split_len);
  const int end = newest_here ? seen : begin + int(p.split_len);
  device const T* keys = k_plane;
  device const T* values = v_plane;
  const ms_pages<T> pages = ms_pages_of(keys, values, table, kv_head, D, DV, p);
  ms_attend<T, D, DV, H, LPT, U, NSG, true>(t, view, begin, end, pages, newest, p.softcap, int(sg), int(lane));
  ms_shared<DV, HM, NSG> all;
  all.o = all_o;
  all.m = all_m;
  all.s = all_s;
  ms_merge<DV, H, HM, LPT, NSG, EK, EV>(t, all, to, grid.z, out, sinks, workspace, p, int(tid), int(sg), int(lane));
}

// One result of the pieces of a row and query head; rows of one piece have theirs already. Grid: [q heads, rows]; a
// thread for each of DV elements.
template <int DV>
[[kernel, max_total_threads_per_threadgroup((DV + 31) / 32 * 32)]] void attention_reduce(
    constant MSStep& step                [[buffer(0)]],
    device const int* positions          [[buffer(1)]],
    device const int* seq_ids            [[buffer(2)]],
    device const MSSequence* sequences   [[buffer(3)]],
    device const float* workspace        [[buffer(4)]],
    device const float* sinks            [[buffer(5)]],
    device float* out                    [[buffer(6)]],
    constant MSGpuAttentionParams& p     [[buffer(7)]],
    uint3 at     [[threadgroup_position_in_grid]],
    uint3 grid   [[threadgroups_per_grid]],
    uint tid     [[thread_index_in_threadgroup]],
    uint lane    [[thread_index_in_simdgroup]]) {
  if (at.y >= step.num_tokens) return;
  const int seen = ms_seen(ms_view_of(positions[at.y], seq_ids[at.y], step, sequences, p));
  const int pieces = ms_pieces(seen, p);
  if (pieces == 1) return;
  const ulong head = ulong(at.y) * p.num_q_heads + at.x;
  device const float* values = workspace + head * p.splits * DV;
  device const float* sums = workspace + (ulong(grid.y) * p.num_q_heads * DV + head * 2) * p.splits;
  const bool has_element = int(tid) < DV;
  float most = MS_NEG;
  for (int i = int(lane); i < pieces; i += 32) most = max(most, sums[i * 2]);
  most = simd_max(most);
  float sum = 0.0f, value = 0.0f;
  for (int first = 0; first < pieces; first += 32) {
    const int i = first + int(lane);
    const float left = i < pieces ? ms_weight(sums[i * 2], most) : 0.0f;
    sum = fma(i < pieces ? sums[i * 2 + 1] : 0.0f, left, sum);
    for (int j = first; j < min(pieces, first + 32); j++) {
      const float factor = simd_shuffle(left, ushort(j - first));
      if (has_element) value = fma(values[ulong(j) * DV + tid], factor, value);
    }
  }
  sum = simd_sum(sum);
  const float sink = p.has_sinks != 0 ? sinks[at.x] : 0.0f;
  if (has_element) out[head * DV + tid] = value * ms_last_factor(most, sum, p.has_sinks != 0, sink);
}
