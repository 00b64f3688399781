#include "program_check.h"
#include <stdarg.h>
#include <stdio.h>
#include "kv_codec.h"
#include "panel.h"

typedef struct {
  const MSInstr *in;
  uint64_t registers;
  uint32_t binds;
  uint32_t index;
  bool epilogue;
  const char *kernel;
  char *message;  // 256 bytes
} checked;

#define MS_REQUIRE(condition, ...)                     \
  do {                                                 \
    if (!(condition)) return complain(k, __VA_ARGS__); \
  } while (0)
#define MS_PASS(check)                 \
  do {                                 \
    const char *wrong_ = (check);      \
    if (wrong_ != NULL) return wrong_; \
  } while (0)

__attribute__((format(printf, 2, 3))) static const char *complain(const checked *k, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int at = snprintf(k->message, 256, "%s: instruction %u (op %u): ", k->kernel, k->index, k->in->op);
  vsnprintf(k->message + at, 256 - (size_t)at, format, arguments);
  va_end(arguments);
  return k->message;
}

// `count` elements from a register lie in the scratch row; in an epilogue, the register exists.
static const char *in_row(const checked *k, const char *name, uint32_t start, uint64_t count) {
  if (k->epilogue) count = 1;
  MS_REQUIRE(start != MS_NONE, "operand %s is absent", name);
  MS_REQUIRE(start + count <= k->registers, "%s is %u + %llu, past the %llu of the scratch row", name, start,
             (unsigned long long)count, (unsigned long long)k->registers);
  return NULL;
}

// The result: its last vector is written whole.
static const char *result(const checked *k, uint64_t count) {
  return in_row(k, "dst", k->in->dst, (count + 15) / 16 * 16);
}

// A register operand that the result does not overlap, except by being it.
static const char *operand(const checked *k, const char *name, uint32_t start, uint64_t count, uint64_t results) {
  const uint64_t dst = k->in->dst;
  MS_PASS(in_row(k, name, start, count));
  MS_REQUIRE(k->epilogue || dst == start || dst + results <= start || start + count <= dst,
             "dst %llu overlaps operand %s at %u", (unsigned long long)dst, name, start);
  return NULL;
}

static const char *slot(const checked *k, uint32_t number) {
  MS_REQUIRE(number < k->binds, "slot %u of a launch with %u bindings", number, k->binds);
  return NULL;
}

static const char *spans(const checked *k) {
  MS_REQUIRE(k->in->inner > 0 && k->in->n % k->in->inner == 0, "%u elements are no whole spans of %u", k->in->n,
             k->in->inner);
  return NULL;
}

// GATHER and SCATTER: the strided side stays in [0, registers - base).
static const char *strided(const checked *k, uint32_t base) {
  const MSInstr *in = k->in;
  int64_t least = in->offset, most = in->offset;
  uint64_t count = 1;
  for (int i = 0; i < 4; ++i) {
    MS_REQUIRE(in->dims[i] > 0 && (count *= in->dims[i]) <= in->n, "dims do not multiply to %u", in->n);
    const int64_t reach = ((int64_t)in->dims[i] - 1) * in->strides[i];
    if (reach < 0) least += reach;
    if (reach > 0) most += reach;
  }
  MS_REQUIRE(count == in->n, "dims multiply to %llu, n is %u", (unsigned long long)count, in->n);
  MS_REQUIRE(least >= 0 && base + (uint64_t)most < k->registers,
             "elements %lld to %lld of register %u leave the scratch row", (long long)least, (long long)most, base);
  return NULL;
}

static const char *check_buffer_instr(const checked *k) {
  const MSInstr *in = k->in;
  MS_PASS(slot(k, in->slot));
  MS_REQUIRE(in->dtype <= MS_INT32, "dtype %u is unknown", in->dtype);
  MS_REQUIRE(in->rows <= MS_ROW_SAMPLED, "rows %u is unknown", in->rows);
  if (in->op == MS_OP_LOAD) return result(k, in->n);
  MS_REQUIRE(in->rows != MS_ROW_SAME, "every row would store to the same place");
  return in_row(k, "a", in->a, in->n);
}

// The keys' or the values' plane of the cache; scales: its words before them, which are those of whole blocks.
static const char *plane(const checked *k, uint32_t codec, uint32_t dim, uint32_t scales) {
  const uint64_t vectors = (uint64_t)k->in->dims[0] * k->in->dims[3];  // in a block
  MS_REQUIRE(ms_kv_known(codec), "the cache has no codec %u", codec);
  MS_REQUIRE(ms_kv_dim_ok(codec, dim), "codec %u does not take vectors of %u", codec, dim);
  if (ms_kv_is_float(codec)) {
    MS_REQUIRE(scales == 0, "scales at %u of a plane of floats", scales);
    return NULL;
  }
  MS_REQUIRE(scales > 0 && scales % vectors == 0 && scales / vectors % ms_kv_words(codec, dim) == 0,
             "scales at %u are not behind blocks of %llu vectors of %u words", scales, (unsigned long long)vectors,
             ms_kv_words(codec, dim));
  return NULL;
}

static const char *check_kv_write(const checked *k) {
  const MSInstr *in = k->in;
  const uint64_t keys = (uint64_t)in->dims[0] * in->dims[1], values = (uint64_t)in->dims[0] * in->dims[2];
  MS_REQUIRE(keys > 0 && values > 0 && in->dims[3] > 0, "heads, dims and block_size must not be 0");
  MS_REQUIRE(keys == in->n, "%u keys of %u heads of %u", in->n, in->dims[0], in->dims[1]);
  MS_REQUIRE((in->imm & 3) <= MS_KV_SCALE_UNBIASED && in->imm >> 2 <= MS_KV_SCALE_UNBIASED, "imm %u is no ms_kv_scales",
             in->imm);
  MS_PASS(slot(k, in->slot));
  MS_PASS(slot(k, in->slot2));
  MS_PASS(plane(k, in->dtype, in->dims[1], in->offset));
  MS_PASS(plane(k, in->inner, in->dims[2], in->row_stride));
  MS_PASS(in_row(k, "a", in->a, keys));
  return in_row(k, "b", in->b, values);
}

static const char *check_rope(const checked *k) {
  const MSInstr *in = k->in;
  MS_PASS(spans(k));
  MS_REQUIRE(in->dims[0] > 0 && in->dims[0] <= in->inner / 2, "rotates 2 * %u elements of heads of %u", in->dims[0],
             in->inner);
  MS_PASS(result(k, in->n));
  MS_PASS(operand(k, "a", in->a, in->n, in->n));
  return operand(k, "b", in->b, 2 * (uint64_t)in->dims[0], in->n);
}

static const char *check_norm(const checked *k) {
  const MSInstr *in = k->in;
  MS_PASS(spans(k));
  MS_PASS(result(k, in->n));
  MS_PASS(operand(k, "a", in->a, in->n, in->n));
  if (in->b != MS_NONE) MS_PASS(operand(k, "b", in->b, in->inner, in->n));
  if (in->op == MS_OP_LAYER_NORM && in->c != MS_NONE) MS_PASS(operand(k, "c", in->c, in->inner, in->n));
  return NULL;
}

// Instructions other than the elementwise ones, in a row program.
static const char *check_row_instr(const checked *k) {
  const MSInstr *in = k->in;
  const char *problem;
  MS_REQUIRE(in->imm == 0 || in->op == MS_OP_KV_WRITE, "takes no scalar operands");
  switch (in->op) {
    case MS_OP_LOAD:
    case MS_OP_STORE:
      return check_buffer_instr(k);
    case MS_OP_GATHER:
      MS_PASS(result(k, in->n));
      MS_PASS(in_row(k, "a", in->a, 1));
      return strided(k, in->a);
    case MS_OP_SCATTER:
      MS_REQUIRE(in->inner <= MS_MIN, "ms_combine %u is unknown", in->inner);
      MS_PASS(in_row(k, "a", in->a, in->n));
      MS_PASS(in_row(k, "dst", in->dst, 1));
      return strided(k, in->dst);
    case MS_OP_EMBEDDING:
      MS_PASS(slot(k, in->slot));
      MS_PASS(slot(k, in->slot2));
      problem = ms_panel_problem(in->dims[3], in->n, in->dims[0], in->dims[1], in->dims[2]);
      MS_REQUIRE(problem == NULL, "a table of %u rows of %u: %s", in->dims[3], in->n, problem);
      return result(k, in->n);
    case MS_OP_ROPE_ANGLES:
      MS_REQUIRE(in->b != MS_NONE || in->imm0 > 0, "base %g is not positive", (double)in->imm0);
      MS_PASS(result(k, 2 * (uint64_t)in->n));
      return in->b == MS_NONE ? NULL : operand(k, "b", in->b, in->n, 2 * (uint64_t)in->n);
    case MS_OP_ROPE:
      return check_rope(k);
    case MS_OP_RMS_NORM:
    case MS_OP_LAYER_NORM:
      return check_norm(k);
    case MS_OP_SOFTMAX:
      MS_PASS(spans(k));
      MS_PASS(result(k, in->n));
      return operand(k, "a", in->a, in->n, in->n);
    case MS_OP_REDUCE:
      MS_REQUIRE(in->inner > 0, "inner is 0");
      MS_REQUIRE(in->dims[0] >= MS_SUM && in->dims[0] <= MS_MIN, "reduction %u is unknown", in->dims[0]);
      MS_PASS(result(k, in->n));
      return operand(k, "a", in->a, (uint64_t)in->n * in->inner, in->n);
    case MS_OP_KV_WRITE:
      return check_kv_write(k);
    default:
      return complain(k, "unknown");
  }
}

// How many operands an elementwise instruction has; 0: there is no such instruction.
static uint32_t elementwise_operands(uint32_t op) {
  if (op >= MS_OP_COPY && op <= MS_OP_NOT) return 1;
  if (op >= MS_OP_ADD && op <= MS_OP_FLOOR_DIV) return 2;
  return op == MS_OP_SELECT ? 3 : 0;
}

static const char *check_elementwise(const checked *k) {
  const MSInstr *in = k->in;
  const uint32_t operands = elementwise_operands(in->op), numbers[3] = {in->a, in->b, in->c};
  static const char *const names[3] = {"a", "b", "c"};
  MS_REQUIRE(operands > 0, "unknown");
  MS_PASS(result(k, in->n));
  for (uint32_t i = 0; i < operands; ++i) {
    if (in->imm >> i & 1) continue;
    MS_PASS(operand(k, names[i], numbers[i], in->n, in->n));
  }
  return NULL;
}

const char *ms_program_check(const MSInstr *instrs, uint32_t count, uint32_t registers, uint32_t binds, bool epilogue,
                             const char *kernel, char message[256]) {
  for (uint32_t i = 0; i < count; ++i) {
    checked of = {&instrs[i], registers, binds, i, epilogue, kernel, message};
    const checked *k = &of;
    const uint32_t op = instrs[i].op;
    if (!epilogue) of.registers = ((uint64_t)registers + 15) / 16 * 16;
    if (epilogue) {
      MS_REQUIRE(instrs[i].n == 0, "n is %u; an epilogue's instructions have n = 0", instrs[i].n);
      MS_REQUIRE(op >= MS_OP_COPY || op == MS_OP_LOAD || op == MS_OP_STORE, "not possible in an epilogue");
    } else {
      MS_REQUIRE(instrs[i].n > 0, "n is 0");
    }
    MS_PASS(op < MS_OP_COPY ? check_row_instr(k) : check_elementwise(k));
  }
  return NULL;
}
