// attention: planes of codes (kv_codec.h), and what a launch needs to read them, made once for each thread.
//
// Nothing is unpacked to memory: a vector of codes becomes bytes or floats in registers, beside the products.
#include "kv_codec.h"

// A plane whose vectors are codes.
typedef struct {
  const uint8_t *codes, *scales;
  uint32_t codec;          // without the bit for wide scales
  uint32_t words, groups;  // of a vector
  uint32_t group;          // elements
  bool wide;               // scales are float32
  uint32_t signs[MS_KV_SIGN_WORDS];
} MS_NAME(packed_plane);

typedef struct {
  MS_NAME(packed_plane) k, v;  // of planes of floats: nothing
  // A centroid of the keys is (byte - 128 + half) * unit. AVX-512 looks up 6 bits: the codebook is repeated.
  uint8_t bytes[64];
  float half, unit;
  float centroids[16];  // of the values; repeated
} MS_NAME(attention_packed);

static void MS_NAME(pack_plane)(MS_NAME(packed_plane) * plane, const void *memory, uint32_t codec, uint32_t scales,
                                uint32_t dim, uint32_t seed) {
  if (ms_kv_is_float(codec)) return;
  plane->codes = memory, plane->scales = plane->codes + (size_t)scales * 4;
  plane->codec = ms_kv_base(codec), plane->wide = ms_kv_wide(codec);
  plane->words = ms_kv_words(codec, dim), plane->groups = ms_kv_groups(codec, dim);
  plane->group = ms_kv_affine_group(dim);
  if (ms_kv_is_turbo(codec)) ms_turbo_signs(dim, seed, plane->signs);
}

// Integers for the centroids of keys, by bits: the factor is what makes their error under N(0, 1) least. It adds
// 4.8e-8, 5.9e-7 and 1.0e-5 to the codebooks' own 0.117, 0.0345 and 0.0095. Of 2 and 3 bits they are odd halves.
static const float MS_NAME(key_integers)[3][8] = {
    {35.5f, 118.5f}, {12.5f, 38.5f, 68.5f, 109.5f}, {5, 15, 25, 36, 48, 62, 79, 104}};
static const double MS_NAME(key_factors)[3] = {78.447, 50.929, 38.214};

static void MS_NAME(pack_books)(MS_NAME(attention_packed) * c, const MSAttentionParams *p) {
  if (ms_kv_is_turbo(p->k_codec)) {
    const uint32_t bits = ms_kv_bits(p->k_codec), n = 1u << bits;
    c->half = bits == 4 ? 0.0f : 0.5f;
    c->unit = (float)(1.0 / (MS_NAME(key_factors)[bits - 2] * sqrt((double)p->head_dim)));
    for (uint32_t i = 0; i < 64; ++i) {
      const uint32_t code = i % n;
      const float *half = MS_NAME(key_integers)[bits - 2];
      const float x = code < n / 2 ? -half[n / 2 - 1 - code] : half[code - n / 2];
      c->bytes[i] = (uint8_t)(x + 128.0f - c->half);
    }
  }
  if (ms_kv_is_turbo(p->v_codec)) {
    const uint32_t bits = ms_kv_bits(p->v_codec);
    float boundaries[15];
    ms_turbo_book(bits, p->value_dim, c->centroids, boundaries);
    for (uint32_t i = 1u << bits; i < 16; ++i) c->centroids[i] = c->centroids[i - (1u << bits)];
  }
}

static void MS_NAME(pack_attention)(MS_NAME(attention_packed) * c, const MSAttentionParams *p, const void *keys,
                                    const void *values) {
  MS_NAME(pack_plane)(&c->k, keys, p->k_codec, p->k_scales, p->head_dim, MS_KV_K_SEED);
  MS_NAME(pack_plane)(&c->v, values, p->v_codec, p->v_scales, p->value_dim, MS_KV_V_SEED);
  MS_NAME(pack_books)(c, p);
}

// 16 scales from the `at`-th on.
MS_VEC f32x16 MS_NAME(load_turbo_scales)(const MS_NAME(packed_plane) * plane, size_t at) {
  return plane->wide ? vload((const float *)(const void *)plane->scales + at)
                     : vload_f16((const uint16_t *)(const void *)plane->scales + at);
}
MS_VEC f32x16 MS_NAME(load_affine_scales)(const MS_NAME(packed_plane) * plane, size_t at) {
  return vload_f16((const uint16_t *)(const void *)plane->scales + at);
}
