// What instructions other than the elementwise ones do to a row: buffers, strided copies, rotations, norms, reductions,
// the cache.

static void MS_NAME(load_row)(float *dst, const void *buffer, int64_t at, uint32_t n, uint32_t dtype) {
  const uint32_t whole = n & ~15u, rest = n & 15u;
  if (dtype == MS_FLOAT32) {
    const float *p = (const float *)buffer + at;
    for (uint32_t i = 0; i < whole; i += 16) vstore(dst + i, vload(p + i));
    if (rest) vstore(dst + whole, vload_n(p + whole, rest));
  } else if (dtype == MS_INT32) {
    const int32_t *p = (const int32_t *)buffer + at;
    for (uint32_t i = 0; i < n; ++i) dst[i] = (float)p[i];
  } else {
    const uint16_t *p = (const uint16_t *)buffer + at;
    for (uint32_t i = 0; i < n; i += 16) {
      const u16x16 h = i < whole ? vload_u16(p + i) : vload_u16_n(p + i, rest);
      vstore(dst + i, dtype == MS_FLOAT16 ? vfrom_f16(h) : vfrom_bf16(h));
    }
  }
}

static void MS_NAME(store_row)(const float *src, void *buffer, int64_t at, uint32_t n, uint32_t dtype) {
  const uint32_t whole = n & ~15u, rest = n & 15u;
  if (dtype == MS_FLOAT32) {
    float *p = (float *)buffer + at;
    for (uint32_t i = 0; i < whole; i += 16) vstore(p + i, vload(src + i));
    if (rest) vstore_n(p + whole, vload_n(src + whole, rest), rest);
  } else if (dtype == MS_INT32) {
    int32_t *p = (int32_t *)buffer + at;
    for (uint32_t i = 0; i < n; ++i) {  // saturating; NaN becomes 0
      p[i] = src[i] >= 0x1p31f ? INT32_MAX : src[i] >= -0x1p31f ? (int32_t)src[i] : src[i] == src[i] ? INT32_MIN : 0;
    }
  } else {
    uint16_t *p = (uint16_t *)buffer + at;
    for (uint32_t i = 0; i < n; i += 16) {
      const f32x16 v = i < whole ? vload(src + i) : vload_n(src + i, rest);
      const u16x16 h = dtype == MS_FLOAT16 ? vto_f16(v) : vto_bf16(v);
      if (i < whole) {
        vstore_u16(p + i, h);
      } else {
        vstore_u16_n(p + i, h, rest);
      }
    }
  }
}

MS_VEC float MS_NAME(combine)(uint32_t how, float old, float x) {
  switch (how) {
    case MS_SUM:
      return old + x;
    case MS_PROD:
      return old * x;
    case MS_MAX:
      return old > x || old != old ? old : x;
    case MS_MIN:
      return old < x || old != old ? old : x;
    default:
      return x;
  }
}

static void MS_NAME(strided_copy)(float *dst, const float *a, const MSInstr *in) {
  const uint32_t *d = in->dims;
  const int32_t *s = in->strides;
  const bool gather = in->op == MS_OP_GATHER;
  uint32_t at = 0;
  for (uint32_t i = 0; i < d[0]; ++i) {
    for (uint32_t j = 0; j < d[1]; ++j) {
      for (uint32_t k = 0; k < d[2]; ++k) {
        const int64_t base = in->offset + (int64_t)i * s[0] + (int64_t)j * s[1] + (int64_t)k * s[2];
        if (gather) {
          for (uint32_t l = 0; l < d[3]; ++l) dst[at + l] = a[base + (int64_t)l * s[3]];
        } else {
          for (uint32_t l = 0; l < d[3]; ++l) {
            float *to = dst + base + (int64_t)l * s[3];
            *to = MS_NAME(combine)(in->inner, *to, a[at + l]);
          }
        }
        at += d[3];
      }
    }
  }
}

// dst = cos, dst + n = sin of position * scale / freq. The angle is rounded to float32, as in the models' own code; its
// frequency is exact to a rounding, since an angle of 100,000 positions has its error 100,000-fold.
static void MS_NAME(rope_angles)(float *dst, const float *freqs, const MSInstr *in, int32_t position) {
  const float at = (float)position * in->imm1;
  const double step = freqs ? 0.0 : log((double)in->imm0) / in->n;
  for (uint32_t i = 0; i < in->n; ++i) {
    const float angle = at * (freqs ? 1.0f / freqs[i] : (float)exp(-(double)i * step));
    dst[i] = cosf(angle);
    dst[in->n + i] = sinf(angle);
  }
}

static void MS_NAME(rope)(float *dst, const float *a, const float *angles, const MSInstr *in) {
  const uint32_t half = in->dims[0], head_dim = in->inner;
  const float *cos = angles, *sin = angles + half;
  for (uint32_t h = 0; h < in->n; h += head_dim) {
    const float *x = a + h;
    float *y = dst + h;
    if (in->dims[1]) {  // neighbours
      for (uint32_t i = 0; i < half; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        y[2 * i] = even * cos[i] - odd * sin[i];
        y[2 * i + 1] = even * sin[i] + odd * cos[i];
      }
    } else {
      for (uint32_t i = 0; i < half; i += 16) {
        const uint32_t n = half - i < 16 ? half - i : 16;
        const f32x16 c = vload_n(cos + i, n), s = vload_n(sin + i, n);
        const f32x16 first = vload_n(x + i, n), second = vload_n(x + half + i, n);
        vstore_n(y + i, first * c - second * s, n);
        vstore_n(y + half + i, first * s + second * c, n);
      }
    }
    if (x != y) {
      for (uint32_t i = 2 * half; i < head_dim; ++i) y[i] = x[i];
    }
  }
}

// Sixteen lanes by four accumulators: the order of every sum over a span.
MS_VEC float MS_NAME(span_sum)(const float *x, uint32_t n) {
  f32x16 sum[4] = {vsplat(0), vsplat(0), vsplat(0), vsplat(0)};
  uint32_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (uint32_t j = 0; j < 4; ++j) sum[j] += vload(x + i + 16 * j);
  }
  for (; i < n; i += 16) sum[i / 16 % 4] += vload_n(x + i, n - i < 16 ? n - i : 16);
  return vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Sum of (x - mean)^2.
MS_VEC float MS_NAME(span_squares)(const float *x, float mean, uint32_t n) {
  f32x16 sum[4] = {vsplat(0), vsplat(0), vsplat(0), vsplat(0)};
  uint32_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (uint32_t j = 0; j < 4; ++j) {
      const f32x16 v = vload(x + i + 16 * j) - mean;
      sum[j] = vfma(v, v, sum[j]);
    }
  }
  for (; i < n; i += 16) {
    const uint32_t rest = n - i < 16 ? n - i : 16, j = i / 16 % 4;
    const f32x16 v = vfirst(vload_n(x + i, rest) - mean, rest, vsplat(0));
    sum[j] = vfma(v, v, sum[j]);
  }
  return vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The largest element; NaN when one is.
MS_VEC float MS_NAME(span_max)(const float *x, uint32_t n) {
  f32x16 most = vsplat(-__builtin_inff());
  for (uint32_t i = 0; i < n; i += 16) {
    const uint32_t rest = n - i < 16 ? n - i : 16;
    most = vmax_nan(most, vfirst(vload_n(x + i, rest), rest, most));
  }
  float result = most[0];
  for (uint32_t i = 1; i < 16; ++i) result = MS_NAME(combine)(MS_MAX, result, most[i]);
  return result;
}

static void MS_NAME(norm)(float *dst, const float *a, const float *weight, const float *bias, const MSInstr *in) {
  const uint32_t width = in->inner;
  for (uint32_t at = 0; at < in->n; at += width) {
    const float *x = a + at;
    const float mean = in->op == MS_OP_LAYER_NORM ? MS_NAME(span_sum)(x, width) / (float)width : 0.0f;
    const float scale = 1.0f / sqrtf(MS_NAME(span_squares)(x, mean, width) / (float)width + in->imm0);
    for (uint32_t i = 0; i < width; i += 16) {
      const uint32_t rest = width - i < 16 ? width - i : 16;
      f32x16 v = (vload_n(x + i, rest) - mean) * scale;
      if (weight) v *= vload_n(weight + i, rest);
      if (bias) v += vload_n(bias + i, rest);
      vstore_n(dst + at + i, v, rest);
    }
  }
}

static void MS_NAME(softmax)(float *dst, const float *a, uint32_t n, uint32_t width) {
  for (uint32_t at = 0; at < n; at += width) {
    const float most = MS_NAME(span_max)(a + at, width);
    for (uint32_t i = 0; i < width; i += 16) {
      const uint32_t rest = width - i < 16 ? width - i : 16;
      vstore_n(dst + at + i, vexp(vload_n(a + at + i, rest) - most), rest);
    }
    const float scale = 1.0f / MS_NAME(span_sum)(dst + at, width);
    for (uint32_t i = 0; i < width; i += 16) {
      const uint32_t rest = width - i < 16 ? width - i : 16;
      vstore_n(dst + at + i, vload_n(dst + at + i, rest) * scale, rest);
    }
  }
}

static void MS_NAME(reduce)(float *dst, const float *a, uint32_t n, uint32_t width, uint32_t how) {
  for (uint32_t i = 0; i < n; ++i, a += width) {
    if (how == MS_SUM) {
      dst[i] = MS_NAME(span_sum)(a, width);
    } else {
      float result = a[0];
      for (uint32_t j = 1; j < width; ++j) result = MS_NAME(combine)(how, result, a[j]);
      dst[i] = result;
    }
  }
}

// Keys of floats [heads, dim] into their plane, the place in the block as its fastest axis.
static void MS_NAME(write_float_keys)(const float *keys, void *plane, uint32_t dtype, uint32_t heads, uint32_t dim,
                                      uint32_t block_size, int64_t block, int64_t in_block) {
  for (uint32_t h = 0; h < heads; ++h, keys += dim) {
    const int64_t at = (block * heads + h) * dim * block_size + in_block;
    if (dtype == MS_FLOAT32) {
      float *to = (float *)plane + at;
      for (uint32_t i = 0; i < dim; ++i) to[(size_t)i * block_size] = keys[i];
    } else {
      uint16_t *to = (uint16_t *)plane + at, half[16];
      for (uint32_t i = 0; i < dim; i += 16) {
        const uint32_t rest = dim - i < 16 ? dim - i : 16;
        MS_NAME(store_row)(keys + i, half, 0, rest, dtype);
        for (uint32_t j = 0; j < rest; ++j) to[(size_t)(i + j) * block_size] = half[j];
      }
    }
  }
}

// One row into the cache.
static void MS_NAME(kv_write)(const float *keys, const float *values, const MSInstr *in, int32_t place, void *k_plane,
                              void *v_plane) {
  const uint32_t heads = in->dims[0], key_dim = in->dims[1], value_dim = in->dims[2], block_size = in->dims[3];
  const uint32_t k_codec = in->dtype, v_codec = in->inner;
  if (place < 0) return;
  const int64_t block = (uint32_t)place / block_size, in_block = (uint32_t)place % block_size;
  MS_NAME(kv_codec) codec;
  if (ms_kv_is_float(k_codec)) {
    MS_NAME(write_float_keys)(keys, k_plane, k_codec, heads, key_dim, block_size, block, in_block);
  } else {
    MS_NAME(kv_codec_of)(&codec, k_codec, key_dim, in->imm & 3, MS_KV_K_SEED);
    MS_NAME(kv_write_codes)(keys, k_plane, &codec, heads, block_size, block, in_block, in->offset, true);
  }
  if (ms_kv_is_float(v_codec)) {
    for (uint32_t h = 0; h < heads; ++h) {
      const int64_t at = ((block * heads + h) * block_size + in_block) * value_dim;
      MS_NAME(store_row)(values + (size_t)h * value_dim, v_plane, at, value_dim, v_codec);
    }
  } else {
    MS_NAME(kv_codec_of)(&codec, v_codec, value_dim, in->imm >> 2, MS_KV_V_SEED);
    MS_NAME(kv_write_codes)(values, v_plane, &codec, heads, block_size, block, in_block, in->row_stride, false);
  }
}
