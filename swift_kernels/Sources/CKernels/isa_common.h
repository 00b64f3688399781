// What every instruction set's translation unit includes before its target attribute: the system's headers and ours.
#ifndef METALSTEP_ISA_COMMON_H
#define METALSTEP_ISA_COMMON_H
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include "attention_layout.h"
#include "host_kernels.h"
#include "kv_codec.h"
#include "program_check.h"
#include "sample_layout.h"

#define MS_DECLARE_KERNELS(isa)                     \
  void ms_linear_##isa(const ms_host_args *);       \
  void ms_row_program_##isa(const ms_host_args *);  \
  void ms_attention_##isa(const ms_host_args *);    \
  void ms_sample_##isa(const ms_host_args *);       \
  void ms_step_advance_##isa(const ms_host_args *); \
  void ms_step_load_##isa(const ms_host_args *);    \
  void ms_add_rms_norm_##isa(const ms_host_args *); \
  void ms_limits_##isa(const ms_host_args *);
MS_DECLARE_KERNELS(avx512)
MS_DECLARE_KERNELS(avx2)
MS_DECLARE_KERNELS(neon)
MS_DECLARE_KERNELS(portable)
#undef MS_DECLARE_KERNELS

#endif
