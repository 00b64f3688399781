// Draws: among all tokens by the chunks' sums, or among those that pass top_p, min_p, xtc and top_k. A draw inverts the
// cumulative distribution at one Philox number.

// Philox 4x32-10 of key (seed) and counter: Salmon et al., SC 2011. A double in [0, 1) from its first two words.
// use: the counter's second word: 0 the token, 1 xtc's coin.
static double MS_NAME(philox_uniform)(const MSSampling *s, uint32_t use) {
  uint32_t c0 = s->counter, c1 = use, c2 = 0, c3 = 0, k0 = s->seed_lo, k1 = s->seed_hi;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ((double)(c0 >> 5) * 67108864.0 + (double)(c1 >> 6)) * 0x1p-53;
}

MS_VEC float MS_NAME(weight_of)(float x, float scale) { return MS_NAME(weight)(vsplat(x), scale)[0]; }

// The largest of all logits and the sum of e^((x - it) * scale) by their chunks' sums. -infinity: there is none.
static float MS_NAME(total)(const ms_logits *l, uint32_t n, float scale, double *sum) {
  const uint32_t chunks = ms_sample_chunks(n);
  float max = -__builtin_inff();
  *sum = 0;
  for (uint32_t c = 0; c < chunks; ++c) max = l->sums[c].max > max ? l->sums[c].max : max;
  for (uint32_t c = 0; c < chunks && max > -__builtin_inff(); ++c) {
    const float mass = scale == 1.0f ? l->sums[c].sum : l->sums[c].tempered;
    *sum += (double)mass * (double)MS_NAME(weight_of)(l->sums[c].max - max, scale);
  }
  return max;
}

// A draw among all tokens: the chunk by the chunks' sums, then the token in it.
static uint32_t MS_NAME(draw_any)(const ms_sample_row *r, const ms_logits *l, float max, double total) {
  const uint32_t n = r->vocab_size, chunks = ms_sample_chunks(n);
  const float inverse = r->inverse;
  double target = MS_NAME(philox_uniform)(r->s, 0) * total, scale = 0;
  uint32_t chunk = 0;
  for (uint32_t c = 0; c < chunks; ++c) {
    const double share = (double)MS_NAME(weight_of)(l->sums[c].max - max, inverse);
    const double mass = (double)(inverse == 1.0f ? l->sums[c].sum : l->sums[c].tempered) * share;
    if (mass > 0) chunk = c, scale = share;
    if (mass > target) break;
    target -= mass;
  }
  target /= scale;
  const uint32_t first = chunk * MS_SAMPLE_CHUNK, end = n - first < MS_SAMPLE_CHUNK ? n : first + MS_SAMPLE_CHUNK;
  const float most = l->sums[chunk].max;
  double passed = 0;
  uint32_t chosen = MS_NAME(find_logit)(l->x + first, end - first, most) + first;
  for (uint32_t i = first; i < end; i += 16) {
    const f32x16 w = MS_NAME(weight)(MS_NAME(logits_at)(l->x, i, end) - most, inverse);
    const double here = (double)vsum(w);
    if (passed + here <= target) {
      passed += here;
      continue;
    }
    for (uint32_t j = 0; j < 16 && i + j < end; ++j) {
      if (w[j] > 0.0f) chosen = i + j;
      passed += (double)w[j];
      if (passed > target) break;
    }
    if (passed > target) break;
  }
  return chosen;
}

// Whether xtc keeps this token in any case.
static bool MS_NAME(is_special)(const ms_sample_row *r, uint32_t token) {
  const MSTokenBias *special = r->biases + r->s->xtc_first;
  for (uint32_t i = 0; i < r->s->xtc_count; ++i) {
    if ((uint32_t)special[i].token == token) return true;
  }
  return false;
}

// xtc over all tokens: `out` becomes the logits without those that are more likely than the least likely of the tokens
// above the threshold.
static void MS_NAME(xtc_all)(const ms_sample_row *r, const ms_logits *l, float max, double sum, const ms_logits *out) {
  const uint32_t n = r->vocab_size;
  const float least = (float)log((double)r->s->xtc_threshold * sum), infinity = __builtin_inff();
  f32x16 last = vsplat(infinity);
  for (uint32_t i = 0; i < n; i += 16) {
    const f32x16 v = MS_NAME(logits_at)(l->x, i, n), depth = v - max;
    last = vmin((depth == 0.0f ? depth : depth * r->scale) > least ? v : infinity, last);
  }
  const float limit = -vmaxall(-last);  // infinity: there is none above
  for (uint32_t i = 0; i < n; i += 16) {
    const f32x16 v = MS_NAME(logits_at)(l->x, i, n);
    vstore_n(out->x + i, v > limit ? vsplat(-infinity) : v, n - i < 16 ? n - i : 16);
  }
  for (uint32_t i = 0; i < r->s->xtc_count; ++i) {
    const uint32_t token = (uint32_t)r->biases[r->s->xtc_first + i].token;
    if (token < n) out->x[token] = l->x[token];
  }
  ms_sample_row sums = *r;
  sums.changes = false;
  sums.sum = r->inverse == 1.0f;
  sums.tempered = !sums.sum;
  for (uint32_t c = 0; c < ms_sample_chunks(n); ++c) MS_NAME(process_chunk)(&sums, c, out, out, NULL, 0);
}

MS_VEC void MS_NAME(measure_candidates)(ms_candidates *c, float max) {
  for (uint32_t i = 0; i < c->count; ++i) c->depth[i] = MS_NAME(logit_of)(c->token[i].key) - max;
}
MS_VEC void MS_NAME(weigh_candidates)(ms_candidates *c, float scale) {
  for (uint32_t i = 0; i < c->count; i += 16) {
    const uint32_t here = c->count - i < 16 ? c->count - i : 16;
    vstore_n(c->mass + i, MS_NAME(weight)(vload_n(c->depth + i, here), scale), here);
  }
}

// Tokens of at least `least`, in order, in memory of 2 n candidates and the sort's counts.
static ms_candidates MS_NAME(gather)(const ms_sample_row *r, const ms_logits *l, float max, float least,
                                     ms_candidate *memory) {
  const uint32_t n = r->vocab_size;
  ms_candidate *const second = memory + n;
  ms_candidates c = {memory, NULL, NULL, MS_NAME(collect)(l, n, least, memory)};
  c.token = MS_NAME(sort_candidates)(memory, second, c.count, (uint32_t *)(second + n));
  c.depth = (float *)(c.token == memory ? second : memory);
  c.mass = c.depth + n;
  MS_NAME(measure_candidates)(&c, max);
  MS_NAME(weigh_candidates)(&c, r->scale);
  return c;
}

// xtc over candidates, whose depths are then below the largest that is left: it may be far below the row's.
static void MS_NAME(xtc_some)(const ms_sample_row *r, ms_candidates *c, double sum) {
  const double limit = (double)r->s->xtc_threshold * sum;
  uint32_t above = 0, kept = 0;
  while (above < c->count && (double)c->mass[above] > limit) ++above;
  const uint32_t last = above > 0 ? c->token[above - 1].key : 0;
  for (uint32_t i = 0; i < c->count; ++i) {
    const bool drop = i < above && c->token[i].key < last;
    if (!drop || MS_NAME(is_special)(r, c->token[i].token)) c->token[kept++] = c->token[i];
  }
  c->count = kept;
  MS_NAME(measure_candidates)(c, MS_NAME(logit_of)(c->token[0].key));
  MS_NAME(weigh_candidates)(c, r->scale);
}

// How many candidates in front hold a share of `sum`. tied: and those that are as likely as the last of them.
static uint32_t MS_NAME(nucleus)(const ms_candidates *c, double share, double sum, bool tied) {
  double above = 0;
  uint32_t kept = 0;
  for (; kept < c->count; ++kept) {
    const bool equal = tied && kept > 0 && c->token[kept].key == c->token[kept - 1].key;
    if (kept > 0 && above >= share * sum && !equal) break;
    above += (double)c->mass[kept];
  }
  return kept;
}

// A draw among the tokens that pass the filters. sum: of the filters' distribution over all tokens, relative to the
// largest; used by a nucleus that no other filter comes before. xtc: it is still to be applied.
static uint32_t MS_NAME(draw_filtered)(const ms_sample_row *r, const ms_logits *l, float max, double sum, bool xtc,
                                       ms_candidate *memory) {
  const MSSampling *s = r->s;
  const uint32_t n = r->vocab_size, keep = s->min_keep ? s->min_keep : 1;
  const bool tempered_first = (s->flags & MS_SAMPLE_TEMPERATURE_FIRST) != 0;
  const bool nucleus_first = s->top_p < 1.0f && (!tempered_first || !(s->min_p > 0.0f || r->top_k));
  const bool nucleus_last = s->top_p < 1.0f && !nucleus_first;
  const float least_p = s->min_p > 0.0f ? logf(s->min_p) : -__builtin_inff();
  // What every token that passes reaches. The depths are a little more, for they are rounded.
  float least = -__FLT_MAX__;
  if (nucleus_first) {  // all tokens deeper than this together have less than 1 - top_p
    const double depth = log((double)n / ((1.0 - (double)s->top_p) * sum)) + 0.01;
    least = fmaxf(least, max - (float)(depth > 0.01 ? depth : 0.01) / r->scale - 1e-6f * fabsf(max));
  }
  if (s->min_p > 0.0f) {
    const float reach = max + least_p * 1.00001f / r->scale - 1e-6f * fabsf(max);
    least = fmaxf(least, keep > 1 ? fminf(reach, MS_NAME(bound)(l, n, max, keep)) : reach);
  }
  if (r->top_k && !xtc) least = fmaxf(least, MS_NAME(bound)(l, n, max, r->top_k));
  // Most nuclei are small, far smaller than what reaches `least`: few candidates are tried first.
  ms_candidates c;
  for (uint32_t tried = MS_SAMPLE_NUCLEUS;; tried = tried == MS_SAMPLE_NUCLEUS ? 16 * tried : n) {
    const float from = nucleus_first ? fmaxf(least, MS_NAME(bound)(l, n, max, tried)) : least;
    c = MS_NAME(gather)(r, l, max, from, memory);
    const uint32_t all = c.count;
    if (nucleus_first) c.count = MS_NAME(nucleus)(&c, (double)s->top_p, sum, !tempered_first);
    if (c.count < all || !(from > least)) break;
  }
  uint32_t kept = 0;
  double mass = 0;
  for (; kept < c.count; ++kept) {
    const float depth = c.depth[kept] == 0.0f ? 0.0f : c.depth[kept] * r->scale;
    if ((depth < least_p && kept >= keep) || (!xtc && r->top_k && kept >= r->top_k)) break;
    mass += (double)c.mass[kept];
  }
  c.count = kept;
  if (xtc) {
    MS_NAME(xtc_some)(r, &c, mass);
    if (r->top_k && c.count > r->top_k) c.count = r->top_k;
  }
  if (nucleus_last) {
    double left = 0;
    for (uint32_t i = 0; i < c.count; ++i) left += (double)c.mass[i];
    c.count = MS_NAME(nucleus)(&c, (double)s->top_p, left, false);
  }
  if (r->scale != r->inverse) MS_NAME(weigh_candidates)(&c, r->inverse);
  double total = 0, passed = 0;
  for (uint32_t i = 0; i < c.count; ++i) total += (double)c.mass[i];
  const double target = MS_NAME(philox_uniform)(s, 0) * total;
  uint32_t chosen = 0;
  for (uint32_t i = 0; i < c.count && passed <= target; ++i) {
    if (c.mass[i] > 0.0f) chosen = i;
    passed += (double)c.mass[i];
  }
  return c.token[chosen].token;
}

// One token of the logits, by the row's temperature and filters. spare: for logits without what xtc drops.
static uint32_t MS_NAME(draw)(const ms_sample_row *r, const ms_logits *l, const ms_logits *spare,
                              ms_candidate *memory) {
  const MSSampling *s = r->s;
  const uint32_t n = r->vocab_size;
  bool xtc = r->xtc;
  double sum = 0;
  float max = MS_NAME(total)(l, n, r->scale, &sum);
  if (xtc && r->xtc_first) {
    MS_NAME(xtc_all)(r, l, max, sum, spare);
    l = spare, xtc = false;
    max = MS_NAME(total)(l, n, r->scale, &sum);
  }
  if (s->top_p < 1.0f || s->min_p > 0.0f || r->top_k) return MS_NAME(draw_filtered)(r, l, max, sum, xtc, memory);
  max = MS_NAME(total)(l, n, r->inverse, &sum);
  return MS_NAME(draw_any)(r, l, max, sum);
}
