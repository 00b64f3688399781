// NEON with dot products (Armv8.2): every Apple chip since A11, Neoverse N1 and later.
#if defined(__aarch64__)
#include <arm_neon.h>
#include "isa_common.h"

#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#define MS_ISA_IS_NEON 1
#define MS_NAME(x) x##_neon
#include "isa_bodies.h"
#pragma clang attribute pop
#endif
