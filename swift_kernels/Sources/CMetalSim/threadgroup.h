// Runs one threadgroup: its threads are fibers of the calling thread of the operating system.
#ifndef METALSTEP_THREADGROUP_H
#define METALSTEP_THREADGROUP_H
#include <stdbool.h>

#include "sim_dispatch.h"

// What the threadgroups of a dispatch have in common.
typedef struct {
  sim_entry entry;
  void* const* buffers;
  const uint32_t* grid;        // threadgroups by axis
  const uint32_t* threads;     // of a threadgroup, by axis
  uint32_t threads_per_group;  // in all
  uint64_t seed;
  char* message;  // SIM_MESSAGE bytes, written by the first that fails
} sim_group_job;

// `index` is the threadgroup's number in the grid. False, with the reason in `message`, if the kernel is mistaken.
bool sim_run_threadgroup(const sim_group_job* job, const uint32_t position[3], uint32_t index,
                         char message[SIM_MESSAGE]);

// Releases the calling thread's stacks.
void sim_release_threadgroup(void);

static inline uint32_t sim_random_below(uint64_t* state, uint32_t limit) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)((*state >> 33) % limit);
}

#endif
