#define _DEFAULT_SOURCE  // mmap: MAP_ANONYMOUS
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fiber_switch.h"
#include "sim_dispatch.h"

enum {
  STACK_BYTES = 128 << 10,
  GUARD_BYTES = 16 << 10,  // a page, whatever its size: running off a stack faults instead of writing into the next one
  STAGGER_BYTES = 192,     // stacks that start at the same offset would share one set of the cache
  MAX_VARIABLES = 32,      // threadgroup variables of one kernel
  RED_ZONE = 64,           // bytes after each of them, checked for writes
  EXCHANGE_BYTES = 64,
};

typedef struct {
  void* stack_pointer;
  char* stack;
  sim_thread thread;
  uint32_t exchanges;  // so far; two buffers by turns, as a lane may run ahead to the next exchange
} fiber;

typedef struct {
  uint32_t lanes, returned, waiting;
  const char* operation;  // what the waiting lanes wait in
  _Alignas(16) char slots[2][SIM_SIMD_WIDTH * EXCHANGE_BYTES];
} simdgroup;

typedef struct {
  const void* site;
  uint32_t offset, size;  // bytes in `memory`
} variable;

// The threadgroup being run, one per thread of the operating system.
typedef struct {
  sim_entry entry;
  void* const* buffers;
  char* message;
  uint64_t seed, random;
  uint32_t threads, simdgroups, returned, current;
  uint32_t waiting, barrier_line;  // threads in threadgroup_barrier
  bool failed;
  void* scheduler;  // stack of sim_dispatch
  uint32_t ready_count, ready[SIM_MAX_THREADS];
  uint32_t variable_count, memory_used, memory_bytes;
  variable variables[MAX_VARIABLES];
  simdgroup simd[SIM_MAX_THREADS / SIM_SIMD_WIDTH];
  fiber fibers[SIM_MAX_THREADS];
  _Alignas(64) unsigned char memory[SIM_THREADGROUP_MEMORY + MAX_VARIABLES * 2 * RED_ZONE];
} group;

static _Thread_local group* running;

static uint32_t random_below(uint64_t* state, uint32_t limit) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)((*state >> 33) % limit);
}

static simdgroup* simd_of(const fiber* f) { return &running->simd[f->thread.simdgroup_index_in_threadgroup]; }

static void resume(void** from, uint32_t index) {
  running->current = index;
  sim_switch(from, running->fibers[index].stack_pointer);
}

// Ends the dispatch. Fibers are abandoned where they stand: kernels own nothing that must be released.
_Noreturn static void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(running->message, SIM_MESSAGE, format, arguments);
  va_end(arguments);
  running->failed = true;
  sim_switch(&running->fibers[running->current].stack_pointer, running->scheduler);
  abort();
}

static void wake(uint32_t first, uint32_t count) {
  group* g = running;
  for (uint32_t i = 0; i < count; i++)  // the last of `ready` runs first
    g->ready[g->ready_count++] = g->seed == 1 ? first + i : first + count - 1 - i;
}

static uint32_t next_ready(void) {
  group* g = running;
  if (g->ready_count == 0) {
    for (uint32_t i = 0; i < g->simdgroups; i++)
      if (g->simd[i].waiting) fail("%s is not reached by every lane of simdgroup %u", g->simd[i].operation, i);
    fail("threadgroup_barrier is reached by %u of %u threads", g->waiting, g->threads);
  }
  const uint32_t place = g->seed >= 2 ? random_below(&g->random, g->ready_count) : g->ready_count - 1;
  const uint32_t index = g->ready[place];
  g->ready[place] = g->ready[--g->ready_count];
  return index;
}

static void yield(void) {
  fiber* me = &running->fibers[running->current];
  const uint32_t index = next_ready();
  if (index != running->current) resume(&me->stack_pointer, index);
}

static const sim_thread* runtime_thread(void) { return &running->fibers[running->current].thread; }

static void runtime_threadgroup_barrier(uint32_t line) {
  group* g = running;
  if (g->waiting == 0) g->barrier_line = line;
  if (g->barrier_line != line)
    fail("threads diverge: some are in the threadgroup_barrier of line %u, others in that of line %u", g->barrier_line,
         line);
  g->waiting++;
  if (g->returned)
    fail("threadgroup_barrier is not reached by every thread: %u of %u returned before it", g->returned, g->threads);
  if (g->waiting == g->threads) {
    g->waiting = 0;
    wake(0, g->threads);
  }
  yield();
}

static void runtime_simdgroup_wait(const char* operation) {
  const fiber* me = &running->fibers[running->current];
  simdgroup* s = simd_of(me);
  const uint32_t index = me->thread.simdgroup_index_in_threadgroup;
  if (s->returned) fail("%s after %u lanes of simdgroup %u returned", operation, s->returned, index);
  if (s->waiting == 0) s->operation = operation;
  if (strcmp(s->operation, operation) != 0)
    fail("lanes of simdgroup %u diverge: some are in %s, others in %s", index, s->operation, operation);
  if (++s->waiting == s->lanes) {
    s->waiting = 0;
    wake(index * SIM_SIMD_WIDTH, s->lanes);
  }
  yield();
}

static uint32_t runtime_simdgroup_exchange(const void* value, size_t size, void* all, const char* operation) {
  fiber* me = &running->fibers[running->current];
  simdgroup* s = simd_of(me);
  if (size > EXCHANGE_BYTES)
    fail("%s of a value of %zu bytes; at most %d can be exchanged", operation, size, EXCHANGE_BYTES);
  char* slots = s->slots[me->exchanges++ & 1];
  memcpy(slots + me->thread.thread_index_in_simdgroup * size, value, size);
  runtime_simdgroup_wait(operation);
  memcpy(all, slots, s->lanes * size);
  return s->lanes;
}

static void* runtime_threadgroup_memory(const void* site, size_t size) {
  group* g = running;
  for (uint32_t i = 0; i < g->variable_count; i++)
    if (g->variables[i].site == site) return g->memory + g->variables[i].offset;
  if (g->variable_count == MAX_VARIABLES) fail("more than %d threadgroup variables", MAX_VARIABLES);
  if (g->memory_bytes + size > SIM_THREADGROUP_MEMORY)
    fail("threadgroup variables take more than %d bytes", SIM_THREADGROUP_MEMORY);
  variable* v = &g->variables[g->variable_count++];
  *v = (variable){site, g->memory_used, (uint32_t)size};
  g->memory_bytes += (uint32_t)size;
  g->memory_used += ((uint32_t)size + 2 * RED_ZONE - 1) / RED_ZONE * RED_ZONE;
  memset(g->memory + v->offset, 0xff, g->memory_used - v->offset);
  return g->memory + v->offset;
}

static void check_red_zones(void) {
  group* g = running;
  for (uint32_t i = 0; i < g->variable_count; i++) {
    const variable v = g->variables[i];
    const uint32_t end = i + 1 < g->variable_count ? g->variables[i + 1].offset : g->memory_used;
    for (uint32_t at = v.offset + v.size; at < end && !g->failed; at++) {
      if (g->memory[at] == 0xff) continue;
      g->failed = true;
      snprintf(g->message, SIM_MESSAGE, "a threadgroup variable of %u bytes was written at byte %u", v.size,
               at - v.offset);
    }
  }
}

static void fiber_body(void) {
  group* g = running;
  fiber* me = &g->fibers[g->current];
  g->entry(g->buffers, &me->thread);
  simdgroup* s = simd_of(me);
  s->returned++;
  g->returned++;
  if (g->waiting)
    fail("threadgroup_barrier is not reached by every thread: one returned while %u of %u wait in it", g->waiting,
         g->threads);
  if (s->waiting) fail("%s is not reached by every lane: one returned before it", s->operation);
  if (g->returned == g->threads) sim_switch(&me->stack_pointer, g->scheduler);
  resume(&me->stack_pointer, next_ready());
}

static bool make_stacks(group* g, uint32_t threads) {
  for (uint32_t i = 0; i < threads; i++) {
    if (g->fibers[i].stack) continue;
    char* block = mmap(NULL, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) return false;
    mprotect(block, GUARD_BYTES, PROT_NONE);
    g->fibers[i].stack = block + GUARD_BYTES;
  }
  return true;
}

static void run_threadgroup(const uint32_t position[3], const uint32_t grid[3], const uint32_t threads[3]) {
  group* g = running;
  g->returned = g->waiting = g->ready_count = g->variable_count = g->memory_used = g->memory_bytes = 0;
  g->simdgroups = (g->threads + SIM_SIMD_WIDTH - 1) / SIM_SIMD_WIDTH;
  for (uint32_t i = 0; i < g->simdgroups; i++) {
    const uint32_t left = g->threads - i * SIM_SIMD_WIDTH;
    g->simd[i].lanes = left < SIM_SIMD_WIDTH ? left : SIM_SIMD_WIDTH;
    g->simd[i].returned = g->simd[i].waiting = 0;
  }
  for (uint32_t i = 0; i < g->threads; i++) {
    fiber* f = &g->fibers[i];
    f->exchanges = 0;
    f->stack_pointer = sim_stack_start(f->stack + STACK_BYTES - i % 32 * STAGGER_BYTES, fiber_body);
    sim_thread* t = &f->thread;
    const uint32_t place[3] = {i % threads[0], i / threads[0] % threads[1], i / (threads[0] * threads[1])};
    for (int axis = 0; axis < 3; axis++) {
      t->thread_position_in_grid[axis] = position[axis] * threads[axis] + place[axis];
      t->thread_position_in_threadgroup[axis] = place[axis];
      t->threadgroup_position_in_grid[axis] = position[axis];
      t->threads_per_threadgroup[axis] = threads[axis];
      t->threadgroups_per_grid[axis] = grid[axis];
      t->threads_per_grid[axis] = grid[axis] * threads[axis];
    }
    t->thread_index_in_threadgroup = i;
    t->thread_index_in_simdgroup = i % SIM_SIMD_WIDTH;
    t->simdgroup_index_in_threadgroup = i / SIM_SIMD_WIDTH;
    t->simdgroups_per_threadgroup = g->simdgroups;
  }
  wake(0, g->threads);
  resume(&g->scheduler, next_ready());
  if (!g->failed) check_red_zones();
}

// Threadgroups in the order of the seed.
static uint32_t* threadgroup_order(uint32_t count, uint64_t seed) {
  uint32_t* order = malloc(count * sizeof *order);
  if (!order) return NULL;
  for (uint32_t i = 0; i < count; i++) order[i] = seed == 1 ? count - 1 - i : i;
  uint64_t state = seed;
  for (uint32_t i = count; seed >= 2 && i > 1; i--) {
    const uint32_t j = random_below(&state, i), swap = order[i - 1];
    order[i - 1] = order[j];
    order[j] = swap;
  }
  return order;
}

int32_t sim_dispatch(sim_entry entry, void* const* buffers, const uint32_t grid[3], const uint32_t threads[3],
                     uint64_t seed, char message[SIM_MESSAGE]) {
  const uint64_t in_group = (uint64_t)threads[0] * threads[1] * threads[2],
                 groups = (uint64_t)grid[0] * grid[1] * grid[2];
  if (in_group == 0 || in_group > SIM_MAX_THREADS || groups == 0 || groups > UINT32_MAX) {
    snprintf(message, SIM_MESSAGE, "a dispatch of %llu threadgroups of %llu threads; a threadgroup has 1 to %d",
             (unsigned long long)groups, (unsigned long long)in_group, SIM_MAX_THREADS);
    return 1;
  }
  if (!running) running = calloc(1, sizeof *running);
  uint32_t* order = threadgroup_order((uint32_t)groups, seed);
  if (!running || !order || !make_stacks(running, (uint32_t)in_group)) {
    free(order);
    snprintf(message, SIM_MESSAGE, "no memory for the stacks of %llu threads", (unsigned long long)in_group);
    return 1;
  }
  group* g = running;
  g->entry = entry;
  g->buffers = buffers;
  g->message = message;
  g->threads = (uint32_t)in_group;
  g->seed = g->random = seed;
  g->failed = false;
  for (uint32_t i = 0; i < groups && !g->failed; i++) {
    const uint32_t n = order[i];
    run_threadgroup((uint32_t[3]){n % grid[0], n / grid[0] % grid[1], n / grid[0] / grid[1]}, grid, threads);
  }
  free(order);
  return g->failed;
}

const sim_runtime* sim_runtime_functions(void) {
  static const sim_runtime functions = {runtime_thread, runtime_threadgroup_barrier, runtime_simdgroup_wait,
                                        runtime_simdgroup_exchange, runtime_threadgroup_memory};
  return &functions;
}

void sim_thread_end(void) {
  if (!running) return;
  for (uint32_t i = 0; i < SIM_MAX_THREADS; i++)
    if (running->fibers[i].stack) munmap(running->fibers[i].stack - GUARD_BYTES, STACK_BYTES + GUARD_BYTES);
  free(running);
  running = NULL;
}
