#define _DEFAULT_SOURCE  // sigset_t
#include "sim_dispatch.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "sanitizers.h"
#include "threadgroup.h"

// One dispatch, shared by those that run its threadgroups.
typedef struct {
  sim_group_job work;
  const uint32_t* order;  // of threadgroups
  uint32_t groups;
  _Atomic uint32_t next;
  _Atomic bool failed;
} job;

// A second thread of the operating system, which takes threadgroups of its owner's dispatches.
typedef struct {
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  job* offered;  // until taken
  bool busy, stopped;
} worker;

static _Thread_local worker* own_worker;

static void take_threadgroups(job* j) {
  const uint32_t* grid = j->work.grid;
  char message[SIM_MESSAGE];
  while (!atomic_load(&j->failed)) {
    const uint32_t i = atomic_fetch_add(&j->next, 1);
    if (i >= j->groups) return;
    const uint32_t n = j->order ? j->order[i] : i;
    const uint32_t position[3] = {n % grid[0], n / grid[0] % grid[1], n / grid[0] / grid[1]};
    if (sim_run_threadgroup(&j->work, position, n, message)) continue;
    if (!atomic_exchange(&j->failed, true)) snprintf(j->work.message, SIM_MESSAGE, "%s", message);
  }
}

static void* serve(void* context) {
  worker* h = context;
  pthread_mutex_lock(&h->mutex);
  while (!h->stopped) {
    job* j = h->offered;
    if (!j) {
      pthread_cond_wait(&h->changed, &h->mutex);
      continue;
    }
    h->offered = NULL;
    h->busy = true;
    pthread_mutex_unlock(&h->mutex);
    take_threadgroups(j);
    pthread_mutex_lock(&h->mutex);
    h->busy = false;
    pthread_cond_broadcast(&h->changed);
  }
  pthread_mutex_unlock(&h->mutex);
  sim_release_threadgroup();
  return NULL;
}

// The calling thread's worker, or NULL where there is one processor or no memory.
static worker* find_worker(void) {
  if (own_worker || sysconf(_SC_NPROCESSORS_ONLN) < 2) return own_worker;
  worker* h = calloc(1, sizeof *h);
  if (!h) return NULL;
  pthread_mutex_init(&h->mutex, NULL);
  pthread_cond_init(&h->changed, NULL);
  sigset_t all, before;
  sigfillset(&all);  // signals are for the program's own threads
  pthread_sigmask(SIG_BLOCK, &all, &before);
  const int failure = pthread_create(&h->thread, NULL, serve, h);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (failure) {
    free(h);
    return NULL;
  }
  return own_worker = h;
}

static void run(job* j, worker* h) {
  if (h) {
    pthread_mutex_lock(&h->mutex);
    h->offered = j;
    pthread_cond_broadcast(&h->changed);
    pthread_mutex_unlock(&h->mutex);
  }
  take_threadgroups(j);
  if (h) {
    pthread_mutex_lock(&h->mutex);
    h->offered = NULL;  // it may not have come to it
    while (h->busy) pthread_cond_wait(&h->changed, &h->mutex);
    pthread_mutex_unlock(&h->mutex);
  }
}

// Threadgroups in the order of the seed; NULL for ascending order, or without memory.
static uint32_t* threadgroup_order(uint32_t count, uint64_t seed) {
  uint32_t* order = seed ? malloc(count * sizeof *order) : NULL;
  if (!order) return NULL;
  for (uint32_t i = 0; i < count; i++) order[i] = seed == 1 ? count - 1 - i : i;
  uint64_t state = seed;
  for (uint32_t i = count; seed >= 2 && i > 1; i--) {
    const uint32_t j = sim_random_below(&state, i), swap = order[i - 1];
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
  uint32_t* order = threadgroup_order((uint32_t)groups, seed);
  job j = {.work = {entry, buffers, grid, threads, (uint32_t)in_group, seed, message},
           .order = order,
           .groups = (uint32_t)groups};
  const bool few = groups * in_group < 2 * SIM_SIMD_WIDTH;  // done before another thread would wake
  const bool alone = seed || groups == 1 || few || sim_sanitizers.create_fiber;
  run(&j, alone ? NULL : find_worker());
  free(order);
  return atomic_load(&j.failed);
}

void sim_thread_end(void) {
  worker* h = own_worker;
  if (h) {
    pthread_mutex_lock(&h->mutex);
    h->stopped = true;
    pthread_cond_broadcast(&h->changed);
    pthread_mutex_unlock(&h->mutex);
    pthread_join(h->thread, NULL);
    pthread_cond_destroy(&h->changed);
    pthread_mutex_destroy(&h->mutex);
    free(h);
    own_worker = NULL;
  }
  sim_release_threadgroup();
}
