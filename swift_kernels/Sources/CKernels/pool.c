// The thread pool. Threads meet at gates: words on which they spin briefly and then sleep (a futex; elsewhere a
// condition variable). Without pinning, the system may keep two spinning threads on one processor: each barrier then
// costs the whole spin. Workers stay pinned; the caller is pinned for the length of a job and gets its own mask back.
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "pool.h"
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include "cpus.h"
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread/qos.h>
#endif

enum { SPINS = 1000 };  // about 26 us on Zen 4: longer than a launch's imbalance, shorter than a scheduler's tick

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

// A word that threads wait on until it differs from what they saw.
typedef struct {
  _Alignas(128) _Atomic uint32_t word;
  _Atomic uint32_t sleepers;
#if !defined(__linux__)
  pthread_mutex_t mutex;
  pthread_cond_t condition;
#endif
} gate;

typedef struct {
  ms_pool *pool;
  int32_t thread;
} worker;

struct ms_pool {
  int32_t threads;
  int32_t spins;
  uint32_t forks;  // fork count when its workers were started: a child has none of them
  _Atomic bool stop;
  gate job;      // counts jobs
  gate barrier;  // counts barriers
  _Alignas(128) _Atomic uint32_t arrived;
  ms_pool_body body;
  void *context;
  pthread_t *handles;  // of threads 1.. at 1..
  worker *workers;
  bool pinned;
  ms_cpus cpus;
};

static _Atomic uint32_t fork_count;  // forks between the first process and this one
static void count_fork(void) { atomic_fetch_add(&fork_count, 1); }
static void watch_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

static void gate_init(gate *g) {
  atomic_init(&g->word, 0);
  atomic_init(&g->sleepers, 0);
#if !defined(__linux__)
  pthread_mutex_init(&g->mutex, NULL);
  pthread_cond_init(&g->condition, NULL);
#endif
}

static void gate_wait(gate *g, uint32_t seen, int32_t spins) {
  for (int32_t i = 0; i < spins; ++i) {
    if (atomic_load_explicit(&g->word, memory_order_acquire) != seen) return;
    relax();
  }
#if defined(__linux__)
  atomic_fetch_add(&g->sleepers, 1);
  while (atomic_load(&g->word) == seen) syscall(SYS_futex, &g->word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
  atomic_fetch_sub(&g->sleepers, 1);
#else
  pthread_mutex_lock(&g->mutex);
  atomic_fetch_add(&g->sleepers, 1);
  while (atomic_load(&g->word) == seen) pthread_cond_wait(&g->condition, &g->mutex);
  atomic_fetch_sub(&g->sleepers, 1);
  pthread_mutex_unlock(&g->mutex);
#endif
}

// Sequentially consistent on both sides: the opener sees the sleeper, or the sleeper sees the new word.
static void gate_open(gate *g) {
  atomic_fetch_add(&g->word, 1);
  if (atomic_load(&g->sleepers) == 0) return;
#if defined(__linux__)
  syscall(SYS_futex, &g->word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
  pthread_mutex_lock(&g->mutex);
  pthread_cond_broadcast(&g->condition);
  pthread_mutex_unlock(&g->mutex);
#endif
}

static void pin(const ms_pool *pool, int32_t thread) {
#if defined(__linux__)
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(pool->cpus.order[thread], &one);
  sched_setaffinity(0, sizeof one, &one);
#else
  (void)pool, (void)thread;
#endif
}

static void *work(void *argument) {
  const worker *self = argument;
  ms_pool *pool = self->pool;
#if defined(__APPLE__)
  pthread_set_qos_class_self_np(QOS_CLASS_USER_INTERACTIVE, 0);
#endif
  if (pool->pinned) pin(pool, self->thread);
  for (uint32_t seen = 0;; ++seen) {
    gate_wait(&pool->job, seen, pool->spins);
    if (atomic_load(&pool->stop)) return NULL;
    pool->body(pool->context, self->thread, pool->threads);
    ms_pool_barrier(pool);
  }
}

static void stop_workers(ms_pool *pool, int32_t started) {
  atomic_store(&pool->stop, true);
  gate_open(&pool->job);
  for (int32_t i = 1; i < started; ++i) pthread_join(pool->handles[i], NULL);
}

// Starts threads 1.. from a state in which nothing has run. Signals are left to the caller's threads.
static bool start_workers(ms_pool *pool) {
  sigset_t all, before;
  int32_t started = 1;
  atomic_init(&pool->stop, false);
  atomic_init(&pool->arrived, 0);
  gate_init(&pool->job);
  gate_init(&pool->barrier);
  pool->forks = atomic_load(&fork_count);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (started < pool->threads && pthread_create(&pool->handles[started], NULL, work, &pool->workers[started]) == 0) {
    ++started;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (started < pool->threads) stop_workers(pool, started);
  return started == pool->threads;
}

static void release(ms_pool *pool) {
  free(pool->handles);
  free(pool->workers);
  free(pool);
}

ms_pool *ms_pool_create(int32_t threads) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  void *memory;
  pthread_once(&once, watch_forks);
  if (threads < 1 || posix_memalign(&memory, 128, sizeof(ms_pool)) != 0) return NULL;
  ms_pool *pool = memory;
  pool->threads = threads;
  pool->handles = calloc((size_t)threads, sizeof *pool->handles);
  pool->workers = calloc((size_t)threads, sizeof *pool->workers);
  ms_cpus_read(&pool->cpus);
  // More threads than processors: who spins holds up who works.
  pool->spins = threads > pool->cpus.count ? 0 : SPINS;
#if defined(__linux__)
  pool->pinned = threads > 1 && threads <= pool->cpus.count;
#else
  pool->pinned = false;  // macOS has no affinity
#endif
  if (pool->handles == NULL || pool->workers == NULL) {
    release(pool);
    return NULL;
  }
  for (int32_t i = 0; i < threads; ++i) pool->workers[i] = (worker){pool, i};
  if (start_workers(pool)) return pool;
  release(pool);
  return NULL;
}

// In a forked child there are no workers to stop.
void ms_pool_destroy(ms_pool *pool) {
  if (pool == NULL) return;
  if (pool->forks == atomic_load(&fork_count)) stop_workers(pool, pool->threads);
  release(pool);
}

int32_t ms_pool_size(const ms_pool *pool) { return pool->threads; }

void ms_pool_barrier(ms_pool *pool) {
  if (pool->threads == 1) return;
  const uint32_t seen = atomic_load_explicit(&pool->barrier.word, memory_order_relaxed);
  if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) + 1 == (uint32_t)pool->threads) {
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    gate_open(&pool->barrier);
  } else {
    gate_wait(&pool->barrier, seen, pool->spins);
  }
}

void ms_pool_run(ms_pool *pool, ms_pool_body body, void *context) {
  if (pool->forks != atomic_load_explicit(&fork_count, memory_order_relaxed) && !start_workers(pool)) {
    pool->threads = 1;  // a forked child that can have no threads runs its jobs alone
  }
  if (pool->threads == 1) {
    body(context, 0, 1);
    return;
  }
#if defined(__linux__)
  cpu_set_t before;
  // A caller that is on its processor already stays there: the others are busy. This saves three system calls, 5 us, a
  // job; one that is moved all the same is pinned from its next job on.
  const bool pinned =
      pool->pinned && sched_getcpu() != pool->cpus.order[0] && sched_getaffinity(0, sizeof before, &before) == 0;
  if (pinned) pin(pool, 0);
#endif
  pool->body = body;
  pool->context = context;
  gate_open(&pool->job);
  body(context, 0, pool->threads);
  ms_pool_barrier(pool);
#if defined(__linux__)
  if (pinned) sched_setaffinity(0, sizeof before, &before);
#endif
}
