// AVX-512 with VNNI and VBMI: Ice Lake, Zen 4 and later.
#if defined(__x86_64__)
#include <immintrin.h>
#include "isa_common.h"

#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c,avx2"))), \
    apply_to = function)
#define MS_ISA_IS_AVX512 1
#define MS_NAME(x) x##_avx512
#include "isa_bodies.h"
#pragma clang attribute pop
#endif
