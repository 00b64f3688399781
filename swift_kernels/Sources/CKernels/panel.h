// How a weight lies in memory: panels of 16 rows, so that one vector register holds the same k of 16 outputs.
//
// Quantised, w = scale * q + bias. A panel is, for each group of group_size elements along k: 16 scales, 16 biases (one
// per row), then the group's q in blocks of 32 along k. A block is `bits` lines of 64 bytes, and a line is one 32-bit
// word per row. Byte i of a word belongs to elements with k % 4 == i; a "quad" is four neighbouring elements, and a
// block has eight:
//   8 bits: line j is quad j.
//   4 bits: line j has quad 2j in its low nibbles and quad 2j + 1 in its high ones.
//   2 bits: line j has quads 4j .. 4j + 3, from the low bits up; 1 bit: the line has quads 0 .. 7.
//   3, 5, 6 bits: the lines of the low 2, 4, 4 bits, then those of the high 1, 1, 2; a line of single bits has quads
//   0 .. 7.
// Floats of 4 or 8 bits, w = scale * e2m1 or e4m3, have scales of a byte and no biases: those of four groups (the last
// ones may be fewer) are a line of 64 bytes in front of these groups. Then, for each of them:
//   4 bits: lines as above: four for groups of 32, two for groups of 16.
//   8 bits: for each two elements of k a word of 16 bits per row.
// Dense, a panel is k lines of 16 elements. Rows past n are zero. A panel is as large as its rows in a checkpoint.
#ifndef METALSTEP_PANEL_H
#define METALSTEP_PANEL_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "params.h"

enum { MS_PANEL_ROWS = 16, MS_BLOCK = 32 };       // outputs in a panel; elements of k in a block
enum { MS_FLOATS_RUN = 4, MS_FLOATS_LINE = 64 };  // groups of floats whose scales are a line; its bytes

static inline uint32_t ms_panel_count(uint32_t n) { return n / MS_PANEL_ROWS + (n % MS_PANEL_ROWS != 0); }

static inline uint32_t ms_dtype_bytes(uint32_t dtype) { return dtype == MS_FLOAT16 || dtype == MS_BFLOAT16 ? 2 : 4; }

static inline int ms_is_dense(uint32_t bits) { return bits >= 16; }

// Whether the elements are floats of 4 or 8 bits: mxfp4, nvfp4, mxfp8.
static inline int ms_is_floats(uint32_t dtype) { return dtype == MS_E8M0 || dtype == MS_E4M3; }

// Bytes of the scales (as many again: the biases) in front of a group, and of a block.
static inline size_t ms_scale_bytes(uint32_t dtype) { return (size_t)MS_PANEL_ROWS * ms_dtype_bytes(dtype); }
static inline size_t ms_block_bytes(uint32_t bits) { return (size_t)bits * 64; }

static inline size_t ms_group_bytes(uint32_t bits, uint32_t group_size, uint32_t dtype) {
  return 2 * ms_scale_bytes(dtype) + group_size / MS_BLOCK * ms_block_bytes(bits);
}

// Bytes of a panel, a multiple of 32.
static inline size_t ms_panel_stride(uint32_t k, uint32_t bits, uint32_t group_size, uint32_t dtype) {
  if (ms_is_dense(bits)) return (size_t)k * MS_PANEL_ROWS * ms_dtype_bytes(dtype);
  if (ms_is_floats(dtype)) {
    const size_t lines = (k / group_size + MS_FLOATS_RUN - 1) / MS_FLOATS_RUN;
    return lines * MS_FLOATS_LINE + (size_t)k * MS_PANEL_ROWS / 8 * bits;
  }
  return k / group_size * ms_group_bytes(bits, group_size, dtype);
}

// NULL, or why no panel has these properties (static storage).
static inline const char *ms_panel_problem(uint32_t n, uint32_t k, uint32_t bits, uint32_t group_size, uint32_t dtype) {
  if (n == 0 || k == 0) return "a weight has no elements";
  if (ms_is_dense(bits)) {
    if (group_size != 0) return "a dense weight has a group size; expected 0";
    if (bits == 16 && (dtype == MS_FLOAT16 || dtype == MS_BFLOAT16)) return NULL;
    if (bits == 32 && dtype == MS_FLOAT32) return NULL;
    return "a dense weight is neither 16 bits of float16 or bfloat16 nor 32 of float32";
  }
  if (ms_is_floats(dtype)) {
    const bool known = dtype == MS_E8M0 ? (bits == 4 || bits == 8) && group_size == 32 : bits == 4 && group_size == 16;
    if (!known) return "e8m0 scales are of 4 or 8 bits in groups of 32, e4m3 scales of 4 bits in groups of 16";
    return k % group_size == 0 ? NULL : "k is not a multiple of the group size";
  }
  if (bits < 1 || bits == 7 || bits > 8) return "bits are not 1, 2, 3, 4, 5, 6, 8 (affine) or 16, 32 (dense)";
  if (group_size != 32 && group_size != 64 && group_size != 128) return "the group size is not 32, 64 or 128";
  if (dtype != MS_FLOAT32 && dtype != MS_FLOAT16 && dtype != MS_BFLOAT16)
    return "scales are not float32, float16 or bfloat16";
  if (k % group_size != 0) return "k is not a multiple of the group size";
  return NULL;
}

#endif
