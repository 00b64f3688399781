// Tiles: MT rows of activations times the 16 rows of a panel, for every width of weights.
//
// One reduction order: a row's sum over a group is an exact integer, and groups are added in float32 from the first to
// the last. So a row's result depends neither on the tile that computes it nor on its neighbours.
#include "linear_activation.h"
#include "linear_dot_body.h"

#define MS_UNROLL _Pragma("clang loop unroll(full)")
// Bytes ahead of the weight being read: into the next page, where the hardware's own prefetch stops.
enum { MS_PREFETCH = 4096 };

typedef struct {
  const uint8_t *panels;  // the first panel
  size_t stride;          // bytes of a panel
  uint32_t count;         // panels
  uint32_t groups;        // along k; dense: k
  uint32_t blocks;        // in a group
  uint32_t dtype;         // ms_dtype of scales and biases, or of dense elements
  const uint8_t *x;       // a stream of MT rows
  size_t x_stride;        // bytes
  float *out;             // [MT, count * 16]
  size_t out_stride;      // elements
} MS_NAME(linear_tile);

// bits, planes, mt and vectors are constants at every call; vectors: registers of lanes at a time.
MS_VEC void tile_panel(const MS_NAME(linear_tile) * t, const uint8_t *panel, float *out, uint32_t bits, int planes,
                       int mt, int vectors) {
  const size_t scale_bytes = ms_scale_bytes(t->dtype), scale_step = ms_dtype_bytes(t->dtype);
  for (int lane = 0; lane < MS_PANEL_ROWS; lane += vectors * MS_LANES) {
    ms_floats sum[MS_TILE_VECTORS];
    MS_UNROLL for (int i = 0; i < mt * vectors; ++i) sum[i] = 0;
    const uint8_t *w = panel, *x = t->x;
    for (uint32_t g = 0; g < t->groups; ++g) {
      const uint8_t *header = w, *x_header = x;
      ms_sums s[MS_TILE_VECTORS];
      MS_UNROLL for (int i = 0; i < mt * vectors; ++i) s[i] = (ms_sums){0, 0};
      if (lane == 0) __builtin_prefetch(w + MS_PREFETCH, 0, 3);
      w += 2 * scale_bytes;
      x += sizeof(MSActivationGroup);
      for (uint32_t b = 0; b < t->blocks; ++b) {
        if (lane == 0) {
          MS_UNROLL for (uint32_t i = 0; i < bits; ++i) __builtin_prefetch(w + MS_PREFETCH + i * 64, 0, 3);
        }
        MS_UNROLL for (int quad = 0; quad < 8; ++quad) {
          ms_words q[4];
          MS_UNROLL for (int v = 0; v < vectors; ++v) {
            q[v] = words_of_quad(w + (size_t)(lane + v * MS_LANES) * 4, bits, quad);
          }
          MS_UNROLL for (int m = 0; m < mt; ++m) {
            const uint8_t *at = x + (size_t)m * t->x_stride + quad * MS_QUAD_BYTES;
            MS_UNROLL for (int v = 0; v < vectors; ++v) dot(&s[m * vectors + v], q[v], at, planes, bits);
          }
        }
        w += ms_block_bytes(bits);
        x += 8 * MS_QUAD_BYTES;
      }
      MS_UNROLL for (int v = 0; v < vectors; ++v) {
        const uint8_t *at = header + (size_t)(lane + v * MS_LANES) * scale_step;
        const ms_floats scales = load_scales(at, t->dtype), biases = load_scales(at + scale_bytes, t->dtype);
        MS_UNROLL for (int m = 0; m < mt; ++m) {
          const MSActivationGroup *a = (const MSActivationGroup *)(const void *)(x_header + (size_t)m * t->x_stride);
          const ms_ints whole = sum_of(s[m * vectors + v], planes, bits, a->total);
          const ms_floats f = __builtin_convertvector(whole, ms_floats) * a->scale;
          sum[m * vectors + v] = multiply_add(biases, a->sum, multiply_add(f, scales, sum[m * vectors + v]));
        }
      }
    }
    MS_UNROLL for (int m = 0; m < mt; ++m) {
      MS_UNROLL for (int v = 0; v < vectors; ++v) {
        __builtin_memcpy(out + (size_t)m * t->out_stride + lane + v * MS_LANES, &sum[m * vectors + v],
                         sizeof(ms_floats));
      }
    }
  }
}

#define MS_TILE(bits, planes, mt)                                                                       \
  static void MS_NAME(tile_##bits##_##planes##_##mt)(const MS_NAME(linear_tile) * t) {                  \
    enum { vectors = MS_TILE_VECTORS / (mt) < 16 / MS_LANES ? MS_TILE_VECTORS / (mt) : 16 / MS_LANES }; \
    for (uint32_t i = 0; i < t->count; ++i)                                                             \
      tile_panel(t, t->panels + i * t->stride, t->out + i * 16, bits, planes, mt, vectors);             \
  }
#define MS_TILES(bits) \
  MS_TILE(bits, 1, 1)  \
  MS_TILE(bits, 1, 2) MS_TILE(bits, 1, 4) MS_TILE(bits, 2, 1) MS_TILE(bits, 2, 2) MS_TILE(bits, 2, 4)
MS_TILES(1)
MS_TILES(2)
MS_TILES(3)
MS_TILES(4)
MS_TILES(5)
MS_TILES(6)
MS_TILES(8)
#if MS_TILE_ROWS == 8
#define MS_WIDE_TILES(bits) MS_TILE(bits, 1, 8) MS_TILE(bits, 2, 8)
MS_WIDE_TILES(1)
MS_WIDE_TILES(2)
MS_WIDE_TILES(3)
MS_WIDE_TILES(4)
MS_WIDE_TILES(5)
MS_WIDE_TILES(6)
MS_WIDE_TILES(8)
#undef MS_WIDE_TILES
#endif
#undef MS_TILE
#undef MS_TILES

// ---- dense weights --------------------------------------------------------------------------------------------------
// One float32 sum per output from k = 0 up. Panels together hide the latency of an fma where there are few rows.
MS_VEC void dense_panels(const MS_NAME(linear_tile) * t, uint32_t first, uint32_t dtype, int mt, int panels) {
  f32x16 sum[MS_TILE_ROWS];
  MS_UNROLL for (int i = 0; i < mt * panels; ++i) sum[i] = vsplat(0);
  const size_t step = (size_t)MS_PANEL_ROWS * ms_dtype_bytes(dtype);
  const uint8_t *w = t->panels + first * t->stride;
  for (uint32_t k = 0; k < t->groups; ++k, w += step) {
    MS_UNROLL for (int p = 0; p < panels; ++p) {
      const uint8_t *at = w + (size_t)p * t->stride;
      __builtin_prefetch(at + MS_PREFETCH, 0, 3);
      f32x16 weights;
      if (dtype == MS_FLOAT32) weights = vload((const float *)(const void *)at);
      if (dtype == MS_FLOAT16) weights = vload_f16((const uint16_t *)(const void *)at);
      if (dtype == MS_BFLOAT16) weights = vload_bf16((const uint16_t *)(const void *)at);
      MS_UNROLL for (int m = 0; m < mt; ++m) {
        const float *x = (const float *)(const void *)(t->x + (size_t)m * t->x_stride);
        sum[m * panels + p] = vfma(weights, vsplat(x[k]), sum[m * panels + p]);
      }
    }
  }
  MS_UNROLL for (int m = 0; m < mt; ++m) {
    MS_UNROLL for (int p = 0; p < panels; ++p) {
      vstore(t->out + (size_t)m * t->out_stride + (first + (uint32_t)p) * MS_PANEL_ROWS, sum[m * panels + p]);
    }
  }
}

#define MS_DENSE(name, dtype, mt)                                                      \
  static void MS_NAME(tile_##name##_##mt)(const MS_NAME(linear_tile) * t) {            \
    enum { panels = 4 / (mt) > 1 ? 4 / (mt) : 1 };                                     \
    uint32_t i = 0;                                                                    \
    for (; i + panels <= t->count; i += panels) dense_panels(t, i, dtype, mt, panels); \
    for (; i < t->count; ++i) dense_panels(t, i, dtype, mt, 1);                        \
  }
#define MS_DENSES(mt) MS_DENSE(f32, MS_FLOAT32, mt) MS_DENSE(f16, MS_FLOAT16, mt) MS_DENSE(bf16, MS_BFLOAT16, mt)
MS_DENSES(1)
MS_DENSES(2)
MS_DENSES(4)
#if MS_TILE_ROWS == 8
MS_DENSES(8)
#endif
#undef MS_DENSE
#undef MS_DENSES

#include "linear_floats_body.h"

// ---- choice ---------------------------------------------------------------------------------------------------------
typedef void (*MS_NAME(linear_tile_function))(const MS_NAME(linear_tile) *);

#if MS_TILE_ROWS == 8
#define MS_ROW_OF(kind) \
  {MS_NAME(tile_##kind##_1), MS_NAME(tile_##kind##_2), MS_NAME(tile_##kind##_4), MS_NAME(tile_##kind##_8)}
#else
#define MS_ROW_OF(kind) {MS_NAME(tile_##kind##_1), MS_NAME(tile_##kind##_2), MS_NAME(tile_##kind##_4), NULL}
#endif
// By arithmetic and bits, then log2 of the rows.
static const MS_NAME(linear_tile_function) MS_NAME(affine_tiles)[2][9][4] = {
    [MS_ARITHMETIC_INT16] = {[1] = MS_ROW_OF(1_2),
                             [2] = MS_ROW_OF(2_2),
                             [3] = MS_ROW_OF(3_2),
                             [4] = MS_ROW_OF(4_2),
                             [5] = MS_ROW_OF(5_2),
                             [6] = MS_ROW_OF(6_2),
                             [8] = MS_ROW_OF(8_2)},
    [MS_ARITHMETIC_INT8] = {[1] = MS_ROW_OF(1_1),
                            [2] = MS_ROW_OF(2_1),
                            [3] = MS_ROW_OF(3_1),
                            [4] = MS_ROW_OF(4_1),
                            [5] = MS_ROW_OF(5_1),
                            [6] = MS_ROW_OF(6_1),
                            [8] = MS_ROW_OF(8_1)},
};
// By ms_dtype.
static const MS_NAME(linear_tile_function) MS_NAME(dense_tiles)[3][4] = {
    [MS_FLOAT32] = MS_ROW_OF(f32), [MS_FLOAT16] = MS_ROW_OF(f16), [MS_BFLOAT16] = MS_ROW_OF(bf16)};
// By arithmetic and whether groups have 16 elements, not 32.
static const MS_NAME(linear_tile_function) MS_NAME(fp4_tiles)[2][2][4] = {
    [MS_ARITHMETIC_INT16] = {MS_ROW_OF(fp4_32_2), MS_ROW_OF(fp4_16_2)},
    [MS_ARITHMETIC_INT8] = {MS_ROW_OF(fp4_32_1), MS_ROW_OF(fp4_16_1)},
};
static const MS_NAME(linear_tile_function) MS_NAME(fp8_tiles)[4] = MS_ROW_OF(fp8);
#undef MS_ROW_OF
#undef MS_UNROLL

// The functions of one part for 1, 2, 4 (and 8) rows.
MS_VEC const MS_NAME(linear_tile_function) * MS_NAME(tiles_of)(const MSLinearPart *part, uint32_t arithmetic) {
  if (ms_is_dense(part->bits)) return MS_NAME(dense_tiles)[part->dtype];
  if (!ms_is_floats(part->dtype)) return MS_NAME(affine_tiles)[arithmetic][part->bits];
  return part->bits == 8 ? MS_NAME(fp8_tiles) : MS_NAME(fp4_tiles)[arithmetic][part->group_size == 16];
}
