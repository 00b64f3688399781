// A row of float32 into the streams of linear_activation.h.
#include "linear_activation.h"
#include "linear_dot_body.h"

// The largest |x| as bits: integers order magnitudes like floats do, with infinities and NaN above all else.
MS_VEC int32_t largest_bits(const float *x, uint32_t n) {
  i32x16 most = 0;
  for (uint32_t i = 0; i < n; i += 16) most = __builtin_elementwise_max(most, vbits(vload(x + i)) & 0x7fffffff);
  return __builtin_reduce_max(most);
}

// A group is x = scale * v, v the nearest integers, |v| <= 32639 (int16) or 127 (int8). A group with an infinity or a
// NaN has scale NaN and v = 0, so that no product hides it. The scale is never below that of a largest |x| of 2^-111, so
// that its reciprocal is finite: groups of smaller inputs are off by less than that scale.
MS_VEC void quantise_group(const float *x, uint32_t group_size, int planes, uint8_t *to) {
#pragma clang fp contract(off)  // x * inverse is rounded before it is rounded to an integer: with or without an fma
  const float limit = planes == 2 ? 32639.0f : 127.0f;
  const int32_t bits = largest_bits(x, group_size);
  const bool finite = bits < 0x7f800000;
  const float magnitude = __builtin_bit_cast(float, bits);
  const float most = magnitude > 0x1p-111f ? magnitude : 0x1p-111f;
  const float scale = finite ? most / limit : __builtin_nanf(""), inverse = limit / most;
  const float magic = 0x1.8p23f;  // |y| < 2^22 plus this has the integer nearest to y (half to even) in its low bits
  i32x16 total = 0;
  for (uint32_t i = 0; i < group_size; i += 16) {
    i32x16 v = vbits(vload(x + i) * inverse + magic) - __builtin_bit_cast(int32_t, magic);
    if (!finite) v = 0;
    total += v;
    store_quads(to + sizeof(MSActivationGroup) + i * 2, v, planes);
  }
  MSActivationGroup group = {.scale = scale, .total = __builtin_reduce_add(total)};
  group.sum = scale * (float)group.total;
  __builtin_memcpy(to, &group, sizeof group);
}

static void MS_NAME(quantise_row)(const float *x, uint32_t k, uint32_t group_size, uint32_t arithmetic, uint8_t *to) {
  const size_t step = sizeof(MSActivationGroup) + (size_t)group_size * 2;
#define MS_QUANTISE(size, planes)                                                                 \
  if (group_size == (size) && (arithmetic == MS_ARITHMETIC_INT16) == ((planes) == 2)) {           \
    for (uint32_t i = 0; i < k; i += (size), to += step) quantise_group(x + i, size, planes, to); \
  }
  MS_QUANTISE(32, 2)
  MS_QUANTISE(64, 2)
  MS_QUANTISE(128, 2)
  MS_QUANTISE(32, 1)
  MS_QUANTISE(64, 1)
  MS_QUANTISE(128, 1)
#undef MS_QUANTISE
}
