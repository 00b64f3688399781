// The interpreter of row programs (MSInstr in params.h): one row, in a scratch row of float32 registers.
//
// A register's last vector is computed whole: registers are padded to 16 elements, and the scratch row has
// MS_PROGRAM_SLACK elements behind its last register. Buffers are never touched beyond the n elements of a LOAD or
// STORE.
typedef struct {
  uint32_t row;
  uint32_t column;  // the first of an epilogue's columns; 0 in a row program
  const ms_host_args *args;
} MS_NAME(program);

// The first element (of the block's columns) in the row that `rows` (ms_row_address) names.
MS_VEC int64_t MS_NAME(row_start)(const MS_NAME(program) * p, const MSInstr *in) {
  int64_t row = 0;
  if (in->rows == MS_ROW_SELF) row = p->row;
  if (in->rows == MS_ROW_SAMPLED) row = ((const int32_t *)p->args->buffers[MS_SLOT_SAMPLED_ROWS])[p->row];
  return in->offset + p->column + row * in->row_stride;
}

static void MS_NAME(run_row_instr)(const MS_NAME(program) * p, const MSInstr *in, uint32_t n, float *dst,
                                   const float *a, const float *b, const float *c) {
  void *const *buffers = p->args->buffers;
  switch (in->op) {
    case MS_OP_LOAD:
      MS_NAME(load_row)(dst, buffers[in->slot], MS_NAME(row_start)(p, in), n, in->dtype);
      break;
    case MS_OP_STORE:
      MS_NAME(store_row)(a, buffers[in->slot], MS_NAME(row_start)(p, in), n, in->dtype);
      break;
    case MS_OP_GATHER:
    case MS_OP_SCATTER:
      MS_NAME(strided_copy)(dst, a, in);
      break;
    case MS_OP_EMBEDDING: {
      const int32_t token = ((const int32_t *)buffers[MS_SLOT_TOKENS])[p->row];
      if (token >= 0 && (uint32_t)token < in->dims[3]) {
        MS_NAME(panel_row)(buffers[in->slot], (uint32_t)token, n, in->dims[0], in->dims[1], in->dims[2], dst);
      } else if (token < 0) {
        MS_NAME(load_row)(dst, buffers[in->slot2], (-(int64_t)token - 1) * n, n, MS_FLOAT32);
      } else {  // not a token: NaN, which sampling reports
        for (uint32_t i = 0; i < n; ++i) dst[i] = __builtin_nanf("");
      }
      break;
    }
    case MS_OP_ROPE_ANGLES:
      MS_NAME(rope_angles)(dst, b, in, ((const int32_t *)buffers[MS_SLOT_POSITIONS])[p->row]);
      break;
    case MS_OP_ROPE:
      MS_NAME(rope)(dst, a, b, in);
      break;
    case MS_OP_RMS_NORM:
    case MS_OP_LAYER_NORM:
      MS_NAME(norm)(dst, a, b, in->op == MS_OP_LAYER_NORM ? c : NULL, in);
      break;
    case MS_OP_SOFTMAX:
      MS_NAME(softmax)(dst, a, n, in->inner);
      break;
    case MS_OP_REDUCE:
      MS_NAME(reduce)(dst, a, n, in->inner, in->dims[0]);
      break;
    case MS_OP_KV_WRITE:
      MS_NAME(kv_write)(a, b, in, ((const int32_t *)buffers[MS_SLOT_SLOT_MAPPING])[p->row], buffers[in->slot],
                        buffers[in->slot2]);
      break;
    default:
      break;  // not reached: ms_program_check
  }
}

#define MS_EACH(op_, lines_)                                 \
  case op_:                                                  \
    for (uint32_t i = 0; i < n; i += 16, a += as, b += bs) { \
      lines_;                                                \
    }                                                        \
    break;
#define MS_UNARY(op_, result_) MS_EACH(op_, const f32x16 x = vload(a); vstore(dst + i, result_))
#define MS_BINARY(op_, result_) \
  MS_EACH(op_, const f32x16 x = vload(a); const f32x16 y = vload(b); vstore(dst + i, result_))
#define MS_TRUTH(op_, condition_) MS_BINARY(op_, (condition_) ? vsplat(1) : vsplat(0))
// Rare functions, by libm. The last vector's padding is left as it is.
#define MS_LIBM(op_, result_)          \
  case op_:                            \
    for (uint32_t i = 0; i < n; ++i) { \
      const float x = a[as ? i : 0];   \
      dst[i] = (result_);              \
    }                                  \
    break;
#define MS_LIBM2(op_, result_)                          \
  case op_:                                             \
    for (uint32_t i = 0; i < n; ++i) {                  \
      const float x = a[as ? i : 0], y = b[bs ? i : 0]; \
      dst[i] = (result_);                               \
    }                                                   \
    break;

MS_VEC float MS_NAME(remainder)(float x, float y) {
  const float r = fmodf(x, y);
  return r != 0.0f && (r < 0.0f) != (y < 0.0f) ? r + y : r;
}
MS_VEC float MS_NAME(logaddexp)(float x, float y) {
  if (x != x || y != y) return x + y;
  const float most = x > y ? x : y, least = x > y ? y : x;
  if (most == __builtin_inff() || least == -__builtin_inff()) return most;
  return most + log1pf(expf(least - most));
}

// Elementwise: n elements, operands advance by as, bs, cs elements a vector (0: a scalar repeated).
static void MS_NAME(run_elementwise)(const MSInstr *in, uint32_t n, float *dst, const float *a, uint32_t as,
                                     const float *b, uint32_t bs, const float *c, uint32_t cs) {
  uint32_t op = in->op;
  if (op == MS_OP_POW && !bs && (b[0] == 2.0f || b[0] == 3.0f)) op = b[0] == 2.0f ? MS_OP_SQUARE : MS_CUBE;
  switch (op) {
    MS_UNARY(MS_OP_COPY, x)
    MS_UNARY(MS_OP_NEG, -x)
    MS_UNARY(MS_OP_ABS, vabs(x))
    MS_UNARY(MS_OP_SIGN, x > 0.0f ? vsplat(1) : x < 0.0f ? vsplat(-1) : vsplat(0))
    MS_UNARY(MS_OP_SQUARE, x * x)
    MS_UNARY(MS_CUBE, x * x * x)
    MS_UNARY(MS_OP_SQRT, vsqrt(x))
    MS_UNARY(MS_OP_RSQRT, 1.0f / vsqrt(x))
    MS_UNARY(MS_OP_EXP, vexp(x))
    MS_UNARY(MS_OP_LOG, vlog(x))
    MS_UNARY(MS_OP_SIGMOID, vsigmoid(x))
    MS_UNARY(MS_OP_TANH, vtanh(x))
    MS_UNARY(MS_OP_ERF, verf(x))
    MS_UNARY(MS_OP_FLOOR, vfloor(x))
    MS_UNARY(MS_OP_CEIL, vceil(x))
    MS_UNARY(MS_OP_ROUND, vround(x))
    MS_UNARY(MS_OP_TRUNC, vtrunc(x))
    MS_UNARY(MS_OP_TO_F16, vfrom_f16(vto_f16(x)))
    MS_UNARY(MS_OP_TO_BF16, vfrom_bf16(vto_bf16(x)))
    MS_UNARY(MS_OP_NOT, x == 0.0f ? vsplat(1) : vsplat(0))
    MS_LIBM(MS_OP_EXPM1, expm1f(x))
    MS_LIBM(MS_OP_LOG2, log2f(x))
    MS_LIBM(MS_OP_LOG10, log10f(x))
    MS_LIBM(MS_OP_LOG1P, log1pf(x))
    MS_LIBM(MS_OP_SIN, sinf(x))
    MS_LIBM(MS_OP_COS, cosf(x))
    MS_BINARY(MS_OP_ADD, x + y)
    MS_BINARY(MS_OP_SUB, x - y)
    MS_BINARY(MS_OP_MUL, x * y)
    MS_BINARY(MS_OP_DIV, x / y)
    MS_BINARY(MS_OP_MAX, vmax_nan(x, y))
    MS_BINARY(MS_OP_MIN, vmin_nan(x, y))
    MS_BINARY(MS_OP_FLOOR_DIV, vfloor(x / y))
    MS_TRUTH(MS_OP_GT, x > y)
    MS_TRUTH(MS_OP_GE, x >= y)
    MS_TRUTH(MS_OP_LT, x < y)
    MS_TRUTH(MS_OP_LE, x <= y)
    MS_TRUTH(MS_OP_EQ, x == y)
    MS_TRUTH(MS_OP_NE, x != y)
    MS_TRUTH(MS_OP_AND, (x != 0.0f) & (y != 0.0f))
    MS_TRUTH(MS_OP_OR, (x != 0.0f) | (y != 0.0f))
    MS_LIBM2(MS_OP_POW, powf(x, y))
    MS_LIBM2(MS_OP_REMAINDER, MS_NAME(remainder)(x, y))
    MS_LIBM2(MS_OP_LOGADDEXP, MS_NAME(logaddexp)(x, y))
    MS_LIBM2(MS_OP_ARCTAN2, atan2f(x, y))
    case MS_OP_SELECT:
      for (uint32_t i = 0; i < n; i += 16, a += as, b += bs, c += cs) {
        vstore(dst + i, vload(a) != 0.0f ? vload(b) : vload(c));
      }
      break;
    default:
      break;  // not reached: ms_program_check
  }
}

// Where the operands of an instruction are: registers of `stride` elements each, or `scalars` filled with an immediate.
// An elementwise instruction goes on by `steps` elements from vector to vector.
typedef struct {
  _Alignas(64) float scalars[3][16];
  const float *at[3];
  uint32_t steps[3];
} MS_NAME(operands);

MS_VEC void MS_NAME(find_operands)(MS_NAME(operands) * o, const MSInstr *in, const float *regs, size_t stride) {
  const uint32_t numbers[3] = {in->a, in->b, in->c};
  const float immediates[3] = {in->imm0, in->imm1, in->imm2};
  const uint32_t scalars = in->op >= MS_OP_COPY ? in->imm : 0;  // a KV_WRITE's are no operands
  for (uint32_t i = 0; i < 3; ++i) {
    o->at[i] = numbers[i] == MS_NONE ? NULL : regs + numbers[i] * stride;
    o->steps[i] = o->at[i] == NULL ? 0 : 16;  // an absent operand is not advanced: NULL + 16 is undefined
    if (scalars >> i & 1) {
      vstore(o->scalars[i], vsplat(immediates[i]));
      o->at[i] = o->scalars[i];
      o->steps[i] = 0;
    }
  }
}

MS_VEC void MS_NAME(run_found)(const MSInstr *in, uint32_t n, float *dst, const MS_NAME(operands) * o) {
  MS_NAME(run_elementwise)(in, n, dst, o->at[0], o->steps[0], o->at[1], o->steps[1], o->at[2], o->steps[2]);
}

// A row program on one row. regs: the scratch row, 64-byte aligned, MS_PROGRAM_SLACK elements longer than its
// registers.
static void MS_NAME(run_program)(const MSInstr *instrs, uint32_t count, float *regs, const ms_host_args *args,
                                 uint32_t row) {
  const MS_NAME(program) program = {row, 0, args};
  MS_NAME(operands) o;
  for (const MSInstr *in = instrs; in != instrs + count; ++in) {
    MS_NAME(find_operands)(&o, in, regs, 1);
    if (in->op < MS_OP_COPY) {
      MS_NAME(run_row_instr)(&program, in, in->n, regs + in->dst, o.at[0], o.at[1], o.at[2]);
    } else {
      MS_NAME(run_found)(in, in->n, regs + in->dst, &o);
    }
  }
}

// An epilogue on columns [column, column + width) of rows [row, row + rows): register r of row m is at
// regs + (r * rows + m) * stride, stride the width rounded up to 16. LOAD and STORE add `column` to the element offset.
static void MS_NAME(run_epilogue)(const MSInstr *instrs, uint32_t count, float *regs, uint32_t stride, uint32_t width,
                                  uint32_t column, const ms_host_args *args, uint32_t row, uint32_t rows) {
  MS_NAME(operands) o;
  const uint32_t elements = rows * stride;
  for (const MSInstr *in = instrs; in != instrs + count; ++in) {
    MS_NAME(find_operands)(&o, in, regs, elements);
    if (in->op >= MS_OP_COPY) {
      MS_NAME(run_found)(in, elements, regs + in->dst * (size_t)elements, &o);
      continue;
    }
    for (uint32_t m = 0; m < rows; ++m) {
      const MS_NAME(program) program = {row + m, column, args};
      const int64_t at = MS_NAME(row_start)(&program, in);
      if (in->op == MS_OP_LOAD) {
        float *const to = regs + in->dst * (size_t)elements + m * (size_t)stride;
        MS_NAME(load_row)(to, args->buffers[in->slot], at, width, in->dtype);
      } else {
        MS_NAME(store_row)(o.at[0] + m * (size_t)stride, args->buffers[in->slot], at, width, in->dtype);
      }
    }
  }
}

// Has the elements that run_epilogue will load and store on their way while the products are computed.
static void MS_NAME(prefetch_epilogue)(const MSInstr *instrs, uint32_t count, uint32_t width, uint32_t column,
                                       const ms_host_args *args, uint32_t row, uint32_t rows) {
  for (const MSInstr *in = instrs; in != instrs + count; ++in) {
    if (in->op >= MS_OP_COPY || in->rows == MS_ROW_SAME) continue;
    const int64_t bytes = ms_dtype_bytes(in->dtype), line = 64;
    for (uint32_t m = 0; m < rows; ++m) {
      const MS_NAME(program) program = {row + m, column, args};
      const uint8_t *at = (const uint8_t *)args->buffers[in->slot] + MS_NAME(row_start)(&program, in) * bytes;
      for (int64_t i = 0; i < width * bytes; i += line) {
        if (in->op == MS_OP_LOAD) {
          __builtin_prefetch(at + i, 0, 2);
        } else {
          __builtin_prefetch(at + i, 1, 2);
        }
      }
    }
  }
}

#undef MS_EACH
#undef MS_UNARY
#undef MS_BINARY
#undef MS_TRUTH
#undef MS_LIBM
#undef MS_LIBM2
