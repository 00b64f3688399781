// Packs a checkpoint's weights into panels (panel.h), without changing a value. The compiler's plain vectors are
// enough: packing is bound by memory.
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "host_kernels.h"
#include "panel.h"

#define INLINE static inline __attribute__((always_inline))

typedef uint8_t u8x16 __attribute__((ext_vector_type(16)));
typedef uint16_t u16x8 __attribute__((ext_vector_type(8)));
typedef uint32_t u32x4 __attribute__((ext_vector_type(4)));
typedef uint32_t u32x16 __attribute__((ext_vector_type(16)));

enum { GGUF_GROUP = 32, PANELS_AT_ONCE = 8 };  // PANELS_AT_ONCE: what a thread takes; neighbours in memory

typedef struct {
  const MSWeightSource *source;
  uint8_t *panels;
  size_t stride;         // bytes of a panel
  uint32_t next;         // first panel that no thread has taken; atomic
  uint32_t refused;      // 1: a block's scale cannot be kept; atomic
  uint32_t refused_row;  // written by the thread that set it
} pack_job;

// Source rows of a panel. Rows past n are not there: count < 16.
typedef struct {
  uint32_t row[MS_PANEL_ROWS], count;
} panel_rows;

static panel_rows rows_of(const MSWeightSource *s, uint32_t panel) {
  panel_rows rows = {.count = 0};
  for (uint32_t r = panel * MS_PANEL_ROWS; r < s->n && rows.count < MS_PANEL_ROWS; ++r) {
    rows.row[rows.count++] = s->row_order ? (uint32_t)s->row_order[r] : r;
  }
  return rows;
}

// ---- transposes: interleaving the first half of the rows with the second, once per bit of their number --------------
INLINE void transpose4(u32x4 a[4]) {
  for (int round = 0; round < 2; ++round) {
    const u32x4 b[4] = {a[0], a[1], a[2], a[3]};
    for (int i = 0; i < 2; ++i) {
      a[2 * i] = __builtin_shufflevector(b[i], b[i + 2], 0, 4, 1, 5);
      a[2 * i + 1] = __builtin_shufflevector(b[i], b[i + 2], 2, 6, 3, 7);
    }
  }
}
INLINE void transpose8(u16x8 a[8]) {
  for (int round = 0; round < 3; ++round) {
    const u16x8 b[8] = {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]};
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = __builtin_shufflevector(b[i], b[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      a[2 * i + 1] = __builtin_shufflevector(b[i], b[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
  }
}

// ---- blocks: 32 q of 16 rows, a byte each, into lines ---------------------------------------------------------------
// Dword j of row r becomes lane r of quads[j].
INLINE void transpose_block(const uint8_t q[MS_PANEL_ROWS][MS_BLOCK], uint32_t quads[8][MS_PANEL_ROWS]) {
  for (int r = 0; r < MS_PANEL_ROWS; r += 4) {
    for (int j = 0; j < 8; j += 4) {
      u32x4 a[4];
      for (int i = 0; i < 4; ++i) memcpy(&a[i], q[r + i] + j * 4, sizeof a[i]);
      transpose4(a);
      for (int i = 0; i < 4; ++i) memcpy(&quads[j + i][r], &a[i], sizeof a[i]);
    }
  }
}

// `width` bits of each q from bit `shift` up, as `width` lines.
INLINE uint8_t *write_plane(const uint32_t quads[8][MS_PANEL_ROWS], uint32_t width, uint32_t shift, uint8_t *to) {
  const uint32_t in_line = 8 / width, mask = 0x01010101u * ((1u << width) - 1);
  for (uint32_t line = 0; line < width; ++line, to += 64) {
    u32x16 words = 0;
    for (uint32_t i = 0; i < in_line; ++i) {
      u32x16 quad;
      memcpy(&quad, quads[line * in_line + i], sizeof quad);
      words |= (quad >> shift & mask) << (width * i);
    }
    memcpy(to, &words, sizeof words);
  }
  return to;
}

INLINE uint8_t *write_block(const uint8_t q[MS_PANEL_ROWS][MS_BLOCK], uint32_t bits, uint8_t *to) {
  uint32_t quads[8][MS_PANEL_ROWS];
  transpose_block(q, quads);
  const uint32_t low = bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
  to = write_plane((const uint32_t (*)[MS_PANEL_ROWS])quads, low, 0, to);
  if (bits > low) to = write_plane((const uint32_t (*)[MS_PANEL_ROWS])quads, bits - low, low, to);
  return to;
}

// ---- MLX's affine layout: q as a stream of bits, the lowest first ---------------------------------------------------
// Eight values of `bits` bits into bytes: halves apart, quarters apart, then each.
INLINE uint64_t spread(uint64_t x, uint32_t bits) {
  const uint64_t four = (1ull << 4 * bits) - 1, two = ((1ull << 2 * bits) - 1) * 0x100000001ull;
  const uint64_t one = ((1ull << bits) - 1) * 0x0001000100010001ull;
  x = (x & four) | (x >> 4 * bits & four) << 32;
  x = (x & two) | (x & two << 2 * bits) << (16 - 2 * bits);
  return (x & one) | (x & one << bits) << (8 - bits);
}

// The 32 q of one row in a block.
INLINE void read_block(const uint8_t *words, uint32_t bits, uint8_t q[MS_BLOCK]) {
  if (bits == 8) {
    memcpy(q, words, MS_BLOCK);
  } else if (bits == 4) {
    u8x16 pairs;
    memcpy(&pairs, words, sizeof pairs);
    const u8x16 even = pairs & 15, odd = pairs >> 4;
    const u8x16 low = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const u8x16 high = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    memcpy(q, &low, sizeof low);
    memcpy(q + 16, &high, sizeof high);
  } else {
    for (uint32_t i = 0; i < MS_BLOCK / 8; ++i) {
      uint64_t x = 0;
      memcpy(&x, words + i * bits, bits);
      x = spread(x, bits);
      memcpy(q + i * 8, &x, sizeof x);
    }
  }
}

INLINE void pack_affine(const MSWeightSource *s, const panel_rows *rows, uint32_t bits, uint8_t *to) {
  const size_t element = ms_dtype_bytes(s->dtype), groups = s->k / s->group_size;
  const size_t row_bytes = (size_t)s->k / 8 * bits, block_bytes = (size_t)bits * (MS_BLOCK / 8);
  const uint8_t *words[MS_PANEL_ROWS], *scales[MS_PANEL_ROWS], *biases[MS_PANEL_ROWS];
  for (uint32_t r = 0; r < rows->count; ++r) {
    words[r] = (const uint8_t *)s->data + rows->row[r] * row_bytes;
    scales[r] = (const uint8_t *)s->scales + rows->row[r] * groups * element;
    biases[r] = (const uint8_t *)s->biases + rows->row[r] * groups * element;
  }
  _Alignas(64) uint8_t q[MS_PANEL_ROWS][MS_BLOCK] = {{0}};
  for (size_t g = 0; g < groups; ++g) {
    if (rows->count < MS_PANEL_ROWS) memset(to, 0, MS_PANEL_ROWS * element * 2);
    for (uint32_t r = 0; r < rows->count; ++r) {
      if (element == 2) {
        memcpy(to + r * 2, scales[r] + g * 2, 2);
        memcpy(to + (MS_PANEL_ROWS + r) * 2, biases[r] + g * 2, 2);
      } else {
        memcpy(to + r * 4, scales[r] + g * 4, 4);
        memcpy(to + (MS_PANEL_ROWS + r) * 4, biases[r] + g * 4, 4);
      }
    }
    to += MS_PANEL_ROWS * element * 2;
    for (uint32_t b = 0; b < s->group_size; b += MS_BLOCK) {
      for (uint32_t r = 0; r < rows->count; ++r) {
        read_block(words[r], bits, q[r]);
        words[r] += block_bytes;
      }
      to = write_block((const uint8_t (*)[MS_BLOCK])q, bits, to);
    }
  }
}

// ---- MLX's floats of 4 and 8 bits: elements as affine q, a byte of scale per group ----------------------------------
INLINE void pack_floats(const MSWeightSource *s, const panel_rows *rows, uint32_t bits, uint8_t *to) {
  const size_t groups = s->k / s->group_size, row_bytes = (size_t)s->k / 8 * bits;
  const uint8_t *words[MS_PANEL_ROWS], *scales[MS_PANEL_ROWS];
  for (uint32_t r = 0; r < rows->count; ++r) {
    words[r] = (const uint8_t *)s->data + rows->row[r] * row_bytes;
    scales[r] = (const uint8_t *)s->scales + rows->row[r] * groups;
  }
  _Alignas(64) uint8_t q[MS_PANEL_ROWS][MS_BLOCK] = {{0}}, lines[4 * 64];
  for (size_t g = 0; g < groups; g += MS_FLOATS_RUN) {
    const size_t count = groups - g < MS_FLOATS_RUN ? groups - g : MS_FLOATS_RUN;
    memset(to, 0, MS_FLOATS_LINE);
    for (uint32_t r = 0; r < rows->count; ++r) {
      for (size_t i = 0; i < count; ++i) to[i * MS_PANEL_ROWS + r] = scales[r][g + i];
    }
    to += MS_FLOATS_LINE;
    for (size_t left = count * s->group_size; left > 0;) {
      const size_t elements = bits == 8 ? 16 : left < MS_BLOCK ? left : MS_BLOCK, bytes = elements * bits / 8;
      u8x16 row[MS_PANEL_ROWS] = {0};
      for (uint32_t r = 0; r < rows->count; ++r) {
        memcpy(&row[r], words[r], bytes);
        words[r] += bytes;
      }
      if (bits == 8) {  // words of two elements
        for (uint32_t r = 0; r < MS_PANEL_ROWS; r += 8) {
          u16x8 a[8];
          memcpy(a, row + r, sizeof a);
          transpose8(a);
          for (uint32_t i = 0; i < 8; ++i) memcpy(to + i * 32 + r * 2, &a[i], sizeof a[i]);
        }
      } else {
        for (uint32_t r = 0; r < rows->count; ++r) read_block((const uint8_t *)&row[r], 4, q[r]);
        write_block((const uint8_t (*)[MS_BLOCK])q, 4, lines);
        memcpy(to, lines, elements * 8);
      }
      to += elements * 2 * bits;
      left -= elements;
    }
  }
}

// ---- GGUF's blocks: a float16 scale (and for Q4_1 a minimum) in front of 32 q ---------------------------------------
// -(2^power) * h, exact. False: it overflows float16, or h is not finite.
INLINE bool negate_times_power(uint16_t h, uint32_t power, uint16_t *out) {
  uint32_t exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  for (; power > 0 && exponent == 0; --power) {  // subnormals double by a shift
    mantissa <<= 1;
    if (mantissa & 0x400) {
      exponent = 1;
      mantissa &= 0x3ff;
    }
  }
  if (exponent != 0) exponent += power;
  *out = (uint16_t)((~h & 0x8000) | exponent << 10 | mantissa);
  return exponent < 31;
}

// Returns the row (of the panel) whose scale cannot be kept, or -1.
INLINE int pack_gguf(const MSWeightSource *s, const panel_rows *rows, uint32_t format, uint8_t *to) {
  const uint32_t header = format == MS_WEIGHT_GGUF_Q4_1 ? 4 : 2, bits = format == MS_WEIGHT_GGUF_Q8_0 ? 8 : 4;
  const size_t block_bytes = header + bits * 4, groups = s->k / GGUF_GROUP;
  const uint8_t *blocks[MS_PANEL_ROWS];
  for (uint32_t r = 0; r < rows->count; ++r) blocks[r] = (const uint8_t *)s->data + rows->row[r] * groups * block_bytes;
  _Alignas(64) uint8_t q[MS_PANEL_ROWS][MS_BLOCK] = {{0}};
  int refused = -1;
  for (size_t g = 0; g < groups; ++g) {
    uint16_t scales[2][MS_PANEL_ROWS] = {{0}};
    for (uint32_t r = 0; r < rows->count; ++r) {
      const uint8_t *block = blocks[r];
      blocks[r] += block_bytes;
      memcpy(&scales[0][r], block, 2);
      if (format == MS_WEIGHT_GGUF_Q4_1) {  // w = d * q + m
        memcpy(&scales[1][r], block + 2, 2);
      } else if (!negate_times_power(scales[0][r], format == MS_WEIGHT_GGUF_Q4_0 ? 3 : 7, &scales[1][r])) {
        refused = (int)r;  // w = d * (q - 8), or d * (q + 128 - 128) of a signed q
      }
      u8x16 low, high;
      memcpy(&low, block + header, 16);
      if (format == MS_WEIGHT_GGUF_Q8_0) {
        memcpy(&high, block + header + 16, 16);
        low ^= 0x80;
        high ^= 0x80;
      } else {  // the low nibbles are elements 0 to 15, the high ones 16 to 31
        high = low >> 4;
        low &= 15;
      }
      memcpy(q[r], &low, 16);
      memcpy(q[r] + 16, &high, 16);
    }
    memcpy(to, scales, sizeof scales);
    to = write_block((const uint8_t (*)[MS_BLOCK])q, bits, to + sizeof scales);
  }
  return refused;
}

// ---- dense ----------------------------------------------------------------------------------------------------------
INLINE void pack_dense(const MSWeightSource *s, const panel_rows *rows, size_t element, uint8_t *to) {
  const uint8_t *from[MS_PANEL_ROWS];
  for (uint32_t r = 0; r < rows->count; ++r) from[r] = (const uint8_t *)s->data + rows->row[r] * (size_t)s->k * element;
  if (rows->count < MS_PANEL_ROWS) memset(to, 0, (size_t)s->k * MS_PANEL_ROWS * element);
  const uint32_t side = element == 2 ? 8 : 4, whole = rows->count == MS_PANEL_ROWS ? s->k / side * side : 0;
  for (size_t k = 0; k < whole; k += side) {
    for (uint32_t r = 0; r < MS_PANEL_ROWS; r += side) {
      uint8_t *at = to + (k * MS_PANEL_ROWS + r) * element;
      if (element == 2) {
        u16x8 a[8];
        for (uint32_t i = 0; i < 8; ++i) memcpy(&a[i], from[r + i] + k * 2, sizeof a[i]);
        transpose8(a);
        for (uint32_t i = 0; i < 8; ++i) memcpy(at + i * MS_PANEL_ROWS * 2, &a[i], sizeof a[i]);
      } else {
        u32x4 a[4];
        for (uint32_t i = 0; i < 4; ++i) memcpy(&a[i], from[r + i] + k * 4, sizeof a[i]);
        transpose4(a);
        for (uint32_t i = 0; i < 4; ++i) memcpy(at + i * MS_PANEL_ROWS * 4, &a[i], sizeof a[i]);
      }
    }
  }
  for (size_t k = whole; k < s->k; ++k) {
    for (uint32_t r = 0; r < rows->count; ++r)
      memcpy(to + (k * MS_PANEL_ROWS + r) * element, from[r] + k * element, element);
  }
}

// ---- all panels -----------------------------------------------------------------------------------------------------
static int pack_panel(const MSWeightSource *s, const panel_rows *rows, uint8_t *to) {
  switch (s->format) {
    case MS_WEIGHT_DENSE:
      if (s->bits == 16) pack_dense(s, rows, 2, to);
      if (s->bits == 32) pack_dense(s, rows, 4, to);
      return -1;
    case MS_WEIGHT_GGUF_Q4_0:
      return pack_gguf(s, rows, MS_WEIGHT_GGUF_Q4_0, to);
    case MS_WEIGHT_GGUF_Q4_1:
      return pack_gguf(s, rows, MS_WEIGHT_GGUF_Q4_1, to);
    case MS_WEIGHT_GGUF_Q8_0:
      return pack_gguf(s, rows, MS_WEIGHT_GGUF_Q8_0, to);
    default:
      break;
  }
  if (s->format == MS_WEIGHT_FLOATS) {
    if (s->bits == 4) pack_floats(s, rows, 4, to);
    if (s->bits == 8) pack_floats(s, rows, 8, to);
    return -1;
  }
  switch (s->bits) {
    case 1:
      pack_affine(s, rows, 1, to);
      break;
    case 2:
      pack_affine(s, rows, 2, to);
      break;
    case 3:
      pack_affine(s, rows, 3, to);
      break;
    case 4:
      pack_affine(s, rows, 4, to);
      break;
    case 5:
      pack_affine(s, rows, 5, to);
      break;
    case 6:
      pack_affine(s, rows, 6, to);
      break;
    case 8:
      pack_affine(s, rows, 8, to);
      break;
    default:
      break;  // not reached: ms_panel_problem
  }
  return -1;
}

static void pack_share(void *context, int32_t thread, int32_t threads) {
  (void)thread, (void)threads;
  pack_job *job = (pack_job *)context;
  const uint32_t panels = ms_panel_count(job->source->n);
  for (;;) {
    const uint32_t first = __atomic_fetch_add(&job->next, PANELS_AT_ONCE, __ATOMIC_RELAXED);
    if (first >= panels) return;
    for (uint32_t panel = first; panel < panels && panel < first + PANELS_AT_ONCE; ++panel) {
      const panel_rows rows = rows_of(job->source, panel);
      const int refused = pack_panel(job->source, &rows, job->panels + panel * job->stride);
      if (refused >= 0 && __atomic_exchange_n(&job->refused, 1, __ATOMIC_RELAXED) == 0) {
        job->refused_row = rows.row[refused];
      }
    }
  }
}

static const char *check_format(const MSWeightSource *s) {
  uint32_t bits = 0;
  switch (s->format) {
    case MS_WEIGHT_DENSE:
      return ms_is_dense(s->bits) ? NULL : "a dense source has 16 or 32 bits";
    case MS_WEIGHT_AFFINE:
      if (ms_is_dense(s->bits)) return "an affine source has 1, 2, 3, 4, 5, 6 or 8 bits";
      if (ms_is_floats(s->dtype)) return "an affine source has scales of float32, float16 or bfloat16";
      return s->scales && s->biases ? NULL : "an affine source needs scales and biases";
    case MS_WEIGHT_FLOATS:
      if (!ms_is_floats(s->dtype)) return "a source of floats has scales of e8m0 or e4m3";
      return s->scales ? NULL : "a source of floats needs scales";
    case MS_WEIGHT_GGUF_Q4_0:
    case MS_WEIGHT_GGUF_Q4_1:
      bits = 4;
      break;
    case MS_WEIGHT_GGUF_Q8_0:
      bits = 8;
      break;
    default:
      return "the format is not an ms_weight_format";
  }
  if (s->bits == bits && s->group_size == GGUF_GROUP && s->dtype == MS_FLOAT16) return NULL;
  return bits == 4 ? "Q4_0 and Q4_1 become 4 bits in groups of 32 with float16 scales"
                   : "Q8_0 becomes 8 bits in groups of 32 with float16 scales";
}

uint64_t ms_panel_bytes(uint32_t n, uint32_t k, uint32_t bits, uint32_t group_size, uint32_t dtype) {
  if (ms_panel_problem(n, k, bits, group_size, dtype)) return 0;
  return (uint64_t)ms_panel_count(n) * ms_panel_stride(k, bits, group_size, dtype);
}

const char *ms_panel_pack(ms_pool *pool, const MSWeightSource *source, void *panels, char message[256]) {
  const MSWeightSource *s = source;
  const char *problem = ms_panel_problem(s->n, s->k, s->bits, s->group_size, s->dtype);
  if (!problem) problem = check_format(s);
  if (!problem && !s->data) problem = "the source has no data";
  if (problem) {
    snprintf(message, 256, "weight_pack: format %u, n %u, k %u, %u bits, groups of %u, dtype %u: %s", s->format, s->n,
             s->k, s->bits, s->group_size, s->dtype, problem);
    return message;
  }
  for (uint32_t i = 0; s->row_order && i < s->n; ++i) {
    if (s->row_order[i] < 0) {
      snprintf(message, 256, "weight_pack: row_order[%u] is %d; rows count from 0", i, s->row_order[i]);
      return message;
    }
  }
  pack_job job = {
      .source = s, .panels = (uint8_t *)panels, .stride = ms_panel_stride(s->k, s->bits, s->group_size, s->dtype)};
  if (pool) {
    ms_pool_run(pool, pack_share, &job);
  } else {
    pack_share(&job, 0, 1);
  }
  if (!job.refused) return NULL;
  snprintf(message, 256,
           "weight_pack: row %u has a block scale d whose bias %s * d is beyond float16; use a float16 or an "
           "MLX checkpoint of this model",
           job.refused_row, s->format == MS_WEIGHT_GGUF_Q8_0 ? "-128" : "-8");
  return message;
}
