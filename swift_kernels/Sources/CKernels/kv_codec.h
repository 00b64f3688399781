// Codecs of the KV cache (ms_kv_codec in params.h): their layouts, and the tables that the turbo ones share.
// Reference: kernels/turboquant.py. Source: TurboQuant, arXiv 2504.19874, section 3.1.
#ifndef METALSTEP_KV_CODEC_H
#define METALSTEP_KV_CODEC_H
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include "params.h"

enum {
  MS_KV_MIN_DIM = 16,  // elements of a vector of codes, a multiple of 16
  MS_KV_MAX_DIM = 512,
  MS_KV_SIGN_WORDS = MS_KV_MAX_DIM / 32,
  MS_KV_MAX_WORDS = MS_KV_MAX_DIM / 4,  // of a vector's codes: affine8
  MS_KV_MAX_GROUPS = MS_KV_MAX_DIM / 16,
};
enum { MS_KV_K_SEED = 42, MS_KV_V_SEED = 43 };  // of the rotations' signs

// Without the bit for wide scales.
static inline uint32_t ms_kv_base(uint32_t codec) { return codec & ~(uint32_t)MS_KV_WIDE_SCALES; }
static inline bool ms_kv_is_float(uint32_t codec) { return codec <= MS_KV_BFLOAT16; }
static inline bool ms_kv_is_turbo(uint32_t codec) {
  return ms_kv_base(codec) >= MS_KV_TURBO2 && ms_kv_base(codec) <= MS_KV_TURBO4;
}
static inline bool ms_kv_known(uint32_t codec) {
  return ms_kv_is_float(codec) || ms_kv_is_turbo(codec) || codec == MS_KV_AFFINE8;
}
static inline bool ms_kv_wide(uint32_t codec) { return (codec & MS_KV_WIDE_SCALES) != 0; }
// Of a stored element.
static inline uint32_t ms_kv_bits(uint32_t codec) {
  return codec == MS_KV_FLOAT32 ? 32 : ms_kv_is_float(codec) ? 16 : ms_kv_base(codec) & 15;
}
// uint32 words of a vector's codes.
static inline uint32_t ms_kv_words(uint32_t codec, uint32_t dim) { return (dim * ms_kv_bits(codec) + 31) / 32; }
// Elements that share an affine8 scale.
static inline uint32_t ms_kv_affine_group(uint32_t dim) { return dim % 64 == 0 ? 64 : dim % 32 == 0 ? 32 : 16; }
// Groups of a vector's elements that have a scale of their own.
static inline uint32_t ms_kv_groups(uint32_t codec, uint32_t dim) {
  return ms_kv_is_float(codec) ? 0 : ms_kv_is_turbo(codec) ? 1 : dim / ms_kv_affine_group(dim);
}
// m of dim = m * 2^k for which there is a Hadamard matrix; 0: none.
static inline uint32_t ms_hadamard_base(uint32_t dim) {
  static const uint32_t bases[4] = {1, 12, 20, 28};
  for (int i = 0; i < 4; ++i) {
    const uint32_t size = dim / bases[i];
    if (size > 0 && size * bases[i] == dim && (size & (size - 1)) == 0) return bases[i];
  }
  return 0;
}
static inline bool ms_kv_dim_ok(uint32_t codec, uint32_t dim) {
  if (ms_kv_is_float(codec)) return dim > 0;
  if (dim % 16 != 0 || dim < MS_KV_MIN_DIM || dim > MS_KV_MAX_DIM) return false;
  return !ms_kv_is_turbo(codec) || ms_hadamard_base(dim) != 0;
}

// ---- codebooks ------------------------------------------------------------------------------------------------------
// Lloyd-Max for N(0, 1), of 2, 3 and 4 bits: ascending, boundaries half-way between centroids.
static const double ms_turbo_centroids[3][16] = {
    {-1.5104176085, -0.4527800346, 0.4527800346, 1.5104176085},
    {-2.1519457045, -1.3439092785, -0.7560052812, -0.2450941789, 0.2450941789, 0.7560052812, 1.3439092785,
     2.1519457045},
    {-2.7325895710, -2.0690172265, -1.6180463860, -1.2562311973, -0.9423404565, -0.6567591185, -0.3880482995,
     -0.1283950299, 0.1283950299, 0.3880482995, 0.6567591185, 0.9423404565, 1.2562311973, 1.6180463860, 2.0690172265,
     2.7325895710},
};
static const double ms_turbo_boundaries[3][15] = {
    {-0.9815988216, 0.0, 0.9815988216},
    {-1.7479274915, -1.0499572799, -0.5005497301, 0.0, 0.5005497301, 1.0499572799, 1.7479274915},
    {-2.4008033988, -1.8435318063, -1.4371387917, -1.0992858269, -0.7995497875, -0.5224037090, -0.2582216647, 0.0,
     0.2582216647, 0.5224037090, 0.7995497875, 1.0992858269, 1.4371387917, 1.8435318063, 2.4008033988},
};

// A vector whose squared norm is less counts as zero: below, squares are subnormal, and a device may take them for 0.
#define MS_TURBO_LEAST_SQUARE 0x1p-100f

// The codebook of unit vectors of `dim` elements: 2^bits centroids and one boundary fewer. The rest is not written.
static inline void ms_turbo_book(uint32_t bits, uint32_t dim, float *centroids, float *boundaries) {
  const double root = sqrt((double)dim);
  for (uint32_t i = 0; i < 1u << bits; ++i) centroids[i] = (float)(ms_turbo_centroids[bits - 2][i] / root);
  for (uint32_t i = 0; i + 1 < 1u << bits; ++i) boundaries[i] = (float)(ms_turbo_boundaries[bits - 2][i] / root);
}

// ---- rotations ------------------------------------------------------------------------------------------------------
// The signs before the Hadamard matrix: bit i % 32 of word i / 32 is set where element i changes its sign. SplitMix64.
static inline void ms_turbo_signs(uint32_t dim, uint32_t seed, uint32_t words[MS_KV_SIGN_WORDS]) {
  uint64_t state = seed * 0x100000001u + (uint64_t)dim;
  for (uint32_t i = 0; i < dim; i += 64) {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    words[i / 32] = (uint32_t)z;
    if (i + 32 < dim) words[i / 32 + 1] = (uint32_t)(z >> 32);
  }
}

// Rows of the Hadamard matrices of 12, 20 and 28 (Paley's, in MLX's order): bit j is set where column j is -1. The
// first is symmetric, the others are not.
static const uint32_t ms_hadamard_12[12] = {0x002, 0xaab, 0x3c8, 0x96e, 0xf20, 0x5ba,
                                            0xc8c, 0x6e6, 0x23c, 0xb96, 0x8f0, 0xe5a};
static const uint32_t ms_hadamard_20[20] = {0x933de, 0x2e3bd, 0x5477b, 0xa0ef7, 0x499ef, 0x637c1, 0xc6ba2,
                                            0x8d764, 0x1aee8, 0x359f0, 0x0fa53, 0x174a7, 0x26d4e, 0x45e9c,
                                            0x83d39, 0xf7a6d, 0xef4fa, 0xdedd5, 0xbdf8b, 0x7bf36};
static const uint32_t ms_hadamard_28[28] = {
    0xcd69e7e, 0x9ad7c7d, 0x37ab8fb, 0x6d571f7, 0xd8ae3ef, 0xb3587df, 0x66b4f3f, 0xb467f43, 0x6acbe87, 0xd593d8e,
    0xab27b9c, 0x564f7b8, 0xac9aff0, 0x5b31fe1, 0x87fb325, 0x0ff66ca, 0x1decd95, 0x39ddb2a, 0x71bf654, 0xe17eca9,
    0xc2fd9d2, 0xfcf1299, 0xfbe2532, 0xf7c4ae4, 0xef8d549, 0xdf1ea13, 0xbe3d4a6, 0x7e7a94c};
static inline const uint32_t *ms_hadamard_rows(uint32_t base) {
  return base == 12 ? ms_hadamard_12 : base == 20 ? ms_hadamard_20 : ms_hadamard_28;
}

#endif
