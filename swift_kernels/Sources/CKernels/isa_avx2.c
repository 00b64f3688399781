// AVX2, FMA and F16C: Haswell, Zen and later.
#if defined(__x86_64__)
#include <immintrin.h>
#include "isa_common.h"

#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#define MS_ISA_IS_AVX2 1
#define MS_NAME(x) x##_avx2
#include "isa_bodies.h"
#pragma clang attribute pop
#endif
