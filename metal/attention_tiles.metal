// Attention of rows by themselves over the paged cache, by products of 8x8 tiles in half precision: for caches of float16 or codes, on
// GPUs that have such products beside their other arithmetic. Reference: kernels/attention.py. Sources: as attention_decode.metal.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "kv_codec.h"
#include "attention.h"
#include "attention_planes.h"
#include "attention_merge.h"
#include "attention_inside.h"
#include "attention_codes.h"
#include "attention_tiles.h"
#include "attention_newest.h"

// A threadgroup has one row, one piece of its context and H query heads of one kv head, H up to 8. A simdgroup takes every NSG-th tile
// of MS_TILE positions (ms_tiles), of which it reads the next one while it works on this one; results are merged HM heads at a time.
// Queries, what codes stand for and the weights of values are rounded to half: scores are off by 2^-10 of their products' absolute sum at
// most, and what is summed of values by 2^-10 of it. Sums are float.
//
// A piece is split_len / MS_TILE tiles: as in attention_decode, where a context is cut and in which order it is summed depends on the
// row alone, and `workspace` is the same.

// What a threadgroup knows of its row.
struct ms_tiled_row {
  ms_view view;
  ms_target to;
  int begin, end;  // tiles
  uint kv_head;
  device const int* table;
};

template <int H>
inline ms_tiled_row ms_tiled_row_of(uint3 at, constant MSStep& step, device const int* positions, device const int* seq_ids,
                                    device const int* block_tables, device const MSSequence* sequences,
                                    constant MSGpuAttentionParams& p) {
  ms_tiled_row row;
  const bool there = at.z < step.num_tokens;
  const int seq = there ? seq_ids[at.z] : -1, length = ms_piece_length<true>(p);
  row.view = ms_view_of(there ? positions[at.z] : -1, seq, step, sequences, p);
  row.to = ms_target_of<H, true>(at, row.view, p);
  row.begin = row.to.piece * length;
  row.end = row.to.piece == row.to.pieces - 1 ? ms_tiles(row.view) : row.begin + length;
  if (row.to.piece >= row.to.pieces) row.end = row.begin;
  row.kv_head = uint(row.to.first_head) / (p.num_q_heads / p.num_kv_heads);
  row.table = block_tables + ulong(uint(seq)) * step.max_blocks;
  return row;
}

template <typename T, int D, int DV>
inline void ms_fill_tables(threadgroup uint* table, int tid, int threads) {
  using Tiled = ms_tiled<T, D, DV>;
  ms_fill_pairs<typename ms_cache<T>::key, D>(table, tid, threads);
  if (!Tiled::same) ms_fill_pairs<typename ms_cache<T>::value, DV>(table + Tiled::value_table, tid, threads);
}

// A simdgroup's first tile, read.
template <typename T, int D, int DV>
inline void ms_fetch_first(thread ms_read_keys<T, D, DV>& keys, thread ms_read_values<T, D, DV>& values, ms_tiled_row row,
                           ms_cached<T, D, DV> from, int sg) {
  MS_UNROLL for (int i = 0; i < 2; i++) ms_no_codes(keys.codes[i]);
  MS_UNROLL for (int i = 0; i < 4; i++) ms_no_codes(values.codes[i]);
  MS_UNROLL for (int i = 0; i < 2; i++) {
    keys.scale[i] = typename ms_codec<typename ms_cache<T>::key>::scale(0.0f);
    values.scale[i] = typename ms_codec<typename ms_cache<T>::value>::scale(0.0f);
  }
  if (row.begin + sg >= row.end) return;
  const ms_positions first = ms_tile_at(row.view, row.begin + sg);
  const uint block = ms_block_of(from.pages, first);
  ms_fetch_keys(keys, from, first, block);
  ms_fetch_values(values, from, first, block);
}

// The tiles of a row's piece, from the simdgroup's first on, which it has read. NEW: the last position of all is not in the cache yet.
template <typename T, int D, int DV, int NSG, bool NEW>
inline void ms_attend_tiles(thread ms_tiled_heads<D, DV>& t, thread ms_read_keys<T, D, DV>& keys, thread ms_read_values<T, D, DV>& values,
                            ms_tiled_row row, ms_cached<T, D, DV> from, const threadgroup uint* key, const threadgroup uint* value,
                            const threadgroup uint* tables, float softcap, int sg, uint lane) {
  using Tiled = ms_tiled<T, D, DV>;
  const ms_lane own = ms_lane_of(lane);
  const threadgroup uint* key_table = ms_address(tables + int(lane) % ms_pairs<typename ms_cache<T>::key, D>::copies);
  const threadgroup uint* value_table =
      ms_address(tables + Tiled::value_table + int(lane) % ms_pairs<typename ms_cache<T>::value, DV>::copies);
  const int last = row.end - 1;
  uint block = row.begin + sg <= last ? ms_block_of(from.pages, ms_tile_at(row.view, min(row.begin + sg + NSG, last))) : 0;
  for (int i = row.begin + sg; i <= last; i += NSG) {
    const ms_positions at = ms_tile_at(row.view, i), next = ms_tile_at(row.view, min(i + NSG, last));
    const uint next_block = block;
    block = ms_block_of(from.pages, ms_tile_at(row.view, min(i + 2 * NSG, last)));
    if (at.first < at.lo || at.first + MS_TILE > min(at.hi, from.newest))
      ms_mend<T, D, DV, NEW>(keys, values, key, value, at, from.newest, own);
    float score[4];
    ms_score<T, D, DV>(score, t, keys, at, key_table, softcap, own);
    if (i + NSG <= last) ms_fetch_keys(keys, from, next, next_block);
    ms_add_tile<T, D, DV>(t, score, values, value_table);
    if (i + NSG <= last) ms_fetch_values(values, from, next, next_block);
  }
}

// Behind a barrier: nobody reads the tables.
template <typename T, int D, int DV, int HM, int NSG, typename Out>
inline void ms_finish_tiles(thread ms_tiled_heads<D, DV>& t, ms_shared<DV, HM, NSG> all, ms_target to, uint rows, device Out* out,
                            device const float* sinks, device float* workspace, constant MSGpuAttentionParams& p, int tid, int sg,
                            ms_lane lane) {
  constexpr bool BACK = ms_tiled<T, D, DV>::Value::turbo;
  for (int first = 0; first < to.heads; first += HM) {
    if (first > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    ms_leave_heads<T, D, DV, HM, NSG>(t, first, all, sg, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ms_merge_simdgroups<DV, HM, NSG, BACK>(all, first, to, rows, out, sinks, workspace, p, tid);
  }
}

// Words of threadgroup memory that are tables and, for each simdgroup, a vector while queries come, and results in the end.
template <typename T, int D, int DV, int NSG, int HM>
struct ms_tiled_memory {
  static constant constexpr int first = ms_tiled<T, D, DV>::tables + NSG * (D > DV ? D : DV);
  static constant constexpr int last = NSG * HM * DV;
  static constant constexpr int words = first > last ? first : last;
};

// Grid: [kv heads * slices, splits, rows]. SHARE: registers are left for so many threadgroups.
template <typename T, int D, int DV, int H, int NSG, int HM, int SHARE, typename Out>
[[kernel, max_total_threads_per_threadgroup(NSG * 32 * SHARE)]] void attention_tiles(
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
  using Memory = ms_tiled_memory<T, D, DV, NSG, HM>;
  using Tiled = ms_tiled<T, D, DV>;
  threadgroup uint memory[Memory::words];
  threadgroup half queries[8 * D];
  threadgroup float units[8];
  threadgroup float all_m[NSG * HM];
  threadgroup float all_s[NSG * HM];
  if (at.z >= step.num_tokens) return;
  const ms_tiled_row row = ms_tiled_row_of<H>(at, step, positions, seq_ids, block_tables, sequences, p);
  if (row.to.piece >= row.to.pieces) return;
  if (ms_seen(row.view) == 0) {
    ms_fill_nan<DV, NSG>(row.to, out, p, int(tid));
    return;
  }
  const ms_lane own = ms_lane_of(lane);
  const ms_cached<T, D, DV> from = ms_cached_of<T, D, DV>(row.table, k_plane, v_plane, row.kv_head, row.view.hi, p, own);
  ms_read_keys<T, D, DV> keys;
  ms_read_values<T, D, DV> values;
  ms_fetch_first(keys, values, row, from, int(sg));
  ms_fill_tables<T, D, DV>(memory, int(tid), NSG * 32);
  threadgroup float* vector = (threadgroup float*)memory + Tiled::tables + int(sg) * D;
  for (int g = int(sg); g < 8; g += NSG) {
    device const float* head = q + p.q_offset + row.to.row * p.q_row_stride + ulong(row.to.first_head + g) * D;
    for (int i = int(lane); i < D; i += 32) vector[i] = g < row.to.heads ? head[i] * ms_query_scale(p) : 0.0f;
    ms_take_query<T, D, DV>(queries + g * D, units + g, vector, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  ms_tiled_heads<D, DV> t;
  ms_take_queries<T, D, DV>(t, queries, units, lane);
  const threadgroup uint* tables = memory;
  ms_attend_tiles<T, D, DV, NSG, false>(t, keys, values, row, from, tables, tables, tables, p.softcap, int(sg), lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  ms_shared<DV, HM, NSG> all;
  all.o = (threadgroup float*)memory;
  all.m = all_m;
  all.s = all_s;
  ms_finish_tiles<T, D, DV, HM, NSG>(t, all, row.to, grid.z, out, sinks, workspace, p, int(tid), int(sg), own);
}

// As attention_decode_inside. Before the launch in front of it has ended, it reads where the row is, and the first keys and values that
// are in the cache.
template <typename T, int D, int DV, int H, int NSG, int HM, int SHARE, typename Out, int SCALES = 0>
[[kernel, max_total_threads_per_threadgroup(NSG * 32 * SHARE)]] void attention_tiles_inside(
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
  using Memory = ms_tiled_memory<T, D, DV, NSG, HM>;
  using Tiled = ms_tiled<T, D, DV>;
  using Key = typename ms_cache<T>::key;
  using Value = typename ms_cache<T>::value;
  threadgroup uint memory[Memory::words];
  threadgroup half queries[8 * D];
  threadgroup float units[8];
  threadgroup uint key[ms_held<Key, D>::all];
  threadgroup uint value[ms_held<Value, DV>::all];
  threadgroup float all_m[NSG * HM];
  threadgroup float all_s[NSG * HM];
  const ms_tiled_row row = ms_tiled_row_of<H>(at, step, positions, seq_ids, block_tables, sequences, p);
  const int slot = at.z < step.num_tokens ? slot_mapping[at.z] : -1;
  const ms_lane own = ms_lane_of(lane);
  const ms_cached<T, D, DV> from = ms_cached_of<T, D, DV>(row.table, k_plane, v_plane, row.kv_head, row.view.hi - 1, p, own);
  ms_read_keys<T, D, DV> keys;
  ms_read_values<T, D, DV> values;
  ms_fetch_first(keys, values, row, from, int(sg));
  ms_fill_tables<T, D, DV>(memory, int(tid), NSG * 32);
  MS_WAIT_PREVIOUS(q);
  MS_LAUNCH_NEXT;
  if (at.z >= step.num_tokens || row.to.piece >= row.to.pieces) return;

  // 1. Query heads, the key and the value: a simdgroup each, in turn.
  device const float* row_angles = ms_waited(angles) + row.to.row * p.rope_dims;
  threadgroup float* vector = (threadgroup float*)memory + Tiled::tables + int(sg) * (D > DV ? D : DV);
  const bool newest_here = row.to.piece == row.to.pieces - 1;
  for (int task = int(sg); task < (newest_here ? row.to.heads + 2 : row.to.heads); task += NSG) {
    if (task < row.to.heads) {
      device const float* x = q + p.q_offset + row.to.row * p.q_row_stride + ulong(row.to.first_head + task) * D;
      ms_prepare<D>(vector, x, p.q_norm, p.q_eps, q_weight, row_angles, p, ms_query_scale(p), int(lane));
      ms_take_query<T, D, DV>(queries + task * D, units + task, vector, lane);
    } else if (task == row.to.heads) {
      device const float* x = ms_waited(new_k) + p.k_offset + row.to.row * p.k_row_stride + ulong(row.kv_head) * D;
      ms_prepare<D>(vector, x, p.k_norm, p.k_eps, k_weight, row_angles, p, 1.0f, int(lane));
      ms_hold<Key, D, SCALES % 4, 0>(key, vector, lane);
    } else {
      device const float* x = ms_waited(new_v) + p.v_offset + row.to.row * p.v_row_stride + ulong(row.kv_head) * DV;
      for (int i = int(lane); i < DV; i += 32) vector[i] = x[i];
      ms_hold<Value, DV, SCALES / 4, 1>(value, vector, lane);
    }
  }
  for (int i = row.to.heads * D + int(tid); i < 8 * D; i += NSG * 32) queries[i] = half(0.0f);
  if (int(tid) >= row.to.heads && tid < 8) units[tid] = 0.0f;
  if (ms_seen(row.view) == 0) {
    ms_fill_nan<DV, NSG>(row.to, out, p, int(tid));
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 2. The piece.
  ms_tiled_heads<D, DV> t;
  ms_take_queries<T, D, DV>(t, queries, units, lane);
  const threadgroup uint* tables = memory;
  const threadgroup uint* held_key = key;
  const threadgroup uint* held_value = value;
  ms_attend_tiles<T, D, DV, NSG, true>(t, keys, values, row, from, held_key, held_value, tables, p.softcap, int(sg), lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 3. The key and the value into the cache, of which nobody reads any more, and the result.
  if (newest_here && slot >= 0 && uint(row.to.first_head) == row.kv_head * (p.num_q_heads / p.num_kv_heads)) {
    ms_slot where;
    where.head = ulong(uint(slot) >> p.block_shift) * p.num_kv_heads + row.kv_head;
    where.place = uint(slot) & ((1u << p.block_shift) - 1);
    where.shift = p.block_shift;
    ms_store_held<D>(ms_stored_at<Key>(k_plane, p.k_scales), held_key, where, int(tid), NSG * 32);
    ms_store_held<DV>(ms_stored_at<Value>(v_plane, p.v_scales), held_value, where, int(tid), NSG * 32);
  }
  ms_shared<DV, HM, NSG> all;
  all.o = (threadgroup float*)memory;
  all.m = all_m;
  all.s = all_s;
  ms_finish_tiles<T, D, DV, HM, NSG>(t, all, row.to, grid.z, out, sinks, workspace, p, int(tid), int(sg), own);
}
