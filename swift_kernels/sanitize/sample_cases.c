// Random launches of sample, step_advance and step_load.
#include <math.h>
#include <string.h>
#include "driver.h"

enum { STATES = 20, STRIDE = 12, ENTRIES = 30, MASKS = 3, MAX_TOP = 5, STEPS = 3 };

// What sample changes beside its results; it is put back before each run.
static const uint32_t kept[] = {MS_SAMPLE_LOGITS, MS_SAMPLE_HISTORY, MS_SAMPLE_COUNTS};
enum { KEPT = sizeof kept / sizeof *kept };

static uint32_t random_range(uint32_t *first, uint32_t most) {
  *first = random_below(ENTRIES);
  return random_below(3) ? 0 : random_below(ENTRIES - *first < most ? ENTRIES - *first : most);
}

static MSSampling random_sampling(uint32_t row, uint32_t vocab) {
  MSSampling s = {.temperature = random_below(3) ? 0.01f + fabsf(random_float()) * 2 : 0,
                  .top_p = random_below(2) ? 1.0f : 1.0f - 0.99f * fabsf(random_float()),
                  .min_p = random_below(2) ? 0 : fabsf(random_float()),
                  .min_keep = random_below(5),
                  .top_k = random_below(2) ? 0 : random_below(2 * vocab),
                  .xtc_probability = random_below(2) ? 0 : 0.7f,
                  .xtc_threshold = random_below(4) ? 0.2f * fabsf(random_float()) : 0,
                  .repetition_penalty = random_below(2) ? 1 : 1.5f,
                  .presence_penalty = random_below(2) ? 0 : 0.5f,
                  .frequency_penalty = random_below(2) ? 0 : 0.25f,
                  .repetition_window = random_below(4),
                  .presence_window = random_below(4),
                  .frequency_window = random_below(4),
                  .state = random_below(4) ? (int32_t)row : -1,
                  .counted = random_below(2 * STRIDE),
                  .min_tokens = random_below(4),
                  .mask = random_below(2) ? 0 : 1 + random_below(MASKS),
                  .grammar = random_below(2) ? 0 : 1 + random_below(MASKS),
                  .target = random_below(8) ? -1 : (int32_t)random_below(vocab),
                  .top = random_below(2 * MAX_TOP),
                  .flags = random_below(8),
                  .seed_lo = 7,
                  .seed_hi = 3,
                  .counter = row};
  s.bias_count = random_range(&s.bias_first, 10);
  s.stop_count = random_range(&s.stop_first, 3);
  s.xtc_count = random_range(&s.xtc_first, 3);
  return s;
}

static void bind_tables(launch *l, uint32_t rows, uint32_t vocab) {
  int32_t *positions = launch_bind(l, NULL, rows * sizeof *positions);
  int32_t *sampled_rows = launch_bind(l, NULL, rows * sizeof *sampled_rows);
  for (uint32_t i = 0; i < rows; ++i) {
    positions[i] = (int32_t)random_below(STRIDE + 3) - 1;
    sampled_rows[i] = (int32_t)random_below(rows + 1);  // one may be no row
  }
  MSTokenBias *biases = launch_bind(l, NULL, ENTRIES * sizeof *biases);
  for (uint32_t i = 0; i < ENTRIES; ++i)
    biases[i] =
        (MSTokenBias){(int32_t)random_below(vocab + 2) - 1, 4 * random_float()};  // tokens that are none among them
  const uint64_t words = (uint64_t)MASKS * ((vocab + 31) / 32);
  uint32_t *masks = launch_bind(l, NULL, words * sizeof *masks);
  for (uint64_t i = 0; i < words; ++i)
    masks[i] = random_below(4) ? random_below(UINT32_MAX) : random_below(2) ? 0 : ~0u;
  int32_t *history = launch_bind(l, NULL, STATES * STRIDE * sizeof *history);
  for (uint32_t i = 0; i < STATES * STRIDE; ++i) history[i] = (int32_t)random_below(vocab + 4) - 2;
  uint32_t *counts = launch_bind(l, NULL, (uint64_t)STATES * vocab * sizeof *counts);
  for (uint64_t i = 0; i < (uint64_t)STATES * vocab; ++i)
    counts[i] = random_below(20) ? 0 : random_below(3) + random_below(2) * MS_COUNT_IN_PROMPT;
}

// Runs on 1 to MAX_THREADS threads from the same state, with the same bits in all that the kernel writes.
static void run_from_same_state(launch *l, int32_t isa) {
  const uint32_t written[] = {MS_SAMPLE_OUT, MS_SAMPLE_TOP, MS_SAMPLE_LOGITS, MS_SAMPLE_HISTORY, MS_SAMPLE_COUNTS};
  void *before[KEPT], *first[5];
  for (int i = 0; i < KEPT; ++i) {
    before[i] = malloc(l->bytes[kept[i]] + 1);
    memcpy(before[i], l->buffers[kept[i]], l->bytes[kept[i]]);
  }
  for (int32_t threads = 1; threads <= MAX_THREADS; ++threads) {
    for (int i = 0; i < KEPT; ++i) memcpy(l->buffers[kept[i]], before[i], l->bytes[kept[i]]);
    memset(l->buffers[MS_SAMPLE_OUT], 0xff, l->bytes[MS_SAMPLE_OUT]);
    memset(l->buffers[MS_SAMPLE_TOP], 0xff, l->bytes[MS_SAMPLE_TOP]);
    if (!launch_run(l, isa, threads)) fail("refused", l);
    for (int i = 0; i < 5; ++i) {
      const uint64_t bytes = l->bytes[written[i]];
      if (threads == 1) memcpy(first[i] = malloc(bytes + 1), l->buffers[written[i]], bytes);
      if (memcmp(first[i], l->buffers[written[i]], bytes) != 0) fail("its bits depend on the number of threads", l);
    }
  }
  for (int i = 0; i < KEPT; ++i) free(before[i]);
  for (int i = 0; i < 5; ++i) free(first[i]);
}

// What holds of a row whatever its record: x is what its logprob and rank are of.
static void check_row(const launch *l, const float *x, uint32_t vocab, const MSSampling *s, const MSSampled *out,
                      const MSTopLogprob *top) {
  if (out->token < 0 || (uint32_t)out->token >= vocab) fail("no such token", l);
  if (s->target >= 0 && out->token != s->target) fail("not the target", l);
  const float chosen = x[out->token];
  uint32_t rank = 1;
  for (uint32_t j = 0; j < vocab; ++j) rank += x[j] > chosen || (x[j] == chosen && j < (uint32_t)out->token);
  if (out->rank != rank) fail("wrong rank", l);
  if (!(out->logprob <= 1e-6f)) fail("a probability above 1", l);
  const bool own = s->target < 0 && (s->flags & MS_SAMPLE_PROCESSED_LOGPROBS) != 0;
  if (own && s->temperature == 0 && rank != 1) fail("not the most likely token", l);
  if (own && s->temperature > 0 && s->top_k && s->xtc_probability == 0 && rank > s->top_k) fail("past top_k", l);
  for (uint32_t i = 0; i < MAX_TOP && i < s->top; ++i) {
    if (top[i].token < -1 || top[i].token >= (int32_t)vocab) fail("no such token among the most likely", l);
    if (i > 0 && top[i].logprob > top[i - 1].logprob) fail("the most likely are not in order", l);
    if (rank == i + 1 && isfinite(chosen) && top[i].token != out->token) fail("its rank is another token's", l);
  }
}

void try_sample(int32_t isa) {
  const uint32_t rows = random_below(16), vocab = 1 + random_below(random_below(2) ? 50 : 9000);
  launch l = {.kernel = "sample", .rows = rows, .grid = {rows, 1, 1}};
  const MSStep step = {
      .num_tokens = rows, .num_sampled = rows, .num_seqs = 1, .max_blocks = 1, .index = random_below(STEPS)};
  launch_bind(&l, &step, sizeof step);
  float *logits = launch_bind(&l, NULL, (uint64_t)rows * vocab * 4);
  MSSampling *sampling = launch_bind(&l, NULL, rows * sizeof *sampling);
  launch_bind(&l, NULL, STEPS * rows * sizeof(MSSampled));
  launch_bind(&l, NULL, STEPS * rows * MAX_TOP * sizeof(MSTopLogprob));
  bind_tables(&l, rows, vocab);
  const float steps = random_below(2) ? 2.0f : 4096.0f;  // coarse: many equal logits
  for (uint64_t i = 0; i < (uint64_t)rows * vocab; ++i)
    logits[i] = random_below(20) ? roundf(random_float() * 8 * steps) / steps : -INFINITY;
  bool *bad = calloc(rows + 1, sizeof *bad);
  for (uint32_t i = 0; i < rows; ++i) {
    float *x = logits + (uint64_t)i * vocab, most = -INFINITY;
    sampling[i] = random_sampling(i, vocab);
    if (random_below(10) == 0) x[random_below(vocab)] = random_below(2) ? NAN : INFINITY;
    for (uint32_t j = 0; j < vocab; ++j) {
      bad[i] |= isnan(x[j]) || x[j] == INFINITY;
      most = fmaxf(most, x[j]);
    }
    bad[i] |= most == -INFINITY;
  }
  const MSSampleParams p = {vocab, rows, MAX_TOP, STRIDE};
  launch_constants(&l, &p, sizeof p);
  run_from_same_state(&l, isa);
  for (uint32_t i = 0; i < rows; ++i) {
    const uint64_t at = (uint64_t)step.index * rows + i;
    const MSSampled *out = (const MSSampled *)l.buffers[MS_SAMPLE_OUT] + at;
    const bool nothing = out->status == MS_SAMPLE_NOTHING_ALLOWED;
    if (nothing && !sampling[i].mask && !sampling[i].grammar && !sampling[i].stop_count)
      fail("something is allowed", &l);
    if (!nothing && out->status != (bad[i] ? MS_SAMPLE_NOT_FINITE : MS_SAMPLE_OK)) fail("wrong status", &l);
    if (out->status == MS_SAMPLE_OK)
      check_row(&l, logits + (uint64_t)i * vocab, vocab, &sampling[i], out,
                (const MSTopLogprob *)l.buffers[MS_SAMPLE_TOP] + at * MAX_TOP);
  }
  free(bad);
  launch_free(&l);
}

void try_step_advance(int32_t isa) {
  const uint32_t rows = random_below(6), tokens = rows + random_below(3), groups = random_below(3),
                 block = 1 + random_below(16);
  launch l = {.kernel = "step_advance", .rows = rows, .grid = {1, 1, 1}};
  MSStep step = {tokens, rows, 1 + random_below(3), 1 + random_below(4), random_below(STEPS), random_below(2)};
  const MSStep *after = launch_bind(&l, &step, sizeof step);
  int32_t *columns[3];  // tokens, positions, seq_ids
  for (int i = 0; i < 3; ++i) {
    columns[i] = launch_bind(&l, NULL, tokens * sizeof(int32_t));
    for (uint32_t j = 0; j < tokens; ++j) columns[i][j] = (int32_t)random_below(i == 1 ? 70 : 6) - (i == 2);
  }
  int32_t *sampled_rows = launch_bind(&l, NULL, rows * sizeof(int32_t));
  for (uint32_t i = 0; i < rows; ++i) sampled_rows[i] = (int32_t)random_below(tokens + 2);
  memset(launch_bind(&l, NULL, rows * sizeof(MSSampling)), 0, rows * sizeof(MSSampling));
  MSSampled *sampled = launch_bind(&l, NULL, STEPS * rows * sizeof *sampled);
  for (uint32_t i = 0; i < STEPS * rows; ++i)
    sampled[i] = (MSSampled){(int32_t)random_below(99), -1, 1, random_below(8) == 0};
  int32_t *limits = launch_bind(&l, NULL, rows * sizeof(int32_t));
  for (uint32_t i = 0; i < rows; ++i) limits[i] = (int32_t)random_below(80);
  for (uint32_t g = 0; g < groups; ++g) {
    int32_t *tables = launch_bind(&l, NULL, (uint64_t)step.num_seqs * step.max_blocks * sizeof(int32_t));
    for (uint32_t i = 0; i < step.num_seqs * step.max_blocks; ++i) tables[i] = (int32_t)random_below(9) - 1;
    memset(launch_bind(&l, NULL, tokens * sizeof(int32_t)), 0, tokens * sizeof(int32_t));
  }
  const MSStepAdvanceParams p = {block, groups, rows};
  launch_constants(&l, &p, sizeof p);
  if (!launch_run(&l, isa, 1 + (int32_t)random_below(MAX_THREADS))) fail("refused", &l);
  if (after->index != step.index + 1) fail("the step is not counted", &l);
  for (uint32_t g = 0; g < groups; ++g) {
    const int32_t *slots = l.buffers[MS_ADVANCE_GROUPS + 2 * g + 1];
    for (uint32_t i = 0; i < tokens; ++i) {
      if (slots[i] < -1 || slots[i] >= (int32_t)(8 * block)) fail("a slot that no block has", &l);
      if (!step.advance && slots[i] != 0) fail("it advanced", &l);
    }
  }
  launch_free(&l);
}

void try_step_load(int32_t isa) {
  const uint32_t words = 1 + random_below(200), first = random_below(words), tokens = random_below(words - first + 1),
                 results = 1 + random_below(9);
  launch l = {.kernel = "step_load", .rows = 1, .grid = {1, 1, 1}};
  int32_t *stage = launch_bind(&l, NULL, (uint64_t)(words + tokens) * sizeof *stage);
  for (uint32_t i = 0; i < words + tokens; ++i) stage[i] = (int32_t)random_below(i < words ? 1000 : results + 1) - 1;
  MSSampled *sampled = launch_bind(&l, NULL, results * sizeof *sampled);
  for (uint32_t i = 0; i < results; ++i)
    sampled[i] = (MSSampled){1000 + (int32_t)random_below(99), -1, 1, random_below(3)};
  const int32_t *region = launch_bind(&l, NULL, words * sizeof *region);
  const MSStepLoadParams p = {words, first, tokens};
  launch_constants(&l, &p, sizeof p);
  launch_run_on_all(&l, isa, MS_LOAD_REGION, 0);
  for (uint32_t i = 0; i < words; ++i) {
    const int32_t source = i >= first && i < first + tokens ? stage[words + i - first] : -1;
    if (source < 0 && region[i] != stage[i]) fail("a word is not the stage's", &l);
    if (source >= 0 && region[i] != (sampled[source].status == MS_SAMPLE_OK ? sampled[source].token : 0))
      fail("a token is not the result's", &l);
  }
  launch_free(&l);
}
