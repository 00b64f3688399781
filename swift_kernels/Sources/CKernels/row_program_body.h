// row_program: rows are split over the threads in contiguous ranges; one row is thread 0's alone.
void MS_NAME(ms_row_program)(const ms_host_args *args) {
  const MSRowProgramParams *p = args->constants;
  const MSInstr *instrs = (const MSInstr *)(p + 1);
  const MSStep *step = args->buffers[MS_SLOT_STEP];
  const uint32_t rows = p->rows == MS_ROWS_SAMPLED ? step->num_sampled : step->num_tokens;
  const uint32_t thread = (uint32_t)args->thread, threads = (uint32_t)args->threads;
  const uint32_t first = (uint32_t)((uint64_t)rows * thread / threads);
  const uint32_t last = (uint32_t)((uint64_t)rows * (thread + 1) / threads);
  if (rows == 1) {
    if (thread == 0) MS_NAME(run_program)(instrs, p->instrs, args->scratch, args, 0);
    return;
  }
  for (uint32_t row = first; row < last; ++row) MS_NAME(run_program)(instrs, p->instrs, args->scratch, args, row);
}
