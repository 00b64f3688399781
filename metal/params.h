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
  // A weight's scales alone, a byte each. Its elements are floats then, of 4 bits (e2m1) or 8 (e4m3), and it has no biases.
  MS_E8M0 = 4,  // 2^(byte - 127); 255 is infinity, as in MLX
  MS_E4M3 = 5,  // a sign, 4 bits of exponent, 3 of mantissa; 127 and 255 are NaN
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
  uint32_t num_seqs;      // rows of block_tables and sequences
  uint32_t max_blocks;    // columns of block_tables
  uint32_t index;         // of this step in its run, from 0; step_advance counts it
  uint32_t advance;       // 1: every row is sampled and step_advance makes the next step's inputs of the sampled tokens
} MSStep;

// One per row of block_tables.
typedef struct {
  uint32_t window;  // positions that a row sees, itself and the first `keep` included; 0: all. Layers may see fewer.
  uint32_t keep;    // first positions that stay visible; 0 without a window
} MSSequence;

// ---- row programs: what happens to one row between two matmuls, and a matmul's epilogue -------------------------------
// A program is an array of MSInstr run for each row in order. Registers are ranges of float32 in a scratch row, given by
// their first element; dst never overlaps an operand unless it equals it. Booleans are 1.0 and 0.0.
enum ms_instr_op {
  // Buffers. LOAD: dst[0..n) <- buffer[slot], STORE: buffer[slot] <- a[0..n); addressing by rows, offset, row_stride.
  // LOAD on a GPU: the sum of dims[0] planes in order (0 or 1: one), each dims[1] elements behind the one before.
  MS_OP_LOAD = 1,
  MS_OP_STORE = 2,
  // Strided copies between registers, up to four axes of dims, slowest first.
  MS_OP_GATHER = 3,   // dst[i] = a[offset + sum idx*strides], i counting the axes contiguously
  MS_OP_SCATTER = 4,  // dst[offset + sum idx*strides] = combine(dst[...], a[i]); combine by inner (ms_combine)
  // Rows of a table, rotations, norms, reductions, the cache.
  MS_OP_EMBEDDING = 5,    // dst[0..n) = row tokens[row] of the packed weight in slot; dims = bits, group_size, dtype, rows;
                          // a token t < 0 is row -(t + 1) of slot2, float32 [.., n] (the caller's own embeddings)
  MS_OP_ROPE_ANGLES = 6,  // dst[0..n) = cos, dst[n..2n) = sin of positions[row]*imm1/freq; freq = b[i], or imm0^(i/n) if b is MS_NONE
  MS_OP_ROPE = 7,         // dst = a rotated, heads of `inner` elements, the first 2*dims[0] of each; b = angles; dims[1] = traditional
  MS_OP_RMS_NORM = 8,     // dst = a / rms(a) * b over spans of `inner`; b may be MS_NONE; imm0 = eps
  MS_OP_LAYER_NORM = 9,   // dst = (a - mean) / sqrt(var + imm0) * b + c over spans of `inner`; b, c may be MS_NONE
  MS_OP_SOFTMAX = 10,     // over spans of `inner`
  MS_OP_REDUCE = 11,      // dst[i] = reduction (dims[0]: ms_combine) of the i-th span of `inner`; n counts results
  MS_OP_KV_WRITE = 12,    // a = keys, b = values of this row, encoded, into slot (K) and slot2 (V); dims = kv_heads, key_dim,
                          // value_dim, block_size; dtype, inner = ms_kv_codec of K and V; offset, row_stride = scales of K and V
                          // (see ms_kv_codec); imm = ms_kv_scale of K + 4 * that of V
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
  uint32_t bits;        // 1, 2, 3, 4, 5, 6, 8: affine; 16, 32: dense; 4 and 8 are floats where dtype is MS_E8M0, 4 where it is MS_E4M3
  uint32_t group_size;  // 32, 64, 128; MS_E8M0: 32, MS_E4M3: 16; 0 when dense
  uint32_t dtype;       // ms_dtype of scales and biases, or of the dense weight
} MSLinearPart;

typedef struct {
  uint32_t first_part, parts;   // its parts; their tiles are registers 0, width, 2*width, ... of the epilogue
  uint32_t first_instr, instrs; // epilogue, counted from the first MSInstr after the prologue
  uint32_t registers;           // registers of the epilogue, each `width` elements; dst/a/b/c count registers, not elements
} MSLinearSegment;

// On a GPU weights stay as MLX has them and the kernels are generated (kernels/gpu/linear.py), the epilogues with them. Constants:
// MSGpuLinearParams, then an MSGpuLinearSegment per segment, then an MSGpuLinearAccess per LOAD and STORE of their epilogues.
typedef struct {
  uint32_t k;             // elements of an input row
  uint32_t x_offset;
  uint32_t x_row_stride;
  float eps;              // of the norm of x, added to the mean square; unused without one
} MSGpuLinearParams;

typedef struct {
  uint32_t first_tile;    // of the launch's threadgroups along x
  uint32_t n;             // outputs
  uint32_t first_access;  // of its epilogue, counted from the launch's first
} MSGpuLinearSegment;

typedef struct {
  uint32_t offset;
  uint32_t row_stride;    // 0: the same for every row
} MSGpuLinearAccess;

// Many rows of x on an NVIDIA GPU (kernels/gpu/linear_library.py): weights as float16, a product by NVIDIA's library, what is done with it.
typedef struct {
  uint32_t chunks;        // of the weight: so many runs of elements that a thread reads at once
  uint32_t first_group;   // of the launch's threadgroups along x
  uint32_t first;         // of the result, by eights: where its first element goes
} MSGpuDequantisePart;

// library_gemm: out = x · Wᵀ, or that plus `added`. All rows of the plan, whatever the step has: those behind its last hold anything.
typedef struct {
  uint32_t rows;
  uint32_t n;             // outputs
  uint32_t k;             // elements of an input row
  uint32_t x_row_stride;  // elements
  uint32_t c_row_stride;  // of `added`
  uint32_t d_row_stride;  // of out
  uint32_t add;           // 1: `added` is
  uint32_t workspace_bytes;
} MSGpuLibraryGemmParams;

enum ms_library_gemm_slot {
  MS_LIBRARY_GEMM_X = 0,          // float16 [rows, k]
  MS_LIBRARY_GEMM_WEIGHT = 1,     // float16 [n, k]
  MS_LIBRARY_GEMM_ADDED = 2,      // float32 [rows, n]; any buffer when add is 0
  MS_LIBRARY_GEMM_OUT = 3,        // float32 [rows, n]
  MS_LIBRARY_GEMM_WORKSPACE = 4,  // any content, before and after
};

// After library_gemm; behind it an MSGpuLinearAccess per LOAD and STORE of the segment's epilogue.
typedef struct {
  uint32_t n;             // columns
  uint32_t c_row_stride;  // elements of the products' rows; part p's are n behind part p - 1's
} MSGpuFinishParams;

// ---- the cache ------------------------------------------------------------------------------------------------------------
// How the vectors of a plane are stored. Floats have the number of their ms_dtype and fill their plane. Others (kernels/turboquant.py)
// are codes, uint32 words [block, kv_head, block_size, words] (of K on the host device [block, kv_head, words, block_size]), and behind
// all of them scales, from the plane's 4-byte word `k_scales` or `v_scales` on. Element j of a vector has bits [j * bits, (j + 1) * bits)
// of its words, LSB first.
enum ms_kv_codec {
  MS_KV_FLOAT32 = 0,
  MS_KV_FLOAT16 = 1,
  MS_KV_BFLOAT16 = 2,
  MS_KV_TURBO2 = 18,    // 16 + bits: rotated, indices of a codebook; scales [block, kv_head, block_size], float16
  MS_KV_TURBO3 = 19,
  MS_KV_TURBO4 = 20,
  MS_KV_AFFINE8 = 24,   // float16 scales [block, kv_head, group, 2, block_size]: the step of each group of elements, its least element
  MS_KV_WIDE_SCALES = 64,  // a bit: the scales of a turbo codec are float32
};

// What a turbo vector's scale is, from its norm n, its rotated unit vector y and the codebook's vector q.
enum ms_kv_scale {
  MS_KV_SCALE_MATCHED = 0,   // n / |q|: keeps the norm
  MS_KV_SCALE_RAW = 1,       // n
  MS_KV_SCALE_UNBIASED = 2,  // n / <y, q>: keeps inner products with the vector itself
};

// ---- attention over the paged cache ---------------------------------------------------------------------------------
typedef struct {
  uint32_t num_q_heads;
  uint32_t num_kv_heads;
  uint32_t head_dim;      // of queries and keys
  uint32_t value_dim;
  uint32_t block_size;    // tokens in a KV block
  uint32_t k_codec;       // ms_kv_codec
  uint32_t v_codec;
  uint32_t k_scales;      // 4-byte words of the plane before its scales; 0 for floats
  uint32_t v_scales;
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
  MS_ATTN_K = 5,             // k_codec; floats: host [block, kv_head, head_dim, block_size], else [block, kv_head, block_size, head_dim]
  MS_ATTN_V = 6,             // v_codec; floats: [block, kv_head, block_size, value_dim]
  MS_ATTN_OUT = 7,           // float32 [num_tokens, num_q_heads, value_dim]
  MS_ATTN_SINKS = 8,         // float32 [num_q_heads]; any buffer when has_sinks is 0
  MS_ATTN_SEQUENCES = 9,     // MSSequence [num_seqs]
};

// attention on a GPU: decode, decode with what comes before it inside, mixed. Its bindings are in kernels/gpu/attention.py.
typedef struct {
  uint32_t num_q_heads;
  uint32_t num_kv_heads;
  uint32_t block_shift;   // log2 of the tokens in a KV block
  uint32_t window;        // positions a row sees, itself included; 0: all
  uint32_t q_offset;      // elements
  uint32_t q_row_stride;  // elements
  uint32_t has_sinks;     // 1: one float32 logit per q head joins the softmax's denominator
  uint32_t splits;        // pieces of a context at most; the last has all that is left. 1: no pieces
  uint32_t split_len;     // visible positions in a piece
  uint32_t k_scales;      // 4-byte words of the plane before its scales; 0 for floats
  uint32_t v_scales;
  float scale;
  float softcap;          // 0: none; else scores become softcap * tanh(score / softcap)
  // What is done inside, before a row attends:
  uint32_t k_offset;      // elements, of the row's new keys
  uint32_t k_row_stride;  // elements
  uint32_t v_offset;
  uint32_t v_row_stride;
  uint32_t q_norm;        // ms_head_norm
  uint32_t k_norm;
  float q_eps;            // added to the mean square
  float k_eps;
  uint32_t rope_dims;     // first elements of a head that are rotated; 0: none
  uint32_t traditional;   // 1: neighbours make a pair, else halves of rope_dims
} MSGpuAttentionParams;

enum ms_head_norm {
  MS_HEAD_NORM_NONE = 0,
  MS_HEAD_NORM_PLAIN = 1,   // without a weight
  MS_HEAD_NORM_WEIGHT = 2,
};

// ---- sampling ---------------------------------------------------------------------------------------------------------
typedef struct {
  uint32_t vocab_size;
  uint32_t max_rows;        // row stride of the results from one step of a run to the next
  uint32_t max_top;         // columns of MS_SAMPLE_TOP
  uint32_t history_stride;  // columns of MS_SAMPLE_HISTORY
} MSSampleParams;

enum ms_sample_flags {
  MS_SAMPLE_PROCESSED_LOGPROBS = 1,   // logprob, rank and top are of the logits after bias, penalties and masks, which replace
                                      // the row in MS_SAMPLE_LOGITS; else of the model's own, and the row stays
  MS_SAMPLE_TEMPERATURE_FIRST = 2,    // filters see the tempered distribution: min_p, xtc, top_k, top_p of what is left (vLLM);
                                      // else top_p, min_p, xtc, top_k of the untempered one (mlx-lm)
  MS_SAMPLE_COMMIT = 4,               // the sampled token is written to the state's history behind the row's position and counted;
                                      // not with a target. No other row of the step has this state.
};

// One per sampled row. Seeds are counter-based (Philox 4x32-10): a row's draw depends on seed and counter alone.
// Order: bias, repetition, presence, frequency (mlx-lm's), stop tokens before min_tokens, masks, then the filters. Of equal
// logits top_k and min_keep take the first; mlx-lm's top_p takes all that equal its last, vLLM's the first.
// Kernels know no table's length: ranges, states, masks and targets lie within theirs. The tokens of a range differ.
typedef struct {
  float temperature;  // 0: the most likely token that is allowed
  float top_p;        // in (0, 1]; 1: off
  float min_p;        // in [0, 1]; 0: off
  uint32_t min_keep;  // most likely tokens that min_p keeps in any case; 0 is 1
  uint32_t top_k;     // 0: off
  float xtc_probability;  // that all tokens above xtc_threshold but the least likely of them are dropped; 0: off
  float xtc_threshold;    // in [0, 0.5]
  uint32_t xtc_first, xtc_count;    // range of MS_SAMPLE_BIASES: tokens that xtc does not drop
  float repetition_penalty;         // divides positive logits, multiplies negative ones; 1 (or 0): off
  float presence_penalty;           // subtracted once; 0: off
  float frequency_penalty;          // subtracted per occurrence; 0: off
  uint32_t repetition_window;       // last tokens of prompt and output that count; 0: all of them
  uint32_t presence_window;         // likewise; 0: all tokens of the output, and none of the prompt's
  uint32_t frequency_window;        // likewise
  int32_t state;                    // row of history and counts; read only with a penalty or MS_SAMPLE_COMMIT; negative: none
  uint32_t counted;                 // positions of the history that counts hold; what lies behind, up to the row's own, counts as output
  uint32_t bias_first, bias_count;  // range of MS_SAMPLE_BIASES, added to logits
  uint32_t stop_first, stop_count;  // range of MS_SAMPLE_BIASES: tokens that are not allowed while counter < min_tokens
  uint32_t min_tokens;
  uint32_t mask;                    // 1 + row of MS_SAMPLE_MASKS; 0: none
  uint32_t grammar;                 // likewise; a token needs its bit in both
  int32_t target;                   // a token to report on instead of sampling (prompt logprobs); negative: sample
  uint32_t top;                     // most likely tokens to report, up to max_top
  uint32_t flags;                   // ms_sample_flags
  uint32_t seed_lo, seed_hi;
  uint32_t counter;                 // how many tokens this request has sampled
} MSSampling;

enum ms_sample_status {
  MS_SAMPLE_OK = 0,
  MS_SAMPLE_NOT_FINITE = 1,       // the row's logits hold a NaN or +infinity (or overflow to one when they are processed), or
                                  // are all -infinity
  MS_SAMPLE_NOTHING_ALLOWED = 2,  // masks, biases or stop tokens leave no token
};

typedef struct {
  int32_t token;
  float logprob;     // of the token, at temperature 1 and without filters
  uint32_t rank;     // 1: the most likely; equal logits by index
  uint32_t status;   // ms_sample_status; the other fields are 0, NaN, 0 if not OK
} MSSampled;

typedef struct {
  int32_t token;  // -1, with a NaN: none, the vocabulary (or what is finite of it) ended, or the row is not OK
  float logprob;
} MSTopLogprob;

typedef struct {
  int32_t token;
  float bias;
} MSTokenBias;

enum ms_sample_slot {
  MS_SAMPLE_STEP = 0,
  MS_SAMPLE_LOGITS = 1,        // float32 [num_sampled, vocab_size]
  MS_SAMPLE_SAMPLING = 2,      // MSSampling [num_sampled]
  MS_SAMPLE_OUT = 3,           // MSSampled [steps of a run, max_rows]; this step's row is MSStep.index
  MS_SAMPLE_TOP = 4,           // MSTopLogprob [steps of a run, max_rows, max_top], descending, equal ones by index
  MS_SAMPLE_POSITIONS = 5,     // int32 [num_tokens]
  MS_SAMPLE_SAMPLED_ROWS = 6,  // int32 [num_sampled]
  MS_SAMPLE_BIASES = 7,        // MSTokenBias [..]
  MS_SAMPLE_MASKS = 8,         // uint32 [.., ceil(vocab_size / 32)], bit token % 32 of word token / 32: allowed
  MS_SAMPLE_HISTORY = 9,       // int32 [states, history_stride]: token at each position of the request's prompt and output;
                               // negative: none, the caller's own embedding
  MS_SAMPLE_COUNTS = 10,       // uint32 [states, vocab_size]: occurrences in the output; MS_COUNT_IN_PROMPT: in the prompt
};

enum { MS_COUNT_IN_PROMPT = 0x40000000 };  // bit of a count

// ---- step_advance: the next decode step's inputs from this step's results ---------------------------------------------------
// MSStep.index grows by one. Where MSStep.advance is set, for each sampled row i, of row r = sampled_rows[i]: tokens[r] becomes
// the sampled token, counter and (with MS_SAMPLE_COMMIT) counted grow by one, and if positions[r] + 1 < limits[i] the position
// moves on and each group's slot mapping follows its block table (-1 where that has no block, or no such sequence); else the row
// stays and its slots become -1. A row whose sample is not OK stays too, and its tokens, counter and counted are left.
typedef struct {
  uint32_t block_size;
  uint32_t groups;    // of layers that share block tables
  uint32_t max_rows;  // as in MSSampleParams
} MSStepAdvanceParams;

enum ms_step_advance_slot {
  MS_ADVANCE_STEP = 0,
  MS_ADVANCE_TOKENS = 1,
  MS_ADVANCE_POSITIONS = 2,
  MS_ADVANCE_SEQ_IDS = 3,
  MS_ADVANCE_SAMPLED_ROWS = 4,
  MS_ADVANCE_SAMPLING = 5,
  MS_ADVANCE_SAMPLED = 6,       // MSSampled [steps of a run, max_rows]
  MS_ADVANCE_LIMITS = 7,        // int32 [num_sampled]: positions that the row's sequence may have
  MS_ADVANCE_GROUPS = 8,        // per group: block tables, then slot mapping
};

// ---- step_load: the next step's arrays, which the host has staged while this step ran ----------------------------------------
// Word w of the region becomes word w of the stage. Where it is a token (its place i = w - tokens_first is below max_tokens) and
// sources[i] is 0 or more, it becomes the token of that result instead, or 0 if the result is not OK: the step before has sampled
// it, and the host has not seen it. The region, the stage and the results do not overlap; sources lie within the results.
typedef struct {
  uint32_t words;         // of the region: arrays of four-byte elements, one behind the other
  uint32_t tokens_first;  // the region's first token
  uint32_t max_tokens;    // tokens_first + max_tokens <= words
} MSStepLoadParams;

enum ms_step_load_slot {
  MS_LOAD_STAGE = 0,    // int32 [words + max_tokens]: the region's new content, then sources, each negative or an index of a result
  MS_LOAD_SAMPLED = 1,  // MSSampled [steps of a run * max_rows]: the results of the run before
  MS_LOAD_REGION = 2,   // int32 [words]
};

// ---- add_rms_norm -------------------------------------------------------------------------------------------------------
typedef struct {
  uint32_t hidden_size;
  float eps;  // added to the mean square
} AddRMSNormParams;

// ---- limits: what a device reads or computes at most, for benchmarks ----------------------------------------------------
enum ms_limit {
  MS_LIMIT_READ = 0,       // each thread its share of the words; its result is their sum, modulo 2^32
  MS_LIMIT_FMA = 1,        // float32 multiply-adds
  MS_LIMIT_DOT_INT16 = 2,  // the products of quantised linears
  MS_LIMIT_DOT_INT8 = 3,
};

enum {
  MS_LIMITS_MACS = 15360,           // multiply-adds of a thread in a round: whole steps in vectors of any length
  MS_LIMITS_OPERANDS = 4096,        // words that dot products read, as small as the first-level cache
  MS_LIMITS_MAX_ROUNDS = 0x100000,
};

typedef struct {
  uint32_t kind;     // ms_limit
  uint32_t words;    // uint32 elements of the input
  uint32_t rounds;   // how often the words are read, or MS_LIMITS_MACS computed by each thread
  uint32_t results;  // uint32 elements of the output: one per thread, at least
} MSLimitsParams;

enum ms_limits_slot {
  MS_LIMITS_IN = 0,
  MS_LIMITS_OUT = 1,
};

#endif
