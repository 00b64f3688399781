// attention: paged, ragged, split over the context. attention_layout.h says how the work is divided.

// Rows of one sequence at neighbouring positions, worked on together.
typedef struct {
  uint32_t row, rows;
  int32_t lo, hi;   // positions that any of its rows sees
  uint32_t split;   // positions in a split
  uint32_t splits;  // at least 1
} MS_NAME(attention_span);

typedef struct {
  const MSAttentionParams *p;
  const MSStep *step;
  const int32_t *positions, *seq_ids, *tables;
  uint32_t tile_rows;
} MS_NAME(attention);

// What a row sees; nothing for a position or a sequence that the block tables do not have (its result is NaN).
MS_VEC int32_t MS_NAME(row_end)(const MS_NAME(attention) * a, uint32_t row) {
  const int32_t position = a->positions[row], seq = a->seq_ids[row];
  const bool known = position >= 0 && seq >= 0 && (uint32_t)seq < a->step->num_seqs &&
                     (uint32_t)position / a->p->block_size < a->step->max_blocks;
  return known ? position + 1 : 0;
}
MS_VEC int32_t MS_NAME(row_begin)(const MS_NAME(attention) * a, int32_t end) {
  return a->p->window > 0 && (uint32_t)end > a->p->window ? end - (int32_t)a->p->window : 0;
}

MS_VEC uint32_t MS_NAME(split_size)(int32_t lo, int32_t hi) {
  const uint64_t length = (uint64_t)(hi - lo);
  uint64_t size = MS_ATTN_LEAST_SPLIT;
  while (size < MS_ATTN_CHUNK && size * 4 < length) size *= 2;
  while (size * (MS_ATTN_SPLITS - 2) < length) size *= 2;  // one boundary more than the length asks for may lie inside
  return (uint32_t)size;
}

// The tile that starts at `row`; rows from `end` on are not its own.
static MS_NAME(attention_span) MS_NAME(span_at)(const MS_NAME(attention) * a, uint32_t row, uint32_t end) {
  MS_NAME(attention_span) s = {.row = row, .rows = 1, .hi = MS_NAME(row_end)(a, row)};
  s.lo = MS_NAME(row_begin)(a, s.hi);
  s.split = MS_NAME(split_size)(s.lo, s.hi);
  while (s.hi > 0 && s.rows < a->tile_rows && row + s.rows < end) {
    const int32_t hi = MS_NAME(row_end)(a, row + s.rows);
    if (hi != s.hi + 1 || a->seq_ids[row + s.rows] != a->seq_ids[row]) break;
    if (MS_NAME(split_size)(MS_NAME(row_begin)(a, hi), hi) != s.split) break;
    s.hi = hi;
    ++s.rows;
  }
  s.splits = s.hi > 0 ? (uint32_t)(s.hi - 1) / s.split - (uint32_t)s.lo / s.split + 1 : 1;
  return s;
}

// Positions [lo, hi) of one of its splits.
MS_VEC void MS_NAME(split_range)(const MS_NAME(attention_span) * s, uint32_t split, int32_t *lo, int32_t *hi) {
  const int64_t begin = ((int64_t)s->lo / s->split + split) * s->split, end = begin + s->split;
  *lo = begin > s->lo ? (int32_t)begin : s->lo;
  *hi = end < s->hi ? (int32_t)end : s->hi;
}

// Relative work: bytes, and arithmetic for each query.
MS_VEC uint64_t MS_NAME(split_cost)(const MS_NAME(attention) * a, const MS_NAME(attention_span) * s, uint32_t split) {
  int32_t lo, hi;
  MS_NAME(split_range)(s, split, &lo, &hi);
  return ((uint64_t)(hi - lo) + 16) * (s->rows * (a->p->num_q_heads / a->p->num_kv_heads) + 6);
}
MS_VEC uint64_t MS_NAME(span_cost)(const MS_NAME(attention) * a, const MS_NAME(attention_span) * s) {
  uint64_t cost = 0;
  for (uint32_t i = 0; i < s->splits; ++i) cost += MS_NAME(split_cost)(a, s, i);
  return cost;
}

MS_VEC MS_NAME(attention_part) MS_NAME(part_at)(const MSAttentionParams *p, float *memory) {
  const size_t queries = p->num_kv_heads * ms_attention_queries(p), padded = (queries + 15) / 16 * 16;
  float *max = memory + queries * p->value_dim;
  return (MS_NAME(attention_part)){memory, max, max + padded};
}

// Scores [MS_ATTN_CHUNK] of query j at positions [lo, hi) of a chunk become weights e^(score - max); the query's values
// and sum follow a new maximum.
static void MS_NAME(soften)(const MSAttentionParams *p, float *scores, const MS_NAME(attention_part) * part, uint32_t j,
                            uint32_t chunk, uint32_t lo, uint32_t hi) {
  const float softcap = p->softcap, old = part->max[j];
  const uint32_t begin = (lo & ~15u) - chunk, end = hi - chunk;
  f32x16 most = vsplat(old);
  for (uint32_t i = begin; i < end; i += 16) {
    f32x16 s = vload(scores + i);
    if (softcap != 0.0f) s = vtanh(s / softcap) * softcap;
    if (i + 16 > end) s = vfirst(s, end - i, vsplat(-__builtin_inff()));
    if (i + chunk < lo) s = vfirst(vsplat(-__builtin_inff()), lo - chunk - i, s);
    vstore(scores + i, s);
    most = vmax(s, most);
  }
  const float max = vmaxall(most);
  f32x16 sum = vsplat(0);
  for (uint32_t i = begin; i < end; i += 16) {
    const f32x16 w = vexp(vload(scores + i) - max);
    vstore(scores + i, w);
    sum += w;
  }
  const float keep = vexp(vsplat(old - max))[0];
  float *values = part->values + (size_t)j * p->value_dim;
  if (keep != 1.0f) {
    for (uint32_t e = 0; e < p->value_dim; e += 16) vstore(values + e, vload(values + e) * keep);
  }
  part->max[j] = max;
  part->sum[j] = part->sum[j] * keep + vsum(sum);
}

MS_VEC uint32_t MS_NAME(clip)(int32_t x, uint32_t lo, uint32_t hi) {
  return x<(int64_t)lo ? lo : x>(int64_t) hi ? hi : (uint32_t)x;
}

// values of a kv head's queries += weights of a chunk's [lo, hi): positions that all rows of some queries see together,
// others row by row. Each query's positions come in ascending order either way.
static void MS_NAME(weigh_head)(const MS_NAME(attention_tile) * t, float *values, uint32_t chunk, uint32_t lo,
                                uint32_t hi) {
  const uint32_t queries = t->rows * t->group;
  for (uint32_t j = 0, nr; j < queries; j += nr) {
    nr = MS_NAME(tile_width)(queries - j);
    const uint32_t first = j / t->group, last = (j + nr - 1) / t->group;
    uint32_t from = MS_NAME(clip)(t->lo[last], lo, hi), to = MS_NAME(clip)(t->hi[first], lo, hi);
    if (from >= to) from = to = hi;  // nothing in common
    for (uint32_t i = j; i < j + nr; ++i) {
      const uint32_t begin = MS_NAME(clip)(t->lo[i / t->group], lo, from),
                     end = MS_NAME(clip)(t->hi[i / t->group], lo, from);
      if (begin < end) MS_NAME(weigh_queries)(t, values, i, chunk, begin, end, 1);
    }
    if (from < to) MS_NAME(weigh_queries)(t, values, j, chunk, from, to, nr);
    for (uint32_t i = j; i < j + nr; ++i) {
      const uint32_t end = MS_NAME(clip)(t->hi[i / t->group], to, hi);
      if (to < end) MS_NAME(weigh_queries)(t, values, i, chunk, to, end, 1);
    }
  }
}

MS_VEC void MS_NAME(set_head)(MS_NAME(attention_tile) * t, uint32_t head, uint32_t first_head) {
  const size_t queries = t->rows * t->group;
  t->kv_head = head;
  t->queries = t->all_queries + head * queries * t->p->head_dim;
  t->scores = t->all_scores + (head - first_head) * queries * MS_ATTN_CHUNK;
}

// Positions [lo, hi) of one chunk for some kv heads, `stride` positions of one head before those of the next.
static void MS_NAME(attend_chunk)(MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part, uint32_t chunk,
                                  uint32_t lo, uint32_t hi, uint32_t first_head, uint32_t end_head, uint32_t stride) {
  const uint32_t queries = t->rows * t->group, dtype = t->p->kv_dtype;
  for (uint32_t at = lo & ~15u; at < hi; at += stride) {
    const uint32_t end = hi - at < stride ? hi : at + stride;
    for (uint32_t head = first_head; head < end_head; ++head) {
      MS_NAME(set_head)(t, head, first_head);
      if (dtype == MS_FLOAT16) {
        MS_NAME(score_head)(t, chunk, at, end, MS_FLOAT16);
      } else if (dtype == MS_BFLOAT16) {
        MS_NAME(score_head)(t, chunk, at, end, MS_BFLOAT16);
      } else {
        MS_NAME(score_head)(t, chunk, at, end, MS_FLOAT32);
      }
    }
  }
  for (uint32_t head = first_head; head < end_head; ++head) {
    MS_NAME(set_head)(t, head, first_head);
    for (uint32_t j = 0; j < queries; ++j) {
      const uint32_t from = MS_NAME(clip)(t->lo[j / t->group], lo, hi), to = MS_NAME(clip)(t->hi[j / t->group], lo, hi);
      if (from < to)
        MS_NAME(soften)(t->p, t->scores + (size_t)j * MS_ATTN_CHUNK, part, head * queries + j, chunk, from, to);
    }
  }
  for (uint32_t at = lo; at < hi;) {
    const uint32_t end = hi - at < stride ? hi : (at & ~15u) + stride;
    for (uint32_t head = first_head; head < end_head; ++head) {
      MS_NAME(set_head)(t, head, first_head);
      MS_NAME(weigh_head)(t, part->values + (size_t)head * queries * t->p->value_dim, chunk, at, end);
    }
    at = end;
  }
}

// One split of a tile, from nothing. A single row takes its kv heads together, since their keys lie side by side in
// memory; for several, a head's scores fill the cache.
static void MS_NAME(attend_split)(MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part, int32_t lo,
                                  int32_t hi) {
  const uint32_t heads = t->p->num_kv_heads, queries = heads * t->rows * t->group;
  memset(part->values, 0, (size_t)queries * t->p->value_dim * sizeof(float));
  for (uint32_t j = 0; j < queries; ++j) part->max[j] = -__FLT_MAX__, part->sum[j] = 0;
  for (uint32_t chunk = (uint32_t)lo / MS_ATTN_CHUNK * MS_ATTN_CHUNK; chunk < (uint32_t)hi; chunk += MS_ATTN_CHUNK) {
    const uint32_t begin = MS_NAME(clip)(lo, chunk, chunk + MS_ATTN_CHUNK);
    const uint32_t end = MS_NAME(clip)(hi, chunk, chunk + MS_ATTN_CHUNK);
    if (t->rows == 1) {
      MS_NAME(attend_chunk)(t, part, chunk, begin, end, 0, heads, MS_ATTN_STRIDE);
    } else {
      for (uint32_t head = 0; head < heads; ++head) {
        MS_NAME(attend_chunk)(t, part, chunk, begin, end, head, head + 1, MS_ATTN_CHUNK);
      }
    }
  }
}

// total becomes the result over its positions and those of `next`, which follow them.
static void MS_NAME(merge_parts)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * total,
                                 const MS_NAME(attention_part) * next) {
  const uint32_t dim = t->p->value_dim, queries = t->p->num_kv_heads * t->rows * t->group;
  for (uint32_t j = 0; j < queries; ++j) {
    float *to = total->values + (size_t)j * dim;
    const float *from = next->values + (size_t)j * dim;
    if (next->max[j] == -__FLT_MAX__ && next->sum[j] == 0.0f) continue;  // the row sees none of these positions
    if (total->max[j] == -__FLT_MAX__ && total->sum[j] == 0.0f) {        // or none before them
      memcpy(to, from, dim * sizeof(float));
      total->max[j] = next->max[j];
      total->sum[j] = next->sum[j];
      continue;
    }
    const float max = total->max[j] > next->max[j] ? total->max[j] : next->max[j];
    const float a = vexp(vsplat(total->max[j] - max))[0], b = vexp(vsplat(next->max[j] - max))[0];
    for (uint32_t e = 0; e < dim; e += 16) vstore(to + e, vfma(vload(from + e), vsplat(b), vload(to + e) * a));
    total->sum[j] = total->sum[j] * a + next->sum[j] * b;
    total->max[j] = max;
  }
}

// Divides by the sums, and writes the tile's rows.
static void MS_NAME(finish_tile)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * total,
                                 const ms_host_args *args) {
  const MSAttentionParams *p = t->p;
  const float *sinks = args->buffers[MS_ATTN_SINKS];
  const uint32_t queries = t->rows * t->group;
  for (uint32_t j = 0; j < p->num_kv_heads * queries; ++j) {
    const uint32_t r = j % queries / t->group, head = j / queries * t->group + j % t->group;
    float keep = 1.0f, sum = total->sum[j];
    if (p->has_sinks) {
      const float max = sinks[head] > total->max[j] ? sinks[head] : total->max[j];
      keep = vexp(vsplat(total->max[j] - max))[0];
      sum = sum * keep + vexp(vsplat(sinks[head] - max))[0];
    }
    const float scale = t->hi[r] > 0 ? keep / sum : __builtin_nanf("");
    const float *from = total->values + (size_t)j * p->value_dim;
    float *to = (float *)args->buffers[MS_ATTN_OUT] + ((size_t)(t->row + r) * p->num_q_heads + head) * p->value_dim;
    for (uint32_t e = 0; e < p->value_dim; e += 16) vstore(to + e, vload(from + e) * scale);
  }
}

// A tile with its queries scaled.
static void MS_NAME(begin_tile)(const MS_NAME(attention) * a, const MS_NAME(attention_span) * s,
                                const ms_host_args *args, MS_NAME(attention_tile) * t) {
  const MSAttentionParams *p = a->p;
  const uint32_t group = p->num_q_heads / p->num_kv_heads, n = group * p->head_dim;
  *t = (MS_NAME(attention_tile)){
      .p = p,
      .keys = args->buffers[MS_ATTN_K],
      .values = args->buffers[MS_ATTN_V],
      .table = s->hi > 0 ? a->tables + (size_t)a->seq_ids[s->row] * a->step->max_blocks : NULL,
      .block_shift = (uint32_t)__builtin_ctz(p->block_size),
      .row = s->row,
      .rows = s->rows,
      .group = group,
      .all_queries = args->scratch,
      .all_scores = (float *)args->scratch + ms_attention_tile_queries(p),
  };
  for (uint32_t r = 0; r < s->rows; ++r) {
    t->hi[r] = MS_NAME(row_end)(a, s->row + r);
    t->lo[r] = MS_NAME(row_begin)(a, t->hi[r]);
    const float *q = (const float *)args->buffers[MS_ATTN_Q] + p->q_offset + (size_t)(s->row + r) * p->q_row_stride;
    for (uint32_t head = 0; head < p->num_kv_heads; ++head, q += n) {
      float *to = t->all_queries + ((size_t)head * s->rows + r) * n;
      for (uint32_t i = 0; i < n; ++i) to[i] = q[i] * p->scale;
    }
  }
}

// A tile that this thread has for itself.
static void MS_NAME(attend_whole)(MS_NAME(attention_tile) * t, const MS_NAME(attention_span) * s,
                                  const ms_host_args *args) {
  float *memory = t->all_scores + ms_attention_tile_scores(t->p);
  const MS_NAME(attention_part) total = MS_NAME(part_at)(t->p, memory);
  const MS_NAME(attention_part) next = MS_NAME(part_at)(t->p, memory + ms_attention_part(t->p));
  for (uint32_t i = 0; i < s->splits; ++i) {
    int32_t lo, hi;
    MS_NAME(split_range)(s, i, &lo, &hi);
    MS_NAME(attend_split)(t, i == 0 ? &total : &next, lo, hi);
    if (i > 0) MS_NAME(merge_parts)(t, &total, &next);
  }
  MS_NAME(finish_tile)(t, &total, args);
}

// Which thread has the piece of work [at, at + cost).
MS_VEC uint64_t MS_NAME(piece_thread)(uint64_t at, uint64_t cost, uint64_t total, uint64_t threads) {
  return (at + cost / 2) * threads / total;
}

// This thread's splits of a tile that several threads share, into parts [split].
static void MS_NAME(attend_pieces)(const MS_NAME(attention) * a, MS_NAME(attention_tile) * t,
                                   const MS_NAME(attention_span) * s, float *parts, uint64_t at, uint64_t total,
                                   const ms_host_args *args) {
  for (uint32_t i = 0; i < s->splits; ++i) {
    const uint64_t cost = MS_NAME(split_cost)(a, s, i);
    if (MS_NAME(piece_thread)(at, cost, total, (uint64_t)args->threads) == (uint64_t)args->thread) {
      const MS_NAME(attention_part) part = MS_NAME(part_at)(a->p, parts + i * ms_attention_part(a->p));
      int32_t lo, hi;
      MS_NAME(split_range)(s, i, &lo, &hi);
      MS_NAME(attend_split)(t, &part, lo, hi);
    }
    at += cost;
  }
}

static void MS_NAME(merge_pieces)(const MS_NAME(attention_tile) * t, uint32_t splits, float *parts,
                                  const ms_host_args *args) {
  const MS_NAME(attention_part) total = MS_NAME(part_at)(t->p, parts);
  for (uint32_t i = 1; i < splits; ++i) {
    const MS_NAME(attention_part) next = MS_NAME(part_at)(t->p, parts + i * ms_attention_part(t->p));
    MS_NAME(merge_parts)(t, &total, &next);
  }
  MS_NAME(finish_tile)(t, &total, args);
}

// The launch's splits, tile by tile, are cut into one piece of equal cost per thread. A tile inside a piece is its
// thread's alone. A tile in several pieces (at most threads - 1 are) leaves its splits in `shared`, and its last thread
// merges them behind a barrier.
void MS_NAME(ms_attention)(const ms_host_args *args) {
  const MSAttentionParams *p = args->constants;
  void *const *buffers = args->buffers;
  const MS_NAME(attention) a = {p,
                                buffers[MS_ATTN_STEP],
                                buffers[MS_ATTN_POSITIONS],
                                buffers[MS_ATTN_SEQ_IDS],
                                buffers[MS_ATTN_BLOCK_TABLES],
                                ms_attention_tile_rows(p)};
  const uint32_t rows = a.step->num_tokens;
  const uint64_t thread = (uint64_t)args->thread, threads = (uint64_t)args->threads;
  uint64_t total = 0, at = 0;
  for (uint32_t row = 0; row < rows;) {
    const MS_NAME(attention_span) s = MS_NAME(span_at)(&a, row, rows);
    total += MS_NAME(span_cost)(&a, &s);
    row += s.rows;
  }
  uint32_t shared_tiles = 0;
  MS_NAME(attention_tile) t, own = {0};  // own: the shared tile that this thread merges
  uint32_t own_splits = 0;
  float *own_parts = NULL;
  for (uint32_t row = 0; row < rows;) {
    const MS_NAME(attention_span) s = MS_NAME(span_at)(&a, row, rows);
    const uint64_t first = at, first_cost = MS_NAME(split_cost)(&a, &s, 0);
    const uint64_t last_cost = MS_NAME(split_cost)(&a, &s, s.splits - 1);
    row += s.rows;
    at += MS_NAME(span_cost)(&a, &s);
    const uint64_t from = MS_NAME(piece_thread)(first, first_cost, total, threads);
    const uint64_t to = MS_NAME(piece_thread)(at - last_cost, last_cost, total, threads);
    float *parts = (float *)args->shared + shared_tiles * MS_ATTN_SPLITS * ms_attention_part(p);
    shared_tiles += from != to;
    if (thread < from || thread > to) continue;
    MS_NAME(begin_tile)(&a, &s, args, &t);
    if (from == to) {
      MS_NAME(attend_whole)(&t, &s, args);
    } else {
      MS_NAME(attend_pieces)(&a, &t, &s, parts, first, total, args);
      if (thread == to) own = t, own_splits = s.splits, own_parts = parts;
    }
  }
  if (shared_tiles == 0) return;
  ms_pool_barrier(args->pool);
  if (own_parts != NULL) MS_NAME(merge_pieces)(&own, own_splits, own_parts, args);
}

#undef MS_TILES
#undef MS_UNROLL
