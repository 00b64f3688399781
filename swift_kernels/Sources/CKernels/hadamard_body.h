// Rotations of the turbo codecs: signs, then a Hadamard matrix, in place. Reference: turboquant.rotate.
//
// A vector has m * 2^k elements (ms_hadamard_base), a multiple of 16, and the matrix is kron(H_m, H_2^k): first the
// stages of 2^k, h = 1, 2, 4 and so on, (a, b) -> (a + b, a - b) for elements h apart, then H_m over blocks of 2^k.

// x with the sign of each lane changed whose bit is set in the low 16 of `bits`.
MS_VEC f32x16 MS_NAME(flip)(f32x16 x, uint32_t bits) {
  const i32x16 lane = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                       1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const i32x16 set = ((i32x16)(int32_t)bits & lane) != 0;
  return vfloat(vbits(x) ^ (set & (int32_t)0x80000000));
}
// The 16 signs of vector i.
MS_VEC uint32_t MS_NAME(sign_bits)(const uint32_t *signs, uint32_t i) {
  return i % 2 ? signs[i / 2] >> 16 : signs[i / 2];
}

// Stages h = 1, 2, 4 and 8 lie inside a vector: the neighbour plus, or minus in the upper lane, the element itself.
// A product with 1 or -1 is exact, fused or not.
MS_VEC f32x16 MS_NAME(stage1)(f32x16 v) {
  const f32x16 sign = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  return v * sign + __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
MS_VEC f32x16 MS_NAME(stage2)(f32x16 v) {
  const f32x16 sign = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  return v * sign + __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
}
MS_VEC f32x16 MS_NAME(stage4)(f32x16 v) {
  const f32x16 sign = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  return v * sign + __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
}
MS_VEC f32x16 MS_NAME(stage8)(f32x16 v) {
  const f32x16 sign = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  return v * sign + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}

// Signs, the Hadamard matrix of 16 * n elements (n a power of two, a constant where this is inlined), a factor, signs.
MS_VEC void MS_NAME(turn_vectors)(float *x, const uint32_t n, const uint32_t *before, float scale,
                                  const uint32_t *after) {
  f32x16 v[16];
#pragma clang loop unroll(full)
  for (uint32_t i = 0; i < n; ++i) {
    v[i] = MS_NAME(flip)(vload(x + 16 * i), MS_NAME(sign_bits)(before, i));
    v[i] = MS_NAME(stage8)(MS_NAME(stage4)(MS_NAME(stage2)(MS_NAME(stage1)(v[i]))));
  }
#pragma clang loop unroll(full)
  for (uint32_t h = 1; h < 16; h *= 2) {
#pragma clang loop unroll(full)
    for (uint32_t i = 0; i < n; ++i) {
      if (h >= n || i & h) continue;
      const f32x16 a = v[i], b = v[i + h];
      v[i] = a + b, v[i + h] = a - b;
    }
  }
#pragma clang loop unroll(full)
  for (uint32_t i = 0; i < n; ++i) {
    vstore(x + 16 * i, MS_NAME(flip)(v[i] * scale, MS_NAME(sign_bits)(after, i)));
  }
}

// H_m, or its transpose, over m blocks of `size` elements: `lanes` at a time.
#define MS_HADAMARD_BASE(name, lanes)                                                                             \
  static void MS_NAME(name)(float *x, uint32_t m, uint32_t size, const float *h, uint32_t row, uint32_t column) { \
    typedef float vec __attribute__((ext_vector_type(lanes)));                                                    \
    for (uint32_t at = 0; at < size; at += lanes) {                                                               \
      vec in[28];                                                                                                 \
      for (uint32_t i = 0; i < m; ++i) memcpy(&in[i], x + (size_t)i * size + at, sizeof(vec));                    \
      for (uint32_t i = 0; i < m; i += 4) {                                                                       \
        vec out[4] = {(vec)(0.0f), (vec)(0.0f), (vec)(0.0f), (vec)(0.0f)};                                        \
        for (uint32_t j = 0; j < m; ++j) {                                                                        \
          for (uint32_t k = 0; k < 4; ++k) out[k] += (vec)(h[(i + k) * row + j * column]) * in[j];                \
        }                                                                                                         \
        for (uint32_t k = 0; k < 4; ++k) memcpy(x + (size_t)(i + k) * size + at, &out[k], sizeof(vec));           \
      }                                                                                                           \
    }                                                                                                             \
  }
MS_HADAMARD_BASE(base4, 4)
MS_HADAMARD_BASE(base8, 8)
MS_HADAMARD_BASE(base16, 16)
#undef MS_HADAMARD_BASE

// Any vector, through memory. back: the transpose.
static void MS_NAME(turn_memory)(float *x, uint32_t dim, const uint32_t *before, float scale, const uint32_t *after,
                                 bool back) {
  const uint32_t m = ms_hadamard_base(dim), size = dim / m;
  for (uint32_t i = 0; i < dim; i += 16) {
    f32x16 v = MS_NAME(flip)(vload(x + i), MS_NAME(sign_bits)(before, i / 16));
    v = MS_NAME(stage2)(MS_NAME(stage1)(v));
    if (size > 4) v = MS_NAME(stage4)(v);
    if (size > 8) v = MS_NAME(stage8)(v);
    vstore(x + i, v);
  }
  for (uint32_t h = 16; h < size; h *= 2) {
    for (uint32_t i = 0; i < dim; i += 16) {
      if (i & h) continue;  // size is a multiple of 2 h, and so is every block's first element
      const f32x16 a = vload(x + i), b = vload(x + i + h);
      vstore(x + i, a + b), vstore(x + i + h, a - b);
    }
  }
  if (m > 1) {
    const uint32_t *rows = ms_hadamard_rows(m);
    float h[28 * 32];
    for (uint32_t i = 0; i < m; ++i) {
      vstore(h + 32 * i, MS_NAME(flip)(vsplat(1), rows[i]));
      vstore(h + 32 * i + 16, MS_NAME(flip)(vsplat(1), rows[i] >> 16));
    }
    const uint32_t row = back ? 1 : 32, column = back ? 32 : 1;
    if (size >= 16) {
      MS_NAME(base16)(x, m, size, h, row, column);
    } else if (size == 8) {
      MS_NAME(base8)(x, m, size, h, row, column);
    } else {
      MS_NAME(base4)(x, m, size, h, row, column);
    }
  }
  for (uint32_t i = 0; i < dim; i += 16) {
    vstore(x + i, MS_NAME(flip)(vload(x + i) * scale, MS_NAME(sign_bits)(after, i / 16)));
  }
}

static void MS_NAME(turn)(float *x, uint32_t dim, const uint32_t *before, float scale, const uint32_t *after,
                          bool back) {
  switch (dim) {
    case 64:
      MS_NAME(turn_vectors)(x, 4, before, scale, after);
      break;
    case 128:
      MS_NAME(turn_vectors)(x, 8, before, scale, after);
      break;
    case 256:
      MS_NAME(turn_vectors)(x, 16, before, scale, after);
      break;
    default:
      MS_NAME(turn_memory)(x, dim, before, scale, after, back);
  }
}

static const uint32_t MS_NAME(no_signs)[MS_KV_SIGN_WORDS] = {0};
// x <- R x, R = H S / sqrt(dim). signs: ms_turbo_signs.
MS_VEC void MS_NAME(rotate)(float *x, uint32_t dim, const uint32_t *signs) {
  MS_NAME(turn)(x, dim, signs, (float)(1.0 / sqrt((double)dim)), MS_NAME(no_signs), false);
}
// x <- R^T x.
MS_VEC void MS_NAME(rotate_back)(float *x, uint32_t dim, const uint32_t *signs) {
  MS_NAME(turn)(x, dim, MS_NAME(no_signs), (float)(1.0 / sqrt((double)dim)), signs, true);
}
// x <- H S x: not divided by sqrt(dim).
MS_VEC void MS_NAME(hadamard)(float *x, uint32_t dim, const uint32_t *signs) {
  MS_NAME(turn)(x, dim, signs, 1.0f, MS_NAME(no_signs), false);
}
