// Products of four unsigned weight bytes and four activations, summed per lane: what differs between instruction sets.
//
// An activation is an integer v of 15 bits and a sign (int16 arithmetic) or of 7 (int8). The sums are exact integers
// (at most 128 * 255 * 32639 < 2^31), so every instruction set has the same. A quad of activations takes 8 bytes; how v
// lies in them is each set's own:
//   AVX-512, NEON: four int8 hi, then four int8 lo, v = 256 * hi + lo (|v| <= 32639 keeps hi from reaching 128).
//   AVX2: int16 of k, k + 2, k + 1, k + 3, as vpmaddwd meets the even and the odd weight bytes. (vpmaddubsw on split
//   bytes is slower, and saturates on 8-bit weights.)
//   Portable: int16 in order.
#ifndef METALSTEP_LINEAR_DOT_BODY_H
#define METALSTEP_LINEAR_DOT_BODY_H
#include "panel.h"

enum { MS_QUAD_BYTES = 8 };

// MS_LANES: rows of a panel in one register. A tile has up to MS_TILE_ROWS rows and MS_TILE_VECTORS registers of
// products.
#if defined(MS_ISA_IS_AVX512)
#define MS_LANES 16
#define MS_TILE_ROWS 8
#define MS_TILE_VECTORS 8
#elif defined(MS_ISA_IS_AVX2)
#define MS_LANES 8
#define MS_TILE_ROWS 4
#define MS_TILE_VECTORS 8
#elif defined(MS_ISA_IS_NEON)
#define MS_LANES 4
#define MS_TILE_ROWS 4
#define MS_TILE_VECTORS 8
#else
#define MS_LANES 4
#define MS_TILE_ROWS 4
#define MS_TILE_VECTORS 4
#endif

typedef uint32_t ms_words __attribute__((ext_vector_type(MS_LANES)));  // four weight bytes per lane
typedef int32_t ms_ints __attribute__((ext_vector_type(MS_LANES)));
typedef float ms_floats __attribute__((ext_vector_type(MS_LANES)));

// Partial sums of a group: of hi and of lo where they are apart, else `hi` holds the sum.
typedef struct {
  ms_ints hi, lo;
} ms_sums;

// As vfma (vec.h), on a register of lanes.
MS_VEC ms_floats multiply_add(ms_floats a, ms_floats b, ms_floats c) {
#if defined(MS_ISA_IS_PORTABLE)
#pragma clang fp contract(off)
  return a * b + c;
#else
  return __builtin_elementwise_fma(a, b, c);
#endif
}

MS_VEC ms_words load_words(const void *p) {
  ms_words w;
  __builtin_memcpy(&w, p, sizeof w);
  return w;
}
MS_VEC int32_t load_i32(const void *p) {
  int32_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Adds the products of `w` and the activations at `x`. planes: 2 for int16, 1 for int8 (lo is 0); bits: of the weights.
MS_VEC void dot(ms_sums *s, ms_words w, const uint8_t *x, int planes, uint32_t bits) {
  (void)planes, (void)bits;
#if defined(MS_ISA_IS_AVX512)
  s->hi = (ms_ints)_mm512_dpbusd_epi32((__m512i)s->hi, (__m512i)w, _mm512_set1_epi32(load_i32(x)));
  if (planes == 2) s->lo = (ms_ints)_mm512_dpbusd_epi32((__m512i)s->lo, (__m512i)w, _mm512_set1_epi32(load_i32(x + 4)));
#elif defined(MS_ISA_IS_AVX2)
  const __m256i even = (__m256i)(w & 0x00ff00ff), odd = _mm256_srli_epi16((__m256i)w, 8);
  s->hi += (ms_ints)_mm256_madd_epi16(even, _mm256_set1_epi32(load_i32(x)));
  s->hi += (ms_ints)_mm256_madd_epi16(odd, _mm256_set1_epi32(load_i32(x + 4)));
#elif defined(MS_ISA_IS_NEON)
  // sdot is signed: 8-bit weights come as q - 128 (words_of_quad), and sum_of adds 128 times the sum of v.
  s->hi = vdotq_s32(s->hi, vreinterpretq_s8_u32(w), vreinterpretq_s8_s32(vdupq_n_s32(load_i32(x))));
  if (planes == 2) {
    s->lo = vdotq_s32(s->lo, vreinterpretq_s8_u32(w), vreinterpretq_s8_s32(vdupq_n_s32(load_i32(x + 4))));
  }
#else
  int16_t v[4];
  __builtin_memcpy(v, x, sizeof v);
  for (int i = 0; i < 4; ++i) s->hi += (ms_ints)(w >> (8 * i) & 255) * v[i];
#endif
}

// The sum over a group whose activations sum to `activations`.
MS_VEC ms_ints sum_of(ms_sums s, int planes, uint32_t bits, int32_t activations) {
  (void)planes, (void)bits, (void)activations;
#if defined(MS_ISA_IS_AVX512) || defined(MS_ISA_IS_NEON)
  ms_ints sum = planes == 2 ? (s.hi << 8) + s.lo : s.hi;
#if defined(MS_ISA_IS_NEON)
  if (bits == 8) sum += 128 * activations;
#endif
  return sum;
#else
  return s.hi;
#endif
}

// Quad `quad` of a block for the lanes whose first words are at `block`, as unsigned bytes (NEON: 8 bits as q - 128).
MS_VEC ms_words words_of_quad(const uint8_t *block, uint32_t bits, int quad) {
  if (bits == 8) {
    const ms_words w = load_words(block + quad * 64);
#if defined(MS_ISA_IS_NEON)
    return w ^ 0x80808080;
#else
    return w;
#endif
  }
  const uint32_t low_bits = bits >= 4 ? 4 : bits >= 2 ? 2 : 1, high_bits = bits - low_bits;
  const int low_quads = bits >= 4 ? 2 : bits >= 2 ? 4 : 8;  // quads in a line
  const uint32_t low_mask = bits >= 4 ? 0x0f0f0f0f : bits >= 2 ? 0x03030303 : 0x01010101;
  const ms_words low =
      load_words(block + quad / low_quads * 64) >> (low_bits * (uint32_t)(quad % low_quads)) & low_mask;
  if (high_bits == 0) return low;
  const uint8_t *high_lines = block + low_bits * 64;
  const int high_quads = high_bits == 1 ? 8 : 4;
  const ms_words line = load_words(high_lines + quad / high_quads * 64);
  const int shift = (int)low_bits - (int)high_bits * (quad % high_quads);  // to where the high bits belong
  const uint32_t high_mask = (high_bits == 1 ? 0x01010101u : 0x03030303u) << low_bits;
  return low | ((shift >= 0 ? line << shift : line >> -shift) & high_mask);
}

typedef uint16_t ms_halves __attribute__((ext_vector_type(MS_LANES)));  // bits of float16 or bfloat16

MS_VEC ms_floats floats_of_f16(ms_halves h) {
#if defined(MS_ISA_IS_AVX512)
  return (ms_floats)_mm512_cvtph_ps(__builtin_bit_cast(__m256i, h));
#elif defined(MS_ISA_IS_AVX2)
  return (ms_floats)_mm256_cvtph_ps(__builtin_bit_cast(__m128i, h));
#elif defined(MS_ISA_IS_NEON)
  return vcvt_f32_f16(__builtin_bit_cast(float16x4_t, h));
#else
  const ms_words wide = __builtin_convertvector(h, ms_words), magnitude = (wide & 0x7fff) << 13;
  const ms_floats finite = __builtin_bit_cast(ms_floats, magnitude) * 0x1p112f;  // exact, subnormals too
  const ms_ints special = magnitude >= 0x7c00 << 13;
  const ms_words bits = special ? magnitude | 0x7f800000 : __builtin_bit_cast(ms_words, finite);
  return __builtin_bit_cast(ms_floats, bits | (wide & 0x8000) << 16);
#endif
}

// Lanes [0, MS_LANES) of scales of `dtype`.
MS_VEC ms_floats load_scales(const uint8_t *p, uint32_t dtype) {
  if (dtype == MS_FLOAT32) {
    ms_floats f;
    __builtin_memcpy(&f, p, sizeof f);
    return f;
  }
  ms_halves h;
  __builtin_memcpy(&h, p, sizeof h);
  if (dtype == MS_BFLOAT16) return __builtin_bit_cast(ms_floats, __builtin_convertvector(h, ms_words) << 16);
  return floats_of_f16(h);
}

// Writes 16 integers as four quads.
MS_VEC void store_quads(uint8_t *to, i32x16 v, int planes) {
  (void)planes;
#if defined(MS_ISA_IS_AVX512) || defined(MS_ISA_IS_NEON)
  typedef int8_t i8x16 __attribute__((ext_vector_type(16)));
  i8x16 hi = __builtin_convertvector(v, i8x16), lo = 0;
  if (planes == 2) {
    lo = hi;
    hi = __builtin_convertvector((v + 128) >> 8, i8x16);
  }
  typedef int8_t i8x32 __attribute__((ext_vector_type(32)));
  const i8x32 quads = __builtin_shufflevector(hi, lo, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23, 8, 9, 10,
                                              11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#else
  typedef int16_t i16x16 __attribute__((ext_vector_type(16)));
  i16x16 quads = __builtin_convertvector(v, i16x16);
#if defined(MS_ISA_IS_AVX2)
  quads = __builtin_shufflevector(quads, quads, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
#endif
#endif
  __builtin_memcpy(to, &quads, sizeof quads);
}

#endif
