// How the plan executor finds and calls a kernel of the host device.
#ifndef METALSTEP_HOST_KERNELS_H
#define METALSTEP_HOST_KERNELS_H
#include <stddef.h>
#include <stdint.h>
#include "metalstep.h"
#include "pool.h"

enum ms_isa { MS_ISA_PORTABLE = 0, MS_ISA_NEON = 1, MS_ISA_AVX2 = 2, MS_ISA_AVX512 = 3, MS_ISA_COUNT = 4 };

// What one thread of the pool is called with; it takes its own share of the launch. Resolved when the plan is made.
typedef struct {
  void *const *buffers;  // by binding
  const void *constants;
  const uint32_t *grid;  // the launch's, three words
  void *scratch;         // this thread's own, ms_scratch.per_thread bytes, 64-byte aligned, not zeroed
  void *shared;          // all threads', ms_scratch.shared bytes; launches of a plan reuse it
  ms_pool *pool;         // for a barrier inside the launch: every thread must reach it
  int32_t thread, threads;
} ms_host_args;
typedef void (*ms_host_function)(const ms_host_args *args);

typedef struct {
  uint64_t per_thread, shared;  // bytes
} ms_scratch;

typedef struct {
  const char *name;
  ms_host_function function[MS_ISA_COUNT];  // by ms_isa; NULL: the portable one serves
  // Checks the constants (sizes, slots < binds, known opcodes) and says how much scratch a launch needs.
  // Returns NULL, or what is wrong, in static storage or in `message`.
  const char *(*prepare)(const void *constants, uint32_t const_bytes, uint32_t binds, uint32_t max_tokens,
                         uint32_t max_sampled, int32_t threads, ms_scratch *scratch, char message[256]);
} ms_host_kernel;

int32_t ms_host_kernel_count(void);
const ms_host_kernel *ms_host_kernel_at(int32_t index);
// The best set this machine has, or the one METALSTEP_CPU names; -1 and a message when it names one the machine lacks.
int32_t ms_host_isa(char message[256]);
const char *ms_host_isa_name(int32_t isa);

// Packing (weight_pack.c). Rows are split over the pool; returns NULL or what is wrong.
uint64_t ms_panel_bytes(uint32_t n, uint32_t k, uint32_t bits, uint32_t group_size, uint32_t dtype);
const char *ms_panel_pack(ms_pool *pool, const MSWeightSource *source, void *panels, char message[256]);

#endif
