// How attention divides its work; shared by its kernel and its `prepare`.
//
// A row's context is cut at absolute multiples of its split size, which depends on the number of positions it sees
// alone; the first positions that a sequence with a window keeps are cut by themselves, in front. A split is worked
// through in chunks of MS_ATTN_CHUNK positions with a running softmax; the splits' results are merged in order. So the
// bits of a row do not depend on the batch, the tile or the threads.
//
// Rows of a sequence at neighbouring positions make a tile. A narrow tile has all kv heads, and threads may share its
// splits: decodes, and prompts too short for more. A wide tile has one kv head, whose keys and values are converted to
// float32 once for all of its queries, and one thread.
#ifndef METALSTEP_ATTENTION_LAYOUT_H
#define METALSTEP_ATTENTION_LAYOUT_H
#include <stddef.h>
#include <stdint.h>
#include "params.h"

enum {
  MS_ATTN_CHUNK = 256,         // positions whose scores are kept at once
  MS_ATTN_STRIDE = 64,         // of them, those of one kv head before those of the next, for a single row
  MS_ATTN_AHEAD = 64,          // positions between what is read and what is fetched
  MS_ATTN_LEAST_SPLIT = 32,    // positions; short contexts are cut finer, so that all threads have work
  MS_ATTN_ROW_SPLITS = 63,     // split sizes a row's positions fill at most; a boundary more lies inside
  MS_ATTN_SPLITS = 68,         // of a narrow tile: two ranges, and its rows are neighbours
  MS_ATTN_TILE = 24,           // queries (rows x heads of a group) of a narrow tile
  MS_ATTN_TILE_ROWS = 12,      // at most
  MS_ATTN_WIDE_TILE = 192,     // queries of a wide tile
  MS_ATTN_WIDE_SCORES = 12,    // of them, those whose scores are kept at once: the widest of MS_TILES
  MS_ATTN_WIDE_LEAST = 48,     // fewer do not pay for the conversion
  MS_ATTN_WIDE_DIM = 1024,     // elements of a head; longer ones would not stay in the cache
  MS_ATTN_WIDE_PER_THREAD = 8  // tiles x kv heads: threads end at about the same time
};

// Rows of a sequence that are worked on together.
static inline uint32_t ms_attention_tile_rows(const MSAttentionParams *p) {
  const uint32_t rows = MS_ATTN_TILE / (p->num_q_heads / p->num_kv_heads);
  return rows < 1 ? 1 : rows > MS_ATTN_TILE_ROWS ? MS_ATTN_TILE_ROWS : rows;
}
// The same for wide tiles in a step of `rows`; 0: there are none.
static inline uint32_t ms_attention_wide_rows(const MSAttentionParams *p, uint64_t rows, uint32_t threads) {
  const uint32_t group = p->num_q_heads / p->num_kv_heads;
  const uint64_t enough = rows * p->num_kv_heads / ((uint64_t)threads * MS_ATTN_WIDE_PER_THREAD);
  uint32_t wide = MS_ATTN_WIDE_TILE / group;
  if (wide > enough) wide = (uint32_t)enough;
  if (wide > 4) wide &= ~3u;  // whole tiles of 12 queries for most groups
  if (p->head_dim > MS_ATTN_WIDE_DIM || p->value_dim > MS_ATTN_WIDE_DIM) return 0;
  return wide < 2 || wide * group < MS_ATTN_WIDE_LEAST ? 0 : wide;
}
// Queries of a narrow tile's kv head.
static inline size_t ms_attention_queries(const MSAttentionParams *p) {
  return (size_t)ms_attention_tile_rows(p) * (p->num_q_heads / p->num_kv_heads);
}

// Elements of a partial result: values [queries, value_dim], then the queries' maxima and sums.
static inline size_t ms_attention_part(const MSAttentionParams *p, size_t queries) {
  return queries * p->value_dim + 2 * ((queries + 15) / 16 * 16);
}
static inline size_t ms_attention_narrow_part(const MSAttentionParams *p) {
  return ms_attention_part(p, p->num_kv_heads * ms_attention_queries(p));
}

// Elements of `queries` scaled queries.
static inline size_t ms_attention_scaled(const MSAttentionParams *p, size_t queries) {
  return (queries * p->head_dim + 15) / 16 * 16;
}
// A thread's scratch for a narrow tile: scaled queries, scores (of all heads for one row, of one kv head at a time for
// several), a result and one to merge into it.
static inline size_t ms_attention_narrow_scores(const MSAttentionParams *p) {
  const size_t queries = ms_attention_queries(p);
  return (queries > p->num_q_heads ? queries : p->num_q_heads) * MS_ATTN_CHUNK;
}
static inline size_t ms_attention_narrow_scratch(const MSAttentionParams *p) {
  return ms_attention_scaled(p, p->num_kv_heads * ms_attention_queries(p)) + ms_attention_narrow_scores(p) +
         2 * ms_attention_narrow_part(p);
}
// Whether a wide tile converts a chunk of a plane to float32.
static inline int ms_attention_converts(uint32_t codec) { return codec == MS_KV_FLOAT16 || codec == MS_KV_BFLOAT16; }
// For a wide tile: the same, and a chunk's keys and values if they are 16-bit floats. Codes are unpacked to registers.
static inline size_t ms_attention_wide_scratch(const MSAttentionParams *p) {
  return ms_attention_scaled(p, MS_ATTN_WIDE_TILE) + (size_t)MS_ATTN_WIDE_SCORES * MS_ATTN_CHUNK +
         2 * ms_attention_part(p, MS_ATTN_WIDE_TILE) +
         (ms_attention_converts(p->k_codec) ? (size_t)MS_ATTN_CHUNK * p->head_dim : 0) +
         (ms_attention_converts(p->v_codec) ? (size_t)MS_ATTN_CHUNK * p->value_dim : 0);
}
static inline size_t ms_attention_scratch(const MSAttentionParams *p, uint64_t max_tokens, uint32_t threads) {
  const size_t narrow = ms_attention_narrow_scratch(p);
  if (ms_attention_wide_rows(p, max_tokens, threads) == 0) return narrow;
  const size_t wide = ms_attention_wide_scratch(p);
  return wide > narrow ? wide : narrow;
}

#endif
