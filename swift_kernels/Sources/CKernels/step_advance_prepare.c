#include "prepare.h"

MS_PREPARE(step_advance) {
  const MSStepAdvanceParams *p = constants;
  (void)max_tokens, (void)threads, (void)message;
  if (const_bytes != sizeof *p || (uintptr_t)constants % 4 != 0)
    return "step_advance: constants are not one MSStepAdvanceParams";
  if (p->block_size == 0) return "step_advance: block_size is 0";
  if (p->max_rows < max_sampled) return "step_advance: max_rows is less than the sampled rows of a step";
  if (p->groups > UINT16_MAX || binds < MS_ADVANCE_GROUPS + 2 * p->groups)
    return "step_advance: fewer bindings than ms_step_advance_slot names for its groups";
  scratch->per_thread = scratch->shared = 0;
  return NULL;
}
