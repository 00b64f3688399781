// The kernels' `prepare` functions (ms_host_kernel in host_kernels.h): every check that lets a launch run without any.
#ifndef METALSTEP_PREPARE_H
#define METALSTEP_PREPARE_H
#include "host_kernels.h"

#define MS_PREPARE(kernel)                                                                                            \
  const char *ms_##kernel##_prepare(const void *constants, uint32_t const_bytes, uint32_t binds, uint32_t max_tokens, \
                                    uint32_t max_sampled, int32_t threads, ms_scratch *scratch, char message[256])
MS_PREPARE(linear);
MS_PREPARE(row_program);
MS_PREPARE(attention);
MS_PREPARE(sample);
MS_PREPARE(step_advance);
MS_PREPARE(step_load);
MS_PREPARE(add_rms_norm);
MS_PREPARE(limits);

#endif
