// linear: epilogue(x · Wᵀ) over packed weights. Reference: kernels/linear.py.
//
// Each thread has a contiguous share of the panels (linear_share.h), so that what the tiles prefetch is the thread's
// own. Few rows (decode): each thread quantises them all; nothing waits. More rows: the threads quantise a part each,
// meet once, and whoever has finished its share takes panels of the others'.
#include "linear_activation_body.h"
#include "linear_layout.h"
#include "linear_share.h"
#include "linear_tile_body.h"

typedef struct {
  ms_linear_constants c;
  ms_linear_streams streams;
  const ms_host_args *args;
  float *prologue_row, *registers;
  uint8_t *activations;
  uint32_t rows;
} MS_NAME(linear);

// The k inputs of one row.
static const float *MS_NAME(input_row)(const MS_NAME(linear) * l, uint32_t row) {
  const MSLinearParams *p = l->c.params;
  if (p->prologue) {
    MS_NAME(run_program)(l->c.prologue, p->prologue, l->prologue_row, l->args, row);
    return l->prologue_row + p->prologue_result;
  }
  int64_t from = 0;
  if (p->x_rows == MS_ROW_SELF) from = row;
  if (p->x_rows == MS_ROW_SAMPLED) from = ((const int32_t *)l->args->buffers[MS_SLOT_SAMPLED_ROWS])[row];
  return (const float *)l->args->buffers[p->x_slot] + p->x_offset + from * p->x_row_stride;
}

static void MS_NAME(prepare_rows)(const MS_NAME(linear) * l, uint32_t first, uint32_t end) {
  const MSLinearParams *p = l->c.params;
  for (uint32_t row = first; row < end; ++row) {
    const float *x = MS_NAME(input_row)(l, row);
    uint8_t *to = l->activations + row * l->streams.row_bytes;
    for (uint32_t i = 0; i < MS_STREAMS; ++i) {
      if (l->streams.offset[i] == SIZE_MAX) continue;
      if (i == MS_STREAM_DENSE) {
        memcpy(to + l->streams.offset[i], x, p->k * sizeof(float));
      } else {
        MS_NAME(quantise_row)(x, p->k, ms_stream_group(i), p->arithmetic, to + l->streams.offset[i]);
      }
    }
  }
}

// The store that is a segment's whole epilogue, or NULL: then the tiles write where it would.
static const MSInstr *MS_NAME(bare_store)(const MS_NAME(linear) * l, const MSLinearSegment *s) {
  const MSInstr *in = l->c.epilogues + s->first_instr;
  const bool bare =
      s->instrs == 1 && s->parts == 1 && in->op == MS_OP_STORE && in->a == 0 && (in->imm & 1) == 0 && in->n == 0;
  return bare && in->dtype == MS_FLOAT32 && in->rows == MS_ROW_SELF ? in : NULL;
}

// Products of one part: panels [first, first + count), rows [row, row + rows), rows <= MS_CHUNK_ROWS.
static void MS_NAME(multiply)(const MS_NAME(linear) * l, const MSLinearPart *part, uint32_t first, uint32_t count,
                              uint32_t row, uint32_t rows, float *out, size_t out_stride) {
  const uint32_t k = l->c.params->k;
  const size_t stride = ms_panel_stride(k, part->bits, part->group_size, part->dtype);
  const uint8_t *panels = (const uint8_t *)l->args->buffers[part->slot] + first * stride;
  const uint8_t *x = l->activations + row * l->streams.row_bytes + l->streams.offset[ms_stream_of(part)];
  const bool dense = ms_is_dense(part->bits);
  const MS_NAME(linear_tile_function) *tiles = MS_NAME(tiles_of)(part, l->c.params->arithmetic);
  // Several tiles: a few panels at a time, which the later tiles find in the first-level cache.
  const uint32_t step = rows <= MS_TILE_ROWS && (rows & (rows - 1)) == 0 ? count : 4;
  for (uint32_t panel = 0; panel < count; panel += step) {
    MS_NAME(linear_tile)
    tile = {
        .panels = panels + panel * stride,
        .stride = stride,
        .count = count - panel < step ? count - panel : step,
        .groups = dense ? k : k / part->group_size,
        .blocks = part->group_size / MS_BLOCK,
        .dtype = part->dtype,
        .x_stride = l->streams.row_bytes,
        .out_stride = out_stride,
    };
    for (uint32_t r = 0; r < rows;) {
      uint32_t log = 0;
      while (2u << log <= rows - r && 2u << log <= MS_TILE_ROWS) ++log;
      tile.x = x + r * l->streams.row_bytes;
      tile.out = out + panel * MS_PANEL_ROWS + r * out_stride;
      tiles[log](&tile);
      r += 1u << log;
    }
  }
}

// One segment on panels [first, first + count) (a chunk's columns at most) and rows [row, end).
static void MS_NAME(run_block)(const MS_NAME(linear) * l, const MSLinearSegment *s, uint32_t first, uint32_t count,
                               uint32_t row, uint32_t end) {
  const MSLinearPart *parts = l->c.parts + s->first_part;
  const uint32_t column = first * MS_PANEL_ROWS, left = parts->n - column, stride = count * MS_PANEL_ROWS;
  const MSInstr *store = MS_NAME(bare_store)(l, s);
  if (store && left < stride) {  // the last panel's padding must not be stored
    if (count > 1) {
      MS_NAME(run_block)(l, s, first, count - 1, row, end);
      MS_NAME(run_block)(l, s, first + count - 1, 1, row, end);
      return;
    }
    store = NULL;
  }
  const uint32_t width = left < stride ? left : stride;
  for (; row < end; row += MS_CHUNK_ROWS) {
    const uint32_t rows = end - row < MS_CHUNK_ROWS ? end - row : MS_CHUNK_ROWS;
    if (store) {
      float *out = (float *)l->args->buffers[store->slot] + store->offset + column + (size_t)row * store->row_stride;
      MS_NAME(multiply)(l, parts, first, count, row, rows, out, store->row_stride);
      continue;
    }
    MS_NAME(prefetch_epilogue)(l->c.epilogues + s->first_instr, s->instrs, width, column, l->args, row, rows);
    for (uint32_t i = 0; i < s->parts; ++i) {
      MS_NAME(multiply)(l, parts + i, first, count, row, rows, l->registers + (size_t)i * rows * stride, stride);
    }
    MS_NAME(run_epilogue)(l->c.epilogues + s->first_instr, s->instrs, l->registers, stride, width, column, l->args, row,
                          rows);
  }
}

// Panels [begin, end) of a round on rows [row, row_end).
static void MS_NAME(run_panels)(const MS_NAME(linear) * l, uint32_t begin, uint32_t end, uint32_t row,
                                uint32_t row_end) {
  const uint32_t rows = row_end - row;
  uint32_t start = 0;  // the segment's first panel
  for (const MSLinearSegment *s = l->c.segments; start < end; ++s) {
    const uint32_t next = start + ms_linear_segment_panels(&l->c, s);
    const uint32_t first = begin > start ? begin : start, last = end < next ? end : next;
    if (first < last) {
      const size_t fit = MS_WEIGHT_BLOCK / ms_linear_segment_bytes(&l->c, s);
      uint32_t most = ms_linear_columns(s->registers, rows) / MS_PANEL_ROWS;
      if (rows > MS_CHUNK_ROWS && most > fit) most = fit ? (uint32_t)fit : 1;  // panels that serve several chunks
      const uint32_t step = ms_linear_step(last - first, most);
      for (uint32_t panel = first; panel < last; panel += step) {
        MS_NAME(run_block)(l, s, panel - start, last - panel < step ? last - panel : step, row, row_end);
      }
    }
    start = next;
  }
}

static void MS_NAME(linear_few)(MS_NAME(linear) * l) {
  const uint32_t thread = (uint32_t)l->args->thread, threads = (uint32_t)l->args->threads;
  const uint32_t first = ms_linear_share(&l->c, 1, thread, threads);
  const uint32_t end = ms_linear_share(&l->c, 1, thread + 1, threads);
  if (first == end) return;
  MS_NAME(prepare_rows)(l, 0, l->rows);
  MS_NAME(run_panels)(l, first, end, 0, l->rows);
}

// Has the first lines of a round's panel on their way while the thread quantises rows and waits for the others.
static void MS_NAME(prefetch_panel)(const MS_NAME(linear) * l, uint32_t panel) {
  const MSLinearSegment *s = l->c.segments;
  for (uint32_t count; panel >= (count = ms_linear_segment_panels(&l->c, s)); ++s) panel -= count;
  for (uint32_t i = 0; i < s->parts; ++i) {
    const MSLinearPart *part = l->c.parts + s->first_part + i;
    const size_t stride = ms_linear_panel_bytes(&l->c, part);
    const uint8_t *at = (const uint8_t *)l->args->buffers[part->slot] + panel * stride;
    for (size_t line = 0; line < stride && line < MS_PREFETCH; line += 64) __builtin_prefetch(at + line, 0, 2);
  }
}

// What is left of the panels [first, end), which `taken` counts, a piece of `step` panels at a time. A round of `round`
// panels is a block of `block_rows` rows.
static void MS_NAME(run_share)(const MS_NAME(linear) * l, uint32_t *taken, uint32_t first, uint32_t end, uint32_t step,
                               uint32_t round, uint32_t block_rows) {
  for (;;) {
    const uint32_t before = __atomic_fetch_add(taken, step, __ATOMIC_RELAXED);
    if (before >= end - first) return;
    const uint32_t piece_end = end - first - before < step ? end : first + before + step;
    for (uint32_t at = first + before; at < piece_end;) {
      const uint32_t panel = at % round, row = at / round * block_rows;
      const uint32_t count = piece_end - at < round - panel ? piece_end - at : round - panel;
      if (row < l->rows) {
        const uint32_t rows = l->rows - row < block_rows ? l->rows - row : block_rows;
        MS_NAME(run_panels)(l, panel, panel + count, row, row + rows);
      }
      at += count;
    }
  }
}

static void MS_NAME(linear_many)(MS_NAME(linear) * l) {
  const uint32_t thread = (uint32_t)l->args->thread, threads = (uint32_t)l->args->threads;
  const uint32_t rounds = (l->rows + MS_ROW_BLOCK - 1) / MS_ROW_BLOCK;
  const uint32_t block_rows = ((l->rows + rounds - 1) / rounds + MS_CHUNK_ROWS - 1) / MS_CHUNK_ROWS * MS_CHUNK_ROWS;
  const uint32_t total = ms_linear_share(&l->c, rounds, threads, threads), round = total / rounds;
  uint8_t *const counters = (uint8_t *)l->args->shared;
#define MS_COUNTER(of) ((uint32_t *)(void *)(counters + (size_t)(of) * MS_COUNTER_BYTES))
  __atomic_store_n(MS_COUNTER(thread), 0, __ATOMIC_RELAXED);
  const uint32_t mine = ms_linear_share(&l->c, rounds, thread, threads);
  if (mine < total) MS_NAME(prefetch_panel)(l, mine % round);
  MS_NAME(prepare_rows)(l, (uint32_t)((uint64_t)l->rows * thread / threads),
                        (uint32_t)((uint64_t)l->rows * (thread + 1) / threads));
  ms_pool_barrier(l->args->pool);

  const uint32_t fair = total / (threads * MS_PIECES), step = fair > MS_PIECE ? MS_PIECE : fair ? fair : 1;
  for (uint32_t i = 0; i < threads; ++i) {
    const uint32_t owner = (thread + i) % threads;
    const uint32_t first = ms_linear_share(&l->c, rounds, owner, threads);
    const uint32_t end = ms_linear_share(&l->c, rounds, owner + 1, threads);
    MS_NAME(run_share)(l, MS_COUNTER(owner), first, end, step, round, block_rows);
  }
#undef MS_COUNTER
}

void MS_NAME(ms_linear)(const ms_host_args *args) {
  MS_NAME(linear) l = {.c = ms_linear_constants_at(args->constants), .args = args};
  const MSStep *step = (const MSStep *)args->buffers[MS_SLOT_STEP];
  l.rows = l.c.params->rows == MS_ROWS_TOKENS ? step->num_tokens : step->num_sampled;
  if (l.rows == 0) return;
  l.streams = ms_linear_streams_of(&l.c);
  const ms_linear_scratch at = ms_linear_scratch_of(&l.c, &l.streams);
  l.prologue_row = (float *)args->scratch;
  l.registers = (float *)(void *)((uint8_t *)args->scratch + at.registers_at);
  if (l.rows <= MS_FEW_ROWS) {
    l.activations = (uint8_t *)args->scratch + at.activations_at;
    MS_NAME(linear_few)(&l);
  } else {
    l.activations = (uint8_t *)args->shared + (size_t)args->threads * MS_COUNTER_BYTES;
    MS_NAME(linear_many)(&l);
  }
}
