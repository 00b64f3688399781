#include "sim_dispatch.h"

#pragma clang diagnostic ignored "-Wc23-extensions"  // #embed
// clang-format off
static const char prelude[] = {
#embed "include/sim_runtime.h"
  , '\n',
#embed "metal_types.h"
  , '\n',
#embed "metal_math.h"
  , '\n',
#embed "metal_simdgroup.h"
  , '\n',
#embed "metal_simdgroup_matrix.h"
  , '\n',
#embed "metal_atomic.h"
  , '\n',
#embed "sim_entry.h"
  , '\0'};
// clang-format on

const char *sim_prelude(void) { return prelude; }
