// attention: what rows see, which rows make a tile, and what a tile's splits cost. See attention_layout.h.

typedef struct {
  const MSAttentionParams *p;
  const MSStep *step;
  const int32_t *positions, *seq_ids, *tables;
  const MSSequence *sequences;
  const MS_NAME(attention_packed) * packed;
  uint32_t narrow_rows, wide_rows;  // of a tile; 0: there are no wide ones
} MS_NAME(attention);

// Positions that a row sees: [keep_lo, keep_hi), which is empty unless a window leaves a gap behind it, and [lo, hi).
typedef struct {
  int32_t keep_lo, keep_hi, lo, hi;
} MS_NAME(attention_view);

// Rows of one sequence at neighbouring positions, worked on together.
typedef struct {
  uint32_t row, rows;
  MS_NAME(attention_view) view;  // positions that any of its rows sees
  uint32_t split;                // positions in a split
  uint32_t kept_splits, splits;  // splits: all, at least 1
  uint64_t seen;                 // positions, summed over its rows
  bool wide;
} MS_NAME(attention_span);

// Nothing for a position or a sequence that the block tables do not have (its result is NaN).
MS_VEC MS_NAME(attention_view) MS_NAME(row_view)(const MS_NAME(attention) * a, uint32_t row) {
  const int32_t position = a->positions[row], seq = a->seq_ids[row];
  const bool known = position >= 0 && seq >= 0 && (uint32_t)seq < a->step->num_seqs &&
                     (uint32_t)position / a->p->block_size < a->step->max_blocks;
  MS_NAME(attention_view) v = {0, 0, 0, 0};
  if (!known) return v;
  const MSSequence *s = &a->sequences[seq];
  v.hi = position + 1;
  if (a->p->window > 0 && (uint32_t)v.hi > a->p->window) v.lo = v.hi - (int32_t)a->p->window;
  if (s->window == 0 || (uint32_t)v.hi <= s->window) return v;
  const int32_t begin = v.hi - (s->window > s->keep ? (int32_t)(s->window - s->keep) : 1);  // itself at least
  if (begin <= v.lo || (uint32_t)begin <= s->keep) return v;                                // no gap
  if ((uint32_t)v.lo < s->keep) v.keep_lo = v.lo, v.keep_hi = (int32_t)s->keep;
  v.lo = begin;
  return v;
}

MS_VEC uint32_t MS_NAME(seen)(MS_NAME(attention_view) v) {
  return (uint32_t)(v.hi - v.lo) + (uint32_t)(v.keep_hi - v.keep_lo);
}

MS_VEC uint32_t MS_NAME(split_size)(uint64_t length) {
  uint64_t size = MS_ATTN_LEAST_SPLIT;
  while (size < MS_ATTN_CHUNK && size * 4 < length) size *= 2;
  while (size * MS_ATTN_ROW_SPLITS < length) size *= 2;
  return (uint32_t)size;
}

MS_VEC uint32_t MS_NAME(cuts)(int32_t lo, int32_t hi, uint32_t split) {
  return lo < hi ? (uint32_t)(hi - 1) / split - (uint32_t)lo / split + 1 : 0;
}

// The tile that starts at `row`; rows from `end` on are not its own.
static MS_NAME(attention_span) MS_NAME(span_at)(const MS_NAME(attention) * a, uint32_t row, uint32_t end) {
  const uint32_t narrow = a->narrow_rows, most = a->wide_rows > narrow ? a->wide_rows : narrow;
  const MS_NAME(attention_view) first = MS_NAME(row_view)(a, row);
  MS_NAME(attention_span) s = {.row = row, .rows = 1, .view = first, .seen = MS_NAME(seen)(first)};
  s.split = MS_NAME(split_size)(s.seen);
  MS_NAME(attention_span) least = s;  // the tile when it is narrow
  while (first.hi > 0 && s.rows < most && row + s.rows < end) {
    const MS_NAME(attention_view) v = MS_NAME(row_view)(a, row + s.rows);
    if (v.hi != s.view.hi + 1 || a->seq_ids[row + s.rows] != a->seq_ids[row]) break;
    if ((v.keep_lo < v.keep_hi) != (first.keep_lo < first.keep_hi)) break;
    if (MS_NAME(split_size)(MS_NAME(seen)(v)) != s.split) break;
    s.view.hi = v.hi;
    s.seen += MS_NAME(seen)(v);
    ++s.rows;
    if (s.rows <= narrow) least = s;
  }
  s.wide = a->wide_rows > 0 && s.rows * (a->p->num_q_heads / a->p->num_kv_heads) >= MS_ATTN_WIDE_LEAST;
  if (!s.wide) s = least;
  s.kept_splits = MS_NAME(cuts)(s.view.keep_lo, s.view.keep_hi, s.split);
  s.splits = s.kept_splits + MS_NAME(cuts)(s.view.lo, s.view.hi, s.split);
  if (s.splits == 0) s.splits = 1;
  return s;
}

// Positions [lo, hi) of one of its splits.
MS_VEC void MS_NAME(split_range)(const MS_NAME(attention_span) * s, uint32_t split, int32_t *lo, int32_t *hi) {
  const bool kept = split < s->kept_splits;
  const int32_t first = kept ? s->view.keep_lo : s->view.lo, last = kept ? s->view.keep_hi : s->view.hi;
  const int64_t begin = ((int64_t)first / s->split + (kept ? split : split - s->kept_splits)) * s->split;
  *lo = begin > first ? (int32_t)begin : first;
  *hi = begin + s->split < last ? (int32_t)(begin + s->split) : last;
}

// Relative work: bytes, and arithmetic for each query.
MS_VEC uint64_t MS_NAME(split_cost)(const MS_NAME(attention) * a, const MS_NAME(attention_span) * s, uint32_t split) {
  int32_t lo, hi;
  MS_NAME(split_range)(s, split, &lo, &hi);
  return ((uint64_t)(hi - lo) + 16) * (s->rows * (a->p->num_q_heads / a->p->num_kv_heads) + 6);
}
// Of one kv head of a wide tile.
MS_VEC uint64_t MS_NAME(head_cost)(const MS_NAME(attention) * a, const MS_NAME(attention_span) * s) {
  const uint64_t group = a->p->num_q_heads / a->p->num_kv_heads, each = (s->seen + 16 * s->rows) * group;
  return (each + 6 * (uint64_t)MS_NAME(seen)(s->view)) / a->p->num_kv_heads + 1;
}
MS_VEC uint64_t MS_NAME(span_cost)(const MS_NAME(attention) * a, const MS_NAME(attention_span) * s) {
  if (s->wide) return MS_NAME(head_cost)(a, s) * a->p->num_kv_heads;
  uint64_t cost = 0;
  for (uint32_t i = 0; i < s->splits; ++i) cost += MS_NAME(split_cost)(a, s, i);
  return cost;
}
