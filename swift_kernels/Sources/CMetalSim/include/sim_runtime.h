// What passes between a compiled kernel and the fibers that run it. The simulator puts this text before every kernel it
// compiles (metal_stdlib.c), so that the two sides cannot disagree.
#ifndef METALSTEP_SIM_RUNTIME_H
#define METALSTEP_SIM_RUNTIME_H
#include <stddef.h>
#include <stdint.h>

// A thread's place in its dispatch, by the names of Metal's attributes.
typedef struct {
  uint32_t thread_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threadgroup_position_in_grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_grid[3];
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
} sim_thread;

// Turns the values of all lanes, one after the other, into what the lanes are given instead.
typedef void (*sim_combine)(void* values, uint32_t lanes);

typedef struct {
  const void* values;  // lane after lane; valid until the lane's next exchange
  uint32_t lane, lanes;
} sim_exchange;

// What a kernel calls. Functions that wait run other threads of the threadgroup until they may return; when they never
// may, the dispatch ends with an error and the calling thread does not come back.
typedef struct {
  const sim_thread* (*thread)(void);
  // `line` is of the source: all threads wait at the same one. `orders` memory: otherwise threads only wait.
  void (*threadgroup_barrier)(uint32_t line, int orders);
  void (*simdgroup_wait)(const char* operation, int orders);
  // Waits for every lane's `size` bytes (at most 64). The last lane to come calls `combine`, if there is one.
  sim_exchange (*simdgroup_exchange)(const void* value, size_t size, sim_combine combine, const char* operation);
  // The threadgroup variable declared at `site`: one per threadgroup, every byte 0xff (NaN) before its first write.
  void* (*threadgroup_memory)(const void* site, size_t size);
} sim_runtime;

typedef void (*sim_entry)(void* const* buffers, const sim_thread* thread);

#endif
