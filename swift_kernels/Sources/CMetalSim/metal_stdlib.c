#include "sim_dispatch.h"

#pragma clang diagnostic ignored "-Wc23-extensions"  // #embed
// clang-format off
static const char prelude[] = {
#embed "include/sim_runtime.h"
  , '\n',
#embed "metal_stdlib.h"
  , '\0'};
// clang-format on

const char *sim_prelude(void) { return prelude; }
