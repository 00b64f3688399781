// Floats of 8 bits and 4: the scales and elements of mxfp4, nvfp4 and mxfp8, as float32 and exact.
// Source: OCP Microscaling Formats (MX) 1.0, section 5.3; e8m0's 255 is infinity, as in MLX.
#include "panel.h"

typedef uint8_t u8x16 __attribute__((ext_vector_type(16)));
typedef int8_t i8x16 __attribute__((ext_vector_type(16)));
typedef int16_t i16x16 __attribute__((ext_vector_type(16)));

// 2^(byte - 127); 2^-127 is subnormal.
MS_VEC f32x16 vfrom_e8m0(u8x16 bytes) {
  const i32x16 bits = __builtin_convertvector(bytes, i32x16) << 23;
  return vfloat(bits == 0 ? (i32x16)0x00400000 : bits);
}

// Like e5m10, the half float, e4m3 has subnormals: its bits make a half that is 2^-8 of it.
MS_VEC f32x16 vfrom_e4m3(u8x16 bytes) {
  const i16x16 wide = __builtin_convertvector(__builtin_bit_cast(i8x16, bytes), i16x16);
  const i16x16 half = ((wide & 0x7f) == 0x7f) ? (i16x16)0x7e00 : (wide << 7 & (int16_t)0xbf80);
  return vfrom_f16(__builtin_bit_cast(u16x16, half)) * 0x1p8f;
}

static const float MS_NAME(e2m1)[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                        -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Writes the k elements of lane `lane` of a panel of floats (panel.h).
static void MS_NAME(floats_row)(const uint8_t *w, size_t lane, uint32_t k, uint32_t bits, uint32_t group_size,
                                float *out) {
  const uint8_t *scales = w;
  for (uint32_t i = 0; i < k; i += 16) {
    const uint32_t group = i / group_size;
    if (i % (MS_FLOATS_RUN * group_size) == 0) {
      scales = w;
      w += MS_FLOATS_LINE;
    }
    const u8x16 scale_bytes = scales[group % MS_FLOATS_RUN * MS_PANEL_ROWS + lane];
    const f32x16 scale = group_size == 16 ? vfrom_e4m3(scale_bytes) : vfrom_e8m0(scale_bytes);
    u8x16 bytes;
    f32x16 values;
    for (uint32_t j = 0; j < 16; ++j) {
      if (bits == 8) {
        bytes[j] = w[j / 2 * (2 * MS_PANEL_ROWS) + lane * 2 + j % 2];
      } else {  // line j / 8 has quad j / 4 in its low nibbles or its high ones
        values[j] = MS_NAME(e2m1)[w[j / 8 * 64 + lane * 4 + j % 4] >> (j / 4 % 2 * 4) & 15];
      }
    }
    vstore(out + i, (bits == 8 ? vfrom_e4m3(bytes) : values) * scale);
    w += bits * 32;
  }
}
