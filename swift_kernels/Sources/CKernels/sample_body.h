// sample: one token per sampled row. Filters as mlx-lm's make_sampler applies them (top_p, min_p, top_k on the model's
// own distribution, then the temperature); the draw inverts the cumulative distribution at one Philox number.

// Philox 4x32-10 of key (seed) and counter: Salmon et al., SC 2011. A double in [0, 1) from its first two words.
static double MS_NAME(philox_uniform)(const MSSampling *s) {
  uint32_t c0 = s->counter, c1 = 0, c2 = 0, c3 = 0, k0 = s->seed_lo, k1 = s->seed_hi;
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

// e^(x * inverse) for x <= 0, and 1 for 0 even at an infinite inverse (a tiny temperature).
MS_VEC f32x16 MS_NAME(weight)(f32x16 x, float inverse) { return vexp(x == 0.0f ? x : x * inverse); }

// Sums of logits [0, n). inverse: 1 / temperature; 1: `tempered` is `sum`.
static void MS_NAME(sum_chunk)(const float *x, uint32_t n, float inverse, ms_chunk_sums *out) {
  const f32x16 none = vsplat(-__builtin_inff());
  f32x16 max[4] = {none, none, none, none};
  i32x16 finite = -1;
  uint32_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (uint32_t j = 0; j < 4; ++j) {
      const f32x16 v = vload(x + i + 16 * j);
      max[j] = vmax(v, max[j]);
      finite &= v < __builtin_inff();
    }
  }
  for (; i < n; i += 16) {
    const f32x16 v = n - i < 16 ? vfirst(vload_n(x + i, n - i), n - i, none) : vload(x + i);
    max[0] = vmax(v, max[0]);
    finite &= v < __builtin_inff();
  }
  const float most = vmaxall(vmax(vmax(max[0], max[1]), vmax(max[2], max[3])));
  *out = (ms_chunk_sums){most, 0, 0, __builtin_reduce_and(finite) == 0};
  if (out->bad || most == -__builtin_inff()) return;
  f32x16 sum[2] = {vsplat(0), vsplat(0)}, tempered[2] = {vsplat(0), vsplat(0)};
  for (i = 0; i < n; i += 32) {
    for (uint32_t j = 0; j < 2 && i + 16 * j < n; ++j) {
      const uint32_t rest = n - i - 16 * j;
      const f32x16 v = (rest < 16 ? vfirst(vload_n(x + i + 16 * j, rest), rest, none) : vload(x + i + 16 * j)) - most;
      sum[j] += vexp(v);
      if (inverse != 1.0f) tempered[j] += MS_NAME(weight)(v, inverse);
    }
  }
  out->sum = vsum(sum[0] + sum[1]);
  out->tempered = inverse != 1.0f ? vsum(tempered[0] + tempered[1]) : out->sum;
}

// The first index of [0, n) with this value.
static uint32_t MS_NAME(find_logit)(const float *x, uint32_t n, float value) {
  uint32_t i = 0;
  while (i + 16 <= n && __builtin_reduce_or(vload(x + i) == value) == 0) i += 16;
  while (i + 1 < n && x[i] != value) ++i;
  return i;
}

// 1 + how many logits come before this token's, equal ones by their index.
static uint32_t MS_NAME(rank)(const float *x, uint32_t n, uint32_t token) {
  const float value = x[token];
  const uint32_t own = token & ~15u;
  i32x16 count = 0;
  for (uint32_t i = 0; i < own; i += 16) count -= vload(x + i) >= value;
  for (uint32_t i = own + 16; i + 16 <= n; i += 16) count -= vload(x + i) > value;
  uint32_t rank = 1 + (uint32_t)__builtin_reduce_add(count);
  for (uint32_t i = own; i < n && i < own + 16; ++i) rank += x[i] > value || (x[i] == value && i < token);
  for (uint32_t i = n & ~15u; i < n && i >= own + 16; ++i) rank += x[i] > value;
  return rank;
}

// An order-preserving key of -x; +0 and -0 are one.
MS_VEC uint32_t MS_NAME(key_of)(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x + 0.0f);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
MS_VEC float MS_NAME(logit_of)(uint32_t key) { return __builtin_bit_cast(float, key >> 31 ? key : ~key & 0x7fffffffu); }

// Logits of the first candidates, at most 16; the other lanes are the first's.
MS_VEC f32x16 MS_NAME(candidate_logits)(const ms_candidate *a, uint32_t count) {
  f32x16 x = vsplat(MS_NAME(logit_of)(a[0].key));
  for (uint32_t i = 1; i < 16 && i < count; ++i) x[i] = MS_NAME(logit_of)(a[i].key);
  return x;
}

// Tokens with logits of at least `least`, in order of their index.
static uint32_t MS_NAME(collect)(const float *x, uint32_t n, float least, ms_candidate *out) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < n; i += 16) {
    const uint32_t rest = n - i < 16 ? n - i : 16;
    if (rest == 16 && __builtin_reduce_or(vload(x + i) >= least) == 0) continue;
    for (uint32_t j = i; j < i + rest; ++j) {
      out[count] = (ms_candidate){MS_NAME(key_of)(x[j]), j};
      count += x[j] >= least;
    }
  }
  return count;
}

// Stable, so that equal logits stay in order of their index. Returns the array that holds the result.
static ms_candidate *MS_NAME(sort_candidates)(ms_candidate *a, ms_candidate *b, uint32_t n, uint32_t *counts) {
  if (n <= 32) {
    for (uint32_t i = 1; i < n; ++i) {
      const ms_candidate moved = a[i];
      uint32_t j = i;
      for (; j > 0 && a[j - 1].key > moved.key; --j) a[j] = a[j - 1];
      a[j] = moved;
    }
    return a;
  }
  memset(counts, 0, 3 * MS_SAMPLE_DIGIT * sizeof *counts);
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t d = 0; d < 3; ++d) ++counts[d * MS_SAMPLE_DIGIT + (a[i].key >> 11 * d & (MS_SAMPLE_DIGIT - 1))];
  }
  for (uint32_t d = 0; d < 3; ++d) {
    uint32_t *count = counts + d * MS_SAMPLE_DIGIT, at = 0;
    for (uint32_t i = 0; i < MS_SAMPLE_DIGIT; ++i) {
      const uint32_t here = count[i];
      count[i] = at;
      at += here;
    }
    for (uint32_t i = 0; i < n; ++i) b[count[a[i].key >> 11 * d & (MS_SAMPLE_DIGIT - 1)]++] = a[i];
    ms_candidate *const swap = a;
    a = b, b = swap;
  }
  return a;
}

// How far below the largest logit the filters can reach: what lies deeper is never kept. Infinity: top_k alone decides.
static float MS_NAME(filter_depth)(const MSSampling *s, uint32_t n, double sum) {
  float depth = __builtin_inff();
  if (s->top_p < 1.0f) {  // all tokens deeper than this together have less than 1 - top_p
    const double tail = log((double)n / ((1.0 - (double)s->top_p) * sum)) + 0.01;
    depth = tail > 0.01 ? (float)tail : 0.01f;
  }
  const float by_min_p = s->min_p > 0.0f ? -logf(s->min_p) : __builtin_inff();
  return by_min_p < depth ? by_min_p : depth;
}

// A draw among the tokens that pass the filters. sum: of e^(x - max) over the row.
static void MS_NAME(draw_filtered)(const float *x, uint32_t n, const MSSampling *s, float max, double sum,
                                   ms_candidate *memory, MSSampled *out) {
  const float inverse = 1.0f / s->temperature, depth = MS_NAME(filter_depth)(s, n, sum);
  ms_candidate *a = memory, *b = memory + n;
  uint32_t count = 0;
  if (depth < __builtin_inff()) {
    count = MS_NAME(collect)(x, n, max - depth, a);
  } else {
    for (float reach = 4.0f; count < s->top_k && reach < 1e38f; reach *= 4.0f) {
      count = MS_NAME(collect)(x, n, max - reach, a);
    }
    if (count < s->top_k) count = MS_NAME(collect)(x, n, -__FLT_MAX__, a);
  }
  a = MS_NAME(sort_candidates)(a, b, count, (uint32_t *)(memory + 2 * (size_t)n));
  const double nucleus = (double)s->top_p * sum;
  const float least = s->min_p > 0.0f ? logf(s->min_p) : -__builtin_inff();
  if (s->top_k > 0 && count > s->top_k) count = s->top_k;
  double above = 0, total = 0;
  uint32_t kept = 0;
  for (bool more = true; more && kept < count;) {
    const f32x16 depths = MS_NAME(candidate_logits)(a + kept, count - kept) - max;
    const f32x16 mass = vexp(depths), weights = MS_NAME(weight)(depths, inverse);
    for (uint32_t i = 0; i < 16 && kept < count; ++i) {
      const bool tied = kept > 0 && a[kept].key == a[kept - 1].key;
      more = !((s->top_p < 1.0f && above >= nucleus && !tied) || depths[i] < least);
      if (!more) break;
      above += (double)mass[i];
      total += (double)weights[i];
      ++kept;
    }
  }
  const double target = MS_NAME(philox_uniform)(s) * total;
  double passed = 0;
  uint32_t chosen = 0;
  for (uint32_t at = 0; at < kept && passed <= target; at += 16) {
    const uint32_t n_here = kept - at < 16 ? kept - at : 16;
    const f32x16 weights = MS_NAME(weight)(MS_NAME(candidate_logits)(a + at, n_here) - max, inverse);
    for (uint32_t i = 0; i < n_here && passed <= target; ++i) {
      if (weights[i] > 0.0f) chosen = at + i;
      passed += (double)weights[i];
    }
  }
  out->token = (int32_t)a[chosen].token;
  out->rank = chosen + 1;
}

// A draw among all tokens: the chunk by the chunks' sums, then the token in it.
static void MS_NAME(draw_any)(const float *x, uint32_t n, const MSSampling *s, const ms_chunk_sums *sums, float max,
                              MSSampled *out) {
  const uint32_t chunks = ms_sample_chunks(n);
  const float inverse = 1.0f / s->temperature;
  double total = 0;
  for (uint32_t c = 0; c < chunks; ++c)
    total += (double)sums[c].tempered * (double)MS_NAME(weight)(vsplat(sums[c].max - max), inverse)[0];
  double target = MS_NAME(philox_uniform)(s) * total, scale = 0;
  uint32_t chunk = 0;
  for (uint32_t c = 0; c < chunks; ++c) {
    const double share = (double)MS_NAME(weight)(vsplat(sums[c].max - max), inverse)[0];
    const double mass = (double)sums[c].tempered * share;
    if (mass > 0) chunk = c, scale = share;
    if (mass > target) break;
    target -= mass;
  }
  target /= scale;
  const uint32_t first = chunk * MS_SAMPLE_CHUNK, end = n - first < MS_SAMPLE_CHUNK ? n : first + MS_SAMPLE_CHUNK;
  double passed = 0;
  uint32_t chosen = MS_NAME(find_logit)(x + first, end - first, sums[chunk].max) + first;
  for (uint32_t i = first; i < end; i += 16) {
    const uint32_t rest = end - i < 16 ? end - i : 16;
    const f32x16 w =
        MS_NAME(weight)(vfirst(vload_n(x + i, rest), rest, vsplat(-__builtin_inff())) - sums[chunk].max, inverse);
    const double here = (double)vsum(w);
    if (passed + here <= target) {
      passed += here;
      continue;
    }
    for (uint32_t j = 0; j < rest; ++j) {
      if (w[j] > 0.0f) chosen = i + j;
      passed += (double)w[j];
      if (passed > target) break;
    }
    if (passed > target) break;
  }
  out->token = (int32_t)chosen;
  out->rank = MS_NAME(rank)(x, n, chosen);
}

// One row, once its chunks are summed.
static void MS_NAME(sample_row)(const float *x, uint32_t n, const MSSampling *s, const ms_chunk_sums *sums,
                                ms_candidate *memory, MSSampled *out) {
  const uint32_t chunks = ms_sample_chunks(n);
  float max = -__builtin_inff();
  double sum = 0;
  uint32_t bad = 0, best = 0;
  for (uint32_t c = 0; c < chunks; ++c) {
    bad |= sums[c].bad;
    if (sums[c].max > max) max = sums[c].max, best = c;
  }
  if (bad || max == -__builtin_inff()) {
    *out = (MSSampled){0, __builtin_nanf(""), 0, MS_SAMPLE_NOT_FINITE};
    return;
  }
  for (uint32_t c = 0; c < chunks; ++c) sum += (double)sums[c].sum * (double)vexp(vsplat(sums[c].max - max))[0];
  out->status = MS_SAMPLE_OK;
  if (!(s->temperature > 0.0f)) {
    const uint32_t first = best * MS_SAMPLE_CHUNK, end = n - first < MS_SAMPLE_CHUNK ? n : first + MS_SAMPLE_CHUNK;
    out->token = (int32_t)(first + MS_NAME(find_logit)(x + first, end - first, max));
    out->rank = 1;
  } else if (s->top_p < 1.0f || s->min_p > 0.0f || (s->top_k > 0 && s->top_k < n)) {
    MS_NAME(draw_filtered)(x, n, s, max, sum, memory, out);
  } else {
    MS_NAME(draw_any)(x, n, s, sums, max, out);
  }
  out->logprob = (float)((double)(x[out->token] - max) - log(sum));
}

MS_VEC void MS_NAME(sum_row_chunk)(const float *x, uint32_t n, const MSSampling *s, uint32_t chunk,
                                   ms_chunk_sums *sums) {
  const uint32_t first = chunk * MS_SAMPLE_CHUNK, count = n - first < MS_SAMPLE_CHUNK ? n - first : MS_SAMPLE_CHUNK;
  MS_NAME(sum_chunk)(x + first, count, s->temperature > 0.0f ? 1.0f / s->temperature : 1.0f, &sums[chunk]);
}

void MS_NAME(ms_sample)(const ms_host_args *args) {
  const uint32_t n = ((const MSSampleParams *)args->constants)->vocab_size, chunks = ms_sample_chunks(n);
  const MSStep *step = args->buffers[MS_SAMPLE_STEP];
  const float *logits = args->buffers[MS_SAMPLE_LOGITS];
  const MSSampling *sampling = args->buffers[MS_SAMPLE_SAMPLING];
  MSSampled *out = args->buffers[MS_SAMPLE_OUT];
  const uint64_t rows = step->num_sampled, thread = (uint64_t)args->thread, threads = (uint64_t)args->threads;
  ms_candidate *memory = args->scratch;
  ms_chunk_sums *own = (ms_chunk_sums *)((char *)args->scratch + ms_sample_scratch(n)) - chunks;
  if (threads == 1 || rows >= MS_SAMPLE_SPLIT_ROWS * threads) {
    for (uint64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; ++row) {
      const float *x = logits + row * n;
      for (uint32_t c = 0; c < chunks; ++c) MS_NAME(sum_row_chunk)(x, n, &sampling[row], c, own);
      MS_NAME(sample_row)(x, n, &sampling[row], own, memory, &out[row]);
    }
    return;
  }
  if (rows == 0) return;
  ms_chunk_sums *shared = args->shared;
  const uint64_t items = rows * chunks;
  for (uint64_t i = items * thread / threads; i < items * (thread + 1) / threads; ++i) {
    const uint64_t row = i / chunks;
    MS_NAME(sum_row_chunk)(logits + row * n, n, &sampling[row], (uint32_t)(i % chunks), shared + row * chunks);
  }
  ms_pool_barrier(args->pool);
  for (uint64_t row = thread; row < rows; row += threads) {
    MS_NAME(sample_row)(logits + row * n, n, &sampling[row], shared + row * chunks, memory, &out[row]);
  }
}
