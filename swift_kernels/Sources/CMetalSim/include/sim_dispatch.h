// Runs compiled kernels: every thread of a threadgroup is a fiber, threadgroups follow one another.
#ifndef METALSTEP_SIM_DISPATCH_H
#define METALSTEP_SIM_DISPATCH_H
#include "sim_runtime.h"

enum {
  SIM_MAX_THREADS = 1024,          // in a threadgroup
  SIM_SIMD_WIDTH = 32,             // lanes
  SIM_THREADGROUP_MEMORY = 32768,  // bytes
  SIM_MESSAGE = 256,               // bytes
};

// sim_runtime.h and metal_stdlib.h as text, to be compiled in front of a kernel.
const char* sim_prelude(void);

// The functions to hand to a loaded library's sim_set_runtime.
const sim_runtime* sim_runtime_functions(void);

// seed 0: threads and threadgroups in ascending order; 1: descending; others: shuffled by the seed.
// Returns 0, or 1 with the reason in `message`; the dispatch is then abandoned where it was.
int32_t sim_dispatch(sim_entry entry, void* const* buffers, const uint32_t grid[3], const uint32_t threads[3],
                     uint64_t seed, char message[SIM_MESSAGE]);

// Releases the calling thread's stacks.
void sim_thread_end(void);

#endif
