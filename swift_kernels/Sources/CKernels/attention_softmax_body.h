// attention: the running softmax of a tile's queries, and what two runs over neighbouring positions make together.

// A result over some positions. Queries are numbered by kv head of the tile, row, and q head of the group.
typedef struct {
  float *values;  // [queries, value_dim], not divided by the sum
  float *max;     // [queries]
  float *sum;     // [queries] of e^(score - max)
} MS_NAME(attention_part);

MS_VEC MS_NAME(attention_part) MS_NAME(part_at)(const MSAttentionParams *p, size_t queries, float *memory) {
  float *max = memory + queries * p->value_dim;
  return (MS_NAME(attention_part)){memory, max, max + (queries + 15) / 16 * 16};
}

// Nothing seen so far.
static void MS_NAME(clear_part)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part) {
  const uint32_t queries = t->heads * t->rows * t->group;
  memset(part->values, 0, (size_t)queries * t->p->value_dim * sizeof(float));
  for (uint32_t j = 0; j < queries; ++j) part->max[j] = -__FLT_MAX__, part->sum[j] = 0;
}

// Scores of positions [lo, hi) of a chunk, capped; -inf for others in their vectors. Returns the largest, or `most`.
MS_VEC float MS_NAME(cap_scores)(float *scores, float softcap, float most, uint32_t chunk, uint32_t lo, uint32_t hi) {
  const uint32_t begin = (lo & ~15u) - chunk, end = hi - chunk;
  f32x16 max = vsplat(most);
  for (uint32_t i = begin; i < end; i += 16) {
    f32x16 s = vload(scores + i);
    const bool whole = i + 16 <= end && i + chunk >= lo;
    if (softcap != 0.0f || !whole) {
      if (softcap != 0.0f) s = vtanh(s / softcap) * softcap;
      if (i + 16 > end) s = vfirst(s, end - i, vsplat(-__builtin_inff()));
      if (i + chunk < lo) s = vfirst(vsplat(-__builtin_inff()), lo - chunk - i, s);
      vstore(scores + i, s);
    }
    max = vmax(s, max);
  }
  return vmaxall(max);
}

// Scores become weights e^(score - max), times `scales` of the chunk's positions unless NULL; returns the sum without
// them.
MS_VEC float MS_NAME(weights_of)(float *scores, float max, uint32_t chunk, uint32_t lo, uint32_t hi,
                                 const float *scales) {
  f32x16 sum = vsplat(0);
  for (uint32_t i = (lo & ~15u) - chunk; i < hi - chunk; i += 16) {
    const f32x16 w = vexp(vload(scores + i) - max);
    vstore(scores + i, scales != NULL ? w * vload(scales + i) : w);
    sum += w;
  }
  return vsum(sum);
}

// Scores of n <= 16 queries from j of a kv head, `first` queries behind the part's first, at those positions [lo, hi) of
// a chunk that they see become weights; values and sums follow a new maximum. They go through each step together: one
// alone would wait for its maximum.
static void MS_NAME(soften_queries)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * part,
                                    float *scores, uint32_t first, uint32_t j, uint32_t n, uint32_t chunk, uint32_t lo,
                                    uint32_t hi) {
  const uint32_t dim = t->p->value_dim;
  float *max = part->max + first + j, *sum = part->sum + first + j;
  uint32_t from[16], to[16];
  _Alignas(64) float most[16] = {0}, keep[16];
  _Alignas(64) float
      scales[MS_ATTN_CHUNK];  // of turbo values: NaN where one was not finite, so none that is not seen counts
  const bool turbo = ms_kv_is_turbo(t->v_codec);
  if (turbo) MS_NAME(value_scales)(t, scales, chunk, lo, hi);
  for (uint32_t i = 0, row = j / t->group, left = t->group - j % t->group; i < n; ++i, --left) {
    if (left == 0) ++row, left = t->group;
    from[i] = MS_NAME(clip)(t->lo[row], lo, hi), to[i] = MS_NAME(clip)(t->hi[row], lo, hi);
    most[i] = max[i];
    if (from[i] >= to[i]) continue;
    most[i] = MS_NAME(cap_scores)(scores + (size_t)i * MS_ATTN_CHUNK, t->p->softcap, max[i], chunk, from[i], to[i]);
  }
  vstore(keep, vexp(vload_n(max, n) - vload(most)));
  for (uint32_t i = 0; i < n; ++i) {
    if (from[i] >= to[i]) continue;
    float *s = scores + (size_t)i * MS_ATTN_CHUNK;
    const float more = turbo ? MS_NAME(weights_of)(s, most[i], chunk, from[i], to[i], scales)
                             : MS_NAME(weights_of)(s, most[i], chunk, from[i], to[i], NULL);
    max[i] = most[i];
    sum[i] = sum[i] * keep[i] + more;
    if (keep[i] == 1.0f) continue;
    float *values = part->values + (size_t)(first + j + i) * dim;
    for (uint32_t e = 0; e < dim; e += 16) vstore(values + e, vload(values + e) * keep[i]);
  }
}

// total becomes the result over its positions and those of `next`, which follow them.
static void MS_NAME(merge_parts)(const MS_NAME(attention_tile) * t, const MS_NAME(attention_part) * total,
                                 const MS_NAME(attention_part) * next) {
  const uint32_t dim = t->p->value_dim, queries = t->heads * t->rows * t->group;
  for (uint32_t at = 0; at < queries; at += 16) {
    const uint32_t n = queries - at < 16 ? queries - at : 16;
    const f32x16 before = vload_n(total->max + at, n), after = vload_n(next->max + at, n);
    const f32x16 max = before > after ? before : after;
    _Alignas(64) float a[16], b[16];
    vstore(a, vexp(before - max));
    vstore(b, vexp(after - max));
    for (uint32_t i = 0, j = at; i < n; ++i, ++j) {
      float *to = total->values + (size_t)j * dim;
      const float *from = next->values + (size_t)j * dim;
      if (next->max[j] == -__FLT_MAX__ && next->sum[j] == 0.0f) continue;  // the row sees none of these positions
      if (total->max[j] == -__FLT_MAX__ && total->sum[j] == 0.0f) {        // or none before them
        memcpy(to, from, dim * sizeof(float));
        total->max[j] = next->max[j];
        total->sum[j] = next->sum[j];
        continue;
      }
      for (uint32_t e = 0; e < dim; e += 16) {
        vstore(to + e, vfma(vload(from + e), vsplat(b[i]), vload(to + e) * a[i]));
      }
      total->sum[j] = total->sum[j] * a[i] + next->sum[j] * b[i];
      total->max[j] = max[i];
    }
  }
}
