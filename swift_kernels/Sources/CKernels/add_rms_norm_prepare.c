#include "prepare.h"

MS_PREPARE(add_rms_norm) {
  const AddRMSNormParams *p = constants;
  (void)max_tokens, (void)max_sampled, (void)threads, (void)message;
  if (const_bytes != sizeof *p || (uintptr_t)constants % 4 != 0)
    return "add_rms_norm: constants are not one AddRMSNormParams";
  if (binds < 4) return "add_rms_norm: fewer bindings than x, residual, weight, out";
  if (p->hidden_size == 0) return "add_rms_norm: hidden_size is 0";
  scratch->per_thread = scratch->shared = 0;
  return NULL;
}
