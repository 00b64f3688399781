// step_load: the next step's arrays from what the host has staged, and tokens that it has not seen.
void MS_NAME(ms_step_load)(const ms_host_args *args) {
  const MSStepLoadParams *p = args->constants;
  const int32_t *stage = args->buffers[MS_LOAD_STAGE], *sources = stage + p->words;
  const MSSampled *sampled = args->buffers[MS_LOAD_SAMPLED];
  int32_t *region = args->buffers[MS_LOAD_REGION];
  const uint64_t thread = (uint64_t)args->thread, threads = (uint64_t)args->threads;
  const uint64_t first = p->words * thread / threads, end = p->words * (thread + 1) / threads;
  memcpy(region + first, stage + first, (end - first) * sizeof *region);
  const uint64_t tokens = p->tokens_first, tokens_end = tokens + p->max_tokens;
  for (uint64_t word = first > tokens ? first : tokens; word < end && word < tokens_end; ++word) {
    const int32_t source = sources[word - tokens];
    if (source >= 0) region[word] = sampled[source].status == MS_SAMPLE_OK ? sampled[source].token : 0;
  }
}
