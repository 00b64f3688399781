// Random launches of the host kernels, for sanitizers: every buffer is exactly as long as the launch may touch.
#ifndef METALSTEP_SANITIZE_DRIVER_H
#define METALSTEP_SANITIZE_DRIVER_H
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include "host_kernels.h"

enum { MAX_BINDS = 16, MAX_THREADS = 3 };

// One launch; its memory is freed by launch_free.
typedef struct {
  const char *kernel;
  void *constants;
  uint32_t const_bytes;
  void *buffers[MAX_BINDS];
  uint64_t bytes[MAX_BINDS];
  uint32_t binds, grid[3], rows;
} launch;

uint32_t random_below(uint32_t n);  // from 0 to n - 1
float random_float(void);           // from -1 to 1

// A new buffer of the launch, uninitialised where contents is NULL.
void *launch_bind(launch *l, const void *contents, uint64_t bytes);
float *launch_bind_floats(launch *l, uint64_t count);  // random ones
void launch_constants(launch *l, const void *constants, uint64_t bytes);
void launch_free(launch *l);
// false: `prepare` refused it.
bool launch_run(const launch *l, int32_t isa, int32_t threads);
// On 1 to MAX_THREADS threads; binding `result` must have the same bits each time. closeness > 0: it is float32, and
// differs from the portable kernel's by at most this part of the largest element.
void launch_run_on_all(launch *l, int32_t isa, uint32_t result, float closeness);
void fail(const char *what, const launch *l);

// Each makes a launch, runs it on every thread count and checks what holds for any input.
void try_row_program(int32_t isa);
void try_linear(int32_t isa);
void try_attention(int32_t isa);
void try_sample(int32_t isa);
void try_step_advance(int32_t isa);
void try_step_load(int32_t isa);
void try_add_rms_norm(int32_t isa);
// Constants with a random word changed: refused, or run (where no buffer depends on the change).
void try_broken_constants(int32_t isa);

#endif
