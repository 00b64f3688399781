// attention: packed values, weighed. A code becomes its centroid or, of affine8, code * step + least element; a
// vector's turbo scale is part of its weight (attention_softmax_body.h).

// 16 elements of turbo codes from element e on, a multiple of 16. Reads up to 8 bytes: behind the last codes of a
// plane lie its scales.
MS_VEC f32x16 MS_NAME(turbo_values)(const uint8_t *codes, uint32_t e, f32x16 table, const uint32_t codec) {
  const uint32_t bits = codec & 15;
  codes += e / 8 * bits;
#if defined(MS_ISA_IS_AVX512)
  // The lookup reads the four low bits of a lane. Shifts take another pipe than the lookup (Zen 4: a quarter faster).
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if (bits == 2) {
    const __m512i line = _mm512_set1_epi32(load_i32(codes));
    return (f32x16)_mm512_permutexvar_ps(_mm512_srlv_epi32(line, _mm512_add_epi32(lane, lane)), (__m512)table);
  }
  int64_t word;
  memcpy(&word, codes, sizeof word);
  const __m512i line = _mm512_set1_epi64(word);
  if (bits == 4) {  // even lanes have the first eight elements: order_values
    const __m512i shift = _mm512_slli_epi32(_mm512_srli_epi32(lane, 1), 2);
    return (f32x16)_mm512_permutexvar_ps(_mm512_srlv_epi32(line, shift), (__m512)table);
  }
  const __m512i shift = _mm512_add_epi32(_mm512_add_epi32(lane, lane), lane);  // of a lane's low byte
  return (f32x16)_mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(shift, line), (__m512)table);
#else
  const u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  u32x16 index;
  if (bits == 2) {
    index = (u32x16)(uint32_t)load_i32(codes) >> 2 * lane;
  } else {
    uint64_t word;
    memcpy(&word, codes, sizeof word);
    const uint32_t whole = bits == 4 ? 8 : 10;  // codes in 32 bits
    const u32x16 first = (u32x16)(uint32_t)word >> (lane < whole ? lane * bits : 0);
    const u32x16 second = (u32x16)(uint32_t)(word >> whole * bits) >> (lane < whole ? 0 : (lane - whole) * bits);
    index = lane < whole ? first : second;
  }
#if defined(MS_ISA_IS_AVX2)
  f32x16 x;
  const __m256 low = (__m256)table.lo, high = (__m256)table.hi;
  const __m256i a = (__m256i)index.lo, b = (__m256i)index.hi;
  __m256 c = _mm256_permutevar8x32_ps(low, a), d = _mm256_permutevar8x32_ps(low, b);
  if (bits == 4) {
    c = _mm256_blendv_ps(c, _mm256_permutevar8x32_ps(high, a), (__m256)_mm256_slli_epi32(a, 28));
    d = _mm256_blendv_ps(d, _mm256_permutevar8x32_ps(high, b), (__m256)_mm256_slli_epi32(b, 28));
  }
  memcpy(&x, &c, sizeof c), memcpy((char *)&x + sizeof c, &d, sizeof d);
  return x;
#elif defined(MS_ISA_IS_NEON)
  uint8x16x4_t bytes;
  memcpy(&bytes, &table, sizeof bytes);
  const u32x16 at = (index & ((1u << bits) - 1)) * 0x04040404 + 0x03020100;
  f32x16 x;
  for (uint32_t i = 0; i < 4; ++i) {
    uint8x16_t four;
    memcpy(&four, (const char *)&at + 16 * i, sizeof four);
    four = vqtbl4q_u8(bytes, four);
    memcpy((char *)&x + 16 * i, &four, sizeof four);
  }
  return x;
#else
  uint32_t each[16];
  float from[16], x[16];
  index &= (1u << bits) - 1;
  memcpy(each, &index, sizeof each), memcpy(from, &table, sizeof from);
  for (uint32_t i = 0; i < 16; ++i) x[i] = from[each[i]];
  return vload(x);
#endif
#endif
}

// Sums of weighed values, in the order of turbo_values, into the elements' own.
MS_VEC void MS_NAME(order_values)(float *values, uint32_t dim, uint32_t codec) {
#if defined(MS_ISA_IS_AVX512)
  if (codec != MS_KV_TURBO4) return;
  for (uint32_t e = 0; e < dim; e += 16) {
    const f32x16 v = vload(values + e);
    vstore(values + e, __builtin_shufflevector(v, v, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  }
#else
  (void)values, (void)dim, (void)codec;
#endif
}

MS_VEC f32x16 MS_NAME(affine_codes)(const uint8_t *codes) {
  typedef uint8_t u8x16 __attribute__((ext_vector_type(16)));
  u8x16 bytes;
  memcpy(&bytes, codes, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, i32x16), f32x16);
}

// Where the words of a position's value begin.
MS_VEC const uint8_t *MS_NAME(value_codes)(const MS_NAME(attention_tile) * t, const int32_t *table, uint32_t position) {
  const size_t head = (size_t)(uint32_t)table[position >> t->block_shift] * t->plane_heads + t->plane_head;
  const uint32_t within = position & ((1u << t->block_shift) - 1);
  return t->packed->v.codes + ((head << t->block_shift) + within) * t->packed->v.words * 4;
}

// Scales of the turbo values at those positions of a chunk that share a vector with [lo, hi).
MS_VEC void MS_NAME(value_scales)(const MS_NAME(attention_tile) * t, float *to, uint32_t chunk, uint32_t lo,
                                  uint32_t hi) {
  for (uint32_t at = lo & ~15u; at < hi; at += 16) {
    vstore(to + (at - chunk), MS_NAME(load_turbo_scales)(&t->packed->v, MS_NAME(scale_in)(t, t->table, at, 1)));
  }
}

// Fetches 16 positions' codes ahead of `at`, and the scales of the next chunk, which come before its codes.
MS_VEC void MS_NAME(prefetch_values)(const MS_NAME(attention_tile) * t, uint32_t at, const uint32_t codec) {
  const MS_NAME(packed_plane) *plane = &t->packed->v;
  const int32_t *table;
  uint32_t position;
  MS_NAME(look_ahead)(t, at, at + MS_ATTN_AHEAD, &table, &position);
  const uint8_t *next = MS_NAME(value_codes)(t, table, position);
  for (uint32_t i = 0; i < plane->words; ++i) __builtin_prefetch(next + 64 * i, 0, 2);
  const uint32_t rows = codec == MS_KV_AFFINE8 ? 2 * plane->groups : 1;
  if (codec != MS_KV_AFFINE8) MS_NAME(look_ahead)(t, at, at + MS_ATTN_CHUNK, &table, &position);
  next = plane->scales + MS_NAME(scale_in)(t, table, position, rows) * (plane->wide ? 4 : 2);
  for (uint32_t g = 0; g < rows; ++g) __builtin_prefetch(next + ((size_t)2 * g << t->block_shift), 0, 2);
}

// As `weigh`, of packed values; weights: a turbo vector's scale is in them.
MS_VEC void MS_NAME(weigh_packed)(const MS_NAME(attention_tile) * t, float *values, const float *weights, uint32_t lo,
                                  uint32_t hi, uint32_t e, const uint32_t nr, const uint32_t nv, const uint32_t codec) {
  const MS_NAME(packed_plane) *plane = &t->packed->v;
  const uint32_t dim = t->p->value_dim;
  const size_t bytes = (size_t)plane->words * 4;
  const f32x16 table = vload(t->packed->centroids);
  _Alignas(64) float step[4][16], least[4][16];
  f32x16 sum[12][8];
  MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) sum[i][v] = vload(values + (size_t)i * dim + e + 16 * v);
  }
  for (uint32_t at = lo; at < hi;) {
    const uint32_t line = (at | 15) + 1, end = line < hi ? line : hi;
    const uint8_t *codes = MS_NAME(value_codes)(t, t->table, at);
    if (e == 0) MS_NAME(prefetch_values)(t, at & ~15u, codec);
    uint32_t first[4] = {0};  // group of each vector, from the first vector's on
    if (codec == MS_KV_AFFINE8) {
      const size_t scale = MS_NAME(scale_in)(t, t->table, at & ~15u, 2 * plane->groups);
      const uint32_t group = e / plane->group, last = (e + 16 * nv - 1) / plane->group;
      for (uint32_t g = group; g <= last; ++g) {
        const size_t from = scale + ((size_t)2 * g << t->block_shift);
        vstore(step[g - group], MS_NAME(load_affine_scales)(plane, from));
        vstore(least[g - group], MS_NAME(load_affine_scales)(plane, from + (1u << t->block_shift)));
      }
      MS_UNROLL for (uint32_t v = 0; v < nv; ++v) first[v] = (e + 16 * v) / plane->group - group;
    }
    for (uint32_t n = at; n < end; ++n, codes += bytes) {
      f32x16 x[8];
      MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
        if (codec == MS_KV_AFFINE8) {
          x[v] = vfma(MS_NAME(affine_codes)(codes + e + 16 * v), vsplat(step[first[v]][n % 16]),
                      vsplat(least[first[v]][n % 16]));
        } else {
          x[v] = MS_NAME(turbo_values)(codes, e + 16 * v, table, codec);
        }
      }
      MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
        const f32x16 w = vsplat(weights[(size_t)i * MS_ATTN_CHUNK + (n - lo)]);
        MS_UNROLL for (uint32_t v = 0; v < nv; ++v) sum[i][v] = vfma(x[v], w, sum[i][v]);
      }
    }
    at = end;
  }
  MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) vstore(values + (size_t)i * dim + e + 16 * v, sum[i][v]);
  }
}
