// step_advance: the next decode step's inputs from this step's samples. One thread does it: a step has few rows.

// The cache place of a position; -1: the sequence has no block for it.
static int32_t MS_NAME(slot_of)(const MSStep *step, const int32_t *tables, int32_t sequence, uint32_t position,
                                uint32_t block_size) {
  const uint32_t block = position / block_size;
  if ((uint32_t)sequence >= step->num_seqs || block >= step->max_blocks) return -1;
  const int32_t id = tables[(uint64_t)(uint32_t)sequence * step->max_blocks + block];
  return id < 0 ? -1 : (int32_t)((uint32_t)id * block_size + position % block_size);
}

void MS_NAME(ms_step_advance)(const ms_host_args *args) {
  const MSStepAdvanceParams *p = args->constants;
  MSStep *step = args->buffers[MS_ADVANCE_STEP];
  int32_t *tokens = args->buffers[MS_ADVANCE_TOKENS], *positions = args->buffers[MS_ADVANCE_POSITIONS];
  const int32_t *seq_ids = args->buffers[MS_ADVANCE_SEQ_IDS], *limits = args->buffers[MS_ADVANCE_LIMITS];
  const uint32_t *sampled_rows = args->buffers[MS_ADVANCE_SAMPLED_ROWS];
  MSSampling *sampling = args->buffers[MS_ADVANCE_SAMPLING];
  if (args->thread != 0) return;
  const MSSampled *sampled =
      (const MSSampled *)args->buffers[MS_ADVANCE_SAMPLED] + (uint64_t)step->index++ * p->max_rows;
  for (uint32_t i = 0; step->advance && i < step->num_sampled; ++i) {
    const uint32_t row = sampled_rows[i];
    if (row >= step->num_tokens) continue;
    const bool ok = sampled[i].status == MS_SAMPLE_OK, moves = ok && (int64_t)positions[row] + 1 < limits[i];
    if (ok) {
      tokens[row] = sampled[i].token;
      ++sampling[i].counter;
      if (sampling[i].flags & MS_SAMPLE_COMMIT) ++sampling[i].counted;
    }
    if (moves) ++positions[row];
    for (uint32_t g = 0; g < p->groups; ++g) {
      const int32_t *tables = args->buffers[MS_ADVANCE_GROUPS + 2 * g];
      int32_t *slots = args->buffers[MS_ADVANCE_GROUPS + 2 * g + 1];
      slots[row] = moves ? MS_NAME(slot_of)(step, tables, seq_ids[row], (uint32_t)positions[row], p->block_size) : -1;
    }
  }
}
