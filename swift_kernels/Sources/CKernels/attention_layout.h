// How attention divides its work; shared by its kernel and its `prepare`.
//
// A row's context is cut at absolute multiples of its split size, which depends on the length of the context alone. A
// split is worked through in chunks of MS_ATTN_CHUNK positions with a running softmax; the splits' results are merged
// in order. So the bits of a row do not depend on the batch, the tile or the threads.
#ifndef METALSTEP_ATTENTION_LAYOUT_H
#define METALSTEP_ATTENTION_LAYOUT_H
#include <stddef.h>
#include <stdint.h>
#include "params.h"

enum {
  MS_ATTN_CHUNK = 256,       // positions whose scores are kept at once
  MS_ATTN_STRIDE = 64,       // of them, those of one kv head before those of the next, for a single row
  MS_ATTN_AHEAD = 64,        // positions between what is read and what is fetched
  MS_ATTN_LEAST_SPLIT = 32,  // positions; short contexts are cut finer, so that all threads have work
  MS_ATTN_SPLITS = 65,       // of a row at most 64; a tile's rows are neighbours and have one more
  MS_ATTN_TILE = 24,         // queries (rows x heads of a group) that share the loads of keys and values
  MS_ATTN_TILE_ROWS = 12,
};

// Rows of a sequence that are worked on together.
static inline uint32_t ms_attention_tile_rows(const MSAttentionParams *p) {
  const uint32_t rows = MS_ATTN_TILE / (p->num_q_heads / p->num_kv_heads);
  return rows < 1 ? 1 : rows > MS_ATTN_TILE_ROWS ? MS_ATTN_TILE_ROWS : rows;
}
static inline size_t ms_attention_queries(const MSAttentionParams *p) {
  return (size_t)ms_attention_tile_rows(p) * (p->num_q_heads / p->num_kv_heads);
}

// Elements of a partial result of a tile: values [num_kv_heads, queries, value_dim], then the queries' maxima and sums.
static inline size_t ms_attention_part(const MSAttentionParams *p) {
  const size_t queries = p->num_kv_heads * ms_attention_queries(p);
  return queries * p->value_dim + 2 * ((queries + 15) / 16 * 16);
}

// Elements of a tile's scaled queries and of its scores: of all heads for one row, of one kv head at a time for
// several.
static inline size_t ms_attention_tile_queries(const MSAttentionParams *p) {
  return (p->num_kv_heads * ms_attention_queries(p) * p->head_dim + 15) / 16 * 16;
}
static inline size_t ms_attention_tile_scores(const MSAttentionParams *p) {
  const size_t queries = ms_attention_queries(p);
  return (queries > p->num_q_heads ? queries : p->num_q_heads) * MS_ATTN_CHUNK;
}

// A thread's scratch: scaled queries, scores, a result and one to merge into it.
static inline size_t ms_attention_scratch(const MSAttentionParams *p) {
  return ms_attention_tile_queries(p) + ms_attention_tile_scores(p) + 2 * ms_attention_part(p);
}

#endif
