#include "prepare.h"

MS_PREPARE(step_load) {
  const MSStepLoadParams *p = constants;
  (void)max_tokens, (void)max_sampled, (void)threads, (void)message;
  if (const_bytes != sizeof *p || (uintptr_t)constants % 4 != 0)
    return "step_load: constants are not one MSStepLoadParams";
  if (binds <= MS_LOAD_REGION) return "step_load: fewer bindings than ms_step_load_slot names";
  if (p->words == 0) return "step_load: words is 0";
  if ((uint64_t)p->tokens_first + p->max_tokens > p->words) return "step_load: the tokens end behind the last word";
  scratch->per_thread = scratch->shared = 0;
  return NULL;
}
