// The thread pool. Threads meet at gates: words on which they spin briefly and then sleep (a futex; elsewhere a
// condition variable). Without pinning, the system may keep two spinning threads on one processor: each barrier then
// costs the whole spin. Workers stay pinned; the caller is pinned for the length of a job and gets its own mask back.
// A pinned thread that another process has preempted cannot go where a processor is idle: whoever waits for it at a
// barrier moves it to its own, and it goes home behind the barrier.
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
#include <time.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread/qos.h>
#endif

enum {
  SPINS = 1000,       // about 26 us on Zen 4: longer than a launch's imbalance, shorter than a scheduler's tick
  LATE_SPINS = 3000,  // longer than a thread takes to wake up or to move
};

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

enum { AT_HOME = 0, IS_MOVED = 1, AWAY = 2, NO_JOB = 3 };  // IS_MOVED: by another thread, just now

typedef struct {
  ms_pool *pool;
  int32_t thread;
  _Atomic uint32_t arrivals;  // the barrier's word behind the last barrier that it came to
  _Atomic uint32_t place;  // AT_HOME, ...; whoever sets IS_MOVED may use its handle and write below until it sets AWAY
#if defined(__linux__)
  _Atomic clockid_t clock;  // its processor time
  cpu_set_t home;           // its mask before it was moved
  bool was_moved;           // in this job
#endif
} worker;
static _Thread_local worker *self;  // in a job

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
  pthread_t *handles;  // the caller's, of its latest job, at 0
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

static bool gate_spin(gate *g, uint32_t seen, int32_t spins) {
  for (int32_t i = 0; i < spins; ++i) {
    if (atomic_load_explicit(&g->word, memory_order_acquire) != seen) return true;
    relax();
  }
  return false;
}

static void gate_sleep(gate *g, uint32_t seen) {
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

// ---- late threads -------------------------------------------------------------------------------------------------
#if defined(__linux__)
static int64_t processor_time(const worker *w) {
  struct timespec time = {0};
  clock_gettime(atomic_load_explicit(&w->clock, memory_order_relaxed), &time);
  return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// Whether it is queued behind something else: one that has more work than others is left alone.
static bool is_preempted(const worker *w, uint32_t arrivals) {
  const int64_t before = processor_time(w);
  return !gate_spin(&w->pool->barrier, arrivals - 1, LATE_SPINS) && processor_time(w) == before;
}

// Moves one thread that has not come to the barrier to this thread's processor, which is about to be idle.
static void fetch_late(ms_pool *pool, uint32_t arrivals) {
  for (int32_t i = 0; i < pool->threads; ++i) {
    worker *late = &pool->workers[i];
    uint32_t place = AT_HOME;
    if (atomic_load(&late->arrivals) == arrivals || atomic_load(&late->place) != AT_HOME ||
        !is_preempted(late, arrivals))
      continue;
    if (!atomic_compare_exchange_strong(&late->place, &place, IS_MOVED)) continue;
    if (atomic_load(&late->arrivals) == arrivals) {  // meanwhile
      atomic_store(&late->place, AT_HOME);
      continue;
    }
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(pool->cpus.order[self->thread], &here);
    if (!late->was_moved) pthread_getaffinity_np(pool->handles[i], sizeof late->home, &late->home);
    late->was_moved = true;
    pthread_setaffinity_np(pool->handles[i], sizeof here, &here);
    atomic_store(&late->place, AWAY);
    return;
  }
}

// From AT_HOME or AWAY to `place`, on its own processor.
static void go_home(uint32_t place) {
  uint32_t now = AT_HOME;
  while (!atomic_compare_exchange_strong(&self->place, &now, place)) {
    if (now == AWAY) {
      pin(self->pool, self->thread);
      atomic_store(&self->place, AT_HOME);
    } else {
      sched_yield();
    }
    now = AT_HOME;
  }
}

// Begins a thread's time in which it may be moved.
static void enter(worker *w) {
  clockid_t clock;
  self = w;
  if (pthread_getcpuclockid(pthread_self(), &clock) == 0) atomic_store_explicit(&w->clock, clock, memory_order_relaxed);
  atomic_store(&w->place, AT_HOME);
}
#else
static void fetch_late(ms_pool *pool, uint32_t arrivals) { (void)pool, (void)arrivals; }
static void go_home(uint32_t place) { (void)place; }
static void enter(worker *w) { self = w; }
#endif

static void *work(void *argument) {
  worker *own = argument;
  ms_pool *pool = own->pool;
#if defined(__APPLE__)
  pthread_set_qos_class_self_np(QOS_CLASS_USER_INTERACTIVE, 0);
#endif
  if (pool->pinned) pin(pool, own->thread);
  enter(own);
  for (uint32_t seen = 0;; ++seen) {
    if (!gate_spin(&pool->job, seen, pool->spins)) gate_sleep(&pool->job, seen);
    if (atomic_load(&pool->stop)) return NULL;
    pool->body(pool->context, own->thread, pool->threads);
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
  for (int32_t i = 0; i < pool->threads; ++i) {
    atomic_init(&pool->workers[i].arrivals, 0);
    atomic_init(&pool->workers[i].place, NO_JOB);
  }
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
  for (int32_t i = 0; i < threads; ++i) pool->workers[i].pool = pool, pool->workers[i].thread = i;
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
  atomic_store_explicit(&self->arrivals, seen + 1, memory_order_relaxed);
  if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) + 1 == (uint32_t)pool->threads) {
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    gate_open(&pool->barrier);
  } else if (!gate_spin(&pool->barrier, seen, pool->spins)) {
    if (pool->pinned) fetch_late(pool, seen + 1);
    gate_sleep(&pool->barrier, seen);
  }
  if (atomic_load_explicit(&self->place, memory_order_relaxed) != AT_HOME) go_home(AT_HOME);
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
#if defined(__linux__)
  pool->handles[0] = pthread_self();
  pool->workers[0].was_moved = false;
#endif
  enter(&pool->workers[0]);
  pool->body = body;
  pool->context = context;
  gate_open(&pool->job);
  body(context, 0, pool->threads);
  ms_pool_barrier(pool);
  go_home(NO_JOB);
#if defined(__linux__)
  if (!pinned && pool->workers[0].was_moved) before = pool->workers[0].home;
  if (pinned || pool->workers[0].was_moved) sched_setaffinity(0, sizeof before, &before);
#endif
}
