// Random row programs, most of them plausible, and constants with one word changed.
#include <string.h>
#include "driver.h"
#include "kv_codec.h"

enum { ROWS = 5, REGISTERS = 512, ELEMENTS = 4096, BLOCKS = 4, MAX_INSTRS = 12 };
enum { IN = MS_SLOT_FIRST, OUT, K_PLANE, V_PLANE, TABLE };
enum { TABLE_ROWS = 20, TABLE_WIDTH = 64, KV_HEADS = 2, BLOCK_SIZE = 16, MAX_HEAD_DIM = 128 };

typedef struct {
  MSRowProgramParams p;
  MSInstr instrs[MAX_INSTRS];
} program;

static uint32_t store_dtype;  // of a program: rows of different widths in one buffer would overlap

static uint32_t kv_codecs[2], kv_dims[2];  // of a program's planes, keys and values

// Bytes of a plane of the cache, exactly; scales: its words before them.
static uint64_t plane_bytes(int which, uint32_t *scales) {
  const uint32_t codec = kv_codecs[which], dim = kv_dims[which], vectors = BLOCKS * KV_HEADS * BLOCK_SIZE;
  *scales = 0;
  if (ms_kv_is_float(codec)) return (uint64_t)vectors * dim * ms_kv_bits(codec) / 8;
  *scales = vectors * ms_kv_words(codec, dim);
  const uint32_t each = ms_kv_wide(codec) ? 4 : ms_kv_is_turbo(codec) ? 2 : 4 * ms_kv_groups(codec, dim);
  return 4 * (uint64_t)*scales + (uint64_t)vectors * each;
}

static void random_planes(void) {
  static const uint32_t codecs[] = {MS_KV_FLOAT32, MS_KV_FLOAT16, MS_KV_BFLOAT16, MS_KV_TURBO2,
                                    MS_KV_TURBO3,  MS_KV_TURBO4,  MS_KV_AFFINE8,  MS_KV_TURBO3 | MS_KV_WIDE_SCALES};
  static const uint32_t dims[] = {16, 48, 64, 80, 96, 112, MAX_HEAD_DIM};
  for (int i = 0; i < 2; ++i) kv_codecs[i] = codecs[random_below(8)], kv_dims[i] = dims[random_below(7)];
}

static uint32_t random_register(void) { return 16 * random_below(REGISTERS / 16 - 4); }

// An instruction that the check accepts more often than not; buffers are long enough for any.
static MSInstr random_instr(void) {
  static const uint32_t ops[] = {MS_OP_LOAD,       MS_OP_STORE,       MS_OP_GATHER, MS_OP_SCATTER,
                                 MS_OP_EMBEDDING,  MS_OP_ROPE_ANGLES, MS_OP_ROPE,   MS_OP_RMS_NORM,
                                 MS_OP_LAYER_NORM, MS_OP_SOFTMAX,     MS_OP_REDUCE, MS_OP_KV_WRITE};
  const uint32_t elementwise = random_below(2) == 0;
  const uint32_t op = elementwise ? MS_OP_COPY + random_below(MS_OP_SELECT - MS_OP_COPY + 1) : ops[random_below(12)];
  MSInstr in = {.op = op,
                .dst = random_register(),
                .a = random_register(),
                .b = random_register(),
                .c = random_register(),
                .n = 1 + random_below(100),
                .imm0 = random_float() + 1,
                .imm1 = random_float(),
                .imm2 = random_float()};
  in.dtype = random_below(4);
  in.rows = random_below(3);
  in.inner = 1;
  if (elementwise) in.imm = random_below(8);
  switch (op) {
    case MS_OP_LOAD:
      in.slot = IN, in.offset = random_below(100), in.row_stride = random_below(200);
      break;
    case MS_OP_STORE:
      in.slot = OUT, in.rows = MS_ROW_SELF, in.row_stride = 200, in.offset = random_below(100);
      break;
    case MS_OP_GATHER:
    case MS_OP_SCATTER:
      in.inner = random_below(5);
      in.n = 1;
      for (int i = 0; i < 4; ++i)
        in.n *= in.dims[i] = 1 + random_below(3), in.strides[i] = (int32_t)random_below(17) - 8;
      in.offset = random_below(64);
      break;
    case MS_OP_EMBEDDING:
      in.slot = TABLE, in.slot2 = IN, in.n = TABLE_WIDTH;
      memcpy(in.dims, (uint32_t[]){32, 0, MS_FLOAT32, TABLE_ROWS}, sizeof in.dims);
      break;
    case MS_OP_ROPE:
      in.inner = 2 + random_below(40);
      in.n = in.inner * (1 + random_below(3));
      in.dims[0] = 1 + random_below(in.inner / 2), in.dims[1] = random_below(2);
      break;
    case MS_OP_RMS_NORM:
    case MS_OP_LAYER_NORM:
    case MS_OP_SOFTMAX:
      in.inner = 1 + random_below(50), in.n = in.inner * (1 + random_below(3));
      break;
    case MS_OP_REDUCE:
      in.inner = 1 + random_below(50), in.n = 1 + random_below(3), in.dims[0] = 1 + random_below(4);
      break;
    case MS_OP_KV_WRITE:
      in.slot = K_PLANE, in.slot2 = V_PLANE, in.n = KV_HEADS * kv_dims[0];
      in.dtype = kv_codecs[0], in.inner = kv_codecs[1], in.imm = random_below(3) + 4 * random_below(3);
      plane_bytes(0, &in.offset), plane_bytes(1, &in.row_stride);
      memcpy(in.dims, (uint32_t[]){KV_HEADS, kv_dims[0], kv_dims[1], BLOCK_SIZE}, sizeof in.dims);
      break;
    default:
      break;
  }
  return in;
}

static void bind_program(launch *l, uint32_t rows) {
  const MSStep step = {.num_tokens = rows, .num_sampled = rows, .num_seqs = 1, .max_blocks = 1};
  launch_bind(l, &step, sizeof step);
  for (int slot = MS_SLOT_TOKENS; slot < MS_SLOT_FIRST; ++slot) {
    int32_t *values = launch_bind(l, NULL, rows * sizeof(int32_t));
    for (uint32_t i = 0; i < rows; ++i) {
      values[i] = (int32_t)random_below(TABLE_ROWS + 4) - 2;  // with embeddings of the caller, and what is no token
      if (slot == MS_SLOT_POSITIONS) values[i] = (int32_t)random_below(200000);
      if (slot == MS_SLOT_SLOT_MAPPING)
        values[i] = i % 2 ? -1 : (int32_t)(i * BLOCK_SIZE / 2);  // no two rows the same place
      if (slot == MS_SLOT_SAMPLED_ROWS) values[i] = (int32_t)random_below(rows);
    }
  }
  random_planes();
  for (int slot = IN; slot <= OUT; ++slot) launch_bind_floats(l, ELEMENTS);
  for (int i = 0; i < 2; ++i) {
    uint32_t scales;
    launch_bind(l, NULL, plane_bytes(i, &scales));
  }
  launch_bind_floats(l, (TABLE_ROWS + 15) / 16 * 16 * TABLE_WIDTH);
  l->rows = l->grid[0] = rows;
}

// A program of instructions that are accepted one by one.
static program random_program(int32_t isa, const launch *bound) {
  program made = {.p = {MS_ROWS_TOKENS, 0, REGISTERS}};
  store_dtype = random_below(4);
  const uint32_t wanted = 1 + random_below(MAX_INSTRS);
  for (int tries = 0; tries < 200 && made.p.instrs < wanted; ++tries) {
    launch l = *bound;
    program one = {.p = {MS_ROWS_TOKENS, 1, REGISTERS}, .instrs = {random_instr()}};
    launch_constants(&l, &one, sizeof one.p + sizeof(MSInstr));
    l.rows = 0;
    ((MSStep *)l.buffers[MS_SLOT_STEP])->num_tokens = 0;  // checked, not run
    if (launch_run(&l, isa, 1)) made.instrs[made.p.instrs++] = one.instrs[0];
    ((MSStep *)l.buffers[MS_SLOT_STEP])->num_tokens = bound->rows;
    free(l.constants);
  }
  return made;
}

void try_row_program(int32_t isa) {
  launch l = {.kernel = "row_program"};
  bind_program(&l, random_below(ROWS + 1));
  const program made = random_program(isa, &l);
  launch_constants(&l, &made, sizeof made.p + made.p.instrs * sizeof(MSInstr));
  if (!launch_run(&l, isa, 1 + (int32_t)random_below(MAX_THREADS))) fail("refused", &l);
  launch_free(&l);
}

void try_broken_constants(int32_t isa) {
  for (int i = 0; i < 40; ++i) {
    launch l = {.kernel = "row_program"};
    bind_program(&l, 2);
    program broken = {.p = {MS_ROWS_TOKENS, 1, REGISTERS}, .instrs = {random_instr()}};
    MSInstr *in = &broken.instrs[0];
    const uint32_t values[] = {0,
                               1,
                               15,
                               16,
                               17,
                               63,
                               REGISTERS - 16,
                               REGISTERS - 1,
                               REGISTERS,
                               0x7fffffff,
                               0x80000000,
                               0xfffffff0,
                               0xffffffff,
                               random_below(REGISTERS)};
    uint32_t *const words[] = {&in->dst,
                               &in->a,
                               &in->b,
                               &in->c,
                               &in->n,
                               &in->inner,
                               &in->dims[0],
                               &in->dims[1],
                               &in->dims[2],
                               &in->dims[3],
                               (uint32_t *)&in->strides[0],
                               (uint32_t *)&in->strides[3],
                               &in->imm};
    // What a buffer's length must follow is left alone: the check does not know how long buffers are.
    const bool buffers =
        in->op == MS_OP_LOAD || in->op == MS_OP_STORE || in->op == MS_OP_KV_WRITE || in->op == MS_OP_EMBEDDING;
    *words[random_below(buffers ? 4 : 13)] = values[random_below(14)];
    if (random_below(10) == 0) in->slot = 100;
    launch_constants(&l, &broken, sizeof broken.p + sizeof(MSInstr));
    if (random_below(10) == 0) --l.const_bytes;
    launch_run(&l, isa, 1);
    launch_free(&l);
  }
}
