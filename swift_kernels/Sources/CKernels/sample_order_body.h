// Finding large logits without sorting a row: bounds, ranks, and candidates in order.

// The first index of [0, n) with this value.
static uint32_t MS_NAME(find_logit)(const float *x, uint32_t n, float value) {
  uint32_t i = 0;
  while (i + 16 <= n && __builtin_reduce_or(vload(x + i) == value) == 0) i += 16;
  while (i + 1 < n && x[i] != value) ++i;
  return i;
}

// 1 + how many logits come before this token's, equal ones by their index.
static uint32_t MS_NAME(rank)(const ms_logits *l, uint32_t n, uint32_t token) {
  const float value = l->x[token];
  i32x16 count = 0;
  for (uint32_t first = 0; first < n; first += MS_SAMPLE_BLOCK) {
    const uint32_t end = n - first < MS_SAMPLE_BLOCK ? n : first + MS_SAMPLE_BLOCK;
    if (__builtin_reduce_or(vload(l->maxima + first / MS_SAMPLE_BLOCK * 16) >= value) == 0) continue;
    for (uint32_t i = first; i < end; i += 16) {
      const f32x16 v = MS_NAME(logits_at)(l->x, i, end);
      const i32x16 before = MS_NAME(lane)() < (int32_t)(token < i ? 0 : token - i < 16 ? token - i : 16);
      count -= (v > value) | ((v == value) & before);
    }
  }
  return 1 + (uint32_t)__builtin_reduce_add(count);
}

// An order-preserving key of -x; +0 and -0 are one.
MS_VEC uint32_t MS_NAME(key_of)(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x + 0.0f);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
MS_VEC float MS_NAME(logit_of)(uint32_t key) { return __builtin_bit_cast(float, key >> 31 ? key : ~key & 0x7fffffffu); }

static uint32_t MS_NAME(count_least)(const float *x, uint32_t n, float least) {
  i32x16 count = 0;
  for (uint32_t i = 0; i < n; i += 16) count -= MS_NAME(logits_at)(x, i, n) >= least;
  return (uint32_t)__builtin_reduce_add(count);
}

// A value that at least `wanted` of n elements reach, and not many more, by bisection. So many do reach -FLT_MAX.
static float MS_NAME(bisect)(const float *x, uint32_t n, float max, uint32_t wanted) {
  if (MS_NAME(count_least)(x, n, max) >= wanted) return max;
  uint32_t few = MS_NAME(key_of)(max), enough = MS_NAME(key_of)(-__FLT_MAX__);
  while (enough - few > 1) {
    const uint32_t middle = few + (enough - few) / 2;
    const uint32_t count = MS_NAME(count_least)(x, n, MS_NAME(logit_of)(middle));
    if (count < wanted) {
      few = middle;
    } else {
      enough = middle;
      if (count - wanted <= wanted / 4) break;
    }
  }
  return MS_NAME(logit_of)(enough);
}

// A value that at least `wanted` logits reach, and not many more; -FLT_MAX where there are no more. A group of logits
// reaches what its maximum does: where few are wanted, the row is not read.
static float MS_NAME(bound)(const ms_logits *l, uint32_t n, float max, uint32_t wanted) {
  const uint32_t groups = 16 * ms_sample_blocks(n);
  if (wanted <= groups / 2 && MS_NAME(count_least)(l->maxima, groups, -__FLT_MAX__) >= wanted)
    return MS_NAME(bisect)(l->maxima, groups, max, wanted);
  if (wanted >= n || MS_NAME(count_least)(l->x, n, -__FLT_MAX__) <= wanted) return -__FLT_MAX__;
  return MS_NAME(bisect)(l->x, n, max, wanted);
}

// Tokens with logits of at least `least`, in order of their index.
static uint32_t MS_NAME(collect)(const ms_logits *l, uint32_t n, float least, ms_candidate *out) {
  uint32_t count = 0;
  for (uint32_t first = 0; first < n; first += MS_SAMPLE_BLOCK) {
    const uint32_t end = n - first < MS_SAMPLE_BLOCK ? n : first + MS_SAMPLE_BLOCK;
    if (__builtin_reduce_or(vload(l->maxima + first / MS_SAMPLE_BLOCK * 16) >= least) == 0) continue;
    for (uint32_t i = first; i < end; i += 16) {
      if (__builtin_reduce_or(MS_NAME(logits_at)(l->x, i, end) >= least) == 0) continue;
      for (uint32_t j = i; j < end && j < i + 16; ++j) {
        out[count] = (ms_candidate){MS_NAME(key_of)(l->x[j]), j};
        count += l->x[j] >= least;
      }
    }
  }
  return count;
}

// Stable, so that equal logits stay in order of their index. Returns the array that holds the result: a or b.
static ms_candidate *MS_NAME(sort_candidates)(ms_candidate *a, ms_candidate *b, uint32_t n, uint32_t *counts) {
  if (n <= 128) {
    for (uint32_t i = 1; i < n; ++i) {
      const ms_candidate moved = a[i];
      uint32_t j = i;
      for (; j > 0 && a[j - 1].key > moved.key; --j) a[j] = a[j - 1];
      a[j] = moved;
    }
    return a;
  }
  memset(counts, 0, 3 * MS_SAMPLE_DIGIT * sizeof *counts);
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t d = 0; d < 3; ++d) ++counts[d * MS_SAMPLE_DIGIT + (a[i].key >> 11 * d & (MS_SAMPLE_DIGIT - 1))];
  }
  for (uint32_t d = 0; d < 3; ++d) {
    uint32_t *count = counts + d * MS_SAMPLE_DIGIT, at = 0;
    for (uint32_t i = 0; i < MS_SAMPLE_DIGIT; ++i) {
      const uint32_t here = count[i];
      count[i] = at;
      at += here;
    }
    for (uint32_t i = 0; i < n; ++i) b[count[a[i].key >> 11 * d & (MS_SAMPLE_DIGIT - 1)]++] = a[i];
    ms_candidate *const swap = a;
    a = b, b = swap;
  }
  return a;
}
