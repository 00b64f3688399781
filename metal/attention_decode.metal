// Attention of rows by themselves over the paged cache. Reference: kernels/attention.py. Sources: online softmax,
// arXiv 1805.02867; contexts in pieces, https://pytorch.org/blog/flash-decoding.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "kv_codec.h"
#include "attention.h"
#include "attention_planes.h"
#include "attention_merge.h"
#include "attention_lanes.h"
#include "attention_inside.h"

// A threadgroup has one row, one piece of its context and H query heads of one kv head, which share what is read.
// D, DV: elements of a key and of a value; LPT lanes have a position together, each lane U positions at a time; NSG
// simdgroups, whose results are merged HM heads at a time. T: see ms_planes. Packed keys and values are unpacked in registers;
// where they are in rotated space, each query head is rotated before, and its result back, once.
//
// A piece is split_len of the row's visible positions, counted from the first it sees: where it is cut, and in which
// order it is summed, depends on the row alone. A row of one piece is finished here; the others' pieces are left in
// `workspace`: float32 [rows, q heads, splits, DV] of weighted values, [rows, q heads, splits, 2] of maximum and sum.

// Grid: [kv heads * slices, splits, rows].
template <typename T, int D, int DV, int H, int LPT, int U, int NSG, int HM, typename Out>
[[kernel, max_total_threads_per_threadgroup(NSG * 32)]] void attention_decode(
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
  const ms_target to = ms_target_of<H, false>(at, view, p);
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

// Every row is the newest of its own sequence: its queries and keys are normed and rotated here, and its keys and
// values written where slot_mapping says. They are seen as the cache holds them, but without reading it: no threadgroup
// waits for another. A row whose slot is negative sees its own keys and values too.
// SCALES: of turbo codecs, ms_kv_scale of keys + 4 * that of values.
template <typename T, int D, int DV, int H, int LPT, int U, int NSG, int HM, typename Out, int SCALES = 0>
[[kernel, max_total_threads_per_threadgroup(NSG * 32)]] void attention_decode_inside(
    constant MSStep& step                [[buffer(0)]],
    device const int* positions          [[buffer(1)]],
    device const int* seq_ids            [[buffer(2)]],
    device const int* block_tables       [[buffer(3)]],
    device const MSSequence* sequences   [[buffer(4)]],
    device const float* q                [[buffer(5)]],
    device typename ms_codec<typename ms_cache<T>::key>::stored* k_plane    [[buffer(6)]],
    device typename ms_codec<typename ms_cache<T>::value>::stored* v_plane  [[buffer(7)]],
    device Out* out                      [[buffer(8)]],
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
  const ms_target to = ms_target_of<H, false>(at, view, p);
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
      ms_prepare<D>(queries + task * D, x, p.q_norm, p.q_eps, q_weight, row_angles, p, ms_query_scale(p), int(lane));
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (Parts::key::turbo) ms_rotate<ROTATED>(queries + task * D, ms_kv_seeds[0], lane);
    } else if (task == to.heads) {
      device const float* x = new_k + p.k_offset + to.row * p.k_row_stride + ulong(kv_head) * D;
      ms_prepare<D>(key, x, p.k_norm, p.k_eps, k_weight, row_angles, p, 1.0f, int(lane));
      simdgroup_barrier(mem_flags::mem_threadgroup);
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
