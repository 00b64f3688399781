// The processors this process may use.
#ifndef METALSTEP_CPUS_H
#define METALSTEP_CPUS_H
#include <stdint.h>

enum { MS_MAX_CPUS = 1024 };

typedef struct {
  int32_t count;               // processors in the affinity mask; on macOS all
  int32_t cores;               // of them on different cores; on macOS performance cores
  int16_t order[MS_MAX_CPUS];  // their numbers: one of each core, then the cores' other threads. Linux only
} ms_cpus;

void ms_cpus_read(ms_cpus *cpus);

#endif
