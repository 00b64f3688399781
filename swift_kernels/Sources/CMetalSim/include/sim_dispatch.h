// Runs compiled kernels: every thread of a threadgroup is a fiber of one thread of the operating system.
#ifndef METALSTEP_SIM_DISPATCH_H
#define METALSTEP_SIM_DISPATCH_H
#include "sim_runtime.h"

enum {
  SIM_MAX_THREADS = 1024,          // in a threadgroup
  SIM_SIMD_WIDTH = 32,             // lanes
  SIM_THREADGROUP_MEMORY = 32768,  // bytes
  SIM_MAX_BUFFERS = 31,            // of a dispatch
  SIM_MESSAGE = 256,               // bytes
};

// sim_runtime.h and Metal's standard library as text, to be compiled in front of a kernel.
const char* sim_prelude(void);

// The functions to hand to a loaded library's sim_set_runtime.
const sim_runtime* sim_runtime_functions(void);

// seed 0: threads and threadgroups in ascending order, threadgroups over two threads of the operating system; others: over
// one, so that a run can be repeated; 1: descending; from 2: shuffled by the seed.
// `buffers` has SIM_MAX_BUFFERS entries, NULL where nothing is bound.
// Returns 0, or 1 with the reason in `message`; the dispatch is then abandoned where it was.
int32_t sim_dispatch(sim_entry entry, void* const* buffers, const uint32_t grid[3], const uint32_t threads[3],
                     uint64_t seed, char message[SIM_MESSAGE]);

// Memory of a device buffer, aligned to 16 bytes and of any content. What lies behind its end cannot be touched: from the
// next byte on under AddressSanitizer, otherwise from the next multiple of 16. NULL without memory.
void* sim_memory_allocate(size_t size);
void sim_memory_free(void* memory);
void sim_memory_poison_ends(void);

// Finds the sanitizer that `library`, a loaded library of kernels, was compiled with.
void sim_find_sanitizers(void* library);

// Releases the calling thread's stacks and ends its helper.
void sim_thread_end(void);

#endif
