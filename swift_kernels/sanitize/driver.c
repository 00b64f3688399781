// Runs the random launches for some seconds (argument 1) on every instruction set of the machine. Argument 2: a seed.
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "driver.h"
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static uint64_t state = 1;
static ms_pool *pools[MAX_THREADS + 1];

uint32_t random_below(uint32_t n) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (uint32_t)((state >> 32) * n >> 32);
}
float random_float(void) { return (float)random_below(1 << 24) / (1 << 23) - 1.0f; }

void fail(const char *what, const launch *l) {
  fprintf(stderr, "driver: %s: %s\n", l->kernel, what);
  abort();
}

// An allocation of exactly this size: what lies behind it is the sanitizer's.
static void *exact(uint64_t bytes) {
  void *memory;
  if (posix_memalign(&memory, 128, bytes ? bytes : 1) != 0) abort();
  return memory;
}

void *launch_bind(launch *l, const void *contents, uint64_t bytes) {
  void *memory = exact(bytes);
  if (contents != NULL) memcpy(memory, contents, bytes);
  l->buffers[l->binds] = memory;
  l->bytes[l->binds++] = bytes;
  return memory;
}

float *launch_bind_floats(launch *l, uint64_t count) {
  float *x = launch_bind(l, NULL, count * sizeof(float));
  for (uint64_t i = 0; i < count; ++i) x[i] = random_float();
  return x;
}

void launch_constants(launch *l, const void *constants, uint64_t bytes) {
  l->constants = exact(bytes);
  l->const_bytes = (uint32_t)bytes;
  memcpy(l->constants, constants, bytes);
}

void launch_free(launch *l) {
  for (uint32_t i = 0; i < l->binds; ++i) free(l->buffers[i]);
  free(l->constants);
}

static const ms_host_kernel *find(const char *name) {
  for (int32_t i = 0; i < ms_host_kernel_count(); ++i) {
    if (strcmp(ms_host_kernel_at(i)->name, name) == 0) return ms_host_kernel_at(i);
  }
  abort();
}

typedef struct {
  const launch *l;
  ms_host_function function;
  void *scratch[MAX_THREADS], *shared;
  ms_pool *pool;
} job;

static void body(void *context, int32_t thread, int32_t threads) {
  job *j = context;
  ms_host_args args = {.buffers = j->l->buffers,
                       .constants = j->l->constants,
                       .grid = j->l->grid,
                       .scratch = j->scratch[thread],
                       .shared = j->shared,
                       .pool = j->pool,
                       .thread = thread,
                       .threads = threads};
  j->function(&args);
}

bool launch_run(const launch *l, int32_t isa, int32_t threads) {
  const ms_host_kernel *kernel = find(l->kernel);
  char message[256];
  ms_scratch scratch = {0, 0};
  if (kernel->prepare(l->constants, l->const_bytes, l->binds, l->rows, l->rows, threads, &scratch, message) != NULL)
    return false;
  job j = {.l = l, .function = kernel->function[isa], .pool = pools[threads]};
  for (int32_t i = 0; i < threads; ++i) {
    j.scratch[i] = exact(scratch.per_thread);
    memset(j.scratch[i], 0xff, scratch.per_thread);  // NaN: what is read before it is written shows
  }
  j.shared = exact(scratch.shared);
  memset(j.shared, 0xff, scratch.shared);
  ms_pool_run(pools[threads], body, &j);
  for (int32_t i = 0; i < threads; ++i) free(j.scratch[i]);
  free(j.shared);
  return true;
}

// Whether count floats differ by at most `closeness` of the largest.
static bool close(const float *a, const float *b, uint64_t count, float closeness) {
  float most = 0;
  for (uint64_t i = 0; i < count; ++i) most = fmaxf(most, fabsf(a[i]));
  for (uint64_t i = 0; i < count; ++i) {
    if (!(fabsf(a[i] - b[i]) <= closeness * most)) return false;
  }
  return true;
}

void launch_run_on_all(launch *l, int32_t isa, uint32_t result, float closeness) {
  const uint64_t bytes = l->bytes[result];
  void *out = l->buffers[result], *first = exact(bytes);
  for (int32_t threads = 1; threads <= MAX_THREADS; ++threads) {
    memset(out, 0xff, bytes);
    if (!launch_run(l, isa, threads)) fail("refused", l);
    if (threads == 1) memcpy(first, out, bytes);
    if (memcmp(first, out, bytes) != 0) fail("its bits depend on the number of threads", l);
  }
  if (closeness > 0 && isa != MS_ISA_PORTABLE) {
    launch_run(l, MS_ISA_PORTABLE, 1);
    if (!close(out, first, bytes / sizeof(float), closeness)) fail("it differs from the portable kernel", l);
    memcpy(out, first, bytes);
  }
  free(first);
}

int main(int argc, char **argv) {
  const time_t end = time(NULL) + (argc > 1 ? atoi(argv[1]) : 10);
  if (argc > 2) state = strtoull(argv[2], NULL, 10) | 1;
  for (int32_t i = 1; i <= MAX_THREADS; ++i) pools[i] = ms_pool_create(i);
  unsigned rounds = 0;
  char sets[128] = "";
  for (; time(NULL) < end || rounds == 0; ++rounds) {
    for (int32_t isa = 0; isa < MS_ISA_COUNT; ++isa) {
      char message[256];
      setenv("METALSTEP_CPU", ms_host_isa_name(isa), 1);
      if (ms_host_isa(message) != isa) continue;
      if (rounds == 0) strcat(strcat(sets, " "), ms_host_isa_name(isa));
      try_row_program(isa);
      try_linear(isa);
      try_attention(isa);
      try_sample(isa);
      try_step_advance(isa);
      try_step_load(isa);
      try_add_rms_norm(isa);
      try_broken_constants(isa);
    }
  }
  for (int32_t i = 1; i <= MAX_THREADS; ++i) ms_pool_destroy(pools[i]);
  printf("driver: %u rounds on%s, 1 to %d threads\n", rounds, sets, MAX_THREADS);
  return 0;
}
