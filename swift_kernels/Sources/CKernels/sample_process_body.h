// A row's logits, chunk by chunk: what bias, penalties, stop tokens and masks make of them, their maxima and their sums.

enum { MS_MARK_REPEATED = -0x7fffffff - 1, MS_MARK_PRESENT = 0x40000000, MS_MARK_COUNT = 0x3fffffff };

MS_VEC i32x16 MS_NAME(lane)(void) { return (i32x16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// The first n <= 16 words; 0 in the other lanes.
MS_VEC i32x16 MS_NAME(load_words)(const uint32_t *p, uint32_t n) {
  i32x16 v = 0;
  if (n >= 16) {
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  int32_t lanes[16] = {0};
  for (uint32_t i = 0; i < n; ++i) lanes[i] = (int32_t)p[i];
  __builtin_memcpy(&v, lanes, sizeof v);
  return v;
}

// Logits i.. of n; -infinity behind the last.
MS_VEC f32x16 MS_NAME(logits_at)(const float *x, uint32_t i, uint32_t n) {
  return n - i < 16 ? vfirst(vload_n(x + i, n - i), n - i, vsplat(-__builtin_inff())) : vload(x + i);
}

// e^(x * scale) for x <= 0, and 1 for 0 even at an infinite scale (a tiny temperature).
MS_VEC f32x16 MS_NAME(weight)(f32x16 x, float scale) { return vexp(x == 0.0f ? x : x * scale); }

// Maxima of a chunk, and whether it is finite. copy: where it is copied to; NULL: nowhere.
MS_VEC void MS_NAME(scan_chunk)(const float *x, uint32_t n, float *copy, float *maxima, ms_chunk_sums *out) {
  const f32x16 none = vsplat(-__builtin_inff());
  f32x16 most = none;
  i32x16 finite = -1;
  for (uint32_t block = 0; block < n; block += MS_SAMPLE_BLOCK) {
    const uint32_t end = n - block < MS_SAMPLE_BLOCK ? n : block + MS_SAMPLE_BLOCK;
    f32x16 max[4] = {none, none, none, none};
    uint32_t i = block;
    for (; i + 64 <= end; i += 64) {
      for (uint32_t j = 0; j < 4; ++j) {
        const f32x16 v = vload(x + i + 16 * j);
        max[j] = vmax(v, max[j]);
        finite &= v < __builtin_inff();
        if (copy != NULL) vstore(copy + i + 16 * j, v);
      }
    }
    for (; i < end; i += 16) {
      const f32x16 v = MS_NAME(logits_at)(x, i, end);
      max[0] = vmax(v, max[0]);
      finite &= v < __builtin_inff();
      if (copy != NULL) vstore_n(copy + i, v, end - i < 16 ? end - i : 16);
    }
    max[0] = vmax(vmax(max[0], max[1]), vmax(max[2], max[3]));
    vstore(maxima + block / MS_SAMPLE_BLOCK * 16, max[0]);
    most = vmax(max[0], most);
  }
  *out = (ms_chunk_sums){vmaxall(most), 0, 0, __builtin_reduce_and(finite) == 0};
}

// The sums that are asked for, of a chunk that is scanned.
MS_VEC void MS_NAME(sum_chunk)(const float *x, uint32_t n, float inverse, bool plain, bool tempered,
                               ms_chunk_sums *out) {
  const float most = out->max;
  f32x16 sum[2] = {vsplat(0), vsplat(0)}, other[2] = {vsplat(0), vsplat(0)};
  if (most == -__builtin_inff() || out->bad) return;
  for (uint32_t i = 0; i < n; i += 32) {
    for (uint32_t j = 0; j < 2 && i + 16 * j < n; ++j) {
      const f32x16 v = MS_NAME(logits_at)(x, i + 16 * j, n) - most;
      if (plain) sum[j] += vexp(v);
      if (tempered) other[j] += MS_NAME(weight)(v, inverse);
    }
  }
  out->sum = vsum(sum[0] + sum[1]);
  out->tempered = vsum(other[0] + other[1]);
}

// Both plain sums where few logits differ: e^x is computed once where they do not. The largest are close together.
MS_VEC void MS_NAME(sum_both)(const float *x, const float *y, uint32_t n, ms_chunk_sums *of_x, ms_chunk_sums *of_y) {
  const float most = of_x->max;
  f32x16 sum_x[2] = {vsplat(0), vsplat(0)}, sum_y[2] = {vsplat(0), vsplat(0)};
  for (uint32_t i = 0; i < n; i += 32) {
    for (uint32_t j = 0; j < 2 && i + 16 * j < n; ++j) {
      const f32x16 v = MS_NAME(logits_at)(x, i + 16 * j, n), w = MS_NAME(logits_at)(y, i + 16 * j, n);
      const f32x16 share = vexp(v - most);
      sum_x[j] += share;
      sum_y[j] += __builtin_reduce_or(v != w) == 0 ? share : vexp(w - most);
    }
  }
  of_x->sum = vsum(sum_x[0] + sum_x[1]);
  of_y->sum = vsum(sum_y[0] + sum_y[1]) * vexp(vsplat(most - of_y->max))[0];
}

// Marks what the history says of tokens first.. first + n - 1, window by window: whether they are repeated, whether they
// are present, and how often they occur. A window of 0 counts what `counts` do not hold yet. false: nothing to mark.
static bool MS_NAME(mark_history)(const ms_sample_row *r, uint32_t first, uint32_t n, uint32_t *marks) {
  const MSSampling *s = r->s;
  const float penalties[3] = {s->repetition_penalty == 1.0f ? 0 : s->repetition_penalty, s->presence_penalty,
                              s->frequency_penalty};
  const uint32_t windows[3] = {s->repetition_window, s->presence_window, s->frequency_window};
  uint32_t starts[3], start = r->length;
  for (int i = 0; i < 3; ++i) {
    starts[i] = windows[i] ? (windows[i] < r->length ? r->length - windows[i] : 0) : s->counted;
    if (penalties[i] == 0 || starts[i] > r->length) starts[i] = r->length;
    if (starts[i] < start) start = starts[i];
  }
  if (start == r->length) return false;
  memset(marks, 0, n * sizeof *marks);
  for (uint32_t at = start; at < r->length; ++at) {
    const uint32_t token = (uint32_t)r->history[at] - first;  // a caller's own embedding, below 0, is no token
    if (token >= n) continue;
    uint32_t mark = marks[token];
    if (at >= starts[0]) mark |= (uint32_t)MS_MARK_REPEATED;
    if (at >= starts[1]) mark |= MS_MARK_PRESENT;
    if (at >= starts[2]) mark += 1;
    marks[token] = mark;
  }
  return true;
}

// Repetition, presence, frequency, in this order. counts, marks: of the same tokens; marks may be NULL.
MS_VEC void MS_NAME(penalise)(float *x, uint32_t n, const MSSampling *s, const uint32_t *counts,
                              const uint32_t *marks) {
  const bool repetition = s->repetition_penalty != 1.0f && s->repetition_penalty != 0;
  const int32_t all = MS_COUNT_IN_PROMPT | MS_MARK_COUNT;
  const int32_t repeated = repetition && s->repetition_window == 0 ? all : 0;
  const int32_t present = s->presence_penalty != 0 && s->presence_window == 0 ? MS_MARK_COUNT : 0;
  const int32_t counted = s->frequency_penalty != 0 && s->frequency_window == 0 ? MS_MARK_COUNT : 0;
  const int32_t used = repeated | present | counted;
  for (uint32_t i = 0; i < n; i += 16) {
    const uint32_t here = n - i < 16 ? n - i : 16;
    i32x16 count = 0, mark = 0;
    if (used) count = MS_NAME(load_words)(counts + i, here) & used;
    if (marks != NULL) mark = MS_NAME(load_words)(marks + i, here);
    if (__builtin_reduce_or(count | mark) == 0) continue;
    f32x16 v = vload_n(x + i, here);
    const i32x16 is_repeated = ((count & repeated) | (mark & MS_MARK_REPEATED)) != 0;
    const i32x16 is_present = ((count & present) | (mark & MS_MARK_PRESENT)) != 0;
    const i32x16 times = (count & counted) + (mark & MS_MARK_COUNT);
    const f32x16 scaled = v < 0.0f ? v * s->repetition_penalty : v / s->repetition_penalty;
    v = is_repeated ? scaled : v;
    v = is_present ? v - s->presence_penalty : v;
    const f32x16 often = vfma(__builtin_convertvector(times, f32x16), vsplat(-s->frequency_penalty), v);
    vstore_n(x + i, times != 0 ? often : v, here);
  }
}

// Only tokens with their bit in both masks stay. The masks' first word is of the chunk's first tokens.
MS_VEC void MS_NAME(mask_chunk)(float *x, uint32_t n, const uint32_t *mask, const uint32_t *other) {
  for (uint32_t i = 0; i < n; i += 16) {
    const uint32_t here = n - i < 16 ? n - i : 16, bits = (mask[i / 32] & other[i / 32]) >> i % 32 & 0xffff;
    if (bits == 0xffff) continue;
    const i32x16 allowed = ((i32x16)((int32_t)bits) >> MS_NAME(lane)() & 1) != 0;
    vstore_n(x + i, allowed ? vload_n(x + i, here) : vsplat(-__builtin_inff()), here);
  }
}

// One chunk of a row, whose marks (if any) begin at token `marked`. Not inlined: a chunk has one code, so that its bits
// do not depend on how the row is split.
static __attribute__((noinline)) void MS_NAME(process_chunk)(const ms_sample_row *r, uint32_t chunk,
                                                             const ms_logits *own, const ms_logits *given,
                                                             const uint32_t *marks, uint32_t marked) {
  const MSSampling *s = r->s;
  const uint32_t first = chunk * MS_SAMPLE_CHUNK;
  const uint32_t n = r->vocab_size - first < MS_SAMPLE_CHUNK ? r->vocab_size - first : MS_SAMPLE_CHUNK;
  const uint32_t maxima = chunk * (MS_SAMPLE_CHUNK / MS_SAMPLE_BLOCK * 16);
  const float *x = own->x + first;
  float *y = given->x + first;
  ms_chunk_sums *of_x = &own->sums[chunk], *of_y = &given->sums[chunk];
  if (!r->changes) {
    MS_NAME(scan_chunk)(x, n, NULL, own->maxima + maxima, of_x);
    MS_NAME(sum_chunk)(x, n, r->inverse, r->sum, r->tempered, of_x);
    return;
  }
  MS_NAME(scan_chunk)(x, n, r->in_place ? NULL : y, own->maxima + maxima, of_x);
  for (uint32_t i = s->bias_first; i < s->bias_first + s->bias_count; ++i) {
    const uint32_t token = (uint32_t)r->biases[i].token - first;
    if (token < n) y[token] += r->biases[i].bias;
  }
  if (r->penalised) MS_NAME(penalise)(y, n, s, r->counts + first, marks == NULL ? NULL : marks + (first - marked));
  for (uint32_t i = s->stop_first; r->stopped && i < s->stop_first + s->stop_count; ++i) {
    const uint32_t token = (uint32_t)r->biases[i].token - first;
    if (token < n) y[token] = -__builtin_inff();
  }
  if (r->masks[0] != NULL) MS_NAME(mask_chunk)(y, n, r->masks[0] + first / 32, r->masks[1] + first / 32);
  MS_NAME(scan_chunk)(y, n, NULL, given->maxima + maxima, of_y);
  if (of_x->bad || of_y->bad) return;
  // Nothing underflows in the one sum that counts in the other.
  const bool close = fabsf(of_x->max - of_y->max) <= 16.0f;
  const bool both = r->own_sum && r->sum && close;
  if (both) MS_NAME(sum_both)(x, y, n, of_x, of_y);
  if (r->own_sum && !both) MS_NAME(sum_chunk)(x, n, 1.0f, true, false, of_x);
  if ((r->sum && !both) || r->tempered) {
    const float sum = of_y->sum;
    MS_NAME(sum_chunk)(y, n, r->inverse, r->sum && !both, r->tempered, of_y);
    if (both) of_y->sum = sum;
  }
}
