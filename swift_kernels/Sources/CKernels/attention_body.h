// attention: paged, ragged, split over the context. attention_layout.h says how the work is divided.

MS_VEC void MS_NAME(set_head)(MS_NAME(attention_tile) * t, uint32_t head) {
  t->plane_head = t->first_head + head;
  t->queries = t->all_queries + (size_t)head * t->rows * t->group * t->p->head_dim;
}

// Positions [lo, hi) of one chunk for some kv heads, `stride` positions of one head before those of the next.
static void MS_NAME(attend_heads)(MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part, uint32_t chunk,
                                  uint32_t lo, uint32_t hi, uint32_t first_head, uint32_t end_head, uint32_t stride) {
  const uint32_t queries = t->rows * t->group, dim = t->p->value_dim;
  for (uint32_t at = lo & ~15u; at < hi; at += stride) {
    const uint32_t end = hi - at < stride ? hi : at + stride;
    float *scores = t->scores;
    for (uint32_t head = first_head; head < end_head; ++head) {
      MS_NAME(set_head)(t, head);
      for (uint32_t j = 0, nr; j < queries; j += nr, scores += (size_t)nr * MS_ATTN_CHUNK) {
        nr = MS_NAME(tile_width)(queries - j);
        MS_NAME(score_any)(t, scores, j, nr, chunk, at, end);
      }
    }
  }
  float *scores = t->scores;
  for (uint32_t head = first_head; head < end_head; ++head) {
    MS_NAME(set_head)(t, head);
    for (uint32_t j = 0, n; j < queries; j += n, scores += (size_t)n * MS_ATTN_CHUNK) {
      n = queries - j < 16 ? queries - j : 16;
      MS_NAME(soften_queries)(t, part, scores, head * queries, j, n, chunk, lo, hi);
    }
  }
  for (uint32_t at = lo; at < hi;) {
    const uint32_t end = hi - at < stride ? hi : (at & ~15u) + stride;
    float *values = part->values + (size_t)first_head * queries * dim;
    scores = t->scores;
    for (uint32_t head = first_head; head < end_head; ++head) {
      MS_NAME(set_head)(t, head);
      for (uint32_t j = 0, nr; j < queries; j += nr) {
        nr = MS_NAME(tile_width)(queries - j);
        MS_NAME(weigh_seen)(t, values, scores, j, nr, chunk, at, end);
        values += (size_t)nr * dim, scores += (size_t)nr * MS_ATTN_CHUNK;
      }
    }
    at = end;
  }
}

// A tile whose keys or values are what convert_chunk made of positions [lo, hi) of a chunk.
MS_VEC void MS_NAME(view_chunk)(const MS_NAME(attention_tile) * t, MS_NAME(attention_tile) * c, uint32_t chunk,
                                uint32_t lo, uint32_t hi) {
  static const int32_t blocks[MS_ATTN_CHUNK / 16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  *c = *t;
  c->keys = t->converted_keys, c->values = t->converted_values;
  c->table = blocks;
  c->k_codec = c->v_codec = MS_KV_FLOAT32, c->block_shift = 4, c->plane_heads = 1, c->plane_head = 0;
  for (uint32_t r = 0; r < t->rows; ++r) {
    c->lo[r] = (int32_t)(MS_NAME(clip)(t->lo[r], lo, hi) - chunk);
    c->hi[r] = (int32_t)(MS_NAME(clip)(t->hi[r], lo, hi) - chunk);
  }
}

// Positions [lo, hi) of one chunk for the kv head of a wide tile. 16-bit floats become planes of the chunk alone, in
// float32; codes are read where they are. The scores of a few queries at a time stay in the first-level cache.
static void MS_NAME(attend_wide_chunk)(MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part,
                                       uint32_t chunk, uint32_t lo, uint32_t hi) {
  const uint32_t queries = t->rows * t->group;
  MS_NAME(set_head)(t, 0);
  const bool keys = t->converted_keys != NULL, values = t->converted_values != NULL;
  MS_NAME(attention_tile) c;
  if (keys || values) {
    MS_NAME(convert_chunk)(t, chunk, lo, hi);
    MS_NAME(view_chunk)(t, &c, chunk, lo, hi);
  }
  float *to = part->values;
  for (uint32_t j = 0, nr; j < queries; j += nr, to += (size_t)nr * t->p->value_dim) {
    nr = MS_NAME(tile_width)(queries - j);
    if (keys) {
      MS_NAME(score_float32)(&c, t->scores, j, nr, 0, lo - chunk, hi - chunk);
    } else {
      MS_NAME(score_any)(t, t->scores, j, nr, chunk, lo, hi);
    }
    MS_NAME(soften_queries)(t, part, t->scores, 0, j, nr, chunk, lo, hi);
    if (values) {
      MS_NAME(weigh_seen)(&c, to, t->scores, j, nr, 0, lo - chunk, hi - chunk);
    } else {
      MS_NAME(weigh_seen)(t, to, t->scores, j, nr, chunk, lo, hi);
    }
  }
}

// One split of a tile, from nothing. A single row takes its kv heads together, since their keys lie side by side in
// memory; for several, a head's scores fill the cache.
static void MS_NAME(attend_split)(MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part, int32_t lo,
                                  int32_t hi) {
  MS_NAME(clear_part)(t, part);
  for (uint32_t chunk = (uint32_t)lo / MS_ATTN_CHUNK * MS_ATTN_CHUNK; chunk < (uint32_t)hi; chunk += MS_ATTN_CHUNK) {
    const uint32_t begin = MS_NAME(clip)(lo, chunk, chunk + MS_ATTN_CHUNK);
    const uint32_t end = MS_NAME(clip)(hi, chunk, chunk + MS_ATTN_CHUNK);
    if (t->wide) {
      MS_NAME(attend_wide_chunk)(t, part, chunk, begin, end);
    } else if (t->rows == 1) {
      MS_NAME(attend_heads)(t, part, chunk, begin, end, 0, t->heads, MS_ATTN_STRIDE);
    } else {
      for (uint32_t head = 0; head < t->heads; ++head) {
        MS_NAME(attend_heads)(t, part, chunk, begin, end, head, head + 1, MS_ATTN_CHUNK);
      }
    }
  }
}

// A split by its number. first: the first that this tile attends to.
static void MS_NAME(attend_numbered)(const MS_NAME(attention) * a, MS_NAME(attention_tile) * t,
                                     const MS_NAME(attention_span) * s, uint32_t split, bool first,
                                     const MS_NAME(attention_part) * part) {
  const bool kept = split < s->kept_splits;
  int32_t lo, hi;
  MS_NAME(split_range)(s, split, &lo, &hi);
  if (first || split == s->kept_splits) {
    for (uint32_t r = 0; r < t->rows; ++r) {
      const MS_NAME(attention_view) v = MS_NAME(row_view)(a, s->row + r);
      t->lo[r] = kept ? v.keep_lo : v.lo, t->hi[r] = kept ? v.keep_hi : v.hi;
    }
  }
  MS_NAME(attend_split)(t, part, lo, hi);
}

// Divides by the sums, and writes the tile's rows.
static void MS_NAME(finish_tile)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * total,
                                 const ms_host_args *args) {
  const MSAttentionParams *p = t->p;
  const float *sinks = args->buffers[MS_ATTN_SINKS];
  uint32_t j = 0;
  for (uint32_t kv_head = t->first_head; kv_head < t->first_head + t->heads; ++kv_head) {
    for (uint32_t r = 0; r < t->rows; ++r) {
      for (uint32_t head = kv_head * t->group; head < (kv_head + 1) * t->group; ++head, ++j) {
        float keep = 1.0f, sum = total->sum[j];
        if (p->has_sinks) {
          const float max = sinks[head] > total->max[j] ? sinks[head] : total->max[j];
          keep = vexp(vsplat(total->max[j] - max))[0];
          sum = sum * keep + vexp(vsplat(sinks[head] - max))[0];
        }
        const float scale = t->table != NULL ? keep / sum : __builtin_nanf("");
        float *from = total->values + (size_t)j * p->value_dim;
        if (ms_kv_is_turbo(t->v_codec)) {
          MS_NAME(order_values)(from, p->value_dim, t->v_codec);
          MS_NAME(rotate_back)(from, p->value_dim, t->packed->v.signs);
        }
        float *to = (float *)args->buffers[MS_ATTN_OUT] + ((size_t)(t->row + r) * p->num_q_heads + head) * p->value_dim;
        for (uint32_t e = 0; e < p->value_dim; e += 16) vstore(to + e, vload(from + e) * scale);
      }
    }
  }
}

// A tile of kv heads [first_head, first_head + heads) with its queries scaled, and packed for packed keys; its scratch
// lies behind them.
static void MS_NAME(begin_tile)(const MS_NAME(attention) * a, const MS_NAME(attention_span) * s, uint32_t first_head,
                                uint32_t heads, const ms_host_args *args, MS_NAME(attention_tile) * t) {
  const MSAttentionParams *p = a->p;
  const uint32_t group = p->num_q_heads / p->num_kv_heads, n = group * p->head_dim;
  t->p = p;
  t->keys = args->buffers[MS_ATTN_K], t->values = args->buffers[MS_ATTN_V];
  t->table = s->view.hi > 0 ? a->tables + (size_t)a->seq_ids[s->row] * a->step->max_blocks : NULL;
  t->k_codec = ms_kv_base(p->k_codec), t->v_codec = ms_kv_base(p->v_codec);
  t->packed = a->packed;
  t->block_shift = (uint32_t)__builtin_ctz(p->block_size);
  t->plane_heads = p->num_kv_heads;
  t->row = s->row, t->rows = s->rows;
  t->group = group;
  t->first_head = first_head, t->heads = heads;
  t->all_queries = args->scratch;
  t->wide = false;
  t->next_table = NULL, t->next_lo = t->next_hi = 0;
  const float scale = p->scale;
  const float *q = (const float *)args->buffers[MS_ATTN_Q] + p->q_offset + (size_t)s->row * p->q_row_stride;
  q += (size_t)first_head * n;
  for (uint32_t r = 0; r < s->rows; ++r, q += p->q_row_stride) {
    for (uint32_t head = 0; head < heads; ++head) {
      const float *from = q + (size_t)head * n;
      float *to = t->all_queries + ((size_t)head * s->rows + r) * n;
      for (uint32_t i = 0; i < n; ++i) to[i] = from[i] * scale;
      if (ms_kv_is_float(t->k_codec)) continue;
      for (uint32_t i = 0; i < n; i += p->head_dim) MS_NAME(pack_query)(a->packed, p->head_dim, to + i);
    }
  }
}

// Fetches where a tile's results go: of one kv head, they are short pieces that the hardware does not foresee.
MS_VEC void MS_NAME(prefetch_out)(const MS_NAME(attention_tile) * t, const ms_host_args *args) {
  const uint32_t n = t->group * t->p->value_dim;
  const float *to = (const float *)args->buffers[MS_ATTN_OUT] + (size_t)t->first_head * n;
  for (uint32_t r = 0; r < t->rows; ++r) {
    const float *row = to + (size_t)(t->row + r) * t->p->num_q_heads * t->p->value_dim;
    for (uint32_t i = 0; i < n; i += 16) __builtin_prefetch(row + i, 1, 2);
  }
}

// A tile that this thread has for itself; memory: for two parts of `queries`.
static void MS_NAME(attend_whole)(const MS_NAME(attention) * a, MS_NAME(attention_tile) * t,
                                  const MS_NAME(attention_span) * s, float *memory, size_t queries,
                                  const ms_host_args *args) {
  const MS_NAME(attention_part) total = MS_NAME(part_at)(t->p, queries, memory);
  const MS_NAME(attention_part) next = MS_NAME(part_at)(t->p, queries, memory + ms_attention_part(t->p, queries));
  for (uint32_t i = 0; i < s->splits; ++i) {
    MS_NAME(attend_numbered)(a, t, s, i, i == 0, i == 0 ? &total : &next);
    if (i > 0) MS_NAME(merge_parts)(t, &total, &next);
  }
  MS_NAME(finish_tile)(t, &total, args);
}

// One kv head of a wide tile.
static void MS_NAME(attend_wide)(const MS_NAME(attention) * a, MS_NAME(attention_tile) * t,
                                 const MS_NAME(attention_span) * s, uint32_t head, const ms_host_args *args) {
  MS_NAME(begin_tile)(a, s, head, 1, args, t);
  MS_NAME(prefetch_out)(t, args);
  t->wide = true;
  t->scores = t->all_queries + ms_attention_scaled(a->p, MS_ATTN_WIDE_TILE);
  float *memory = t->scores + MS_ATTN_WIDE_SCORES * MS_ATTN_CHUNK;
  float *converted = memory + 2 * ms_attention_part(a->p, MS_ATTN_WIDE_TILE);
  t->converted_keys = ms_attention_converts(t->k_codec) ? converted : NULL;
  if (t->converted_keys != NULL) converted += MS_ATTN_CHUNK * a->p->head_dim;
  t->converted_values = ms_attention_converts(t->v_codec) ? converted : NULL;
  MS_NAME(attend_whole)(a, t, s, memory, MS_ATTN_WIDE_TILE, args);
}

// Which thread has the piece of work [at, at + cost).
MS_VEC uint64_t MS_NAME(piece_thread)(uint64_t at, uint64_t cost, uint64_t total, uint64_t threads) {
  return (at + cost / 2) * threads / total;
}

// This thread's splits of a tile that several threads share, into parts [split].
static void MS_NAME(attend_pieces)(const MS_NAME(attention) * a, MS_NAME(attention_tile) * t,
                                   const MS_NAME(attention_span) * s, float *parts, uint64_t at, uint64_t total,
                                   const ms_host_args *args) {
  const size_t queries = a->p->num_kv_heads * ms_attention_queries(a->p);
  bool first = true;
  for (uint32_t i = 0; i < s->splits; ++i) {
    const uint64_t cost = MS_NAME(split_cost)(a, s, i);
    if (MS_NAME(piece_thread)(at, cost, total, (uint64_t)args->threads) == (uint64_t)args->thread) {
      const MS_NAME(attention_part) part =
          MS_NAME(part_at)(a->p, queries, parts + i * ms_attention_part(a->p, queries));
      MS_NAME(attend_numbered)(a, t, s, i, first, &part);
      first = false;
    }
    at += cost;
  }
}

static void MS_NAME(merge_pieces)(const MS_NAME(attention_tile) * t, uint32_t splits, float *parts,
                                  const ms_host_args *args) {
  const size_t queries = t->p->num_kv_heads * ms_attention_queries(t->p);
  const MS_NAME(attention_part) total = MS_NAME(part_at)(t->p, queries, parts);
  for (uint32_t i = 1; i < splits; ++i) {
    const MS_NAME(attention_part) next = MS_NAME(part_at)(t->p, queries, parts + i * ms_attention_part(t->p, queries));
    MS_NAME(merge_parts)(t, &total, &next);
  }
  MS_NAME(finish_tile)(t, &total, args);
}

// The launch's splits, tile by tile, are cut into one piece of equal cost per thread; a wide tile's pieces are its kv
// heads. A narrow tile inside a piece is its thread's alone. One in several pieces (at most threads - 1 are) leaves its
// splits in `shared`, and its last thread merges them behind a barrier.
void MS_NAME(ms_attention)(const ms_host_args *args) {
  const MSAttentionParams *p = args->constants;
  void *const *buffers = args->buffers;
  const MSStep *step = buffers[MS_ATTN_STEP];
  const uint32_t rows = step->num_tokens;
  const uint64_t thread = (uint64_t)args->thread, threads = (uint64_t)args->threads;
  MS_NAME(attention_packed) packed;
  MS_NAME(pack_attention)(&packed, p, buffers[MS_ATTN_K], buffers[MS_ATTN_V]);
  const MS_NAME(attention) a = {p,
                                step,
                                buffers[MS_ATTN_POSITIONS],
                                buffers[MS_ATTN_SEQ_IDS],
                                buffers[MS_ATTN_BLOCK_TABLES],
                                buffers[MS_ATTN_SEQUENCES],
                                &packed,
                                ms_attention_tile_rows(p),
                                ms_attention_wide_rows(p, rows, (uint32_t)threads)};
  const size_t narrow = p->num_kv_heads * ms_attention_queries(p), shared_part = ms_attention_narrow_part(p);
  uint64_t total = 0, at = 0;
  for (uint32_t row = 0; row < rows;) {
    const MS_NAME(attention_span) s = MS_NAME(span_at)(&a, row, rows);
    total += MS_NAME(span_cost)(&a, &s);
    row += s.rows;
  }
  uint32_t shared_tiles = 0;
  MS_NAME(attention_tile) t, own;  // own: the shared tile that this thread merges
  uint32_t own_splits = 0;
  float *own_parts = NULL;
  for (uint32_t row = 0; row < rows;) {
    const MS_NAME(attention_span) s = MS_NAME(span_at)(&a, row, rows);
    row += s.rows;
    if (s.wide) {
      const uint64_t cost = MS_NAME(head_cost)(&a, &s);
      for (uint32_t head = 0; head < p->num_kv_heads; ++head, at += cost) {
        if (MS_NAME(piece_thread)(at, cost, total, threads) == thread) MS_NAME(attend_wide)(&a, &t, &s, head, args);
      }
      continue;
    }
    const uint64_t first = at, first_cost = MS_NAME(split_cost)(&a, &s, 0);
    const uint64_t last_cost = MS_NAME(split_cost)(&a, &s, s.splits - 1);
    at += MS_NAME(span_cost)(&a, &s);
    const uint64_t from = MS_NAME(piece_thread)(first, first_cost, total, threads);
    const uint64_t to = MS_NAME(piece_thread)(at - last_cost, last_cost, total, threads);
    float *parts = (float *)args->shared + shared_tiles * MS_ATTN_SPLITS * shared_part;
    shared_tiles += from != to;
    if (thread < from || thread > to) continue;
    MS_NAME(begin_tile)(&a, &s, 0, p->num_kv_heads, args, &t);
    t.scores = t.all_queries + ms_attention_scaled(p, narrow);
    if (from == to) {
      if (row < rows) {
        const MS_NAME(attention_view) next = MS_NAME(row_view)(&a, row);
        t.next_table = next.hi > 0 ? a.tables + (size_t)a.seq_ids[row] * step->max_blocks : NULL;
        t.next_lo = (uint32_t)next.lo & ~15u, t.next_hi = (uint32_t)next.hi;
      }
      MS_NAME(attend_whole)(&a, &t, &s, t.scores + ms_attention_narrow_scores(p), narrow, args);
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
#undef MS_PACKED_TILES
#undef MS_UNROLL
