#include "prepare.h"
#include "sample_layout.h"

MS_PREPARE(sample) {
  const MSSampleParams *p = constants;
  (void)max_tokens, (void)message;
  if (const_bytes != sizeof *p || (uintptr_t)constants % 4 != 0) return "sample: constants are not one MSSampleParams";
  if (binds <= MS_SAMPLE_OUT) return "sample: fewer bindings than ms_sample_slot names";
  if (p->vocab_size == 0 || p->vocab_size > INT32_MAX) return "sample: vocab_size is 0 or above 2^31 - 1";
  const uint64_t most = (uint64_t)MS_SAMPLE_SPLIT_ROWS * (uint64_t)threads,
                 rows = max_sampled < most ? max_sampled : most;
  scratch->per_thread = ms_sample_scratch(p->vocab_size);
  scratch->shared = threads > 1 ? rows * ms_sample_chunks(p->vocab_size) * sizeof(ms_chunk_sums) : 0;
  return NULL;
}
