#include "prepare.h"
#include "sample_layout.h"

MS_PREPARE(sample) {
  const MSSampleParams *p = constants;
  (void)max_tokens, (void)message;
  if (const_bytes != sizeof *p || (uintptr_t)constants % 4 != 0) return "sample: constants are not one MSSampleParams";
  if (binds <= MS_SAMPLE_COUNTS) return "sample: fewer bindings than ms_sample_slot names";
  if (p->vocab_size == 0 || p->vocab_size > INT32_MAX) return "sample: vocab_size is 0 or above 2^31 - 1";
  if (p->max_rows < max_sampled) return "sample: max_rows is less than the sampled rows of a step";
  if (p->history_stride >= MS_COUNT_IN_PROMPT) return "sample: history_stride is 2^30 or more";
  const uint64_t most = (uint64_t)MS_SAMPLE_SPLIT_ROWS * (uint64_t)threads,
                 rows = max_sampled < most ? max_sampled : most;
  scratch->per_thread = ms_sample_thread_bytes(p->vocab_size);
  scratch->shared = threads > 1 ? rows * ms_sample_row_bytes(p->vocab_size) : 0;
  return NULL;
}
