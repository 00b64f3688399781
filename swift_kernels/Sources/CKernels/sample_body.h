// sample: one token per sampled row, or a report on one that is given. Tables are not checked: ranges of entries, states,
// masks and targets are within them, and tokens of entries and history count only where the vocabulary has them.

// What a row's record asks for.
static ms_sample_row MS_NAME(read_row)(const ms_host_args *args, uint32_t row) {
  const MSSampleParams *p = args->constants;
  const MSStep *step = args->buffers[MS_SAMPLE_STEP];
  const MSSampling *s = (const MSSampling *)args->buffers[MS_SAMPLE_SAMPLING] + row;
  const uint32_t n = p->vocab_size, words = (n - 1) / 32 + 1, *masks = args->buffers[MS_SAMPLE_MASKS];
  ms_sample_row r = {.s = s, .biases = args->buffers[MS_SAMPLE_BIASES], .vocab_size = n, .inverse = 1, .scale = 1};
  r.in_place = (s->flags & MS_SAMPLE_PROCESSED_LOGPROBS) != 0;
  r.draws = s->target < 0 && s->temperature > 0;
  if (s->state >= 0) {
    r.history = (int32_t *)args->buffers[MS_SAMPLE_HISTORY] + (uint64_t)s->state * p->history_stride;
    r.counts = (uint32_t *)args->buffers[MS_SAMPLE_COUNTS] + (uint64_t)s->state * n;
    const uint32_t token_row = ((const uint32_t *)args->buffers[MS_SAMPLE_SAMPLED_ROWS])[row];
    const int32_t position =
        token_row < step->num_tokens ? ((const int32_t *)args->buffers[MS_SAMPLE_POSITIONS])[token_row] : -1;
    const uint32_t length = position < 0 ? 0 : (uint32_t)position + 1;
    r.length = length < p->history_stride ? length : p->history_stride;
  }
  if (r.in_place || s->target < 0) {
    const bool repetition = s->repetition_penalty != 1.0f && s->repetition_penalty != 0;
    const uint32_t mask = s->mask ? s->mask : s->grammar, other = s->grammar ? s->grammar : s->mask;
    if (mask) r.masks[0] = masks + (uint64_t)(mask - 1) * words, r.masks[1] = masks + (uint64_t)(other - 1) * words;
    r.penalised = r.counts != NULL && (repetition || s->presence_penalty != 0 || s->frequency_penalty != 0);
    r.stopped = s->counter < s->min_tokens && s->stop_count > 0;
    r.changes = s->bias_count > 0 || r.penalised || r.stopped || mask;
  }
  r.own_sum = r.changes && !r.in_place;
  r.sum = !r.own_sum;
  if (!r.draws) return r;
  const bool tempered_first = (s->flags & MS_SAMPLE_TEMPERATURE_FIRST) != 0, min_p = s->min_p > 0.0f;
  const bool top_p = s->top_p < 1.0f;
  r.top_k = s->top_k < n ? s->top_k : 0;
  r.inverse = 1.0f / s->temperature;
  r.scale = tempered_first ? r.inverse : 1.0f;
  r.xtc = s->xtc_probability > 0 && MS_NAME(philox_uniform)(s, 1) < (double)s->xtc_probability;
  r.xtc_first = r.xtc && !min_p && (tempered_first || !top_p);
  const bool filter_sum = r.xtc_first || (top_p && (!tempered_first || !(min_p || r.top_k)));
  const bool draw_sum = !(r.xtc || top_p || min_p || r.top_k);
  r.sum |= (filter_sum && r.scale == 1.0f) || (draw_sum && r.inverse == 1.0f);
  r.tempered = (filter_sum && r.scale != 1.0f) || (draw_sum && r.inverse != 1.0f);
  return r;
}

// The most likely tokens, and none (-1, NaN) where the finite ones end.
static void MS_NAME(report_top)(const ms_logits *l, uint32_t n, float max, double sum, ms_candidate *memory,
                                MSTopLogprob *top, uint32_t count) {
  const float least = MS_NAME(bound)(l, n, max, count);
  const uint32_t found = MS_NAME(collect)(l, n, least, memory);
  const ms_candidate *a = MS_NAME(sort_candidates)(memory, memory + n, found, (uint32_t *)(memory + 2 * (uint64_t)n));
  const double log_sum = log(sum);
  for (uint32_t i = 0; i < count; ++i) {
    top[i] = (MSTopLogprob){-1, __builtin_nanf("")};
    if (i < found)
      top[i] = (MSTopLogprob){(int32_t)a[i].token, (float)((double)(MS_NAME(logit_of)(a[i].key) - max) - log_sum)};
  }
}

// One row, once its chunks are processed.
static void MS_NAME(sample_row)(const ms_host_args *args, const ms_sample_row *r, const ms_logits *own,
                                const ms_logits *given, const ms_logits *spare, ms_candidate *memory, uint32_t row) {
  const MSSampleParams *p = args->constants;
  const MSSampling *s = r->s;
  const uint64_t at = (uint64_t)((const MSStep *)args->buffers[MS_SAMPLE_STEP])->index * p->max_rows + row;
  const uint32_t n = r->vocab_size, chunks = ms_sample_chunks(n), top = s->top < p->max_top ? s->top : p->max_top;
  MSSampled *out = (MSSampled *)args->buffers[MS_SAMPLE_OUT] + at;
  MSTopLogprob *tops = (MSTopLogprob *)args->buffers[MS_SAMPLE_TOP] + at * p->max_top;
  const ms_logits *reported = r->in_place ? given : own;
  double sum = 0, ignored;
  const float own_max = MS_NAME(total)(own, n, 1.0f, &ignored), given_max = MS_NAME(total)(given, n, 1.0f, &ignored);
  const float max = MS_NAME(total)(reported, n, 1.0f, &sum);
  uint32_t bad = own_max == -__builtin_inff();
  for (uint32_t c = 0; c < chunks; ++c) bad |= own->sums[c].bad | given->sums[c].bad;
  if (bad || given_max == -__builtin_inff()) {
    *out = (MSSampled){0, __builtin_nanf(""), 0, bad ? MS_SAMPLE_NOT_FINITE : MS_SAMPLE_NOTHING_ALLOWED};
    for (uint32_t i = 0; i < top; ++i) tops[i] = (MSTopLogprob){-1, __builtin_nanf("")};
    return;
  }
  uint32_t token = (uint32_t)s->target;
  if (r->draws) {
    token = MS_NAME(draw)(r, given, spare, memory);
  } else if (s->target < 0) {
    uint32_t c = 0;
    while (given->sums[c].max != given_max) ++c;
    const uint32_t first = c * MS_SAMPLE_CHUNK, rest = n - first < MS_SAMPLE_CHUNK ? n - first : MS_SAMPLE_CHUNK;
    token = first + MS_NAME(find_logit)(given->x + first, rest, given_max);
  }
  out->token = (int32_t)token;
  out->logprob = (float)((double)(reported->x[token] - max) - log(sum));
  out->rank = MS_NAME(rank)(reported, n, token);
  out->status = MS_SAMPLE_OK;
  if (top) MS_NAME(report_top)(reported, n, max, sum, memory, tops, top);
  if ((s->flags & MS_SAMPLE_COMMIT) && r->counts != NULL && s->target < 0) {
    if (r->length < p->history_stride) r->history[r->length] = (int32_t)token;
    ++r->counts[token];
  }
}

// Chunks [begin, end) of a row. marks: memory for a word per token.
static void MS_NAME(process_row)(const ms_sample_row *r, uint32_t begin, uint32_t end, const ms_logits *own,
                                 const ms_logits *given, uint32_t *marks) {
  const uint32_t first = begin * MS_SAMPLE_CHUNK, n = r->vocab_size;
  const uint32_t last = end < ms_sample_chunks(n) ? end * MS_SAMPLE_CHUNK : n;
  const bool marked = r->penalised && MS_NAME(mark_history)(r, first, last - first, marks);
  for (uint32_t c = begin; c < end; ++c) MS_NAME(process_chunk)(r, c, own, given, marked ? marks : NULL, first);
}

// The logits of a row: the model's own, and (the same, unless something changes them) the processed ones. memory:
// ms_sample_row_bytes.
static void MS_NAME(place_row)(const ms_sample_row *r, float *x, char *memory, ms_logits *own, ms_logits *given) {
  const uint32_t n = r->vocab_size;
  const uint64_t known = ms_sample_known_bytes(n);
  *own = *given = ms_sample_logits(x, memory, n);
  if (r->changes) *given = ms_sample_logits(r->in_place ? x : (float *)(memory + 2 * known), memory + known, n);
}

void MS_NAME(ms_sample)(const ms_host_args *args) {
  const uint32_t n = ((const MSSampleParams *)args->constants)->vocab_size, chunks = ms_sample_chunks(n);
  float *logits = args->buffers[MS_SAMPLE_LOGITS];
  const uint64_t rows = ((const MSStep *)args->buffers[MS_SAMPLE_STEP])->num_sampled;
  const uint64_t thread = (uint64_t)args->thread, threads = (uint64_t)args->threads;
  char *memory = (char *)args->scratch + ms_sample_row_bytes(n);
  const ms_logits spare = ms_sample_logits((float *)(memory + ms_sample_known_bytes(n)), memory, n);
  uint32_t *marks = (uint32_t *)spare.x;  // needed before the spare logits are
  ms_candidate *candidates = (ms_candidate *)((char *)spare.x + ms_sample_logits_bytes(n));
  ms_logits own, given;
  if (threads == 1 || rows >= MS_SAMPLE_SPLIT_ROWS * threads) {
    for (uint64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; ++row) {
      const ms_sample_row r = MS_NAME(read_row)(args, (uint32_t)row);
      MS_NAME(place_row)(&r, logits + row * n, args->scratch, &own, &given);
      MS_NAME(process_row)(&r, 0, chunks, &own, &given, marks);
      MS_NAME(sample_row)(args, &r, &own, &given, &spare, candidates, (uint32_t)row);
    }
    return;
  }
  if (rows == 0) return;
  const uint64_t items = rows * chunks, end = items * (thread + 1) / threads;
  for (uint64_t i = items * thread / threads; i < end;) {
    const uint64_t row = i / chunks, stop = (row + 1) * chunks < end ? (row + 1) * chunks : end;
    const ms_sample_row r = MS_NAME(read_row)(args, (uint32_t)row);
    MS_NAME(place_row)(&r, logits + row * n, (char *)args->shared + row * ms_sample_row_bytes(n), &own, &given);
    MS_NAME(process_row)(&r, (uint32_t)(i - row * chunks), (uint32_t)(stop - row * chunks), &own, &given, marks);
    i = stop;
  }
  ms_pool_barrier(args->pool);
  for (uint64_t row = thread; row < rows; row += threads) {
    const ms_sample_row r = MS_NAME(read_row)(args, (uint32_t)row);
    MS_NAME(place_row)(&r, logits + row * n, (char *)args->shared + row * ms_sample_row_bytes(n), &own, &given);
    MS_NAME(sample_row)(args, &r, &own, &given, &spare, candidates, (uint32_t)row);
  }
}
