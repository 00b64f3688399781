#include "prepare.h"

MS_PREPARE(limits) {
  const MSLimitsParams *p = constants;
  (void)max_tokens, (void)max_sampled, (void)message;
  if (const_bytes != sizeof *p || (uintptr_t)constants % 4 != 0) return "limits: constants are not one MSLimitsParams";
  if (binds <= MS_LIMITS_OUT) return "limits: fewer bindings than ms_limits_slot names";
  if (p->kind > MS_LIMIT_DOT_INT8) return "limits: kind is none of ms_limit";
  if (p->rounds == 0 || p->rounds > MS_LIMITS_MAX_ROUNDS) return "limits: rounds is not 1 to MS_LIMITS_MAX_ROUNDS";
  if (p->kind != MS_LIMIT_READ && p->words < MS_LIMITS_OPERANDS) return "limits: words is below MS_LIMITS_OPERANDS";
  if (p->results < (uint32_t)threads) return "limits: fewer results than threads";
  scratch->per_thread = scratch->shared = 0;
  return NULL;
}
