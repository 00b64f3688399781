// Random launches of linear, attention and add_rms_norm.
#include <math.h>
#include <string.h>
#include "driver.h"
#include "kv_codec.h"

// The bindings that every program has (ms_program_slot).
static void bind_step(launch *l, uint32_t rows, uint32_t tokens_below) {
  const MSStep step = {.num_tokens = rows, .num_sampled = rows, .num_seqs = 1, .max_blocks = 1};
  launch_bind(l, &step, sizeof step);
  for (int slot = MS_SLOT_TOKENS; slot < MS_SLOT_FIRST; ++slot) {
    int32_t *values = launch_bind(l, NULL, rows * sizeof(int32_t));
    for (uint32_t i = 0; i < rows; ++i)
      values[i] = (int32_t)(slot == MS_SLOT_SAMPLED_ROWS ? random_below(rows) : random_below(tokens_below));
  }
  l->rows = l->grid[0] = rows;
}

void try_linear(int32_t isa) {
  static const uint32_t all_bits[] = {1, 2, 3, 4, 5, 6, 8, 16, 32};
  const uint32_t floats = random_below(4) == 0, bits = floats ? 4u << random_below(2) : all_bits[random_below(9)];
  const uint32_t dense = bits >= 16, e4m3 = floats && bits == 4 && random_below(2);
  const uint32_t group = dense ? 0 : e4m3 ? 16 : floats ? 32 : 32u << random_below(3);
  const uint32_t k = dense ? 1 + random_below(90) : group * (1 + random_below(3)), n = 1 + random_below(70);
  const uint32_t rows = random_below(8) ? 1 + random_below(20) : random_below(150);
  const uint32_t number = bits == 32 ? MS_FLOAT32 : dense ? MS_FLOAT16 + random_below(2) : random_below(3);
  const uint32_t dtype = e4m3 ? MS_E4M3 : floats ? MS_E8M0 : number;
  launch l = {.kernel = "linear"};
  bind_step(&l, rows, 10);
  MSWeightSource source = {dense    ? MS_WEIGHT_DENSE
                           : floats ? MS_WEIGHT_FLOATS
                                    : MS_WEIGHT_AFFINE,
                           n,
                           k,
                           bits,
                           group,
                           dtype,
                           NULL,
                           NULL,
                           NULL,
                           NULL};
  const uint64_t data_bytes = (uint64_t)n * k * bits / 8, scales = group ? (uint64_t)n * k / group : 0;
  uint8_t *data = malloc(data_bytes);
  uint16_t *scale = calloc(scales ? scales : 1, 4), *bias = calloc(scales ? scales : 1, 4);
  for (uint64_t i = 0; i < data_bytes; ++i) data[i] = (uint8_t)random_below(256) & (floats && bits == 8 ? 0xbf : 0xff);
  for (uint64_t i = 0; dense && i < (uint64_t)n * k; ++i) {  // finite values
    const uint32_t value = 0x3c00u + random_below(0x100);
    if (bits == 16) memcpy(data + 2 * i, &(uint16_t){(uint16_t)value}, 2);
    if (bits == 32) memcpy(data + 4 * i, &(float){random_float()}, 4);
  }
  for (uint64_t i = 0; i < scales; ++i) {
    if (floats) {
      ((uint8_t *)scale)[i] = (uint8_t)(e4m3 ? 0x30 + random_below(16) : 125 + random_below(4));
    } else if (dtype == MS_FLOAT32) {
      memcpy((char *)scale + 4 * i, &(float){random_float()}, 4);
      memcpy((char *)bias + 4 * i, &(float){random_float()}, 4);
    } else {
      scale[i] = bias[i] = (uint16_t)(0x3c00u + random_below(0x80));
    }
  }
  source.data = data, source.scales = dense ? NULL : scale, source.biases = dense ? NULL : bias;
  void *panels = launch_bind(&l, NULL, ms_panel_bytes(n, k, bits, group, dtype));
  char message[256];
  ms_pool *pool = ms_pool_create(1 + (int32_t)random_below(2));
  if (ms_panel_pack(pool, &source, panels, message) != NULL) fail("cannot be packed", &l);
  ms_pool_destroy(pool);
  free(data), free(scale), free(bias);
  launch_bind_floats(&l, (uint64_t)rows * k);
  launch_bind(&l, NULL, (uint64_t)rows * n * 4);
  struct {
    MSLinearParams p;
    MSLinearPart part;
    MSLinearSegment segment;
    MSInstr instrs[2];
  } constants = {
      .p = {.k = k,
            .parts = 1,
            .segments = 1,
            .x_slot = MS_SLOT_FIRST + 1,
            .x_rows = MS_ROW_SELF,
            .x_row_stride = k,
            .arithmetic = random_below(2)},
      .part = {MS_SLOT_FIRST, n, bits, group, dtype},
      .segment = {0, 1, 0, 2, 2},
      .instrs = {{.op = MS_OP_ADD, .dst = 1, .a = 0, .b = MS_NONE, .c = MS_NONE, .imm = 2, .imm1 = 0.5f},
                 {.op = MS_OP_STORE,
                  .a = 1,
                  .b = MS_NONE,
                  .c = MS_NONE,
                  .slot = MS_SLOT_FIRST + 2,
                  .rows = MS_ROW_SELF,
                  .row_stride = n}},
  };
  launch_constants(&l, &constants, sizeof constants);
  launch_run_on_all(&l, isa, l.binds - 1, 2e-2f);  // an int8 rounded to the other side
  const float *out = l.buffers[l.binds - 1];
  for (uint64_t i = 0; i < (uint64_t)rows * n; ++i) {
    if (!isfinite(out[i])) fail("a result is not finite", &l);
  }
  launch_free(&l);
}

// A codec that takes vectors of dim elements: as often a float type as packed.
static uint32_t random_codec(uint32_t dim) {
  static const uint32_t packed[] = {MS_KV_TURBO2,
                                    MS_KV_TURBO3,
                                    MS_KV_TURBO4,
                                    MS_KV_AFFINE8,
                                    MS_KV_TURBO2 | MS_KV_WIDE_SCALES,
                                    MS_KV_TURBO3 | MS_KV_WIDE_SCALES};
  const uint32_t codec = packed[random_below(6)];
  return random_below(2) && ms_kv_dim_ok(codec, dim) ? codec : random_below(3);
}

// A plane of vectors whose elements are from 1 to 1.25 or so (of turbo codecs: rotated, and anything small); returns
// the 4-byte words before its scales. A plane of codes ends with its scales.
static uint32_t bind_plane(launch *l, uint32_t codec, uint64_t vectors, uint32_t dim, uint32_t block) {
  if (ms_kv_is_float(codec)) {
    const uint64_t count = vectors * dim, size = codec == MS_FLOAT32 ? 4 : 2;
    char *to = launch_bind(l, NULL, count * size);
    for (uint64_t i = 0; i < count; ++i) {
      if (codec == MS_FLOAT32) memcpy(to + 4 * i, &(float){1.0f + 0.24f * fabsf(random_float())}, 4);
      if (codec == MS_FLOAT16) memcpy(to + 2 * i, &(uint16_t){(uint16_t)(0x3c00 + random_below(0xf0))}, 2);
      if (codec == MS_BFLOAT16) memcpy(to + 2 * i, &(uint16_t){(uint16_t)(0x3f80 + random_below(0x1e))}, 2);
    }
    return 0;
  }
  const uint64_t words = vectors * ms_kv_words(codec, dim);
  const uint32_t affine = codec == MS_KV_AFFINE8, size = ms_kv_wide(codec) ? 4 : 2;
  const uint64_t scales = vectors * ms_kv_groups(codec, dim) * (1 + affine);
  char *to = launch_bind(l, NULL, words * 4 + scales * size);
  for (uint64_t i = 0; i < words * 4; ++i) to[i] = (char)random_below(256);
  for (uint64_t i = 0; i < scales; ++i) {
    const bool step = affine && i / block % 2 == 0;
    if (size == 4) memcpy(to + words * 4 + 4 * i, &(float){1.0f + 0.24f * fabsf(random_float())}, 4);
    const uint16_t half = (uint16_t)(step ? 0x1000 + random_below(0x3e0) : 0x3c00);  // 2^-11 to 2^-10, or 1
    if (size == 2) memcpy(to + words * 4 + 2 * i, &half, 2);
  }
  return (uint32_t)words;
}

void try_attention(int32_t isa) {
  const uint32_t group = 1 + random_below(5), kv_heads = 1 + random_below(3), dim = 16 * (1 + random_below(6));
  const uint32_t block = 16u << random_below(3), seqs = 1 + random_below(3), max_blocks = 1 + random_below(600 / block);
  const uint32_t rows = random_below(random_below(8) ? 20 : 200), blocks = seqs * max_blocks;
  const uint32_t k_codec = random_codec(dim), v_codec = random_codec(dim);
  launch l = {.kernel = "attention", .rows = rows, .grid = {rows, kv_heads, 1}};
  const MSStep step = {.num_tokens = rows, .num_sampled = rows, .num_seqs = seqs, .max_blocks = max_blocks};
  launch_bind(&l, &step, sizeof step);
  int32_t *positions = launch_bind(&l, NULL, rows * 4), *seq_ids = launch_bind(&l, NULL, rows * 4);
  for (uint32_t i = 0; i < rows; ++i) {
    const bool next = i > 0 && random_below(4) && (uint32_t)positions[i - 1] + 1 < max_blocks * block;
    seq_ids[i] = next ? seq_ids[i - 1] : (int32_t)random_below(seqs);
    positions[i] = next ? positions[i - 1] + 1 : (int32_t)random_below(max_blocks * block);
  }
  int32_t *tables = launch_bind(&l, NULL, blocks * 4);
  for (uint32_t i = 0; i < blocks; ++i) tables[i] = (int32_t)(blocks - 1 - i);
  launch_bind_floats(&l, (uint64_t)rows * group * kv_heads * dim);
  const uint64_t vectors = (uint64_t)blocks * kv_heads * block;
  const uint32_t k_scales = bind_plane(&l, k_codec, vectors, dim, block);
  const uint32_t v_scales = bind_plane(&l, v_codec, vectors, dim, block);
  const float *out = launch_bind(&l, NULL, (uint64_t)rows * group * kv_heads * dim * 4);
  launch_bind_floats(&l, group * kv_heads);  // sinks
  MSSequence *sequences = launch_bind(&l, NULL, seqs * sizeof *sequences);
  for (uint32_t i = 0; i < seqs; ++i) {
    sequences[i] = (MSSequence){random_below(2) ? 0 : 1 + random_below(200), random_below(40)};
    if (random_below(20) == 0) sequences[i].keep = UINT32_MAX;
  }
  const bool has_sinks = random_below(4) == 0;
  const MSAttentionParams p = {group * kv_heads,
                               kv_heads,
                               dim,
                               dim,
                               block,
                               k_codec,
                               v_codec,
                               k_scales,
                               v_scales,
                               random_below(2) ? 0 : 1 + random_below(300),
                               0,
                               group * kv_heads * dim,
                               has_sinks,
                               0.3f,
                               random_below(3) ? 0.0f : 2.0f};
  launch_constants(&l, &p, sizeof p);
  launch_run_on_all(&l, isa, MS_ATTN_OUT,
                    ms_kv_is_float(k_codec) ? 1e-5f : 1e-3f);  // a query's integer may differ by 1
  for (uint64_t i = 0; i < l.bytes[MS_ATTN_OUT] / 4; ++i) {    // a mean of the values, or less beside a sink
    if (ms_kv_is_turbo(v_codec) && isfinite(out[i])) continue;
    if (!(out[i] < 1.2501f && out[i] > (has_sinks ? 0.0f : 0.9999f))) fail("a result is no mean of the values", &l);
  }
  launch_free(&l);
}

void try_add_rms_norm(int32_t isa) {
  const uint32_t rows = random_below(9), n = 1 + random_below(200);
  launch l = {.kernel = "add_rms_norm", .rows = rows, .grid = {rows, 1, 1}};
  const AddRMSNormParams p = {n, 1e-5f};
  for (int i = 0; i < 2; ++i) launch_bind_floats(&l, (uint64_t)rows * n);  // x, residual
  launch_bind_floats(&l, n);
  launch_bind(&l, NULL, (uint64_t)rows * n * 4);
  launch_constants(&l, &p, sizeof p);
  if (!launch_run(&l, isa, 1 + (int32_t)random_below(MAX_THREADS))) fail("refused", &l);
  launch_free(&l);
}
