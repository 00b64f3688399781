// Vectors into the codes of the KV cache (ms_kv_codec), one at a time: what is stored depends on nothing but the
// vector. Reference, with the same roundings: kernels/turboquant.py.

typedef uint8_t MS_NAME(u8x16) __attribute__((ext_vector_type(16)));

// What all vectors of a plane share.
typedef struct {
  uint32_t codec, dim, scale;           // ms_kv_codec, elements, ms_kv_scale
  float centroids[16], boundaries[16];  // of a turbo codec, ascending; boundaries beyond the last are infinite
  uint32_t signs[MS_KV_SIGN_WORDS];
} MS_NAME(kv_codec);

// A vector's code: `words` has room for the eight bytes that are stored at once.
typedef struct {
  uint32_t words[MS_KV_MAX_WORDS + 2];
  float scale;                                               // turbo
  uint16_t step[MS_KV_MAX_GROUPS], least[MS_KV_MAX_GROUPS];  // affine8
} MS_NAME(kv_code);

static void MS_NAME(kv_codec_of)(MS_NAME(kv_codec) * c, uint32_t codec, uint32_t dim, uint32_t scale, uint32_t seed) {
  c->codec = codec, c->dim = dim, c->scale = scale;
  if (!ms_kv_is_turbo(codec)) return;
  const uint32_t bits = ms_kv_bits(codec);
  const double root = sqrt((double)dim);
  for (uint32_t i = 0; i < 16; ++i) c->centroids[i] = (float)(ms_turbo_centroids[bits - 2][i] / root);
  for (uint32_t i = 0; i < 15; ++i) c->boundaries[i] = (float)(ms_turbo_boundaries[bits - 2][i] / root);
  for (uint32_t i = (1u << bits) - 1; i < 16; ++i) c->boundaries[i] = __builtin_inff();
  ms_turbo_signs(dim, seed, c->signs);
}

// ---- turbo ----------------------------------------------------------------------------------------------------------
// Indices of y's elements, the boundaries below them, and their centroids.
MS_VEC i32x16 MS_NAME(kv_index)(f32x16 y, const MS_NAME(kv_codec) * c, const uint32_t bits, f32x16 *centroid) {
#if defined(MS_ISA_IS_AVX512)
  const __m512 boundaries = _mm512_loadu_ps(c->boundaries);
  __m512i index = _mm512_setzero_si512();
#pragma clang loop unroll(full)
  for (uint32_t step = 1u << (bits - 1); step > 0; step /= 2) {
    const __m512i above = _mm512_add_epi32(index, _mm512_set1_epi32((int)step));
    const __m512 boundary = _mm512_permutexvar_ps(_mm512_sub_epi32(above, _mm512_set1_epi32(1)), boundaries);
    index = _mm512_mask_mov_epi32(index, _mm512_cmp_ps_mask((__m512)y, boundary, _CMP_GT_OQ), above);
  }
  *centroid = (f32x16)_mm512_permutexvar_ps(index, _mm512_loadu_ps(c->centroids));
  return (i32x16)index;
#else
  i32x16 index = 0;
  f32x16 q = vsplat(c->centroids[0]);
  for (uint32_t k = 0; k + 1 < 1u << bits; ++k) {
    const i32x16 above = y > vsplat(c->boundaries[k]);
    index -= above;
    q = above ? vsplat(c->centroids[k + 1]) : q;
  }
  *centroid = q;
  return index;
#endif
}

// Packs, eight elements at a time, and leaves the squared norm of the centroids or their product with y.
MS_VEC float MS_NAME(kv_quantise)(const float *z, float factor, const MS_NAME(kv_codec) * c, const uint32_t bits,
                                  uint32_t *words) {
  const bool unbiased = c->scale == MS_KV_SCALE_UNBIASED;
  uint8_t *to = (uint8_t *)words;
  f32x16 sum = vsplat(0);
  for (uint32_t i = 0; i < c->dim; i += 16) {
    const f32x16 y = vload(z + i) * factor;
    f32x16 q;
    const MS_NAME(u8x16) index = __builtin_convertvector(MS_NAME(kv_index)(y, c, bits, &q), MS_NAME(u8x16));
    sum = vfma(q, unbiased ? y : q, sum);
    uint64_t eights[2];
    memcpy(eights, &index, sizeof eights);
    for (uint32_t k = 0; k < 2; ++k) {  // b bits of each byte together: of pairs, of fours, of all eight
      uint64_t e = eights[k];
      e = (e | e >> (8 - bits)) & (0x0001000100010001u * ((1u << 2 * bits) - 1));
      e = (e | e >> (16 - 2 * bits)) & (0x0000000100000001u * ((1u << 4 * bits) - 1));
      e = (e | e >> (32 - 4 * bits)) & ((1ull << 8 * bits) - 1);
      memcpy(to, &e, sizeof e);  // the next ones overwrite what is past `bits` bytes
      to += bits;
    }
  }
  return vsum(sum);
}

static void MS_NAME(kv_encode_turbo)(const float *x, const MS_NAME(kv_codec) * c, MS_NAME(kv_code) * code) {
  float z[MS_KV_MAX_DIM];
  f32x16 squares[2] = {vsplat(0), vsplat(0)};
  for (uint32_t i = 0; i < c->dim; i += 16) {
    const f32x16 v = vload(x + i);
    squares[i / 16 % 2] = vfma(v, v, squares[i / 16 % 2]);
    vstore(z + i, v);
  }
  const float square = vsum(squares[0] + squares[1]);
  if (!(square >= MS_TURBO_LEAST_SQUARE && square < __builtin_inff())) {
    memset(code->words, 0, 4 * ms_kv_words(c->codec, c->dim));
    code->scale = square < MS_TURBO_LEAST_SQUARE ? 0.0f : __builtin_nanf("");
    return;
  }
  const float norm = sqrtf(square), factor = 1.0f / (norm * (float)sqrt((double)c->dim));
  MS_NAME(hadamard)(z, c->dim, c->signs);
  float sum;
  switch (ms_kv_bits(c->codec)) {
    case 2:
      sum = MS_NAME(kv_quantise)(z, factor, c, 2, code->words);
      break;
    case 3:
      sum = MS_NAME(kv_quantise)(z, factor, c, 3, code->words);
      break;
    default:
      sum = MS_NAME(kv_quantise)(z, factor, c, 4, code->words);
  }
  code->scale = c->scale == MS_KV_SCALE_RAW ? norm : c->scale == MS_KV_SCALE_UNBIASED ? norm / sum : norm / sqrtf(sum);
}

// ---- affine8 --------------------------------------------------------------------------------------------------------
// float16 that is the nearest not above, or not below, v; v that overflows becomes infinite.
MS_VEC u16x16 MS_NAME(kv_f16_down)(f32x16 v) {
  const u16x16 half = vto_f16(v);
  const i32x16 bits = __builtin_convertvector(half, i32x16);
  const i32x16 below = (bits & 0x7fff) == 0 ? (i32x16)(0x8001) : bits < 0x8000 ? bits - 1 : bits + 1;
  return __builtin_convertvector(vfrom_f16(half) > v ? below : bits, u16x16);
}
MS_VEC u16x16 MS_NAME(kv_f16_up)(f32x16 v) { return MS_NAME(kv_f16_down)(-v) ^ (uint16_t)0x8000; }

static void MS_NAME(kv_encode_affine)(const float *x, const MS_NAME(kv_codec) * c, MS_NAME(kv_code) * code) {
  const uint32_t size = ms_kv_affine_group(c->dim), groups = c->dim / size;
  float least[MS_KV_MAX_GROUPS] = {0}, most[MS_KV_MAX_GROUPS] = {0}, step[MS_KV_MAX_GROUPS];
  i32x16 bad = 0;
  for (uint32_t g = 0; g < groups; ++g) {
    f32x16 low = vload(x + g * size), high = low;
    for (uint32_t i = 0; i < size; i += 16) {
      const f32x16 v = vload(x + g * size + i);
      low = vmin(v, low), high = vmax(v, high);
      bad |= v - v != 0.0f;  // neither infinite nor NaN
    }
    least[g] = -vmaxall(-low), most[g] = vmaxall(high);
  }
  for (uint32_t g = 0; g < groups; g += 16) {
    // Rounded away from the elements, so that they lie between least and least + 255 steps; + 0 makes 0 of -0.
    const u16x16 low = MS_NAME(kv_f16_down)(vload(least + g) + 0.0f);
    const f32x16 base = vfrom_f16(low);
    const u16x16 high = MS_NAME(kv_f16_up)((vload(most + g) - base) / 255.0f + 0.0f);
    const f32x16 width = vfrom_f16(high);
    bad |= (vabs(base) == __builtin_inff()) | (width == __builtin_inff());
    vstore_u16(code->least + g, low), vstore_u16(code->step + g, high);
    vstore(least + g, base), vstore(step + g, width);
  }
  int32_t any = 0;
  for (uint32_t i = 0; i < 16; ++i) any |= bad[i];
  if (any) {
    memset(code->words, 0, c->dim);
    for (uint32_t g = 0; g < groups; ++g) code->step[g] = code->least[g] = 0x7e00;
    return;
  }
  uint8_t *to = (uint8_t *)code->words;
  for (uint32_t i = 0; i < c->dim; i += 16) {
    const uint32_t g = i / size;
    f32x16 at = vsplat(0);
    if (step[g] > 0)
      at = vmin(vround((vload(x + i) - least[g]) / step[g]), vsplat(255));  // not below 0: least is not above x
    const MS_NAME(u8x16) index = __builtin_convertvector(__builtin_convertvector(at, i32x16), MS_NAME(u8x16));
    memcpy(to + i, &index, sizeof index);
  }
}

// ---- a plane --------------------------------------------------------------------------------------------------------
// One position's vectors x [heads, dim] into a plane of codes, their scales from its word `scales` on. across: words
// have the position as the fastest axis.
static void MS_NAME(kv_write_codes)(const float *x, uint32_t *plane, const MS_NAME(kv_codec) * c, uint32_t heads,
                                    uint32_t block_size, int64_t block, int64_t in_block, uint32_t scales,
                                    bool across) {
  const uint32_t words = ms_kv_words(c->codec, c->dim), groups = ms_kv_groups(c->codec, c->dim);
  MS_NAME(kv_code) code;
  for (uint32_t h = 0; h < heads; ++h, x += c->dim) {
    const int64_t head = block * heads + h;
    if (ms_kv_is_turbo(c->codec)) {
      const int64_t at = head * block_size + in_block;
      MS_NAME(kv_encode_turbo)(x, c, &code);
      if (ms_kv_wide(c->codec)) {
        ((float *)plane + scales)[at] = code.scale;
      } else {
        const float most = 65504.0f;  // float16's; NaN stays
        const u16x16 half = vto_f16(vsplat(code.scale > most ? most : code.scale));
        ((uint16_t *)(plane + scales))[at] = half[0];
      }
    } else {
      uint16_t *to = (uint16_t *)(plane + scales) + head * groups * 2 * block_size + in_block;
      MS_NAME(kv_encode_affine)(x, c, &code);
      for (uint32_t g = 0; g < groups; ++g, to += 2 * (size_t)block_size) {
        to[0] = code.step[g];
        to[block_size] = code.least[g];
      }
    }
    uint32_t *to = plane + head * words * block_size + in_block * (across ? 1 : words);
    if (across) {
      for (uint32_t i = 0; i < words; ++i) to[(size_t)i * block_size] = code.words[i];
    } else {
      memcpy(to, code.words, 4 * words);
    }
  }
}
