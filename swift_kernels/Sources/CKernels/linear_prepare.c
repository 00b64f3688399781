// Checks of a linear's constants when a plan is made, and its scratch.
#include <stdio.h>

#include "linear_layout.h"
#include "prepare.h"

#define REFUSE(...)                      \
  do {                                   \
    snprintf(message, 256, __VA_ARGS__); \
    return message;                      \
  } while (0)

static const char *check_sizes(const MSLinearParams *p, uint32_t const_bytes, uint64_t *instrs, char message[256]) {
  const uint64_t head =
      sizeof *p + (uint64_t)p->parts * sizeof(MSLinearPart) + (uint64_t)p->segments * sizeof(MSLinearSegment);
  if (p->parts == 0 || p->segments == 0) {
    REFUSE("linear: %u parts and %u segments; expected at least one of each", p->parts, p->segments);
  }
  if (head > const_bytes || (const_bytes - head) % sizeof(MSInstr) != 0) {
    REFUSE("linear: %u bytes of constants do not hold %u parts, %u segments and whole instructions", const_bytes,
           p->parts, p->segments);
  }
  *instrs = (const_bytes - head) / sizeof(MSInstr);
  if (p->prologue > *instrs)
    REFUSE("linear: the prologue has %u instructions; the constants hold %u", p->prologue, (uint32_t)*instrs);
  return NULL;
}

static const char *check_input(const MSLinearParams *p, uint32_t binds, char message[256]) {
  if (p->rows != MS_ROWS_TOKENS && p->rows != MS_ROWS_SAMPLED) REFUSE("linear: rows is %u, not an ms_rows", p->rows);
  if (p->k == 0) REFUSE("linear: k is 0");
  if (p->arithmetic != MS_ARITHMETIC_INT16 && p->arithmetic != MS_ARITHMETIC_INT8) {
    REFUSE("linear: arithmetic is %u, not an ms_arithmetic", p->arithmetic);
  }
  if (binds < MS_SLOT_FIRST) REFUSE("linear: %u bindings; the first %d are the step's", binds, (int)MS_SLOT_FIRST);
  if (p->prologue) {
    if (p->prologue_result > p->registers || p->k > p->registers - p->prologue_result) {
      REFUSE("linear: the prologue's result [%u, %u + k = %u) is outside its %u registers", p->prologue_result,
             p->prologue_result, p->k, p->registers);
    }
    return NULL;
  }
  if (p->x_slot >= binds) REFUSE("linear: x is in slot %u of %u bindings", p->x_slot, binds);
  if (p->x_rows > MS_ROW_SAMPLED) REFUSE("linear: x_rows is %u, not an ms_row_address", p->x_rows);
  return NULL;
}

// Every thread runs the prologue for itself, so it may not change what another reads.
static const char *check_prologue(const ms_linear_constants *c, uint32_t binds, char message[256]) {
  for (uint32_t i = 0; i < c->params->prologue; ++i) {
    const uint32_t op = c->prologue[i].op;
    if (op == MS_OP_STORE || op == MS_OP_KV_WRITE) {
      REFUSE("linear: instruction %u of the prologue writes a buffer; a prologue may only read (use a row_program)", i);
    }
  }
  if (c->params->prologue == 0) return NULL;
  return ms_program_check(c->prologue, c->params->prologue, c->params->registers, binds, false, "linear (prologue)",
                          message);
}

static const char *check_part(const ms_linear_constants *c, uint32_t i, uint32_t binds, char message[256]) {
  const MSLinearPart *part = &c->parts[i];
  const char *problem = ms_panel_problem(part->n, c->params->k, part->bits, part->group_size, part->dtype);
  if (problem) {
    REFUSE("linear: part %u (n %u, k %u, %u bits, groups of %u, dtype %u): %s", i, part->n, c->params->k, part->bits,
           part->group_size, part->dtype, problem);
  }
  if (part->slot >= binds) REFUSE("linear: part %u is in slot %u of %u bindings", i, part->slot, binds);
  return NULL;
}

static const char *check_segment(const ms_linear_constants *c, uint32_t i, uint32_t binds, uint64_t epilogues,
                                 char message[256]) {
  const MSLinearSegment *s = &c->segments[i];
  if (s->parts == 0 || s->first_part > c->params->parts || s->parts > c->params->parts - s->first_part) {
    REFUSE("linear: segment %u has parts [%u, %u + %u) of %u", i, s->first_part, s->first_part, s->parts,
           c->params->parts);
  }
  for (uint32_t j = 1; j < s->parts; ++j) {
    const uint32_t n = c->parts[s->first_part].n, other = c->parts[s->first_part + j].n;
    if (n != other) REFUSE("linear: the parts of segment %u have n = %u and %u; they must agree", i, n, other);
  }
  if (s->first_instr > epilogues || s->instrs > epilogues - s->first_instr) {
    REFUSE("linear: segment %u has instructions [%u, %u + %u) of %u", i, s->first_instr, s->first_instr, s->instrs,
           (uint32_t)epilogues);
  }
  if (s->registers < s->parts) {
    REFUSE("linear: segment %u has %u registers for the products of %u parts", i, s->registers, s->parts);
  }
  if (s->registers > 4096) REFUSE("linear: segment %u has %u registers; at most 4096 are supported", i, s->registers);
  return ms_program_check(c->epilogues + s->first_instr, s->instrs, s->registers, binds, true, "linear (epilogue)",
                          message);
}

MS_PREPARE(linear) {
  if (const_bytes < sizeof(MSLinearParams)) {
    REFUSE("linear: %u bytes of constants; MSLinearParams alone has %zu", const_bytes, sizeof(MSLinearParams));
  }
  const MSLinearParams *p = (const MSLinearParams *)constants;
  uint64_t instrs = 0;
  const char *problem = check_sizes(p, const_bytes, &instrs, message);
  if (!problem) problem = check_input(p, binds, message);
  if (problem) return problem;
  const ms_linear_constants c = ms_linear_constants_at(constants);
  problem = check_prologue(&c, binds, message);
  for (uint32_t i = 0; i < p->parts && !problem; ++i) problem = check_part(&c, i, binds, message);
  for (uint32_t i = 0; i < p->segments && !problem; ++i) {
    problem = check_segment(&c, i, binds, instrs - p->prologue, message);
  }
  if (problem) return problem;
  const ms_linear_streams streams = ms_linear_streams_of(&c);
  scratch->per_thread = ms_linear_scratch_of(&c, &streams).bytes;
  const uint64_t rows = p->rows == MS_ROWS_TOKENS ? max_tokens : max_sampled;
  scratch->shared = rows > MS_FEW_ROWS ? (uint64_t)threads * MS_COUNTER_BYTES + rows * streams.row_bytes : 0;
  return NULL;
}
