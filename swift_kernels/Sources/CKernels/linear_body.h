// linear: epilogue(x · Wᵀ) over packed weights. Reference: kernels/linear.py.
//
// Few rows (decode): each thread quantises them all and takes a contiguous share of the panels; nothing waits. More
// rows: the threads quantise a part each, meet once, and take blocks of columns as they become free.
#include "linear_activation_body.h"
#include "linear_layout.h"
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
  const uint8_t *x = l->activations + row * l->streams.row_bytes + l->streams.offset[ms_stream_of(part->group_size)];
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

// One segment on panels [first, first + count) (at most ms_linear_columns) and rows [row, end).
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
    for (uint32_t i = 0; i < s->parts; ++i) {
      MS_NAME(multiply)(l, parts + i, first, count, row, rows, l->registers + i * (size_t)stride,
                        s->parts * (size_t)stride);
    }
    for (uint32_t m = rows; m-- > 0;) {
      MS_NAME(run_epilogue)(l->c.epilogues + s->first_instr, s->instrs, l->registers + m * s->parts * (size_t)stride,
                            stride, width, column, l->args, row + m);
    }
  }
}

// Bytes of one panel of all parts of a segment.
static size_t MS_NAME(segment_bytes)(const MS_NAME(linear) * l, const MSLinearSegment *s) {
  size_t bytes = 0;
  for (uint32_t i = 0; i < s->parts; ++i) {
    const MSLinearPart *part = l->c.parts + s->first_part + i;
    bytes += ms_panel_stride(l->c.params->k, part->bits, part->group_size, part->dtype);
  }
  return bytes;
}

// Panels of the segment that come before byte `at` of the launch; the segment begins at byte `start`.
static uint32_t MS_NAME(panels_before)(uint64_t at, uint64_t start, size_t panel_bytes, uint32_t panels) {
  if (at <= start) return 0;
  const uint64_t before = (at - start + panel_bytes - 1) / panel_bytes;
  return before < panels ? (uint32_t)before : panels;
}

static void MS_NAME(linear_few)(MS_NAME(linear) * l) {
  const MSLinearParams *p = l->c.params;
  const uint32_t thread = (uint32_t)l->args->thread, threads = (uint32_t)l->args->threads;
  uint64_t total = 0, start = 0;
  for (uint32_t i = 0; i < p->segments; ++i) {
    const MSLinearSegment *s = l->c.segments + i;
    total += MS_NAME(segment_bytes)(l, s) * (uint64_t)ms_panel_count(l->c.parts[s->first_part].n);
  }
  const uint64_t begin = total / threads * thread, end = thread + 1 == threads ? total : total / threads * (thread + 1);
  bool ready = false;
  for (uint32_t i = 0; i < p->segments; ++i) {
    const MSLinearSegment *s = l->c.segments + i;
    const size_t bytes = MS_NAME(segment_bytes)(l, s);
    const uint32_t panels = ms_panel_count(l->c.parts[s->first_part].n);
    uint32_t panel = MS_NAME(panels_before)(begin, start, bytes, panels);
    const uint32_t last = MS_NAME(panels_before)(end, start, bytes, panels);
    const uint32_t step = ms_linear_columns(s->registers, 1) / MS_PANEL_ROWS;
    if (panel < last && !ready) {
      MS_NAME(prepare_rows)(l, 0, l->rows);
      ready = true;
    }
    for (; panel < last; panel += step) {
      MS_NAME(run_block)(l, s, panel, last - panel < step ? last - panel : step, 0, l->rows);
    }
    start += bytes * (uint64_t)panels;
  }
}

// Panels in a block of many rows: what stays in the second-level cache, and small enough that every thread finds work.
static uint32_t MS_NAME(block_panels)(const MS_NAME(linear) * l, const MSLinearSegment *s, uint32_t fair) {
  const size_t fit = MS_WEIGHT_BLOCK / MS_NAME(segment_bytes)(l, s);
  uint32_t panels = ms_linear_columns(s->registers, 0) / MS_PANEL_ROWS;
  if (panels > fit) panels = (uint32_t)fit;
  if (panels > fair) panels = fair;
  return panels ? panels : 1;
}

static void MS_NAME(linear_many)(MS_NAME(linear) * l) {
  const MSLinearParams *p = l->c.params;
  const uint32_t thread = (uint32_t)l->args->thread, threads = (uint32_t)l->args->threads, rows = l->rows;
  uint32_t *next = (uint32_t *)l->args->shared;
  if (thread == 0) __atomic_store_n(next, 0, __ATOMIC_RELAXED);
  MS_NAME(prepare_rows)(l, (uint32_t)((uint64_t)rows * thread / threads),
                        (uint32_t)((uint64_t)rows * (thread + 1) / threads));
  ms_pool_barrier(l->args->pool);

  uint32_t panels = 0, blocks = 0;
  const uint32_t row_blocks = (rows + MS_ROW_BLOCK - 1) / MS_ROW_BLOCK;
  const uint32_t block_rows =
      ((rows + row_blocks - 1) / row_blocks + MS_CHUNK_ROWS - 1) / MS_CHUNK_ROWS * MS_CHUNK_ROWS;
  for (uint32_t i = 0; i < p->segments; ++i) panels += ms_panel_count(l->c.parts[l->c.segments[i].first_part].n);
  const uint64_t fair = (uint64_t)panels * row_blocks / (threads * 8);
  const uint32_t limit = fair < panels ? (uint32_t)fair : panels;
  for (uint32_t i = 0; i < p->segments; ++i) {
    const uint32_t step = MS_NAME(block_panels)(l, l->c.segments + i, limit);
    blocks += (ms_panel_count(l->c.parts[l->c.segments[i].first_part].n) + step - 1) / step;
  }
  for (;;) {
    const uint32_t work = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED), row = work / blocks * block_rows;
    if (work / blocks >= row_blocks || row >= rows) return;
    uint32_t block = work % blocks;
    for (const MSLinearSegment *s = l->c.segments;; ++s) {
      const uint32_t step = MS_NAME(block_panels)(l, s, limit), count = ms_panel_count(l->c.parts[s->first_part].n);
      const uint32_t mine = (count + step - 1) / step;
      if (block >= mine) {
        block -= mine;
        continue;
      }
      const uint32_t first = block * step;
      MS_NAME(run_block)(l, s, first, count - first < step ? count - first : step, row,
                         rows - row < block_rows ? rows : row + block_rows);
      break;
    }
  }
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
    l.activations = (uint8_t *)args->shared + MS_COUNTER_BYTES;
    MS_NAME(linear_many)(&l);
  }
}
