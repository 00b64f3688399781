// limits: what this processor can do at most, read or compute, in the vectors that the other kernels use.

// Each thread's share of the words, `rounds` times; the sum of all that was read.
MS_VEC uint32_t limits_read(const uint32_t *words, uint64_t count, uint32_t rounds) {
  enum { STREAMS = 8, WORDS = 16 * STREAMS };
  u32x16 sums[STREAMS] = {0};
  uint32_t rest = 0;
  for (uint32_t round = 0; round < rounds; ++round) {
    uint64_t i = 0;
    for (; i + WORDS <= count; i += WORDS) {
      for (int s = 0; s < STREAMS; ++s) {
        u32x16 v;
        __builtin_memcpy(&v, words + i + 16 * s, sizeof v);
        sums[s] += v;
      }
    }
    for (; i < count; ++i) rest += words[i];
    __asm__ volatile("" ::: "memory");  // a round reads again
  }
  for (int s = 0; s < STREAMS; ++s)
    for (int lane = 0; lane < 16; ++lane) rest += sums[s][lane];
  return rest;
}

// Independent chains, as many as hide an instruction's latency and fit the registers; MS_LIMITS_MACS a round.
MS_VEC float limits_fma(uint32_t rounds) {
#if defined(MS_ISA_IS_AVX2)
  enum { CHAINS = 12 };
#elif defined(MS_ISA_IS_PORTABLE)
  enum { CHAINS = 8 };
#else
  enum { CHAINS = 16 };
#endif
  _Static_assert(MS_LIMITS_MACS % (CHAINS * MS_LANES) == 0, "whole steps in a round");
  ms_floats x[CHAINS];
  for (int c = 0; c < CHAINS; ++c) x[c] = (ms_floats)(float)c;
  for (uint64_t step = (uint64_t)rounds * (MS_LIMITS_MACS / (CHAINS * MS_LANES)); step > 0; --step) {
    for (int c = 0; c < CHAINS; ++c) x[c] = multiply_add(x[c], (ms_floats)0.5f, (ms_floats)1.0f);  // tends to 2
    __asm__ volatile("");
  }
  float sum = 0;
  for (int c = 0; c < CHAINS; ++c)
    for (int lane = 0; lane < MS_LANES; ++lane) sum += x[c][lane];
  return sum;
}

// The products of the linears, operands in the first-level cache; MS_LIMITS_MACS a round. Words are weights, then activations.
MS_VEC uint32_t limits_dot(const uint32_t *words, uint32_t rounds, int planes) {
  enum { ROWS = 4, VECTORS = 2, STEPS = MS_LIMITS_MACS / (4 * ROWS * VECTORS * MS_LANES) };
  _Static_assert(MS_LIMITS_MACS % (4 * ROWS * VECTORS * MS_LANES) == 0, "whole steps in a round");
  _Static_assert(
      (STEPS * VECTORS + VECTORS) * MS_LANES * 4 + (STEPS + 1) * ROWS * MS_QUAD_BYTES <= MS_LIMITS_OPERANDS * 4,
      "operands within their words");
  const uint8_t *activations = (const uint8_t *)(words + (STEPS * VECTORS + VECTORS) * MS_LANES);
  ms_sums sums[ROWS][VECTORS] = {0};
  for (uint32_t round = 0; round < rounds; ++round) {
    for (int step = 0; step < STEPS; ++step) {
      ms_words w[VECTORS];
      for (int v = 0; v < VECTORS; ++v) w[v] = load_words(words + (step * VECTORS + v) * MS_LANES);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
          dot(&sums[r][v], w[v], activations + (step * ROWS + r) * MS_QUAD_BYTES, planes, 8);
    }
    __asm__ volatile("" ::: "memory");  // no product is carried from one round to the next
  }
  ms_ints sum = 0;
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sum += sums[r][v].hi + sums[r][v].lo;
  uint32_t all = 0;
  for (int lane = 0; lane < MS_LANES; ++lane) all += (uint32_t)sum[lane];
  return all;
}

void MS_NAME(ms_limits)(const ms_host_args *args) {
  const MSLimitsParams *p = args->constants;
  const uint32_t *words = args->buffers[MS_LIMITS_IN];
  const uint64_t thread = (uint64_t)args->thread, threads = (uint64_t)args->threads;
  const uint64_t first = p->words * thread / threads, end = p->words * (thread + 1) / threads;
  uint32_t result = 0;
  if (p->kind == MS_LIMIT_READ) {
    result = limits_read(words + first, end - first, p->rounds);
  } else if (p->kind == MS_LIMIT_FMA) {
    result = __builtin_bit_cast(uint32_t, limits_fma(p->rounds));
  } else {
    result = p->kind == MS_LIMIT_DOT_INT16 ? limits_dot(words, p->rounds, 2) : limits_dot(words, p->rounds, 1);
  }
  uint32_t *out = args->buffers[MS_LIMITS_OUT];
  out[thread] = result;
}
