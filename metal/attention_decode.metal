// Attention of rows by themselves over the paged cache. Reference: kernels/attention.py. Sources: online softmax,
// arXiv 1805.02867; contexts in pieces, https://pytorch.org/blog/flash-decoding.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "kv_codec.h"
#include "attention.h"
#include "attention_planes.h"

// A threadgroup has one row, one piece of its context and H query heads of one kv head, which share what is read.
// D, DV: elements of a key and of a value; LPT lanes have a position together, each lane U positions at a time; NSG
// simdgroups, whose results are merged HM heads at a time. T: see ms_planes. Packed keys and values are unpacked in registers;
// where they are in rotated space, each query head is rotated before, and its result back, once.
//
// A piece is split_len of the row's visible positions, counted from the first it sees: where it is cut, and in which
// order it is summed, depends on the row alone. A row of one piece is finished here; the others' pieces are left in
// `workspace`: float32 [rows, q heads, splits, DV] of weighted values, [rows, q heads, splits, 2] of maximum and sum.

// Lanes have chunks of four elements in turn, so that lanes beside each other read what lies side by side. RUN: of packed elements each
// has one run of them, which are few words.
template <int D, int LPT, bool RUN>
struct ms_chunks {
  static constant constexpr int all = D / 4;
  static constant constexpr int lane = (all + LPT - 1) / LPT;
  static constant constexpr int elements = lane * 4;
  static constant constexpr bool even = all % LPT == 0;
  static inline int at(int c, int l) { return RUN ? l * lane + c : c * LPT + l; }
};

// A lane's part of H heads.
template <int H, int EK, int EV>
struct ms_heads {
  float q[H * EK];
  float o[H * EV];
  float m[H];
  float s[H];
};

// The row's own key and value where they are not read from the cache; position -1: nowhere. As ms_read_lane would have them.
template <typename T>
struct ms_newest {
  int position;
  const threadgroup typename ms_codec<typename ms_cache<T>::key>::unpacked* key;
  const threadgroup typename ms_codec<typename ms_cache<T>::value>::unpacked* value;
  const threadgroup float* scales;  // of the key and of the value
};

template <typename T, int D, int LPT, bool RUN>
inline void ms_read_floats(device const T* from, int l, thread float* to) {
  using Chunks = ms_chunks<D, LPT, RUN>;
  MS_UNROLL for (int c = 0; c < Chunks::lane; c++) {
    const int chunk = Chunks::at(c, l);
    if (Chunks::even || chunk < Chunks::all) {
      ms_read4(from + chunk * 4, to + c * 4);
    } else {
      MS_UNROLL for (int e = 0; e < 4; e++) to[c * 4 + e] = 0.0f;
    }
  }
}

template <typename T, int D, int LPT, bool RUN>
inline void ms_copy_floats(const threadgroup T* from, int l, thread float* to) {
  using Chunks = ms_chunks<D, LPT, RUN>;
  MS_UNROLL for (int c = 0; c < Chunks::lane; c++) {
    const int chunk = Chunks::at(c, l);
    MS_UNROLL for (int e = 0; e < 4; e++) {
      to[c * 4 + e] = Chunks::even || chunk < Chunks::all ? float(from[chunk * 4 + e]) : 0.0f;
    }
  }
}

// A lane's elements of the vector at `place`; what they are still to be multiplied by.
template <int D, int LPT, typename C>
inline float ms_read_lane(ms_plane<C> plane, ulong place, uint block_shift, int l, const threadgroup float* table,
                          thread float* to) {
  ms_read_floats<C, D, LPT, false>(plane.codes + place * D, l, to);
  return 1.0f;
}
template <int D, int LPT, int CODEC>
inline float ms_read_lane(ms_plane<ms_packed<CODEC>> plane, ulong place, uint block_shift, int l, const threadgroup float* table,
                          thread float* to) {
  using Chunks = ms_chunks<D, LPT, true>;
  return ms_unpack<D, Chunks::elements, !Chunks::even>(plane, place, block_shift, l * Chunks::elements, table, to);
}

// What all lanes read from: the planes, and what the codes of turbo codecs stand for.
template <typename T>
struct ms_source {
  ms_pages pages;
  ms_plane<typename ms_cache<T>::key> keys;
  ms_plane<typename ms_cache<T>::value> values;
  const threadgroup float* key_table;
  const threadgroup float* value_table;
};

// Which codecs a cache has, for vectors of D and DV elements, and how lanes divide them.
template <typename T, int D, int DV, int LPT>
struct ms_parts {
  using key = ms_layout<typename ms_cache<T>::key, D>;
  using value = ms_layout<typename ms_cache<T>::value, DV>;
  using key_chunks = ms_chunks<D, LPT, key::packed>;
  using value_chunks = ms_chunks<DV, LPT, value::packed>;
};

// Visible positions [begin, end) of the row, counted from the first that it sees.
template <typename T, int D, int DV, int H, int LPT, int U, int NSG, bool NEW, int EK, int EV>
inline void ms_attend(thread ms_heads<H, EK, EV>& t, ms_view view, int begin, int end, ms_source<T> from,
                      ms_newest<T> newest, float softcap, int sg, int lane) {
  using Parts = ms_parts<T, D, DV, LPT>;
  using Key = typename ms_codec<typename ms_cache<T>::key>::unpacked;
  using Value = typename ms_codec<typename ms_cache<T>::value>::unpacked;
  constexpr int TPS = 32 / LPT;
  const int sub = lane / LPT, l = lane % LPT, kept = view.keep_hi - view.keep_lo;
  const uint shift = from.pages.shift;
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
      place[u] = ms_place(from.pages, position);
      float key[EK], scale = 1.0f;
      if (own[u]) {
        ms_copy_floats<Key, D, LPT, Parts::key::packed>(newest.key, l, key);
        if (Parts::key::turbo) scale = newest.scales[0];
      } else {
        scale = ms_read_lane<D, LPT>(from.keys, place[u], shift, l, from.key_table, key);
      }
      MS_UNROLL for (int g = 0; g < H; g++) {
        float sum = 0.0f;
        MS_UNROLL for (int i = 0; i < EK; i++) sum = fma(key[i], t.q[g * EK + i], sum);
        score[u * H + g] = Parts::key::turbo ? sum * scale : sum;
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
      float value[EV], scale = 1.0f;
      if (own[u]) {
        ms_copy_floats<Value, DV, LPT, Parts::value::packed>(newest.value, l, value);
        if (Parts::value::turbo) scale = newest.scales[1];
      } else {
        scale = ms_read_lane<DV, LPT>(from.values, place[u], shift, l, from.value_table, value);
      }
      MS_UNROLL for (int g = 0; g < H; g++) {
        const float weight = Parts::value::turbo ? score[u * H + g] * scale : score[u * H + g];
        MS_UNROLL for (int i = 0; i < EV; i++) t.o[g * EV + i] = fma(weight, value[i], t.o[g * EV + i]);
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
template <typename Chunks, int DV, int H, int HM, int LPT, int NSG, int EK, int EV>
inline void ms_merge_lanes(thread ms_heads<H, EK, EV>& t, int first, ms_shared<DV, HM, NSG> all, int sg, int lane) {
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
        const int chunk = Chunks::at(c, l);
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

// One result of what the simdgroups hold of heads [first, first + HM), written out. BACK: what is final is rotated back before.
template <int DV, int HM, int NSG, bool BACK>
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
      const float result = value * ms_last_factor(most, sum, p.has_sinks != 0, sink);
      if (BACK) {
        all.o[g * DV + d] = result;  // which this thread alone has read
      } else {
        out[head * DV + d] = result;
      }
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
  if (!BACK || to.pieces != 1) return;
  constexpr int BACK_DIM = BACK ? DV : 32;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int g = tid / 32; g < min(HM, to.heads - first); g += NSG) {
    device float* row = out + (to.row * p.num_q_heads + ulong(to.first_head + first + g)) * DV;
    ms_rotate_back<BACK_DIM>(all.o + g * DV, ms_kv_seeds[1], uint(tid % 32));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = tid % 32; d < DV; d += 32) row[d] = all.o[g * DV + d];
  }
}

// All that a threadgroup's simdgroups hold, written out; every thread comes here.
template <typename Parts, int DV, int H, int HM, int LPT, int NSG, int EK, int EV>
inline void ms_merge(thread ms_heads<H, EK, EV>& t, ms_shared<DV, HM, NSG> all, ms_target to, uint rows,
                     device float* out, device const float* sinks, device float* workspace,
                     constant MSGpuAttentionParams& p, int tid, int sg, int lane) {
  MS_UNROLL for (int first = 0; first < H; first += HM) {
    if (first > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    ms_merge_lanes<typename Parts::value_chunks, DV, H, HM, LPT, NSG, EK, EV>(t, first, all, sg, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ms_merge_simdgroups<DV, HM, NSG, Parts::value::turbo>(all, first, to, rows, out, sinks, workspace, p, tid);
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
    device const typename ms_codec<typename ms_cache<T>::key>::stored* k_plane    [[buffer(6)]],  // [block, kv_head, block_size, D]
    device const typename ms_codec<typename ms_cache<T>::value>::stored* v_plane  [[buffer(7)]],  // [block, kv_head, block_size, DV]
    device float* out                    [[buffer(8)]],   // [num_tokens, num_q_heads, DV]
    device const float* sinks            [[buffer(9)]],   // [num_q_heads]
    device float* workspace              [[buffer(10)]],
    constant MSGpuAttentionParams& p     [[buffer(11)]],
    uint3 at     [[threadgroup_position_in_grid]],
    uint3 grid   [[threadgroups_per_grid]],
    uint tid     [[thread_index_in_threadgroup]],
    uint sg      [[simdgroup_index_in_threadgroup]],
    uint lane    [[thread_index_in_simdgroup]]) {
  using Parts = ms_parts<T, D, DV, LPT>;
  constexpr int EK = Parts::key_chunks::elements, EV = Parts::value_chunks::elements;
  constexpr int ROTATED = Parts::key::turbo ? D : 32;
  threadgroup float all_o[NSG * HM * DV];
  threadgroup float all_m[NSG * HM];
  threadgroup float all_s[NSG * HM];
  threadgroup float queries[Parts::key::turbo ? H * D : 1];
  threadgroup float key_table[Parts::key::table];
  threadgroup float value_table[Parts::value::table];
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
  device const float* heads = q + p.q_offset + to.row * p.q_row_stride + ulong(to.first_head) * D;
  if (Parts::key::turbo || Parts::value::turbo) {
    ms_fill_table<typename ms_cache<T>::key, D>(key_table, int(tid));
    ms_fill_table<typename ms_cache<T>::value, DV>(value_table, int(tid));
    for (int g = int(sg); Parts::key::turbo && g < to.heads; g += NSG) {
      for (int i = int(lane); i < D; i += 32) queries[g * D + i] = heads[g * D + i] * scale;
      ms_rotate<ROTATED>(queries + g * D, ms_kv_seeds[0], lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  MS_UNROLL for (int g = 0; g < H; g++) {
    const int head = min(g, to.heads - 1);  // where there is none another's, which is not written
    if (Parts::key::turbo) {
      ms_copy_floats<float, D, LPT, true>(queries + head * D, l, t.q + g * EK);
      continue;
    }
    ms_read_floats<float, D, LPT, Parts::key::packed>(heads + ulong(head) * D, l, t.q + g * EK);
    MS_UNROLL for (int i = 0; i < EK; i++) t.q[g * EK + i] *= scale;
  }
  ms_newest<T> none;
  none.position = -1;
  none.key = nullptr;
  none.value = nullptr;
  none.scales = nullptr;
  const int begin = to.piece * int(p.split_len);
  const int end = to.piece == to.pieces - 1 ? seen : begin + int(p.split_len);
  ms_source<T> from;
  from.pages = ms_pages_of(table, p);
  from.keys = ms_plane_of<typename ms_cache<T>::key, D>(k_plane, p.k_scales, kv_head, p.block_shift);
  from.values = ms_plane_of<typename ms_cache<T>::value, DV>(v_plane, p.v_scales, kv_head, p.block_shift);
  from.key_table = key_table;
  from.value_table = value_table;
  ms_attend<T, D, DV, H, LPT, U, NSG, false>(t, view, begin, end, from, none, p.softcap, int(sg), int(lane));
  ms_shared<DV, HM, NSG> all;
  all.o = all_o;
  all.m = all_m;
  all.s = all_s;
  ms_merge<Parts, DV, H, HM, LPT, NSG>(t, all, to, grid.z, out, sinks, workspace, p, int(tid), int(sg), int(lane));
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

// Where a vector is written.
struct ms_slot {
  ulong head;  // block * kv heads + kv head
  uint place;  // in the block
  uint shift;  // log2 of the positions in a block
};

// A plane that is written.
template <typename C>
struct ms_stored {
  device typename ms_codec<C>::stored* plane;
  uint scales;  // 4-byte words before its scales
};

template <typename C>
inline ms_stored<C> ms_stored_at(device typename ms_codec<C>::stored* plane, uint scales) {
  ms_stored<C> to;
  to.plane = plane;
  to.scales = scales;
  return to;
}

// A new vector into the plane if `writes`, and x to what ms_read_lane would have of it there; what that is still to be multiplied by. By
// one simdgroup; lane i % 32 has written element i. WHICH: 0 for keys, 1 for values.
template <int D, int SCALE, int WHICH, typename C>
inline float ms_store(ms_stored<C> to, threadgroup C* x, ms_slot slot, bool writes, uint lane) {
  const ulong vector = (slot.head << slot.shift) + slot.place;
  for (int i = int(lane); writes && i < D; i += 32) to.plane[vector * D + i] = x[i];
  return 1.0f;
}
template <int D, int SCALE, int WHICH, int CODEC>
inline float ms_store(ms_stored<ms_packed<CODEC>> to, threadgroup float* x, ms_slot slot, bool writes, uint lane) {
  return ms_encode<CODEC, SCALE, D, true>(x, ms_kv_seeds[WHICH], to.plane, to.scales, slot.head, 1u << slot.shift, slot.place,
                                          lane, writes);
}

// Every row is the newest of its own sequence: its queries and keys are normed and rotated here, and its keys and
// values written where slot_mapping says. They are seen as the cache holds them, but without reading it: no threadgroup
// waits for another. A row whose slot is negative sees its own keys and values too.
// SCALES: of turbo codecs, ms_kv_scale of keys + 4 * that of values.
template <typename T, int D, int DV, int H, int LPT, int U, int NSG, int HM, int SCALES = 0>
[[kernel, max_total_threads_per_threadgroup(NSG * 32)]] void attention_decode_inside(
    constant MSStep& step                [[buffer(0)]],
    device const int* positions          [[buffer(1)]],
    device const int* seq_ids            [[buffer(2)]],
    device const int* block_tables       [[buffer(3)]],
    device const MSSequence* sequences   [[buffer(4)]],
    device const float* q                [[buffer(5)]],
    device typename ms_codec<typename ms_cache<T>::key>::stored* k_plane    [[buffer(6)]],
    device typename ms_codec<typename ms_cache<T>::value>::stored* v_plane  [[buffer(7)]],
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
  using Parts = ms_parts<T, D, DV, LPT>;
  using Key = typename ms_cache<T>::key;
  using Value = typename ms_cache<T>::value;
  constexpr int EK = Parts::key_chunks::elements, EV = Parts::value_chunks::elements;
  constexpr int ROTATED = Parts::key::turbo ? D : 32;
  threadgroup float all_o[NSG * HM * DV];
  threadgroup float all_m[NSG * HM];
  threadgroup float all_s[NSG * HM];
  threadgroup float queries[H * D];
  threadgroup typename ms_codec<Key>::unpacked key[D];
  threadgroup typename ms_codec<Value>::unpacked value[DV];
  threadgroup float scales[2];
  threadgroup float key_table[Parts::key::table];
  threadgroup float value_table[Parts::value::table];
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
  const uint in_cache = uint(max(slot, 0));
  ms_slot where;
  where.head = ulong(in_cache >> p.block_shift) * p.num_kv_heads + kv_head;
  where.place = in_cache & ((1u << p.block_shift) - 1);
  where.shift = p.block_shift;
  const int tasks = newest_here ? to.heads + 2 : to.heads;
  ms_fill_table<Key, D>(key_table, int(tid));
  ms_fill_table<Value, DV>(value_table, int(tid));
  for (int task = int(sg); task < tasks; task += NSG) {
    if (task < to.heads) {
      device const float* x = q + p.q_offset + to.row * p.q_row_stride + ulong(to.first_head + task) * D;
      const float inverse = ms_norm_scale<D>(x, p.q_norm, p.q_eps, int(lane)), scale = ms_query_scale(p);
      const bool weighted = p.q_norm == MS_HEAD_NORM_WEIGHT;
      for (int i = int(lane); i < D; i += 32)
        queries[task * D + i] = ms_prepared(x, i, inverse, q_weight, weighted, row_angles, p) * scale;
      if (Parts::key::turbo) ms_rotate<ROTATED>(queries + task * D, ms_kv_seeds[0], lane);
    } else if (task == to.heads) {
      device const float* x = new_k + p.k_offset + to.row * p.k_row_stride + ulong(kv_head) * D;
      const float inverse = ms_norm_scale<D>(x, p.k_norm, p.k_eps, int(lane));
      const bool weighted = p.k_norm == MS_HEAD_NORM_WEIGHT;
      for (int i = int(lane); i < D; i += 32)
        key[i] = typename ms_codec<Key>::unpacked(ms_prepared(x, i, inverse, k_weight, weighted, row_angles, p));
      const float factor = ms_store<D, SCALES % 4, 0>(ms_stored_at<Key>(k_plane, p.k_scales), key, where, writes, lane);
      if (Parts::key::turbo && lane == 0) scales[0] = factor;
    } else {
      device const float* x = new_v + p.v_offset + to.row * p.v_row_stride + ulong(kv_head) * DV;
      for (int i = int(lane); i < DV; i += 32) value[i] = typename ms_codec<Value>::unpacked(x[i]);
      const float factor = ms_store<DV, SCALES / 4, 1>(ms_stored_at<Value>(v_plane, p.v_scales), value, where, writes, lane);
      if (Parts::value::turbo && lane == 0) scales[1] = factor;
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
    ms_copy_floats<float, D, LPT, Parts::key::packed>(queries + min(g, to.heads - 1) * D, l, t.q + g * EK);
  ms_newest<T> newest;
  newest.position = view.hi - 1;
  newest.key = key;
  newest.value = value;
  newest.scales = scales;
  const int begin = to.piece * int(p.split_len);
  const int end = newest_here ? seen : begin + int(p.split_len);
  ms_source<T> from;
  from.pages = ms_pages_of(table, p);
  from.keys = ms_plane_of<Key, D>(k_plane, p.k_scales, kv_head, p.block_shift);
  from.values = ms_plane_of<Value, DV>(v_plane, p.v_scales, kv_head, p.block_shift);
  from.key_table = key_table;
  from.value_table = value_table;
  ms_attend<T, D, DV, H, LPT, U, NSG, true>(t, view, begin, end, from, newest, p.softcap, int(sg), int(lane));
  ms_shared<DV, HM, NSG> all;
  all.o = all_o;
  all.m = all_m;
  all.s = all_s;
  ms_merge<Parts, DV, H, HM, LPT, NSG>(t, all, to, grid.z, out, sinks, workspace, p, int(tid), int(sg), int(lane));
}

// One result of the pieces of a row and query head; rows of one piece have theirs already. Grid: [q heads, rows]; a
// thread for each of DV elements. BACK: values are in rotated space.
template <int DV, bool BACK = false>
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
  constexpr int BACK_DIM = BACK ? DV : 32;
  threadgroup float rotated[BACK ? DV : 1];
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
  const float result = value * ms_last_factor(most, sum, p.has_sinks != 0, sink);
  if (BACK) {
    if (has_element) rotated[tid] = result;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid >= 32) return;
    ms_rotate_back<BACK_DIM>(rotated, ms_kv_seeds[1], lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = int(lane); d < DV; d += 32) out[head * DV + d] = rotated[d];
  } else if (has_element) {
    out[head * DV + tid] = result;
  }
}
