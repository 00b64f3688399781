#define _DEFAULT_SOURCE  // mmap: MAP_ANONYMOUS
#include "threadgroup.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "faults.h"
#include "fiber_switch.h"
#include "sanitizers.h"

enum {
  STACK_BYTES = 128 << 10,
  GUARD_BYTES = 16 << 10,  // a page, whatever its size: running off a stack faults instead of writing into the next one
  STAGGER_BYTES = 192,     // stacks that start at the same offset would share one set of the cache
  MAX_VARIABLES = 32,      // threadgroup variables of one kernel
  RED_ZONE = 64,           // bytes after each of them, checked for writes
  EXCHANGE_BYTES = 64,
};

typedef struct {
  void* stack_pointer;  // NULL until the thread first runs
  uint32_t stack;       // in `stacks`
  uint32_t exchanges;   // so far; two buffers by turns, as a lane may run ahead to the next exchange
  uint32_t barriers, waits;
  void* traced;  // ThreadSanitizer's fiber
  sim_thread thread;
} fiber;

typedef struct {
  uint32_t lanes, returned, waiting;
  const char* operation;  // what the waiting lanes wait in
  char order[2];          // as group.order
  _Alignas(64) char slots[2][SIM_SIMD_WIDTH * EXCHANGE_BYTES];
} simdgroup;

typedef struct {
  const void* site;
  uint32_t offset, size;  // bytes in `memory`
} variable;

// The threadgroup being run, one per thread of the operating system.
typedef struct {
  const sim_group_job* job;
  uint32_t position[3];
  char* message;
  uint64_t random;
  uint32_t threads, simdgroups, returned, current;
  uint32_t waiting, barrier_line;  // threads in threadgroup_barrier
  bool failed, inside;             // inside: a fiber runs, not the scheduler
  void* scheduler;                 // stack of sim_run_threadgroup
  void* traced;                    // its fiber for ThreadSanitizer
  // For ThreadSanitizer: the first two order what lies before a barrier and after it, by turns, as a thread that runs
  // ahead to the next barrier must not hand on what it wrote since; the others order threadgroups.
  char order[2], start, end;
  uint32_t ready_count, ready[SIM_MAX_THREADS];
  uint32_t free_count, free_stacks[SIM_MAX_THREADS];
  char* stacks[SIM_MAX_THREADS];
  uint32_t variable_count, memory_used, memory_bytes;
  variable variables[MAX_VARIABLES];
  simdgroup simd[SIM_MAX_THREADS / SIM_SIMD_WIDTH];
  fiber fibers[SIM_MAX_THREADS];
  _Alignas(64) unsigned char memory[SIM_THREADGROUP_MEMORY + MAX_VARIABLES * 2 * RED_ZONE];
} group;

static _Thread_local group* running;

static simdgroup* simd_of(const fiber* f) { return &running->simd[f->thread.simdgroup_index_in_threadgroup]; }

// Every change of stack or thread goes through here.
static void change(void** from, void* to, void* traced, bool inside) {
  running->inside = inside;
  if (sim_sanitizers.create_fiber) sim_sanitizers.switch_fiber(traced, 1 /* which orders nothing */);
  sim_switch(from, to);
}

static void leave(void** from) { change(from, running->scheduler, running->traced, false); }

static void release(char* object) {
  if (sim_sanitizers.create_fiber) sim_sanitizers.release(object);
}

static void acquire(char* object) {
  if (sim_sanitizers.create_fiber) sim_sanitizers.acquire(object);
}

// Ends the dispatch. Fibers are abandoned where they stand: kernels own nothing that must be released.
_Noreturn static void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(running->message, SIM_MESSAGE, format, arguments);
  va_end(arguments);
  running->failed = true;
  leave(&running->fibers[running->current].stack_pointer);
  abort();
}

static void wake(uint32_t first, uint32_t count) {
  group* g = running;
  for (uint32_t i = 0; i < count; i++)  // the last of `ready` runs first
    g->ready[g->ready_count++] = g->job->seed == 1 ? first + i : first + count - 1 - i;
}

static uint32_t next_ready(void) {
  group* g = running;
  if (g->ready_count == 0) {
    for (uint32_t i = 0; i < g->simdgroups; i++)
      if (g->simd[i].waiting) fail("%s is not reached by every lane of simdgroup %u", g->simd[i].operation, i);
    fail("threadgroup_barrier is reached by %u of %u threads", g->waiting, g->threads);
  }
  const uint32_t place = g->job->seed >= 2 ? sim_random_below(&g->random, g->ready_count) : g->ready_count - 1;
  const uint32_t index = g->ready[place];
  g->ready[place] = g->ready[--g->ready_count];
  return index;
}

static void fiber_body(void);

static void resume(void** from, uint32_t index) {
  group* g = running;
  fiber* f = &g->fibers[index];
  if (!f->stack_pointer) {
    f->stack = g->free_stacks[--g->free_count];
    f->stack_pointer = sim_stack_start(g->stacks[f->stack] + STACK_BYTES - f->stack % 32 * STAGGER_BYTES, fiber_body);
  }
  g->current = index;
  change(from, f->stack_pointer, f->traced, true);
}

static void yield(void) {
  fiber* me = &running->fibers[running->current];
  const uint32_t index = next_ready();
  if (index != running->current) resume(&me->stack_pointer, index);
}

static const sim_thread* runtime_thread(void) { return &running->fibers[running->current].thread; }

static void runtime_threadgroup_barrier(uint32_t line, int orders) {
  group* g = running;
  char* order = &g->order[g->fibers[g->current].barriers++ & 1];
  if (orders) release(order);
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
  if (orders) acquire(order);
}

static void wait_for_lanes(fiber* me, simdgroup* s, const char* operation, void* values, sim_combine combine) {
  const uint32_t index = me->thread.simdgroup_index_in_threadgroup;
  if (s->returned) fail("%s after %u lanes of simdgroup %u returned", operation, s->returned, index);
  if (s->waiting == 0) s->operation = operation;
  if (s->operation != operation && strcmp(s->operation, operation) != 0)
    fail("lanes of simdgroup %u diverge: some are in %s, others in %s", index, s->operation, operation);
  if (++s->waiting == s->lanes) {
    s->waiting = 0;
    if (combine) combine(values, s->lanes);
    wake(index * SIM_SIMD_WIDTH, s->lanes);
  }
  yield();
}

static void runtime_simdgroup_wait(const char* operation, int orders) {
  fiber* me = &running->fibers[running->current];
  char* order = &simd_of(me)->order[me->waits++ & 1];
  if (orders) release(order);
  wait_for_lanes(me, simd_of(me), operation, NULL, NULL);
  if (orders) acquire(order);
}

// memcpy that ThreadSanitizer does not look at.
static void copy(char* to, const char* from, size_t size) {
  typedef uint64_t __attribute__((aligned(1), may_alias)) word;
  for (; size >= sizeof(word); size -= sizeof(word), to += sizeof(word), from += sizeof(word))
    *(volatile word*)to = *(const volatile word*)from;
  for (; size; size--) *(volatile char*)to++ = *(const volatile char*)from++;
}

static sim_exchange runtime_simdgroup_exchange(const void* value, size_t size, sim_combine combine,
                                               const char* operation) {
  fiber* me = &running->fibers[running->current];
  simdgroup* s = simd_of(me);
  if (size > EXCHANGE_BYTES)
    fail("%s of a value of %zu bytes; at most %d can be exchanged", operation, size, EXCHANGE_BYTES);
  char* slots = s->slots[me->exchanges++ & 1];
  const uint32_t lane = me->thread.thread_index_in_simdgroup;
  copy(slots + lane * size, value, size);
  wait_for_lanes(me, s, operation, slots, combine);
  return (sim_exchange){slots, lane, s->lanes};
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
  if (sim_sanitizers.poison) sim_sanitizers.poison(g->memory + v->offset + size, g->memory_used - v->offset - size);
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

static void place(fiber* f, uint32_t index) {
  const sim_group_job* job = running->job;
  const uint32_t* threads = job->threads;
  const uint32_t at[3] = {index % threads[0], index / threads[0] % threads[1], index / (threads[0] * threads[1])};
  sim_thread* t = &f->thread;
  for (int axis = 0; axis < 3; axis++) {
    t->thread_position_in_grid[axis] = running->position[axis] * threads[axis] + at[axis];
    t->thread_position_in_threadgroup[axis] = at[axis];
    t->threadgroup_position_in_grid[axis] = running->position[axis];
    t->threads_per_threadgroup[axis] = threads[axis];
    t->threadgroups_per_grid[axis] = job->grid[axis];
    t->threads_per_grid[axis] = job->grid[axis] * threads[axis];
  }
  t->thread_index_in_threadgroup = index;
  t->thread_index_in_simdgroup = index % SIM_SIMD_WIDTH;
  t->simdgroup_index_in_threadgroup = index / SIM_SIMD_WIDTH;
  t->simdgroups_per_threadgroup = running->simdgroups;
}

// Runs threads to their end, one after the other, until the next to run already has a stack of its own.
static void fiber_body(void) {
  group* g = running;
  for (;;) {
    fiber* me = &g->fibers[g->current];
    place(me, g->current);
    acquire(&g->start);
    g->job->entry(g->job->buffers, &me->thread);
    release(&g->end);
    simdgroup* s = simd_of(me);
    s->returned++;
    g->returned++;
    if (g->waiting)
      fail("threadgroup_barrier is not reached by every thread: one returned while %u of %u wait in it", g->waiting,
           g->threads);
    if (s->waiting) fail("%s is not reached by every lane: one returned before it", s->operation);
    if (g->returned == g->threads) leave(&me->stack_pointer);
    const uint32_t next = next_ready();
    const bool traced = sim_sanitizers.create_fiber;  // then two threads on one stack would be a race
    if (g->fibers[next].stack_pointer || traced) {
      if (!traced) g->free_stacks[g->free_count++] = me->stack;  // left before anybody takes it
      resume(&me->stack_pointer, next);
    }
    g->fibers[next].stack = me->stack;
    g->fibers[next].stack_pointer = me->stack_pointer;
    g->current = next;
  }
}

static bool make_stacks(group* g, uint32_t threads) {
  for (uint32_t i = 0; i < threads; i++) {
    g->free_stacks[threads - 1 - i] = i;
    if (g->stacks[i]) continue;
    char* block = mmap(NULL, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) return false;
    mprotect(block, GUARD_BYTES, PROT_NONE);
    g->stacks[i] = block + GUARD_BYTES;
  }
  g->free_count = threads;
  return true;
}

// ---- faults

static void land(void) {
  leave(&running->fibers[running->current].stack_pointer);
  abort();
}

bool sim_fault(int signal, const void* address, void (**landing)(void), char** top) {
  group* g = running;
  if (!g || !g->inside) return false;
  char* stack = g->stacks[g->fibers[g->current].stack];
  const char* at = address;
  if (signal == SIGFPE) {
    snprintf(g->message, SIM_MESSAGE, "an integer is divided by zero");
  } else if (at >= stack - GUARD_BYTES && at < stack) {
    snprintf(g->message, SIM_MESSAGE, "a thread needs more than %d bytes of stack", STACK_BYTES);
  } else {
    uint32_t nearest = SIM_MAX_BUFFERS;
    for (uint32_t i = 0; i < SIM_MAX_BUFFERS; i++) {
      const char* start = g->job->buffers[i];
      if (start && start <= at && (nearest == SIM_MAX_BUFFERS || start > (const char*)g->job->buffers[nearest]))
        nearest = i;
    }
    if (nearest == SIM_MAX_BUFFERS)
      snprintf(g->message, SIM_MESSAGE, "memory at %p, before every buffer, is read or written", address);
    else
      snprintf(g->message, SIM_MESSAGE, "memory outside every buffer is read or written: byte %zu of [[buffer(%u)]]",
               (size_t)(at - (const char*)g->job->buffers[nearest]), nearest);
  }
  g->failed = true;
  *landing = land;
  *top = stack + STACK_BYTES - 1024;
  return true;
}

bool sim_run_threadgroup(const sim_group_job* job, const uint32_t position[3], uint32_t index,
                         char message[SIM_MESSAGE]) {
  if (!running && sim_catch_faults()) running = calloc(1, sizeof *running);
  group* g = running;
  if (!g || !make_stacks(g, job->threads_per_group)) {
    snprintf(message, SIM_MESSAGE, "no memory for the stacks of %u threads", job->threads_per_group);
    return false;
  }
  g->job = job;
  memcpy(g->position, position, sizeof g->position);
  g->message = message;
  g->random = job->seed + index * 0x9e3779b97f4a7c15u;
  g->failed = false;
  g->threads = job->threads_per_group;
  g->returned = g->waiting = g->ready_count = g->variable_count = g->memory_used = g->memory_bytes = 0;
  g->simdgroups = (g->threads + SIM_SIMD_WIDTH - 1) / SIM_SIMD_WIDTH;
  if (sim_sanitizers.unpoison) sim_sanitizers.unpoison(g->memory, sizeof g->memory);
  for (uint32_t i = 0; i < g->simdgroups; i++) {
    const uint32_t left = g->threads - i * SIM_SIMD_WIDTH;
    g->simd[i].lanes = left < SIM_SIMD_WIDTH ? left : SIM_SIMD_WIDTH;
    g->simd[i].returned = g->simd[i].waiting = 0;
  }
  for (uint32_t i = 0; i < g->threads; i++) {
    g->fibers[i].stack_pointer = NULL;
    g->fibers[i].exchanges = g->fibers[i].barriers = g->fibers[i].waits = 0;
    if (sim_sanitizers.create_fiber && !g->fibers[i].traced) g->fibers[i].traced = sim_sanitizers.create_fiber(0);
  }
  if (sim_sanitizers.create_fiber) g->traced = sim_sanitizers.current_fiber();
  release(&g->start);
  wake(0, g->threads);
  resume(&g->scheduler, next_ready());
  acquire(&g->end);
  if (!g->failed) check_red_zones();
  return !g->failed;
}

const sim_runtime* sim_runtime_functions(void) {
  static const sim_runtime functions = {runtime_thread, runtime_threadgroup_barrier, runtime_simdgroup_wait,
                                        runtime_simdgroup_exchange, runtime_threadgroup_memory};
  return &functions;
}

void sim_release_threadgroup(void) {
  sim_release_faults();
  if (!running) return;
  for (uint32_t i = 0; i < SIM_MAX_THREADS; i++)
    if (running->stacks[i]) munmap(running->stacks[i] - GUARD_BYTES, STACK_BYTES + GUARD_BYTES);
  free(running);
  running = NULL;
}
