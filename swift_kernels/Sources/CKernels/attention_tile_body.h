// One tile of attention: rows of a sequence against positions of its cache, by chunks.
//
// A query's sums run over dimensions and positions in ascending order, one lane each, whatever its neighbours in the
// tile.

#if defined(MS_ISA_IS_AVX512)
// Queries at once, and how many vectors of positions (scores) or of value elements (sums) fit the registers beside
// them.
#define MS_TILES(case_) case_(12, 2, 2) case_(6, 4, 4) case_(4, 4, 4) case_(3, 4, 4) case_(2, 4, 4) case_(1, 8, 4)
#else
#define MS_TILES(case_) case_(6, 1, 1) case_(4, 1, 1) case_(3, 1, 1) case_(2, 2, 2) case_(1, 4, 4)
#endif
#define MS_UNROLL _Pragma("clang loop unroll(full)")

// Rows that are worked on, and their scratch. A wide tile reads its chunk from planes of its own.
typedef struct {
  const MSAttentionParams *p;
  const void *keys, *values;  // planes
  const int32_t *table;       // the sequence's blocks; NULL: the row sees nothing
  const int32_t *next_table;  // those of the row that this thread works on next, which sees [next_lo, next_hi)
  uint32_t next_lo, next_hi;  // next_hi is 0 where that is not known
  uint32_t k_codec, v_codec;  // of the planes, without the bit for wide scales
  uint32_t block_shift;
  const MS_NAME(attention_packed) * packed;
  uint32_t plane_heads;        // kv heads of a block,
  uint32_t plane_head;         // of which one is worked on:
  float *queries;              // its own [rows * group, head_dim], scaled
  uint32_t row, rows;          // of the step
  uint32_t group;              // q heads of a kv head
  uint32_t first_head, heads;  // kv heads of the tile
  float *all_queries;          // [heads, rows * group, head_dim]
  float *scores;               // [queries that are worked on, MS_ATTN_CHUNK]
  bool wide;
  float *converted_keys, *converted_values;              // of a wide tile's chunk; NULL: they are read where they are
  int32_t lo[MS_ATTN_WIDE_TILE], hi[MS_ATTN_WIDE_TILE];  // positions that a row sees, of those that are worked on
} MS_NAME(attention_tile);

MS_VEC f32x16 MS_NAME(load_kv)(const void *plane, size_t at, const uint32_t dtype) {
  if (dtype == MS_FLOAT32) return vload((const float *)plane + at);
  return dtype == MS_FLOAT16 ? vload_f16((const uint16_t *)plane + at) : vload_bf16((const uint16_t *)plane + at);
}
// Into the second-level cache: the first level has too few outstanding misses for the memory's bandwidth (Zen 4: 21
// against 13 GB/s), and with blocks anywhere in memory the hardware's own prefetching does not follow.
MS_VEC void MS_NAME(prefetch_kv)(const void *plane, size_t at, const uint32_t dtype) {
  __builtin_prefetch((const char *)plane + at * (dtype == MS_FLOAT32 ? 4 : 2), 0, 2);
}

// The first key element of a position's vector, and the first value element of a position, by a sequence's table.
MS_VEC size_t MS_NAME(key_in)(const MS_NAME(attention_tile) * t, const int32_t *table, uint32_t position) {
  const size_t block = (uint32_t)table[position >> t->block_shift];
  const size_t head = block * t->plane_heads + t->plane_head;
  return (head * t->p->head_dim << t->block_shift) + (position & ((1u << t->block_shift) - 1));
}
MS_VEC size_t MS_NAME(value_in)(const MS_NAME(attention_tile) * t, const int32_t *table, uint32_t position) {
  const size_t block = (uint32_t)table[position >> t->block_shift];
  const size_t head = block * t->plane_heads + t->plane_head;
  return ((head << t->block_shift) + (position & ((1u << t->block_shift) - 1))) * t->p->value_dim;
}
MS_VEC size_t MS_NAME(key_at)(const MS_NAME(attention_tile) * t, uint32_t position) {
  return MS_NAME(key_in)(t, t->table, position);
}
MS_VEC size_t MS_NAME(value_at)(const MS_NAME(attention_tile) * t, uint32_t position) {
  return MS_NAME(value_in)(t, t->table, position);
}

// What to fetch while `at` is read: MS_ATTN_AHEAD positions on, and behind the end what the next row reads first, so that
// rows with short contexts do not each wait for their memory. Sets the table and the position in it.
MS_VEC void MS_NAME(look_ahead)(const MS_NAME(attention_tile) * t, uint32_t at, uint32_t ahead, const int32_t **table,
                                uint32_t *position) {
  const uint32_t hi = (uint32_t)t->hi[t->rows - 1], first = ((uint32_t)t->lo[0] & ~15u) + MS_ATTN_AHEAD;
  const uint32_t from = ((hi + 15) & ~15u) > first ? (hi + 15) & ~15u : first;
  *table = t->table, *position = ahead < hi ? ahead : at;
  if (ahead >= hi && ahead >= from && t->next_lo + (ahead - from) < t->next_hi) {
    *table = t->next_table, *position = t->next_lo + (ahead - from);
  }
}
MS_VEC size_t MS_NAME(key_ahead)(const MS_NAME(attention_tile) * t, uint32_t at, uint32_t ahead) {
  const int32_t *table;
  uint32_t position;
  MS_NAME(look_ahead)(t, at, ahead, &table, &position);
  return MS_NAME(key_in)(t, table, position);
}
MS_VEC size_t MS_NAME(value_ahead)(const MS_NAME(attention_tile) * t, uint32_t at, uint32_t ahead) {
  const int32_t *table;
  uint32_t position;
  MS_NAME(look_ahead)(t, at, ahead, &table, &position);
  return MS_NAME(value_in)(t, table, position);
}

// Positions of one chunk become float32, as planes that have one head and blocks of 16 from the chunk on: whole vectors
// of keys that hold [lo, hi), and values [lo, hi).
MS_VEC void MS_NAME(convert_keys)(const MS_NAME(attention_tile) * t, uint32_t chunk, uint32_t lo, uint32_t hi,
                                  const uint32_t dtype) {
  const uint32_t dim = t->p->head_dim;
  for (uint32_t at = lo & ~15u; at < hi; at += 16) {
    const size_t key = MS_NAME(key_at)(t, at);
    const size_t next = MS_NAME(key_at)(t, at + MS_ATTN_AHEAD < hi ? at + MS_ATTN_AHEAD : at);
    float *to = t->converted_keys + (size_t)(at - chunk) * dim;
    for (uint32_t d = 0; d < dim; ++d) {
      MS_NAME(prefetch_kv)(t->keys, next + ((size_t)d << t->block_shift), dtype);
      vstore(to + 16 * d, MS_NAME(load_kv)(t->keys, key + ((size_t)d << t->block_shift), dtype));
    }
  }
}
MS_VEC void MS_NAME(convert_values)(const MS_NAME(attention_tile) * t, uint32_t chunk, uint32_t lo, uint32_t hi,
                                    const uint32_t dtype) {
  const uint32_t dim = t->p->value_dim;
  for (uint32_t at = lo; at < hi; ++at) {
    const size_t value = MS_NAME(value_at)(t, at);
    const size_t next = MS_NAME(value_at)(t, at + MS_ATTN_AHEAD < hi ? at + MS_ATTN_AHEAD : at);
    float *to = t->converted_values + (size_t)(at - chunk) * dim;
    for (uint32_t e = 0; e < dim; e += 32) MS_NAME(prefetch_kv)(t->values, next + e, dtype);
    for (uint32_t e = 0; e < dim; e += 16) vstore(to + e, MS_NAME(load_kv)(t->values, value + e, dtype));
  }
}
static void MS_NAME(convert_chunk)(const MS_NAME(attention_tile) * t, uint32_t chunk, uint32_t lo, uint32_t hi) {
  if (t->converted_keys != NULL) {
    if (t->k_codec == MS_KV_FLOAT16) MS_NAME(convert_keys)(t, chunk, lo, hi, MS_FLOAT16);
    if (t->k_codec == MS_KV_BFLOAT16) MS_NAME(convert_keys)(t, chunk, lo, hi, MS_BFLOAT16);
  }
  if (t->converted_values != NULL) {
    if (t->v_codec == MS_KV_FLOAT16) MS_NAME(convert_values)(t, chunk, lo, hi, MS_FLOAT16);
    if (t->v_codec == MS_KV_BFLOAT16) MS_NAME(convert_values)(t, chunk, lo, hi, MS_BFLOAT16);
  }
}

// Scores of `nr` queries from j against the 16 * nv positions from `at`. ahead: what to fetch for the next call.
MS_VEC void MS_NAME(score)(const MS_NAME(attention_tile) * t, uint32_t j, uint32_t at, uint32_t ahead, float *scores,
                           const uint32_t nr, const uint32_t nv, const uint32_t dtype) {
  const uint32_t dim = t->p->head_dim, stride = 1u << t->block_shift;
  const float *q = t->queries + (size_t)j * dim;
  f32x16 sum[12][8];
  size_t key[8], next[8];
  MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
    key[v] = MS_NAME(key_at)(t, at + 16 * v);
    next[v] = MS_NAME(key_ahead)(t, at + 16 * v, ahead + 16 * v);
    MS_UNROLL for (uint32_t i = 0; i < nr; ++i) sum[i][v] = vsplat(0);
  }
  for (uint32_t d = 0; d < dim; ++d) {
    f32x16 k[8];
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
      k[v] = MS_NAME(load_kv)(t->keys, key[v] + (size_t)d * stride, dtype);
      if (j == 0) MS_NAME(prefetch_kv)(t->keys, next[v] + (size_t)d * stride, dtype);
    }
    MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
      const f32x16 x = vsplat(q[(size_t)i * dim + d]);
      MS_UNROLL for (uint32_t v = 0; v < nv; ++v) sum[i][v] = vfma(k[v], x, sum[i][v]);
    }
  }
  MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) vstore(scores + (size_t)i * MS_ATTN_CHUNK + 16 * v, sum[i][v]);
  }
}

// values[i] += weights of positions [lo, hi) times their values, elements [e, e + 16 * nv), for `nr` queries.
MS_VEC void MS_NAME(weigh)(const MS_NAME(attention_tile) * t, float *values, const float *weights, uint32_t lo,
                           uint32_t hi, uint32_t e, const uint32_t nr, const uint32_t nv, const uint32_t dtype) {
  const uint32_t dim = t->p->value_dim;
  f32x16 sum[12][8];
  MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) sum[i][v] = vload(values + (size_t)i * dim + e + 16 * v);
  }
  for (uint32_t at = lo; at < hi;) {
    const uint32_t block_end = (at | ((1u << t->block_shift) - 1)) + 1, end = block_end < hi ? block_end : hi;
    const size_t value = MS_NAME(value_at)(t, at) + e;
    const size_t next = MS_NAME(value_ahead)(t, at, at + MS_ATTN_AHEAD) + e;
    for (uint32_t n = 0; n < end - at; ++n) {
      f32x16 x[8];
      MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
        x[v] = MS_NAME(load_kv)(t->values, value + (size_t)n * dim + 16 * v, dtype);
        if (v % 2 == 0 || dtype == MS_FLOAT32) {
          MS_NAME(prefetch_kv)(t->values, next + (size_t)n * dim + 16 * v, dtype);
        }
      }
      MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
        const f32x16 w = vsplat(weights[(size_t)i * MS_ATTN_CHUNK + (at - lo) + n]);
        MS_UNROLL for (uint32_t v = 0; v < nv; ++v) sum[i][v] = vfma(x[v], w, sum[i][v]);
      }
    }
    at = end;
  }
  MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) vstore(values + (size_t)i * dim + e + 16 * v, sum[i][v]);
  }
}

// The widest tile of at most `queries`.
MS_VEC uint32_t MS_NAME(tile_width)(uint32_t queries) {
#define MS_CASE(nr, nk, nv) \
  if (queries >= nr) return nr;
  MS_TILES(MS_CASE)
#undef MS_CASE
  return 1;
}

MS_VEC uint32_t MS_NAME(clip)(int32_t x, uint32_t lo, uint32_t hi) {
  return x<(int64_t)lo ? lo : x>(int64_t) hi ? hi : (uint32_t)x;
}
