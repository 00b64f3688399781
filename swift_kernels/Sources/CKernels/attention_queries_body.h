// attention: which positions queries of a tile score and weigh, by codec and by queries at once.

// Where scores of `nr` queries from j against positions [lo, hi) begin, a multiple of 16, and end.
MS_VEC void MS_NAME(score_range)(const MS_NAME(attention_tile) * t, uint32_t j, uint32_t nr, uint32_t lo, uint32_t hi,
                                 uint32_t *from, uint32_t *end) {
  *from = lo & ~15u, *end = hi;
  if (t->rows > 1) {
    *from = MS_NAME(clip)(t->lo[j / t->group], lo, hi) & ~15u;
    *end = MS_NAME(clip)(t->hi[(j + nr - 1) / t->group], lo, hi);
  }
}

// Scores of `nr` queries from j of a kv head against those positions [lo, hi) of a chunk that they see, and some beside
// them.
MS_VEC void MS_NAME(score_queries)(const MS_NAME(attention_tile) * t, float *scores, uint32_t j, uint32_t nr,
                                   uint32_t chunk, uint32_t lo, uint32_t hi, const uint32_t dtype) {
  uint32_t from, end;
  MS_NAME(score_range)(t, j, nr, lo, hi, &from, &end);
  while (from < end) {
    switch (nr) {
#define MS_CASE(nr_, nk_, nv_)                                                                    \
  case nr_:                                                                                       \
    if (nk_ > 1 && from + 16 * nk_ <= end + 15) {                                                 \
      MS_NAME(score)(t, j, from, from + MS_ATTN_AHEAD, scores + (from - chunk), nr_, nk_, dtype); \
      from += 16 * nk_;                                                                           \
    } else {                                                                                      \
      MS_NAME(score)(t, j, from, from + MS_ATTN_AHEAD, scores + (from - chunk), nr_, 1, dtype);   \
      from += 16;                                                                                 \
    }                                                                                             \
    break;
      MS_TILES(MS_CASE)
#undef MS_CASE
    }
  }
}

// The same for packed keys.
MS_VEC void MS_NAME(score_codes)(const MS_NAME(attention_tile) * t, float *scores, uint32_t j, uint32_t nr,
                                 uint32_t chunk, uint32_t lo, uint32_t hi, const uint32_t codec) {
  uint32_t from, end;
  MS_NAME(score_range)(t, j, nr, lo, hi, &from, &end);
  while (from < end) {
    switch (nr) {
#define MS_CASE(nr_, nk_)                                                                                \
  case nr_:                                                                                              \
    if (nk_ > 1 && from + 16 * nk_ <= end + 15) {                                                        \
      MS_NAME(score_packed)(t, j, from, from + MS_ATTN_AHEAD, scores + (from - chunk), nr_, nk_, codec); \
      from += 16 * nk_;                                                                                  \
    } else {                                                                                             \
      MS_NAME(score_packed)(t, j, from, from + MS_ATTN_AHEAD, scores + (from - chunk), nr_, 1, codec);   \
      from += 16;                                                                                        \
    }                                                                                                    \
    break;
      MS_PACKED_TILES(MS_CASE)
#undef MS_CASE
    }
  }
}

// A function for each codec: what is inlined into one shares its frame, without optimisation all of it.
#define MS_SCORES(name, score, codec)                                                                               \
  static __attribute__((noinline)) void MS_NAME(name)(const MS_NAME(attention_tile) * t, float *scores, uint32_t j, \
                                                      uint32_t nr, uint32_t chunk, uint32_t lo, uint32_t hi) {      \
    MS_NAME(score)(t, scores, j, nr, chunk, lo, hi, codec);                                                         \
  }
MS_SCORES(score_float32, score_queries, MS_KV_FLOAT32)
MS_SCORES(score_float16, score_queries, MS_KV_FLOAT16)
MS_SCORES(score_bfloat16, score_queries, MS_KV_BFLOAT16)
MS_SCORES(score_turbo2, score_codes, MS_KV_TURBO2)
MS_SCORES(score_turbo3, score_codes, MS_KV_TURBO3)
MS_SCORES(score_turbo4, score_codes, MS_KV_TURBO4)
MS_SCORES(score_affine8, score_codes, MS_KV_AFFINE8)
#undef MS_SCORES

static void MS_NAME(score_any)(const MS_NAME(attention_tile) * t, float *scores, uint32_t j, uint32_t nr,
                               uint32_t chunk, uint32_t lo, uint32_t hi) {
  if (t->k_codec == MS_KV_FLOAT32) MS_NAME(score_float32)(t, scores, j, nr, chunk, lo, hi);
  if (t->k_codec == MS_KV_FLOAT16) MS_NAME(score_float16)(t, scores, j, nr, chunk, lo, hi);
  if (t->k_codec == MS_KV_BFLOAT16) MS_NAME(score_bfloat16)(t, scores, j, nr, chunk, lo, hi);
  if (t->k_codec == MS_KV_TURBO2) MS_NAME(score_turbo2)(t, scores, j, nr, chunk, lo, hi);
  if (t->k_codec == MS_KV_TURBO3) MS_NAME(score_turbo3)(t, scores, j, nr, chunk, lo, hi);
  if (t->k_codec == MS_KV_TURBO4) MS_NAME(score_turbo4)(t, scores, j, nr, chunk, lo, hi);
  if (t->k_codec == MS_KV_AFFINE8) MS_NAME(score_affine8)(t, scores, j, nr, chunk, lo, hi);
}

// values of `nr` queries from j += weights of positions [lo, hi) of a chunk times their values. weights: query j's.
#define MS_CASE(nr_, nk_, nv_)                                           \
  case nr_:                                                              \
    if (nv_ > 1 && e + 16 * nv_ <= dim) {                                \
      MS_WEIGH(t, values, weights, lo, hi, e, nr_, nv_, MS_WEIGH_CODEC); \
      e += 16 * nv_;                                                     \
    } else {                                                             \
      MS_WEIGH(t, values, weights, lo, hi, e, nr_, 1, MS_WEIGH_CODEC);   \
      e += 16;                                                           \
    }                                                                    \
    break;
#define MS_WEIGHS(name)                                                                                              \
  static __attribute__((noinline)) void MS_NAME(name)(const MS_NAME(attention_tile) * t, float *values,              \
                                                      const float *weights, uint32_t nr, uint32_t lo, uint32_t hi) { \
    const uint32_t dim = t->p->value_dim;                                                                            \
    for (uint32_t e = 0; e < dim;) {                                                                                 \
      switch (nr) { MS_TILES(MS_CASE) }                                                                              \
    }                                                                                                                \
  }
#define MS_WEIGH MS_NAME(weigh)
#define MS_WEIGH_CODEC MS_KV_FLOAT32
MS_WEIGHS(weigh_float32)
#undef MS_WEIGH_CODEC
#define MS_WEIGH_CODEC MS_KV_FLOAT16
MS_WEIGHS(weigh_float16)
#undef MS_WEIGH_CODEC
#define MS_WEIGH_CODEC MS_KV_BFLOAT16
MS_WEIGHS(weigh_bfloat16)
#undef MS_WEIGH_CODEC
#undef MS_WEIGH
#define MS_WEIGH MS_NAME(weigh_packed)
#define MS_WEIGH_CODEC MS_KV_TURBO2
MS_WEIGHS(weigh_turbo2)
#undef MS_WEIGH_CODEC
#define MS_WEIGH_CODEC MS_KV_TURBO3
MS_WEIGHS(weigh_turbo3)
#undef MS_WEIGH_CODEC
#define MS_WEIGH_CODEC MS_KV_TURBO4
MS_WEIGHS(weigh_turbo4)
#undef MS_WEIGH_CODEC
#define MS_WEIGH_CODEC MS_KV_AFFINE8
MS_WEIGHS(weigh_affine8)
#undef MS_WEIGH_CODEC
#undef MS_WEIGH
#undef MS_WEIGHS
#undef MS_CASE

static void MS_NAME(weigh_queries)(const MS_NAME(attention_tile) * t, float *values, const float *weights, uint32_t nr,
                                   uint32_t chunk, uint32_t lo, uint32_t hi) {
  weights += lo - chunk;
  if (t->v_codec == MS_KV_FLOAT32) MS_NAME(weigh_float32)(t, values, weights, nr, lo, hi);
  if (t->v_codec == MS_KV_FLOAT16) MS_NAME(weigh_float16)(t, values, weights, nr, lo, hi);
  if (t->v_codec == MS_KV_BFLOAT16) MS_NAME(weigh_bfloat16)(t, values, weights, nr, lo, hi);
  if (t->v_codec == MS_KV_TURBO2) MS_NAME(weigh_turbo2)(t, values, weights, nr, lo, hi);
  if (t->v_codec == MS_KV_TURBO3) MS_NAME(weigh_turbo3)(t, values, weights, nr, lo, hi);
  if (t->v_codec == MS_KV_TURBO4) MS_NAME(weigh_turbo4)(t, values, weights, nr, lo, hi);
  if (t->v_codec == MS_KV_AFFINE8) MS_NAME(weigh_affine8)(t, values, weights, nr, lo, hi);
}

// values of `nr` queries from j += weights of those positions [lo, hi) of a chunk that they see: positions that all of
// them see together, others by halves of them. Each query's positions come in ascending order either way.
static void MS_NAME(weigh_seen)(const MS_NAME(attention_tile) * t, float *values, const float *weights, uint32_t j,
                                uint32_t nr, uint32_t chunk, uint32_t lo, uint32_t hi) {
  const uint32_t first = j / t->group, last = (j + nr - 1) / t->group, half = nr / 2;
  uint32_t from = MS_NAME(clip)(t->lo[last], lo, hi), to = MS_NAME(clip)(t->hi[first], lo, hi);
  if (from >= to) from = to = hi;  // nothing in common
  float *values_after = values + (size_t)half * t->p->value_dim;
  const float *weights_after = weights + (size_t)half * MS_ATTN_CHUNK;
  if (first < last && MS_NAME(clip)(t->lo[first], lo, hi) < from) {
    MS_NAME(weigh_seen)(t, values, weights, j, half, chunk, lo, from);
    MS_NAME(weigh_seen)(t, values_after, weights_after, j + half, nr - half, chunk, lo, from);
  }
  if (from < to) MS_NAME(weigh_queries)(t, values, weights, nr, chunk, from, to);
  if (first < last && to < MS_NAME(clip)(t->hi[last], lo, hi)) {
    MS_NAME(weigh_seen)(t, values, weights, j, half, chunk, to, hi);
    MS_NAME(weigh_seen)(t, values_after, weights_after, j + half, nr - half, chunk, to, hi);
  }
}
