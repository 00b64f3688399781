// How a linear's constants and its scratch are laid out: for the check when a plan is made and for the kernel.
#ifndef METALSTEP_LINEAR_LAYOUT_H
#define METALSTEP_LINEAR_LAYOUT_H
#include <stddef.h>
#include <stdint.h>

#include "linear_activation.h"
#include "panel.h"
#include "program_check.h"

enum {
  MS_FEW_ROWS = 4,            // up to here each thread quantises all rows for itself: no barrier inside the launch
  MS_CHUNK_ROWS = 8,          // rows whose products are kept for the epilogue at once
  MS_CHUNK_BYTES = 1 << 15,   // their registers: a chunk has as many columns as fit, and one panel's at least
  MS_PIECES = 4,              // in which a thread takes its share of many panels, at least
  MS_PIECE = 8,               // panels of a piece, at most
  MS_ROW_BLOCK = 128,         // rows for which a block of weights, once in the second-level cache, serves
  MS_WEIGHT_BLOCK = 1 << 18,  // bytes of such a block
  MS_COUNTER_BYTES = 128,     // for the count of panels taken of a thread's share: lines are fetched in pairs
};

// The constants, taken apart.
typedef struct {
  const MSLinearParams *params;
  const MSLinearPart *parts;
  const MSLinearSegment *segments;
  const MSInstr *prologue, *epilogues;
} ms_linear_constants;

static inline ms_linear_constants ms_linear_constants_at(const void *constants) {
  ms_linear_constants c = {.params = (const MSLinearParams *)constants};
  c.parts = (const MSLinearPart *)(c.params + 1);
  c.segments = (const MSLinearSegment *)(c.parts + c.params->parts);
  c.prologue = (const MSInstr *)(c.segments + c.params->segments);
  c.epilogues = c.prologue + c.params->prologue;
  return c;
}

// Columns of a chunk of up to `rows` rows: many, so that what interpreting an epilogue costs does not show.
static inline uint32_t ms_linear_columns(uint32_t registers, uint32_t rows) {
  uint32_t columns = MS_CHUNK_BYTES / (MS_CHUNK_ROWS * sizeof(float)), fewer = MS_CHUNK_ROWS;
  while (columns > MS_PANEL_ROWS && columns * registers * sizeof(float) * MS_CHUNK_ROWS > MS_CHUNK_BYTES) columns /= 2;
  for (; fewer / 2 >= rows; fewer /= 2) columns *= 2;
  return columns;
}

// The registers of a chunk, products first: row after row of the first register, then of the next.
static inline uint64_t ms_linear_registers_bytes(const MSLinearSegment *s) {
  const uint64_t elements = (uint64_t)MS_CHUNK_ROWS * ms_linear_columns(s->registers, MS_CHUNK_ROWS);
  return (elements * s->registers + MS_PROGRAM_SLACK) * sizeof(float);
}

// Streams of a row of activations. offset: bytes in the row; SIZE_MAX: no weight needs it.
typedef struct {
  size_t offset[MS_STREAMS], row_bytes;
} ms_linear_streams;

static inline ms_linear_streams ms_linear_streams_of(const ms_linear_constants *c) {
  ms_linear_streams streams = {.row_bytes = 0};
  for (uint32_t i = 0; i < MS_STREAMS; ++i) streams.offset[i] = SIZE_MAX;
  for (uint32_t i = 0; i < c->params->parts; ++i) {
    const uint32_t stream = ms_stream_of(&c->parts[i]);
    if (streams.offset[stream] != SIZE_MAX) continue;
    streams.offset[stream] = streams.row_bytes;
    streams.row_bytes += ms_stream_bytes(stream, c->params->k);
  }
  return streams;
}

// Each thread's scratch: the prologue's row, the registers, then the activations of few rows.
typedef struct {
  uint64_t registers_at, activations_at, bytes;
} ms_linear_scratch;

static inline ms_linear_scratch ms_linear_scratch_of(const ms_linear_constants *c, const ms_linear_streams *streams) {
  uint64_t registers = 0;
  for (uint32_t i = 0; i < c->params->segments; ++i) {
    const uint64_t bytes = ms_linear_registers_bytes(&c->segments[i]);
    if (bytes > registers) registers = bytes;
  }
  ms_linear_scratch scratch = {.registers_at = c->params->prologue ? ms_program_row_bytes(c->params->registers) : 0};
  scratch.activations_at = scratch.registers_at + (registers + 63) / 64 * 64;
  scratch.bytes = scratch.activations_at + MS_FEW_ROWS * (uint64_t)streams->row_bytes;
  return scratch;
}

#endif
