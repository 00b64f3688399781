// One weight row out of its panel (panel.h): the embedding of a token.
#include "panel.h"

MS_VEC float MS_NAME(panel_element)(const uint8_t *p, uint32_t dtype) {
  if (dtype == MS_FLOAT32) {
    float f;
    __builtin_memcpy(&f, p, sizeof f);
    return f;
  }
  uint16_t h;
  __builtin_memcpy(&h, p, sizeof h);
  const u16x16 halves = h;
  return dtype == MS_FLOAT16 ? vfrom_f16(halves)[0] : vfrom_bf16(halves)[0];
}

// The 32 q of a row in a block: its first word is at `words`.
MS_VEC void MS_NAME(block_row)(const uint8_t *words, uint32_t bits, uint8_t q[MS_BLOCK]) {
  const uint32_t low = bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1, planes[2] = {low, bits - low};
  uint32_t shift = 0;
  uint32_t quads[8] = {0};
  for (int plane = 0; plane < 2; ++plane) {
    const uint32_t width = planes[plane];
    if (width == 0) continue;
    const uint32_t mask = 0x01010101u * ((1u << width) - 1), in_line = 8 / width;
    for (uint32_t j = 0; j < 8; ++j) {
      uint32_t line;
      __builtin_memcpy(&line, words + j / in_line * 64, sizeof line);
      quads[j] |= (line >> (width * (j % in_line)) & mask) << shift;
    }
    words += width * 64;
    shift += width;
  }
  __builtin_memcpy(q, quads, MS_BLOCK);
}

// Writes the k elements of weight row `row` as float32; out is written up to a multiple of 16 elements.
static void MS_NAME(panel_row)(const void *panels, uint32_t row, uint32_t k, uint32_t bits, uint32_t group_size,
                               uint32_t dtype, float *out) {
  const uint8_t *w = (const uint8_t *)panels + row / MS_PANEL_ROWS * ms_panel_stride(k, bits, group_size, dtype);
  const size_t lane = row % MS_PANEL_ROWS, element = ms_dtype_bytes(dtype), scale_bytes = ms_scale_bytes(dtype);
  if (ms_is_dense(bits)) {
    for (uint32_t i = 0; i < k; ++i) out[i] = MS_NAME(panel_element)(w + (i * MS_PANEL_ROWS + lane) * element, dtype);
    return;
  }
  if (ms_is_floats(dtype)) {
    MS_NAME(floats_row)(w, lane, k, bits, group_size, out);
    return;
  }
  for (uint32_t i = 0; i < k; i += group_size) {
    const f32x16 scale = vsplat(MS_NAME(panel_element)(w + lane * element, dtype));
    const f32x16 bias = vsplat(MS_NAME(panel_element)(w + scale_bytes + lane * element, dtype));
    w += 2 * scale_bytes;
    for (uint32_t j = 0; j < group_size; j += MS_BLOCK, w += ms_block_bytes(bits)) {
      uint8_t q[MS_BLOCK];
      MS_NAME(block_row)(w + lane * 4, bits, q);
      for (uint32_t c = 0; c < MS_BLOCK; c += 16) {
        u8x16 bytes;
        __builtin_memcpy(&bytes, q + c, sizeof bytes);
        vstore(out + i + j + c, vfma(__builtin_convertvector(bytes, f32x16), scale, bias));
      }
    }
  }
}
