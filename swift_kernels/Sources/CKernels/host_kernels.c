// The registry of host kernels, and which instruction set serves.
#include "host_kernels.h"
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "isa_common.h"
#include "prepare.h"
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__x86_64__)
#define MS_SETS(kernel) \
  {[MS_ISA_PORTABLE] = kernel##_portable, [MS_ISA_AVX2] = kernel##_avx2, [MS_ISA_AVX512] = kernel##_avx512}
#elif defined(__aarch64__)
#define MS_SETS(kernel) {[MS_ISA_PORTABLE] = kernel##_portable, [MS_ISA_NEON] = kernel##_neon}
#else
#define MS_SETS(kernel) {[MS_ISA_PORTABLE] = kernel##_portable}
#endif

static const ms_host_kernel kernels[] = {
    {"linear", MS_SETS(ms_linear), ms_linear_prepare},
    {"row_program", MS_SETS(ms_row_program), ms_row_program_prepare},
    {"attention", MS_SETS(ms_attention), ms_attention_prepare},
    {"sample", MS_SETS(ms_sample), ms_sample_prepare},
    {"step_advance", MS_SETS(ms_step_advance), ms_step_advance_prepare},
    {"step_load", MS_SETS(ms_step_load), ms_step_load_prepare},
    {"add_rms_norm", MS_SETS(ms_add_rms_norm), ms_add_rms_norm_prepare},
    {"limits", MS_SETS(ms_limits), ms_limits_prepare},
};
static const char *const isa_names[MS_ISA_COUNT] = {"portable", "neon", "avx2", "avx512"};

int32_t ms_host_kernel_count(void) { return (int32_t)(sizeof kernels / sizeof *kernels); }

const ms_host_kernel *ms_host_kernel_at(int32_t index) {
  return index < 0 || index >= ms_host_kernel_count() ? NULL : &kernels[index];
}

const char *ms_host_isa_name(int32_t isa) { return isa < 0 || isa >= MS_ISA_COUNT ? "unknown" : isa_names[isa]; }

// Whether this machine runs what the set's translation unit is compiled for (its target attribute).
static bool has_isa(int32_t isa) {
  switch (isa) {
    case MS_ISA_PORTABLE:
      return true;
#if defined(__x86_64__)
    case MS_ISA_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case MS_ISA_AVX512:
      return has_isa(MS_ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#elif defined(__aarch64__) && defined(__APPLE__)
    case MS_ISA_NEON:
      return true;  // every Apple chip that runs a supported macOS has dot products
#elif defined(__aarch64__) && defined(__linux__)
    case MS_ISA_NEON:
      return (getauxval(AT_HWCAP) & (1ul << 20)) != 0;  // HWCAP_ASIMDDP
#endif
    default:
      return false;
  }
}

int32_t ms_host_isa(char message[256]) {
  const char *wanted = getenv("METALSTEP_CPU");
  char present[64] = "";
  int32_t best = MS_ISA_PORTABLE;
  for (int32_t isa = 0; isa < MS_ISA_COUNT; ++isa) {
    if (!has_isa(isa)) continue;
    best = isa;
    strcat(strcat(present, *present ? ", " : ""), isa_names[isa]);
    if (wanted && strcmp(wanted, isa_names[isa]) == 0) return isa;
  }
  if (wanted == NULL || *wanted == '\0') return best;
  snprintf(message, 256, "METALSTEP_CPU is '%.40s'; this machine has %s: name one of these, or unset it", wanted,
           present);
  return -1;
}
