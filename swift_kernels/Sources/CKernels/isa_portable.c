// Any processor: what the compiler makes of the vectors without further instructions.
#include "isa_common.h"

#define MS_ISA_IS_PORTABLE 1
#define MS_NAME(x) x##_portable
#include "isa_bodies.h"
