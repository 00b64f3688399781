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

// The smallest split of which a context needs fewer than MS_ATTN_SPLITS, one boundary more than its length asks for included.
MS_VEC uint32_t MS_NAME(split_size)(int32_t lo, int32_t hi) {
  uint32_t size = MS_ATTN_CHUNK;
  while ((uint64_t)size * (MS_ATTN_SPLITS - 2) < (uint64_t)(hi - lo)) size *= 2;
  return size;
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

MS_VEC MS_NAME(attention_part) MS_NAME(part_at)(const MSAttentionParams *p, float *memory) {
  const size_t queries = ms_attention_queries(p), padded = (queries + 15) / 16 * 16;
  float *max = memory + queries * p->value_dim;
  return (MS_NAME(attention_part)){memory, max, max + padded};
}

// Scores of query j at positions [lo, hi) of a chunk become weights e^(score - max); values and sum follow a new maximum.
static void MS_NAME(soften)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part, uint32_t j, uint32_t chunk, uint32_t lo,
                            uint32_t hi) {
  float *scores = t->scores + (size_t)j * MS_ATTN_CHUNK;
  const float softcap = t->p->softcap, old = part->max[j];
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
  float *values = part->values + (size_t)j * t->p->value_dim;
  if (keep != 1.0f) {
    for (uint32_t e = 0; e < t->p->value_dim; e += 16) vstore(values + e, vload(values + e) * keep);
  }
  part->max[j] = max;
  part->sum[j] = part->sum[j] * keep + vsum(sum);
}

MS_VEC uint32_t MS_NAME(clip)(int32_t x, uint32_t lo, uint32_t hi) {
  return x < (int64_t)lo ? lo : x > (int64_t)hi ? hi : (uint32_t)x;
}

// values += weights of a chunk [lo, hi): positions that all rows of some queries see together, others row by row. Each query's
// positions come in ascending order either way.
static void MS_NAME(weigh_all)(const MS_NAME(attention_tile) * t, float *values, uint32_t chunk, uint32_t lo, uint32_t hi) {
  const uint32_t queries = t->rows * t->group;
  for (uint32_t j = 0, nr; j < queries; j += nr) {
    nr = MS_NAME(tile_width)(queries - j);
    const uint32_t first = j / t->group, last = (j + nr - 1) / t->group;
    uint32_t from = MS_NAME(clip)(t->lo[last], lo, hi), to = MS_NAME(clip)(t->hi[first], lo, hi);
    if (from >= to) from = to = hi;  // nothing in common
    for (uint32_t i = j; i < j + nr; ++i) {
      const uint32_t begin = MS_NAME(clip)(t->lo[i / t->group], lo, from), end = MS_NAME(clip)(t->hi[i / t->group], lo, from);
      if (begin < end) MS_NAME(weigh_one)(t, values, i, chunk, begin, end, 1);
    }
    if (from < to) MS_NAME(weigh_one)(t, values, j, chunk, from, to, nr);
    for (uint32_t i = j; i < j + nr; ++i) {
      const uint32_t end = MS_NAME(clip)(t->hi[i / t->group], to, hi);
      if (to < end) MS_NAME(weigh_one)(t, values, i, chunk, to, end, 1);
    }
  }
}

// One split of a tile, from nothing.
static void MS_NAME(attend_split)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part, int32_t lo, int32_t hi) {
  const uint32_t queries = t->rows * t->group;
  memset(part->values, 0, (size_t)queries * t->p->value_dim * sizeof(float));
  for (uint32_t j = 0; j < queries; ++j) part->max[j] = -__FLT_MAX__, part->sum[j] = 0;
  for (uint32_t chunk = (uint32_t)lo / MS_ATTN_CHUNK * MS_ATTN_CHUNK; chunk < (uint32_t)hi; chunk += MS_ATTN_CHUNK) {
    const uint32_t begin = MS_NAME(clip)(lo, chunk, chunk + MS_ATTN_CHUNK);
    const uint32_t end = MS_NAME(clip)(hi, chunk, chunk + MS_ATTN_CHUNK);
    switch (t->p->kv_dtype) {
      case MS_FLOAT32: MS_NAME(score_all)(t, chunk, begin & ~15u, end, MS_FLOAT32); break;
      case MS_FLOAT16: MS_NAME(score_all)(t, chunk, begin & ~15u, end, MS_FLOAT16); break;
      default: MS_NAME(score_all)(t, chunk, begin & ~15u, end, MS_BFLOAT16); break;
    }
    for (uint32_t j = 0; j < queries; ++j) {
      const uint32_t from = MS_NAME(clip)(t->lo[j / t->group], begin, end);
      const uint32_t to = MS_NAME(clip)(t->hi[j / t->group], begin, end);
      if (from < to) MS_NAME(soften)(t, part, j, chunk, from, to);
    }
    MS_NAME(weigh_all)(t, part->values, chunk, begin, end);
  }
}

// total becomes the result over its positions and those of `next`, which follow them.
static void MS_NAME(merge_parts)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * total, const MS_NAME(attention_part) * next) {
  const uint32_t dim = t->p->value_dim;
  for (uint32_t j = 0; j < t->rows * t->group; ++j) {
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

static void MS_NAME(finish_tile)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * total, uint32_t row, const ms_host_args *args) {
  const MSAttentionParams *p = t->p;
  const float *sinks = args->buffers[MS_ATTN_SINKS];
  for (uint32_t j = 0; j < t->rows * t->group; ++j) {
    const uint32_t head = t->kv_head * t->group + j % t->group;
    float keep = 1.0f, sum = total->sum[j];
    if (p->has_sinks) {
      const float max = sinks[head] > total->max[j] ? sinks[head] : total->max[j];
      keep = vexp(vsplat(total->max[j] - max))[0];
      sum = sum * keep + vexp(vsplat(sinks[head] - max))[0];
    }
    const float scale = t->hi[j / t->group] > 0 ? keep / sum : __builtin_nanf("");
    const float *from = total->values + (size_t)j * p->value_dim;
    float *to = (float *)args->buffers[MS_ATTN_OUT] + ((size_t)(row + j / t->group) * p->num_q_heads + head) * p->value_dim;
    for (uint32_t e = 0; e < p->value_dim; e += 16) vstore(to + e, vload(from + e) * scale);
  }
}

static void MS_NAME(tile_of)(const MS_NAME(attention) * a, const MS_NAME(attention_span) * s, uint32_t kv_head,
                             const ms_host_args *args, MS_NAME(attention_tile) * t) {
  const MSAttentionParams *p = a->p;
  const size_t queries = ms_attention_queries(p);
  t->p = p;
  t->keys = args->buffers[MS_ATTN_K];
  t->planes_values = args->buffers[MS_ATTN_V];
  t->table = s->hi > 0 ? a->tables + (size_t)a->seq_ids[s->row] * a->step->max_blocks : NULL;
  t->kv_head = kv_head;
  t->group = p->num_q_heads / p->num_kv_heads;
  t->block_shift = (uint32_t)__builtin_ctz(p->block_size);
  t->rows = s->rows;
  t->queries = args->scratch;
  t->scores = t->queries + (queries * p->head_dim + 15) / 16 * 16;
  for (uint32_t r = 0; r < s->rows; ++r) {
    t->hi[r] = MS_NAME(row_end)(a, s->row + r);
    t->lo[r] = MS_NAME(row_begin)(a, t->hi[r]);
  }
}

static void MS_NAME(scale_queries)(const MS_NAME(attention_tile) * t, uint32_t row, const ms_host_args *args) {
  const MSAttentionParams *p = t->p;
  const uint32_t n = t->group * p->head_dim;
  for (uint32_t r = 0; r < t->rows; ++r) {
    const float *q = (const float *)args->buffers[MS_ATTN_Q] + p->q_offset + (size_t)(row + r) * p->q_row_stride +
                     (size_t)t->kv_head * n;
    float *to = t->queries + (size_t)r * n;
    for (uint32_t i = 0; i < n; ++i) to[i] = q[i] * p->scale;
  }
}

// A tile that this thread has for itself: its splits one after another.
static void MS_NAME(attend_whole)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_span) * s, const ms_host_args *args) {
  float *memory = t->scores + ms_attention_queries(t->p) * MS_ATTN_CHUNK;
  const MS_NAME(attention_part) total = MS_NAME(part_at)(t->p, memory);
  const MS_NAME(attention_part) next = MS_NAME(part_at)(t->p, memory + ms_attention_part(t->p));
  for (uint32_t i = 0; i < s->splits; ++i) {
    int32_t lo, hi;
    MS_NAME(split_range)(s, i, &lo, &hi);
    MS_NAME(attend_split)(t, i == 0 ? &total : &next, lo, hi);
    if (i > 0) MS_NAME(merge_parts)(t, &total, &next);
  }
  MS_NAME(finish_tile)(t, &total, s->row, args);
}

MS_VEC uint32_t MS_NAME(run_end)(const MS_NAME(attention) * a, uint32_t row, uint32_t rows) {
  uint32_t end = row + 1;
  while (end < rows && a->seq_ids[end] == a->seq_ids[row]) ++end;
  return end;
}

// The splits of a tile in pieces that this thread has, into `shared`.
static void MS_NAME(attend_pieces)(const MS_NAME(attention) * a, const MS_NAME(attention_tile) * t, const MS_NAME(attention_span) * s, float *parts,
                                   uint64_t before, uint64_t total, const ms_host_args *args) {
  bool scaled = false;
  for (uint32_t i = 0; i < s->splits; ++i) {
    const bool own = before * (uint64_t)args->threads / total == (uint64_t)args->thread;
    before += MS_NAME(split_cost)(a, s, i);
    if (!own) continue;
    if (!scaled) MS_NAME(scale_queries)(t, s->row, args);
    scaled = true;
    const MS_NAME(attention_part) part = MS_NAME(part_at)(a->p, parts + i * ms_attention_part(a->p));
    int32_t lo, hi;
    MS_NAME(split_range)(s, i, &lo, &hi);
    MS_NAME(attend_split)(t, &part, lo, hi);
  }
}

static void MS_NAME(merge_pieces)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_span) * s, float *parts, const ms_host_args *args) {
  const MS_NAME(attention_part) total = MS_NAME(part_at)(t->p, parts);
  for (uint32_t i = 1; i < s->splits; ++i) {
    const MS_NAME(attention_part) next = MS_NAME(part_at)(t->p, parts + i * ms_attention_part(t->p));
    MS_NAME(merge_parts)(t, &total, &next);
  }
  MS_NAME(finish_tile)(t, &total, s->row, args);
}

// The launch's splits in order, by sequence, kv head and tile, are cut into one piece of equal cost per thread. A tile inside
// a piece is its thread's alone. A tile in several pieces (at most threads - 1 are) leaves its splits in `shared` and is merged
// behind a barrier.
void MS_NAME(ms_attention)(const ms_host_args *args) {
  const MSAttentionParams *p = args->constants;
  void *const *buffers = args->buffers;
  const MS_NAME(attention) a = {p, buffers[MS_ATTN_STEP], buffers[MS_ATTN_POSITIONS], buffers[MS_ATTN_SEQ_IDS],
                                buffers[MS_ATTN_BLOCK_TABLES], ms_attention_tile_rows(p)};
  const uint32_t rows = a.step->num_tokens;
  const uint64_t thread = (uint64_t)args->thread, threads = (uint64_t)args->threads;
  uint64_t total = 0, before = 0;
  for (uint32_t row = 0; row < rows;) {
    const MS_NAME(attention_span) s = MS_NAME(span_at)(&a, row, rows);
    for (uint32_t i = 0; i < s.splits; ++i) total += MS_NAME(split_cost)(&a, &s, i) * p->num_kv_heads;
    row += s.rows;
  }
  uint32_t cuts = 0;      // tiles in several pieces so far
  MS_NAME(attention_tile) t, cut = {0};  // cut: the one that this thread merges
  MS_NAME(attention_span) cut_span = {0};
  float *cut_parts = NULL;
  for (uint32_t run = 0, end; run < rows; run = end) {
    end = MS_NAME(run_end)(&a, run, rows);
    for (uint32_t head = 0; head < p->num_kv_heads; ++head) {
      for (uint32_t row = run; row < end;) {
        const MS_NAME(attention_span) s = MS_NAME(span_at)(&a, row, end);
        const uint64_t at = before;
        uint64_t last = before;  // cost before its last split
        for (uint32_t i = 0; i < s.splits; ++i) last = before, before += MS_NAME(split_cost)(&a, &s, i);
        row += s.rows;
        const uint64_t first_thread = at * threads / total, last_thread = last * threads / total;
        const bool whole = first_thread == last_thread, mine = first_thread <= thread && thread <= last_thread;
        if (mine) MS_NAME(tile_of)(&a, &s, head, args, &t);
        if (mine && whole) {
          MS_NAME(scale_queries)(&t, s.row, args);
          MS_NAME(attend_whole)(&t, &s, args);
        }
        if (whole) continue;
        float *parts = (float *)args->shared + cuts++ * MS_ATTN_SPLITS * ms_attention_part(p);
        if (mine) MS_NAME(attend_pieces)(&a, &t, &s, parts, at, total, args);
        if (last_thread == thread) cut = t, cut_span = s, cut_parts = parts;
      }
    }
  }
  if (cuts == 0) return;
  ms_pool_barrier(args->pool);
  if (cut_parts != NULL) MS_NAME(merge_pieces)(&cut, &cut_span, cut_parts, args);
}

#undef MS_TILES
#undef MS_UNROLL
