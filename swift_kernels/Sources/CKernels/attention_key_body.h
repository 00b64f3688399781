// attention: scores of packed keys, by integer dot products (linear_dot_body.h).
//
// A query is rotated and scaled, then becomes sigma * v, v integers of 15 bits and a sign. Codes become bytes u: of
// turbo codecs the codebook's integer + 128 (less a half), of affine8 the code itself. The sums of u * v are exact, so
// that every tile and every instruction set has the same.
//
// Sums are kept modulo 2^32: of turbo codecs |u - 128| <= 118 (119 for the half below), so that what remains without
// the 128 is at most 119 * 32639 * 512 < 2^31. A group of affine8 has 64 elements: 255 * 32639 * 64 < 2^31.

// Positions whose scores are summed at once, in vectors of 16, by queries of a tile (MS_TILES).
#if defined(MS_ISA_IS_AVX512)
#define MS_PACKED_TILES(case_) case_(12, 1) case_(6, 2) case_(4, 2) case_(3, 4) case_(2, 4) case_(1, 4)
#else
#define MS_PACKED_TILES(case_) case_(6, 1) case_(4, 1) case_(3, 1) case_(2, 1) case_(1, 1)
#endif
enum { MS_NAME(key_parts) = 16 / MS_LANES };

// Element whose product is the i-th, as bytes of words come to be: see key_bytes.
MS_VEC uint32_t MS_NAME(key_element)(uint32_t i, uint32_t codec) {
  if (codec == MS_KV_TURBO4) return (i & ~7u) + (i % 8 / 4) + i % 4 * 2;
  if (codec == MS_KV_TURBO2) return (i & ~15u) + (i % 16 / 4) + i % 4 * 4;
  return i;
}

// A packed query takes the place of its head_dim floats: an MSActivationGroup, quads, and for affine8 each group's sum
// of v. The scale is what an integer score is multiplied with.
MS_VEC int32_t *MS_NAME(query_totals)(float *query, uint32_t dim) {
  return (int32_t *)(void *)query + sizeof(MSActivationGroup) / 4 + dim / 2;
}

static void MS_NAME(pack_query)(const MS_NAME(attention_packed) * c, uint32_t dim, float *query) {
  _Alignas(64) float turned[MS_KV_MAX_DIM], x[MS_KV_MAX_DIM];
  memcpy(turned, query, dim * sizeof(float));
  const bool turbo = c->k.codec != MS_KV_AFFINE8;
  if (turbo) MS_NAME(rotate)(turned, dim, c->k.signs);
  for (uint32_t i = 0; i < dim; ++i) x[i] = turned[MS_NAME(key_element)(i, c->k.codec)];
  quantise_group(x, dim, 2, (uint8_t *)query);
  if (turbo) {
    MSActivationGroup head;
    memcpy(&head, query, sizeof head);
    head.scale *= c->unit;
    memcpy(query, &head, sizeof head);
    return;
  }
  const uint8_t *quads = (const uint8_t *)query + sizeof(MSActivationGroup);
  for (uint32_t g = 0; g < c->k.groups; ++g) {
    ms_sums s = {0, 0};
    for (uint32_t i = 0; i < c->k.group; i += 4, quads += MS_QUAD_BYTES) dot(&s, (ms_words)0x01010101, quads, 2, 1);
    MS_NAME(query_totals)(query, dim)[g] = sum_of(s, 2, 1, 0)[0];
  }
}

#if defined(MS_ISA_IS_AVX512)
typedef __m512i MS_NAME(key_table);
MS_VEC MS_NAME(key_table) MS_NAME(load_key_table)(const uint8_t *bytes) { return _mm512_loadu_si512(bytes); }
#elif defined(MS_ISA_IS_AVX2)
typedef __m256i MS_NAME(key_table);
MS_VEC MS_NAME(key_table) MS_NAME(load_key_table)(const uint8_t *bytes) {
  return _mm256_loadu_si256((const __m256i *)(const void *)bytes);
}
#elif defined(MS_ISA_IS_NEON)
typedef uint8x16_t MS_NAME(key_table);
MS_VEC MS_NAME(key_table) MS_NAME(load_key_table)(const uint8_t *bytes) {
  return veorq_u8(vld1q_u8(bytes), vdupq_n_u8(0x80));
}
#else
typedef const uint8_t *MS_NAME(key_table);
MS_VEC MS_NAME(key_table) MS_NAME(load_key_table)(const uint8_t *bytes) { return bytes; }
#endif

// Codes in the low bits of each byte become bytes u (NEON: u - 128, as `dot` has them).
MS_VEC ms_words MS_NAME(look_up_keys)(ms_words codes, MS_NAME(key_table) table, const uint32_t codec) {
  const uint32_t bits = codec & 15, mask = ((1u << bits) - 1) * 0x01010101;
#if defined(MS_ISA_IS_AVX512)
  (void)mask;
  return (ms_words)_mm512_permutexvar_epi8((__m512i)codes, table);
#elif defined(MS_ISA_IS_AVX2)
  return (ms_words)_mm256_shuffle_epi8(table, (__m256i)(codes & mask));
#elif defined(MS_ISA_IS_NEON)
  return vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(codes & mask)));
#else
  codes &= mask;
  uint8_t each[sizeof codes];
  memcpy(each, &codes, sizeof codes);
  for (uint32_t i = 0; i < sizeof codes; ++i) each[i] = table[each[i]];
  memcpy(&codes, each, sizeof codes);
  return codes;
#endif
}

// Codes of 3 bits from bit 12 * quad on, each in the low bits of a byte.
MS_VEC ms_words MS_NAME(spread_three)(ms_words window, uint32_t quad) {
#if defined(MS_ISA_IS_AVX512)
  const uint64_t low = quad == 0 ? 0x09060300 : 0x15120f0c;
  return (ms_words)_mm512_multishift_epi64_epi8(_mm512_set1_epi64((int64_t)(low | (low | 0x20202020) << 32)),
                                                (__m512i)window);
#else
  window >>= 12 * quad;
  return (window & 7) | (window << 5 & 0x700) | (window << 10 & 0x70000) | (window << 15 & 0x7000000);
#endif
}

// The quads of one step along a vector, of a key whose words lie `stride` bytes apart from `codes` on: words of one
// (affine8), two (turbo4), four (turbo2) or two for each of three bytes (turbo3: `window`).
MS_VEC uint32_t MS_NAME(step_quads)(const uint32_t codec) {
  return codec == MS_KV_AFFINE8 ? 1 : codec == MS_KV_TURBO2 ? 4 : 2;
}
MS_VEC ms_words MS_NAME(key_window)(const uint8_t *codes, size_t stride, uint32_t step, const uint32_t codec) {
  if (codec != MS_KV_TURBO3) return load_words(codes + step * stride);
  const uint32_t bit = 24 * step;
  const uint8_t *from = codes + bit / 32 * stride;
  if (bit % 32 == 0) return load_words(from);
  if (bit % 32 == 8) return load_words(from) >> 8;
  return load_words(from) >> bit % 32 | load_words(from + stride) << (32 - bit % 32);
}
MS_VEC ms_words MS_NAME(key_bytes)(ms_words window, uint32_t quad, MS_NAME(key_table) table, const uint32_t codec) {
  if (codec == MS_KV_AFFINE8) {
#if defined(MS_ISA_IS_NEON)
    return window ^ 0x80808080;
#else
    return window;
#endif
  }
  if (codec == MS_KV_TURBO3) return MS_NAME(look_up_keys)(MS_NAME(spread_three)(window, quad), table, codec);
  return MS_NAME(look_up_keys)(window >> ((codec & 15) * quad), table, codec);
}

// The sum of (u - 128) * v, exact where it is below 2^31; total: of v.
MS_VEC ms_ints MS_NAME(centred)(ms_sums s, int32_t total) {
#if defined(MS_ISA_IS_NEON)
  (void)total;
  return (s.hi << 8) + s.lo;
#elif defined(MS_ISA_IS_AVX512)
  return (s.hi << 8) + s.lo - 128 * total;
#else
  return s.hi - 128 * total;
#endif
}

// Where the words of a position's key begin, and its scales (of the first group).
MS_VEC const uint8_t *MS_NAME(key_codes)(const MS_NAME(attention_tile) * t, const int32_t *table, uint32_t position) {
  const size_t head = (size_t)(uint32_t)table[position >> t->block_shift] * t->plane_heads + t->plane_head;
  const uint32_t within = position & ((1u << t->block_shift) - 1);
  return t->packed->k.codes + ((head * t->packed->k.words << t->block_shift) + within) * 4;
}
MS_VEC size_t MS_NAME(scale_in)(const MS_NAME(attention_tile) * t, const int32_t *table, uint32_t position,
                                uint32_t rows) {
  const size_t head = (size_t)(uint32_t)table[position >> t->block_shift] * t->plane_heads + t->plane_head;
  return (head * rows << t->block_shift) + (position & ((1u << t->block_shift) - 1));
}

// Products of a quad of `nr` queries, from `quads` on, and of MS_LANES * nv positions.
MS_VEC void MS_NAME(key_products)(ms_sums sum[12][8], const ms_words *window, uint32_t quad, const uint8_t *quads,
                                  size_t query_stride, MS_NAME(key_table) table, const uint32_t nr, const uint32_t nv,
                                  const uint32_t codec) {
  ms_words bytes[8];
  MS_UNROLL for (uint32_t v = 0; v < nv; ++v) bytes[v] = MS_NAME(key_bytes)(window[v], quad, table, codec);
  MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) dot(&sum[i][v], bytes[v], quads + i * query_stride, 2, 8);
  }
}

// `steps` along the vectors from `first` on, fetching those at `next`.
MS_VEC void MS_NAME(key_steps)(ms_sums sum[12][8], const uint8_t *const *codes, const uint8_t *const *next,
                               size_t stride, const uint8_t *quads, size_t query_stride, MS_NAME(key_table) table,
                               uint32_t first, uint32_t steps, bool fetch, const uint32_t nr, const uint32_t nv,
                               const uint32_t codec) {
  const uint32_t n = MS_NAME(step_quads)(codec);
  for (uint32_t step = first; step < first + steps; ++step) {
    const uint8_t *q = quads + (size_t)step * n * MS_QUAD_BYTES;
    ms_words window[8];
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
      window[v] = MS_NAME(key_window)(codes[v], stride, step, codec);
      if (fetch && (codec != MS_KV_TURBO3 || step < 3)) __builtin_prefetch(next[v] + step * stride, 0, 2);
    }
    MS_NAME(key_products)(sum, window, 0, q, query_stride, table, nr, nv, codec);
    if (n >= 2) MS_NAME(key_products)(sum, window, 1, q + MS_QUAD_BYTES, query_stride, table, nr, nv, codec);
    if (n >= 4) {
      MS_NAME(key_products)(sum, window, 2, q + 2 * MS_QUAD_BYTES, query_stride, table, nr, nv, codec);
      MS_NAME(key_products)(sum, window, 3, q + 3 * MS_QUAD_BYTES, query_stride, table, nr, nv, codec);
    }
  }
}

// As `score`, of packed keys.
MS_VEC void MS_NAME(score_packed)(const MS_NAME(attention_tile) * t, uint32_t j, uint32_t at, uint32_t ahead,
                                  float *scores, const uint32_t nr, const uint32_t nv, const uint32_t codec) {
  const MS_NAME(packed_plane) *k = &t->packed->k;
  const uint32_t dim = t->p->head_dim;
  const size_t stride = (size_t)4 << t->block_shift, query_stride = (size_t)dim * sizeof(float);
  const float *queries = t->queries + (size_t)j * dim;
  const uint8_t *quads = (const uint8_t *)queries + sizeof(MSActivationGroup);
  const MS_NAME(key_table) table = MS_NAME(load_key_table)(t->packed->bytes);
  const uint32_t rows = codec == MS_KV_AFFINE8 ? 2 * k->groups : 1;
  for (uint32_t part = 0; part < MS_NAME(key_parts); ++part) {
    const uint8_t *codes[8], *next[8];
    size_t scale[8];
    MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
      const int32_t *next_table;
      uint32_t next_position;
      MS_NAME(look_ahead)(t, at + 16 * v, ahead + 16 * v, &next_table, &next_position);
      codes[v] = MS_NAME(key_codes)(t, t->table, at + 16 * v) + part * sizeof(ms_words);
      next[v] = MS_NAME(key_codes)(t, next_table, next_position);
      scale[v] = MS_NAME(scale_in)(t, t->table, at + 16 * v, rows) + part * MS_LANES;
      if (j == 0 && part == 0) {
        const size_t far = MS_NAME(scale_in)(t, next_table, next_position, rows) * (k->wide ? 4 : 2);
        for (uint32_t g = 0; g < rows; ++g)
          __builtin_prefetch(k->scales + far + ((size_t)2 * g << t->block_shift), 0, 2);
      }
    }
    const bool fetch = j == 0 && part == 0;
    if (codec == MS_KV_AFFINE8) {
      ms_floats score[12][8];
      MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
        MS_UNROLL for (uint32_t v = 0; v < nv; ++v) score[i][v] = (ms_floats)(0.0f);
      }
      const uint32_t steps = k->group / 4;
      for (uint32_t g = 0; g < k->groups; ++g) {
        ms_sums sum[12][8];
        MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
          MS_UNROLL for (uint32_t v = 0; v < nv; ++v) sum[i][v] = (ms_sums){0, 0};
        }
        MS_NAME(key_steps)(sum, codes, next, stride, quads, query_stride, table, g * steps, steps, fetch, nr, nv,
                           codec);
        MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
          const size_t from = scale[v] + ((size_t)2 * g << t->block_shift);
          const ms_floats s = load_scales(k->scales + from * 2, MS_FLOAT16);
          const ms_floats lo = load_scales(k->scales + (from + (1u << t->block_shift)) * 2, MS_FLOAT16);
          MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
            const int32_t total = MS_NAME(query_totals)((float *)queries + (size_t)i * dim, dim)[g];
            const ms_floats products = __builtin_convertvector(sum_of(sum[i][v], 2, 8, total), ms_floats);
            score[i][v] = multiply_add(s, products, score[i][v]);
            score[i][v] = multiply_add(lo, (ms_floats)((float)total), score[i][v]);
          }
        }
      }
      MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
        const ms_floats factor = (ms_floats)(queries[(size_t)i * dim]);
        MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
          const ms_floats s = score[i][v] * factor;
          memcpy(scores + (size_t)i * MS_ATTN_CHUNK + 16 * v + part * MS_LANES, &s, sizeof s);
        }
      }
      continue;
    }
    ms_sums sum[12][8];
    MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
      MS_UNROLL for (uint32_t v = 0; v < nv; ++v) sum[i][v] = (ms_sums){0, 0};
    }
    const uint32_t elements = MS_NAME(step_quads)(codec) * 4;
    if (codec == MS_KV_TURBO3) {  // four steps are three words: their shifts are constants
      for (uint32_t step = 0; step < dim / elements; step += 4) {
        const uint8_t *words[8], *words_ahead[8], *from = quads + (size_t)step * 2 * MS_QUAD_BYTES;
        MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
          words[v] = codes[v] + step / 4 * 3 * stride, words_ahead[v] = next[v] + step / 4 * 3 * stride;
        }
#define MS_STEP(i) \
  MS_NAME(key_steps)(sum, words, words_ahead, stride, from, query_stride, table, i, 1, fetch, nr, nv, codec)
        MS_STEP(0);
        MS_STEP(1);
        if (step + 2 == dim / elements) break;
        MS_STEP(2);
        MS_STEP(3);
#undef MS_STEP
      }
    } else {
      MS_NAME(key_steps)(sum, codes, next, stride, quads, query_stride, table, 0, dim / elements, fetch, nr, nv, codec);
    }
    MS_UNROLL for (uint32_t i = 0; i < nr; ++i) {
      MSActivationGroup head;
      memcpy(&head, queries + (size_t)i * dim, sizeof head);
      const float half = t->packed->half * (float)head.total;
      MS_UNROLL for (uint32_t v = 0; v < nv; ++v) {
        const ms_floats gamma = k->wide ? load_scales(k->scales + scale[v] * 4, MS_FLOAT32)
                                        : load_scales(k->scales + scale[v] * 2, MS_FLOAT16);
        const ms_floats products = __builtin_convertvector(MS_NAME(centred)(sum[i][v], head.total), ms_floats) + half;
        const ms_floats s = products * gamma * head.scale;
        memcpy(scores + (size_t)i * MS_ATTN_CHUNK + 16 * v + part * MS_LANES, &s, sizeof s);
      }
    }
  }
}
