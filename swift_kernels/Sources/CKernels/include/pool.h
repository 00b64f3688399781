// The host device's threads: pinned, spinning briefly, then parked. The caller of ms_pool_run is thread 0.
#ifndef METALSTEP_POOL_H
#define METALSTEP_POOL_H
#include <stdint.h>

typedef struct ms_pool ms_pool;
typedef void (*ms_pool_body)(void *context, int32_t thread, int32_t threads);

// NULL: out of memory or threads. A forked child starts its own at its first job.
ms_pool *ms_pool_create(int32_t threads);
void ms_pool_destroy(ms_pool *pool);
int32_t ms_pool_size(const ms_pool *pool);
// Runs body on every thread and returns when all are done. One job at a time: the caller holds the device's lock.
void ms_pool_run(ms_pool *pool, ms_pool_body body, void *context);
// Inside a body: returns when every thread has arrived.
void ms_pool_barrier(ms_pool *pool);
// Threads worth using: METALSTEP_THREADS, else cores in the affinity mask within the cgroup quota. -1:
// METALSTEP_THREADS is not a number from 1 to 1024.
int32_t ms_pool_default_threads(void);

#endif
