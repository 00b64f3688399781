// Sizes, strides and programs that a kernel reads: one struct per kernel, read by Metal, C, Swift and Python (cffi).
//
// Rules that keep every reader able to parse it: plain C, no macros, four-byte fields, no pointers, no nested structs.
// Counts are elements unless a comment says otherwise. "Row" is one token of the step (or one sampled row).
#ifndef METALSTEP_PARAMS_H
#define METALSTEP_PARAMS_H
#ifndef __METAL_VERSION__
#include <stdint.h>
#endif

// ---- what buffers hold ----------------------------------------------------------------------------------------------
enum ms_dtype {
  MS_FLOAT32 = 0,
  MS_FLOAT16 = 1,
  MS_BFLOAT16 = 2,
  MS_INT32 = 3,
};

// Which count of the step a launch runs over.
enum ms_rows {
  MS_ROWS_TOKENS = 0,   // MSStep.num_tokens
  MS_ROWS_SAMPLED = 1,  // MSStep.num_sampled
};

// The step's counts. Data, never constants: a plan made for 64 rows runs 33 of them and pays for 33.
typedef struct {
  uint32_t num_tokens;    // rows in tokens, positions, seq_ids, slot_mapping
  uint32_t num_sampled;   // rows in sampled_rows
  uint32_t num_seqs;      // rows of block_tables
  uint32_t max_blocks;    // columns of block_tables
} MSStep;

// ---- row programs: what happens to one row between two matmuls, and a matmul's epilogue -------------------------------
// A program is an array of MSInstr run for each row in order. Registers are ranges of float32 in a scratch row, given by
// their first element; dst never overlaps an operand unless it equals it. Booleans are 1.0 and 0.0.
enum ms_instr_op {
  // Buffers. LOAD: dst[0..n) <- buffer[slot], STORE: buffer[slot] <- a[0..n); addressing by rows, offset, row_stride.
  MS_OP_LOAD = 1,
  MS_OP_STORE = 2,
  // Strided copies between registers, up to four axes of dims, slowest first.
  MS_OP_GATHER = 3,   // dst[i] = a[offset + sum idx*strides], i counting the axes contiguously
  MS_OP_SCATTER = 4,  // dst[offset + sum idx*strides] = combine(dst[...], a[i]); combine by inner (ms_combine)
  // Rows of a table, rotations, norms, reductions, the cache.
  MS_OP_EMBEDDING = 5,    // dst[0..n) = row tokens[row] of the packed weight in slot; dims = bits, group_size, dtype, rows
  MS_OP_ROPE_ANGLES = 6,  // dst[0..n) = cos, dst[n..2n) = sin of positions[row]*imm1/freq; freq = b[i], or imm0^(i/n) if b is MS_NONE
  MS_OP_ROPE = 7,         // dst = a rotated, heads of `inner` elements, the first 2*dims[0] of each; b = angles; dims[1] = traditional
  MS_OP_RMS_NORM = 8,     // dst = a / rms(a) * b over spans of `inner`; b may be MS_NONE; imm0 = eps
  MS_OP_LAYER_NORM = 9,   // dst = (a - mean) / sqrt(var + imm0) * b + c over spans of `inner`; b, c may be MS_NONE
  MS_OP_SOFTMAX = 10,     // over spans of `inner`
  MS_OP_REDUCE = 11,      // dst[i] = reduction (dims[0]: ms_combine) of the i-th span of `inner`; n counts results
  MS_OP_KV_WRITE = 12,    // a = keys, b = values of this row into slot (K) and slot2 (V); dims = kv_heads, key_dim, value_dim, block_size
  // Elementwise, over n elements. An operand whose bit is set in `imm` is the scalar imm0 / imm1 / imm2 (for a / b / c).
  MS_OP_COPY = 32,
  MS_OP_NEG = 33,
  MS_OP_ABS = 34,
  MS_OP_SIGN = 35,
  MS_OP_SQUARE = 36,
  MS_OP_SQRT = 37,
  MS_OP_RSQRT = 38,
  MS_OP_EXP = 39,
  MS_OP_EXPM1 = 40,
  MS_OP_LOG = 41,
  MS_OP_LOG2 = 42,
  MS_OP_LOG10 = 43,
  MS_OP_LOG1P = 44,
  MS_OP_SIGMOID = 45,
  MS_OP_TANH = 46,
  MS_OP_ERF = 47,
  MS_OP_SIN = 48,
  MS_OP_COS = 49,
  MS_OP_FLOOR = 50,
  MS_OP_CEIL = 51,
  MS_OP_ROUND = 52,   // half to even
  MS_OP_TRUNC = 53,   // float -> integer -> float
  MS_OP_TO_F16 = 54,  // rounded to float16 and back
  MS_OP_TO_BF16 = 55,
  MS_OP_NOT = 56,
  MS_OP_ADD = 64,
  MS_OP_SUB = 65,
  MS_OP_MUL = 66,
  MS_OP_DIV = 67,
  MS_OP_MAX = 68,
  MS_OP_MIN = 69,
  MS_OP_POW = 70,
  MS_OP_REMAINDER = 71,  // the divisor's sign, as in Python
  MS_OP_LOGADDEXP = 72,
  MS_OP_ARCTAN2 = 73,
  MS_OP_GT = 74,
  MS_OP_GE = 75,
  MS_OP_LT = 76,
  MS_OP_LE = 77,
  MS_OP_EQ = 78,
  MS_OP_NE = 79,
  MS_OP_AND = 80,
  MS_OP_OR = 81,
  MS_OP_FLOOR_DIV = 82,
  MS_OP_SELECT = 96,  // a != 0 ? b : c
};

enum ms_combine {
  MS_ASSIGN = 0,
  MS_SUM = 1,
  MS_PROD = 2,
  MS_MAX = 3,
  MS_MIN = 4,
};

// Where a LOAD or STORE finds its row.
enum ms_row_address {
  MS_ROW_SAME = 0,      // offset alone: a weight, the same for every row
  MS_ROW_SELF = 1,      // offset + row * row_stride
  MS_ROW_SAMPLED = 2,   // offset + sampled_rows[row] * row_stride: a sampled row reads its token's row
};

enum { MS_NONE = 0x7fffffff };  // an absent register operand

typedef struct {
  uint32_t op;          // ms_instr_op
  uint32_t dst;         // first element of the result's register
  uint32_t a, b, c;     // operand registers
  uint32_t n;           // elements; 0 in an epilogue: the width of the column block at hand
  uint32_t inner;       // span of a norm, softmax or reduction; head_dim of a rotation; ms_combine of a scatter
  uint32_t imm;         // bit 0: a is imm0, bit 1: b is imm1, bit 2: c is imm2
  float imm0, imm1, imm2;
  uint32_t slot, slot2; // buffer bindings
  uint32_t dtype;       // ms_dtype of the buffer's elements
  uint32_t rows;        // ms_row_address
  uint32_t offset;      // elements
  uint32_t row_stride;  // elements
  uint32_t dims[4];
  int32_t strides[4];
} MSInstr;

// Fixed bindings of every launch that carries a program (row_program and linear); its own buffers follow.
enum ms_program_slot {
  MS_SLOT_STEP = 0,          // MSStep
  MS_SLOT_TOKENS = 1,        // int32 [num_tokens]
  MS_SLOT_POSITIONS = 2,     // int32 [num_tokens], position in its sequence
  MS_SLOT_SLOT_MAPPING = 3,  // int32 [num_tokens], block * block_size + place in block; negative: not written
  MS_SLOT_SAMPLED_ROWS = 4,  // int32 [num_sampled], row of each sampled token
  MS_SLOT_FIRST = 5,
};

// row_program: constants are MSRowProgramParams, then `instrs` MSInstr.
typedef struct {
  uint32_t rows;       // ms_rows
  uint32_t instrs;
  uint32_t registers;  // float32 elements of the scratch row
} MSRowProgramParams;

// ---- linear: x · Wᵀ for one or several weights, with a prologue on x and an epilogue per column block -----------------
// Constants: MSLinearParams, then `parts` MSLinearPart, `segments` MSLinearSegment, the prologue's MSInstr, the epilogues'.
// out_s = epilogue_s(part_0 .. part_m) for each segment s; all parts of a segment have the same n.
typedef struct {
  uint32_t rows;            // ms_rows
  uint32_t k;               // elements of an input row (a multiple of 32 for quantised weights)
  uint32_t parts;
  uint32_t segments;
  uint32_t prologue;        // instrs before quantising; its LOADs replace x. 0: x is read as it is
  uint32_t prologue_result; // register that holds the k inputs
  uint32_t registers;       // float32 elements of the scratch row of the prologue
  uint32_t x_slot;          // float32; unused with a prologue
  uint32_t x_rows;          // ms_row_address
  uint32_t x_offset;
  uint32_t x_row_stride;
  uint32_t arithmetic;      // ms_arithmetic
} MSLinearParams;

enum ms_arithmetic {
  MS_ARITHMETIC_INT16 = 0,  // activations as two int8 halves, a scale per group: near-exact
  MS_ARITHMETIC_INT8 = 1,   // one int8 and a scale per group
};

typedef struct {
  uint32_t slot;        // packed panels (ms_weight_pack)
  uint32_t n;           // outputs
  uint32_t bits;        // 2, 3, 4, 5, 6, 8: affine; 16, 32: dense
  uint32_t group_size;  // 32, 64, 128; 0 when dense
  uint32_t dtype;       // ms_dtype of scales and biases, or of the dense weight
} MSLinearPart;

typedef struct {
  uint32_t first_part, parts;   // its parts; their tiles are registers 0, width, 2*width, ... of the epilogue
  uint32_t first_instr, instrs; // epilogue, counted from the first MSInstr after the prologue
  uint32_t registers;           // registers of the epilogue, each `width` elements; dst/a/b/c count registers, not elements
} MSLinearSegment;

// ---- attention over the paged cache ---------------------------------------------------------------------------------
typedef struct {
  uint32_t num_q_heads;
  uint32_t num_kv_heads;
  uint32_t head_dim;      // of queries and keys
  uint32_t value_dim;
  uint32_t block_size;    // tokens in a KV block
  uint32_t kv_dtype;      // ms_dtype
  uint32_t window;        // positions a row sees, itself included; 0: all
  uint32_t q_offset;      // elements
  uint32_t q_row_stride;  // elements
  uint32_t has_sinks;     // 1: one float32 logit per q head joins the softmax's denominator
  float scale;
  float softcap;          // 0: none; else scores become softcap * tanh(score / softcap)
} MSAttentionParams;

enum ms_attention_slot {
  MS_ATTN_STEP = 0,
  MS_ATTN_POSITIONS = 1,     // int32 [num_tokens]; a row sees positions 0..its own
  MS_ATTN_SEQ_IDS = 2,       // int32 [num_tokens], row of block_tables
  MS_ATTN_BLOCK_TABLES = 3,  // int32 [num_seqs, max_blocks]
  MS_ATTN_Q = 4,             // float32 [num_tokens, num_q_heads, head_dim]
  MS_ATTN_K = 5,             // kv_dtype; host: [block, kv_head, head_dim, block_size], else [block, kv_head, block_size, head_dim]
  MS_ATTN_V = 6,             // kv_dtype [block, kv_head, block_size, value_dim]
  MS_ATTN_OUT = 7,           // float32 [num_tokens, num_q_heads, value_dim]
  MS_ATTN_SINKS = 8,         // float32 [num_q_heads]; any buffer when has_sinks is 0
};

// ---- sampling ---------------------------------------------------------------------------------------------------------
typedef struct {
  uint32_t vocab_size;
} MSSampleParams;

// One per sampled row. Seeds are counter-based (Philox 4x32-10): a row's draw depends on seed and counter alone.
typedef struct {
  float temperature;  // 0: the most likely token
  float top_p;        // in (0, 1]; 1: off
  float min_p;        // in [0, 1); 0: off
  uint32_t top_k;     // 0: off
  uint32_t seed_lo, seed_hi;
  uint32_t counter;   // how many tokens this request has sampled
} MSSampling;

enum ms_sample_status {
  MS_SAMPLE_OK = 0,
  MS_SAMPLE_NOT_FINITE = 1,  // the row's logits hold a NaN or +infinity, or are all -infinity
};

typedef struct {
  int32_t token;
  float logprob;     // of the token under the model's own distribution (temperature 1, no filter)
  uint32_t rank;     // 1: the most likely
  uint32_t status;   // ms_sample_status
} MSSampled;

enum ms_sample_slot {
  MS_SAMPLE_STEP = 0,
  MS_SAMPLE_LOGITS = 1,    // float32 [num_sampled, vocab_size]
  MS_SAMPLE_SAMPLING = 2,  // MSSampling [num_sampled]
  MS_SAMPLE_OUT = 3,       // MSSampled [num_sampled]
};

// ---- add_rms_norm -------------------------------------------------------------------------------------------------------
typedef struct {
  uint32_t hidden_size;
  float eps;  // added to the mean square
} AddRMSNormParams;

#endif
