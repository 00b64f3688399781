// A row of float32 into the streams of linear_activation.h.
#include "linear_activation.h"
#include "linear_dot_body.h"

// The largest |x| as bits: integers order magnitudes like floats do, with infinities and NaN above all else.
MS_VEC int32_t largest_bits(const float *x, uint32_t n) {
  i32x16 most = 0;
  for (uint32_t i = 0; i < n; i += 16) most = __builtin_elementwise_max(most, vbits(vload(x + i)) & 0x7fffffff);
  return __builtin_reduce_max(most);
}

// |y| < 2^22 plus this has the integer nearest to y (half to even) in its low bits.
#define MS_ROUNDING 0x1.8p23f

// A group is x = scale * v, v the nearest integers, |v| <= 32639 (int16) or 127 (int8). A group with an infinity or a
// NaN has scale NaN and v = 0, so that no product hides it. The scale is never below that of a largest |x| of 2^-111,
// so that its reciprocal is finite: groups of smaller inputs are off by less than that scale.
MS_VEC void quantise_group(const float *x, uint32_t group_size, int planes, uint8_t *to) {
  const float limit = planes == 2 ? 32639.0f : 127.0f;
  const int32_t bits = largest_bits(x, group_size);
  const bool finite = bits < 0x7f800000;
  const float magnitude = __builtin_bit_cast(float, bits);
  const float most = magnitude > 0x1p-111f ? magnitude : 0x1p-111f;
  const float scale = finite ? most / limit : __builtin_nanf(""), inverse = limit / most;
  const float magic = MS_ROUNDING;
  i32x16 total = 0;
  for (uint32_t i = 0; i < group_size; i += 16) {
    i32x16 v = vbits(vfma(vload(x + i), vsplat(inverse), vsplat(magic))) - __builtin_bit_cast(int32_t, magic);
    if (!finite) v = 0;
    total += v;
    store_quads(to + sizeof(MSActivationGroup) + i * 2, v, planes);
  }
  MSActivationGroup group = {.scale = scale, .total = __builtin_reduce_add(total)};
  group.sum = scale * (float)group.total;
  __builtin_memcpy(to, &group, sizeof group);
}

#if defined(MS_ISA_IS_AVX512)
// Four groups as quantise_group does them: a reduction across lanes is a chain of shuffles, and four groups share one.
// The 128-bit lanes of what reduce_each returns are alike and hold one element for each group.
typedef __m512i (*MS_NAME(combine_lanes))(__m512i, __m512i);
MS_VEC __m512i most_of_lanes(__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }
MS_VEC __m512i sum_of_lanes(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
MS_VEC __m512i reduce_each(const __m512i v[4], MS_NAME(combine_lanes) f) {
  const __m512i low = f(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i high = f(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  __m512i each = f(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
  each = f(each, _mm512_shuffle_i32x4(each, each, 0x4e));
  return f(each, _mm512_shuffle_i32x4(each, each, 0xb1));
}

// Quads of what _mm512_packs_epi32 made of 32 integers v, by planes: bytes of v (the first operand of the permutation)
// and of v + 128, whose high bytes are hi, or of zeros (the second).
static const uint8_t MS_NAME(quad_bytes)[2][64] = {
#define MS_QUAD(hi, lo, i) hi(i), hi(i + 2), hi(i + 4), hi(i + 6), lo(i), lo(i + 2), lo(i + 4), lo(i + 6)
#define MS_QUADS(hi, lo)                                                              \
  {MS_QUAD(hi, lo, 0), MS_QUAD(hi, lo, 16), MS_QUAD(hi, lo, 32), MS_QUAD(hi, lo, 48), \
   MS_QUAD(hi, lo, 8), MS_QUAD(hi, lo, 24), MS_QUAD(hi, lo, 40), MS_QUAD(hi, lo, 56)}
#define MS_FIRST(i) (i)
#define MS_SECOND(i) (64 + (i))
#define MS_SECOND_HIGH(i) (65 + (i))
    MS_QUADS(MS_FIRST, MS_SECOND), MS_QUADS(MS_SECOND_HIGH, MS_FIRST)
#undef MS_QUAD
#undef MS_QUADS
#undef MS_FIRST
#undef MS_SECOND
#undef MS_SECOND_HIGH
};

// 16 integers of a group (all: whether it is finite).
MS_VEC __m512i nearest(const float *x, __m512 inverse, __mmask16 all) {
  const __m512 magic = _mm512_set1_ps(MS_ROUNDING), bits = _mm512_fmadd_ps(_mm512_loadu_ps(x), inverse, magic);
  return _mm512_maskz_sub_epi32(all, _mm512_castps_si512(bits), _mm512_castps_si512(magic));
}

MS_VEC void quantise_four(const float *x, uint32_t group_size, int planes, uint8_t *to) {
  const size_t step = sizeof(MSActivationGroup) + (size_t)group_size * 2;
  const __m512i quads = _mm512_loadu_si512(MS_NAME(quad_bytes)[planes - 1]);
  __m512i each[4];
  for (uint32_t g = 0; g < 4; ++g) {
    i32x16 most = 0;
    for (uint32_t i = 0; i < group_size; i += 16) {
      most = __builtin_elementwise_max(most, vbits(vload(x + g * group_size + i)) & 0x7fffffff);
    }
    each[g] = (__m512i)most;
  }
  const __m128i bits = _mm512_castsi512_si128(reduce_each(each, most_of_lanes));
  const __mmask8 finite = _mm_cmplt_epi32_mask(bits, _mm_set1_epi32(0x7f800000));
  const __m128 limit = _mm_set1_ps(planes == 2 ? 32639.0f : 127.0f);
  const __m128 most = _mm_max_ps(_mm_castsi128_ps(bits), _mm_set1_ps(0x1p-111f));
  const __m128 scale = _mm_mask_blend_ps(finite, _mm_set1_ps(__builtin_nanf("")), _mm_div_ps(most, limit));
  const __m512 inverse = _mm512_broadcast_f32x4(_mm_maskz_div_ps(finite, limit, most));
  const __m512 inverses[4] = {_mm512_permute_ps(inverse, 0x00), _mm512_permute_ps(inverse, 0x55),
                              _mm512_permute_ps(inverse, 0xaa), _mm512_permute_ps(inverse, 0xff)};
  for (uint32_t g = 0; group_size < MS_BLOCK && g < 4; g += 2) {  // two groups are what packs together
    each[g] = nearest(x + g * group_size, inverses[g], finite >> g & 1 ? 0xffff : 0);
    each[g + 1] = nearest(x + (g + 1) * group_size, inverses[g + 1], finite >> (g + 1) & 1 ? 0xffff : 0);
    const __m512i v = _mm512_packs_epi32(each[g], each[g + 1]);
    const __m512i other = planes == 2 ? _mm512_add_epi16(v, _mm512_set1_epi16(128)) : _mm512_setzero_si512();
    const __m512i both = _mm512_permutex2var_epi8(v, quads, other);
    uint8_t *at = to + g * step + sizeof(MSActivationGroup);
    _mm256_storeu_si256((__m256i *)(void *)at, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i *)(void *)(at + step), _mm512_extracti64x4_epi64(both, 1));
  }
  for (uint32_t g = 0; group_size >= MS_BLOCK && g < 4; ++g) {
    const __mmask16 all = finite >> g & 1 ? 0xffff : 0;
    uint8_t *at = to + g * step + sizeof(MSActivationGroup);
    each[g] = _mm512_setzero_si512();
    for (uint32_t i = 0; i < group_size; i += MS_BLOCK, at += 2 * MS_BLOCK) {
      const float *from = x + g * group_size + i;
      const __m512i low = nearest(from, inverses[g], all), high = nearest(from + 16, inverses[g], all);
      const __m512i v = _mm512_packs_epi32(low, high);
      const __m512i other = planes == 2 ? _mm512_add_epi16(v, _mm512_set1_epi16(128)) : _mm512_setzero_si512();
      each[g] = _mm512_dpwssd_epi32(each[g], v, _mm512_set1_epi16(1));
      _mm512_storeu_si512(at, _mm512_permutex2var_epi8(v, quads, other));
    }
  }
  const __m128i totals = _mm512_castsi512_si128(reduce_each(each, sum_of_lanes));
  const __m128 sums = _mm_mul_ps(scale, _mm_cvtepi32_ps(totals));
  const __m128 low = _mm_unpacklo_ps(scale, sums), high = _mm_unpackhi_ps(scale, sums);
  const __m128i low_totals = _mm_unpacklo_epi32(totals, _mm_setzero_si128());
  const __m128i high_totals = _mm_unpackhi_epi32(totals, _mm_setzero_si128());
  _mm_storeu_ps((float *)(void *)to, _mm_movelh_ps(low, _mm_castsi128_ps(low_totals)));
  _mm_storeu_ps((float *)(void *)(to + step), _mm_movehl_ps(_mm_castsi128_ps(low_totals), low));
  _mm_storeu_ps((float *)(void *)(to + 2 * step), _mm_movelh_ps(high, _mm_castsi128_ps(high_totals)));
  _mm_storeu_ps((float *)(void *)(to + 3 * step), _mm_movehl_ps(_mm_castsi128_ps(high_totals), high));
}
#endif

MS_VEC void quantise_groups(const float *x, uint32_t k, uint32_t group_size, int planes, uint8_t *to) {
  const size_t step = sizeof(MSActivationGroup) + (size_t)group_size * 2;
  const uint32_t groups = k / group_size;
#if defined(MS_ISA_IS_AVX512)
  if (groups >= 4) {
    for (uint32_t g = 0; g < groups; g += 4) {
      const uint32_t first = g + 4 <= groups ? g : groups - 4;  // the last four may overlap those before
      quantise_four(x + (size_t)first * group_size, group_size, planes, to + first * step);
    }
    return;
  }
#endif
  for (uint32_t g = 0; g < groups; ++g) quantise_group(x + (size_t)g * group_size, group_size, planes, to + g * step);
}

static void MS_NAME(quantise_row)(const float *x, uint32_t k, uint32_t group_size, uint32_t arithmetic, uint8_t *to) {
#define MS_QUANTISE(size, planes)                                                       \
  if (group_size == (size) && (arithmetic == MS_ARITHMETIC_INT16) == ((planes) == 2)) { \
    quantise_groups(x, k, size, planes, to);                                            \
  }
  MS_QUANTISE(16, 2)
  MS_QUANTISE(32, 2)
  MS_QUANTISE(64, 2)
  MS_QUANTISE(128, 2)
  MS_QUANTISE(16, 1)
  MS_QUANTISE(32, 1)
  MS_QUANTISE(64, 1)
  MS_QUANTISE(128, 1)
#undef MS_QUANTISE
}
