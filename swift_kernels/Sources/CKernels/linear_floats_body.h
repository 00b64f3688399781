// Tiles of weights that are floats of 4 or 8 bits (panel.h). Both read as many bits per weight as there are.
//
// 4 bits: twice an e2m1 is a small integer, so products with activations are exact integers as those of affine weights
// are, and the scale is halved. Where dot() takes unsigned weights, they are MS_E2M1_ZERO too large, and the sum of the
// activations is subtracted as often.
// 8 bits: e4m3 spans 18 bits; products are of float32, added up within a group from its first element to its last, then
// scaled and added to the groups before.
#if defined(MS_ISA_IS_NEON)
enum { MS_E2M1_ZERO = 0 };  // sdot is signed
#else
enum { MS_E2M1_ZERO = 12 };
#endif

static const int8_t MS_NAME(e2m1_twice)[16] = {MS_E2M1_ZERO + 0, MS_E2M1_ZERO + 1, MS_E2M1_ZERO + 2, MS_E2M1_ZERO + 3,
                                               MS_E2M1_ZERO + 4, MS_E2M1_ZERO + 6, MS_E2M1_ZERO + 8, MS_E2M1_ZERO + 12,
                                               MS_E2M1_ZERO - 0, MS_E2M1_ZERO - 1, MS_E2M1_ZERO - 2, MS_E2M1_ZERO - 3,
                                               MS_E2M1_ZERO - 4, MS_E2M1_ZERO - 6, MS_E2M1_ZERO - 8, MS_E2M1_ZERO - 12};

// Quad `quad` of the lanes whose first words are at `lines`, as bytes for dot().
MS_VEC ms_words words_of_e2m1(const uint8_t *lines, int quad) {
  const ms_words w = load_words(lines + quad / 2 * 64) >> (uint32_t)(quad % 2 * 4);
#if defined(MS_ISA_IS_AVX512)
  // The lookup takes 6 bits of each index. A table four times over makes it look at 4.
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)MS_NAME(e2m1_twice)));
  return (ms_words)_mm512_permutexvar_epi8((__m512i)w, table);
#elif defined(MS_ISA_IS_AVX2)
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)MS_NAME(e2m1_twice)));
  return (ms_words)_mm256_shuffle_epi8(table, (__m256i)(w & 0x0f0f0f0f));
#elif defined(MS_ISA_IS_NEON)
  return vreinterpretq_u32_s8(vqtbl1q_s8(vld1q_s8(MS_NAME(e2m1_twice)), vreinterpretq_u8_u32(w & 0x0f0f0f0f)));
#else
  // Without a lookup, four bytes at a time: magnitudes 0 .. 7 stand for 0, 1, 2, 3, 4, 6, 8, 12.
  const ms_words low = w & 0x03030303, large = w >> 2 & 0x01010101, negative = (w >> 3 & 0x01010101) * 0xff;
  const ms_words more = low & large * 3;
  const ms_words magnitude = (w & 0x07070707) + more + 2 * (more & more >> 1 & 0x01010101);
  const ms_words zero = 0x01010101 * MS_E2M1_ZERO;
  return ((zero + magnitude) & ~negative) | ((zero - magnitude) & negative);
#endif
}

// Lanes [0, MS_LANES) of half the scales of groups of `group_size`: e8m0 of 32, e4m3 of 16.
MS_VEC ms_floats half_scales(const uint8_t *p, uint32_t group_size) {
  typedef uint8_t bytes __attribute__((ext_vector_type(MS_LANES)));
  bytes b;
  __builtin_memcpy(&b, p, sizeof b);
  if (group_size == MS_BLOCK) {
    const ms_words bits = __builtin_convertvector(b, ms_words) << 23;
    return __builtin_bit_cast(ms_floats, __builtin_elementwise_max(bits, (ms_words)0x00400000)) * 0.5f;
  }
  const ms_halves wide = __builtin_convertvector(b, ms_halves), magnitude = wide & 0x7f;
  const ms_halves h = magnitude == 0x7f ? (ms_halves)0x7e00 : (magnitude << 7 | (wide & 0x80) << 8);
  return floats_of_f16(h) * 0x1p7f;  // see vfrom_e4m3
}

// All but the pointers are constants at every call; see tile_panel.
MS_VEC void fp4_panel(const MS_NAME(linear_tile) * t, const uint8_t *panel, float *out, uint32_t group_size, int planes,
                      int mt, int vectors) {
  const int quads = (int)group_size / 4;
  for (int lane = 0; lane < MS_PANEL_ROWS; lane += vectors * MS_LANES) {
    ms_floats sum[MS_TILE_VECTORS];
    MS_UNROLL for (int i = 0; i < mt * vectors; ++i) sum[i] = 0;
    const uint8_t *w = panel, *x = t->x;
    for (uint32_t first = 0; first < t->groups; first += MS_FLOATS_RUN) {
      const uint8_t *scales = w;
      const uint32_t count = t->groups - first < MS_FLOATS_RUN ? t->groups - first : MS_FLOATS_RUN;
      if (lane == 0) __builtin_prefetch(w + MS_PREFETCH, 0, 3);
      w += MS_FLOATS_LINE;
      for (uint32_t g = 0; g < count; ++g, scales += MS_PANEL_ROWS) {
        const uint8_t *x_header = x;
        ms_sums s[MS_TILE_VECTORS];
        MS_UNROLL for (int i = 0; i < mt * vectors; ++i) s[i] = (ms_sums){0, 0};
        x += sizeof(MSActivationGroup);
        if (lane == 0) {
          MS_UNROLL for (int i = 0; i < quads; i += 2) __builtin_prefetch(w + MS_PREFETCH + i * 32, 0, 3);
        }
        MS_UNROLL for (int quad = 0; quad < quads; ++quad) {
          ms_words q[4];
          MS_UNROLL for (int v = 0; v < vectors; ++v) {
            q[v] = words_of_e2m1(w + (size_t)(lane + v * MS_LANES) * 4, quad);
          }
          MS_UNROLL for (int m = 0; m < mt; ++m) {
            const uint8_t *at = x + (size_t)m * t->x_stride + quad * MS_QUAD_BYTES;
            MS_UNROLL for (int v = 0; v < vectors; ++v) dot(&s[m * vectors + v], q[v], at, planes, 4);
          }
        }
        w += quads * 32;
        x += quads * MS_QUAD_BYTES;
        MS_UNROLL for (int v = 0; v < vectors; ++v) {
          const ms_floats scale = half_scales(scales + lane + v * MS_LANES, group_size);
          MS_UNROLL for (int m = 0; m < mt; ++m) {
            const MSActivationGroup *a = (const MSActivationGroup *)(const void *)(x_header + (size_t)m * t->x_stride);
            const ms_ints whole = sum_of(s[m * vectors + v], planes, 4, a->total) - MS_E2M1_ZERO * a->total;
            const ms_floats f = __builtin_convertvector(whole, ms_floats) * a->scale;
            sum[m * vectors + v] = multiply_add(f, scale, sum[m * vectors + v]);
          }
        }
      }
    }
    MS_UNROLL for (int m = 0; m < mt; ++m) {
      MS_UNROLL for (int v = 0; v < vectors; ++v) {
        __builtin_memcpy(out + (size_t)m * t->out_stride + lane + v * MS_LANES, &sum[m * vectors + v],
                         sizeof(ms_floats));
      }
    }
  }
}

// ---- 8 bits ---------------------------------------------------------------------------------------------------------
// Lines of two elements that are decoded together, as bytes.
#if defined(MS_ISA_IS_AVX512)
enum { MS_E4M3_STEP = 4 };  // elements
typedef uint8_t ms_e4m3 __attribute__((ext_vector_type(64)));
typedef int16_t ms_e4m3_words __attribute__((ext_vector_type(32)));
#else
enum { MS_E4M3_STEP = 2 };
typedef uint8_t ms_e4m3 __attribute__((ext_vector_type(32)));
typedef int16_t ms_e4m3_words __attribute__((ext_vector_type(16)));
#endif

// MS_E4M3_STEP elements of 16 rows, from `p` on, as 2^-8 of what they are (see vfrom_e4m3) but for NaN: `most` becomes
// the largest magnitude of each byte.
MS_VEC void e4m3_elements(const uint8_t *p, f32x16 to[MS_E4M3_STEP], ms_e4m3 *most) {
  ms_e4m3 bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  *most = __builtin_elementwise_max(*most, bytes & 0x7f);
  const ms_e4m3_words words = __builtin_bit_cast(ms_e4m3_words, bytes);
  const ms_e4m3_words even = words << 8 >> 1 & (int16_t)0xbf80, odd = words >> 1 & (int16_t)0xbf80;
#if defined(MS_ISA_IS_AVX512)
  to[0] = (f32x16)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)even));
  to[1] = (f32x16)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)odd));
  to[2] = (f32x16)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)even, 1));
  to[3] = (f32x16)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)odd, 1));
#else
  to[0] = vfrom_f16(__builtin_bit_cast(u16x16, even));
  to[1] = vfrom_f16(__builtin_bit_cast(u16x16, odd));
#endif
}

// The scales of 16 rows' groups; NaN where `most` says that an element is.
MS_VEC f32x16 fp8_scales(const uint8_t *p, ms_e4m3 most) {
  u8x16 bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
#if defined(MS_ISA_IS_AVX512)
  const __m256i lines[2] = {_mm512_castsi512_si256((__m512i)most), _mm512_extracti64x4_epi64((__m512i)most, 1)};
  const i16x16 words = (i16x16)_mm256_max_epu8(lines[0], lines[1]);
#else
  const i16x16 words = __builtin_bit_cast(i16x16, most);
#endif
  const i16x16 nan = ((words & 0x7f) == 0x7f) | (words >= 0x7f00);
  return __builtin_convertvector(nan, i32x16) ? vsplat(__builtin_nanf("")) : vfrom_e8m0(bytes);
}

MS_VEC void fp8_panels(const MS_NAME(linear_tile) * t, uint32_t first, int mt, int panels) {
  f32x16 sum[MS_TILE_ROWS];
  MS_UNROLL for (int i = 0; i < mt * panels; ++i) sum[i] = vsplat(0);
  const uint8_t *w = t->panels + first * t->stride, *scales = w;
  for (uint32_t g = 0; g < t->groups; ++g, scales += MS_PANEL_ROWS) {
    if (g % MS_FLOATS_RUN == 0) {
      scales = w;
      MS_UNROLL for (int p = 0; p < panels; ++p) __builtin_prefetch(w + (size_t)p * t->stride + MS_PREFETCH, 0, 3);
      w += MS_FLOATS_LINE;
    }
    f32x16 part[MS_TILE_ROWS];
    ms_e4m3 most[4];
    MS_UNROLL for (int i = 0; i < mt * panels; ++i) part[i] = vsplat(0);
    MS_UNROLL for (int p = 0; p < panels; ++p) most[p] = 0;
    for (uint32_t k = 0; k < MS_BLOCK; k += MS_E4M3_STEP, w += MS_E4M3_STEP * MS_PANEL_ROWS) {
      MS_UNROLL for (int p = 0; p < panels; ++p) {
        const uint8_t *at = w + (size_t)p * t->stride;
        __builtin_prefetch(at + MS_PREFETCH, 0, 3);
        f32x16 weights[MS_E4M3_STEP];
        e4m3_elements(at, weights, &most[p]);
        MS_UNROLL for (int m = 0; m < mt; ++m) {
          const float *x = (const float *)(const void *)(t->x + (size_t)m * t->x_stride) + g * MS_BLOCK + k;
          MS_UNROLL for (int i = 0; i < MS_E4M3_STEP; ++i) {
            part[m * panels + p] = vfma(weights[i], vsplat(x[i]), part[m * panels + p]);
          }
        }
      }
    }
    MS_UNROLL for (int p = 0; p < panels; ++p) {
      const f32x16 scale = fp8_scales(scales + (size_t)p * t->stride, most[p]);
      MS_UNROLL for (int m = 0; m < mt; ++m) {
        sum[m * panels + p] = vfma(part[m * panels + p] * 0x1p8f, scale, sum[m * panels + p]);
      }
    }
  }
  MS_UNROLL for (int m = 0; m < mt; ++m) {
    MS_UNROLL for (int p = 0; p < panels; ++p) {
      vstore(t->out + (size_t)m * t->out_stride + (first + (uint32_t)p) * MS_PANEL_ROWS, sum[m * panels + p]);
    }
  }
}

#define MS_FP4(group_size, planes, mt)                                                                  \
  static void MS_NAME(tile_fp4_##group_size##_##planes##_##mt)(const MS_NAME(linear_tile) * t) {        \
    enum { vectors = MS_TILE_VECTORS / (mt) < 16 / MS_LANES ? MS_TILE_VECTORS / (mt) : 16 / MS_LANES }; \
    for (uint32_t i = 0; i < t->count; ++i)                                                             \
      fp4_panel(t, t->panels + i * t->stride, t->out + i * 16, group_size, planes, mt, vectors);        \
  }
#define MS_FP8(mt)                                                            \
  static void MS_NAME(tile_fp8_##mt)(const MS_NAME(linear_tile) * t) {        \
    enum { panels = 4 / (mt) > 1 ? 4 / (mt) : 1 };                            \
    uint32_t i = 0;                                                           \
    for (; i + panels <= t->count; i += panels) fp8_panels(t, i, mt, panels); \
    for (; i < t->count; ++i) fp8_panels(t, i, mt, 1);                        \
  }
#define MS_FLOATS(mt) \
  MS_FP4(32, 1, mt)   \
  MS_FP4(32, 2, mt) MS_FP4(16, 1, mt) MS_FP4(16, 2, mt) MS_FP8(mt)
MS_FLOATS(1)
MS_FLOATS(2)
MS_FLOATS(4)
#if MS_TILE_ROWS == 8
MS_FLOATS(8)
#endif
#undef MS_FP4
#undef MS_FP8
#undef MS_FLOATS
