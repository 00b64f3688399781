// Sizes that the sampler's kernel and its `prepare` share, and what the kernel knows of a row.
#ifndef METALSTEP_SAMPLE_LAYOUT_H
#define METALSTEP_SAMPLE_LAYOUT_H
#include <stdbool.h>
#include <stdint.h>
#include "metalstep.h"

enum {
  MS_SAMPLE_CHUNK = 4096,     // logits summed at once; their sums are added in order, whichever thread made them
  MS_SAMPLE_BLOCK = 512,      // logits of one vector of maxima: a scan for large logits skips most blocks
  MS_SAMPLE_SPLIT_ROWS = 4,   // a thread: with fewer rows than this many, rows are split over the threads by chunks
  MS_SAMPLE_DIGIT = 1 << 11,  // of the radix sort: three digits of 11, 11 and 10 bits
  MS_SAMPLE_NUCLEUS = 256,    // candidates that most nuclei lie within; 16 times as many are tried next
};

typedef struct {
  float max;
  float sum;       // of e^(x - max), where asked for
  float tempered;  // of e^((x - max) / temperature), where asked for
  uint32_t bad;    // 1: a NaN or +infinity
} ms_chunk_sums;

// Logits and what is known of them.
typedef struct {
  float *x;             // [vocab_size]
  float *maxima;        // [blocks, 16]: of a block's logits, the largest of those with this index mod 16
  ms_chunk_sums *sums;  // [chunks]
} ms_logits;

// A row's record, its tables, and what has to be computed of it.
typedef struct {
  const MSSampling *s;
  const MSTokenBias *biases;
  const uint32_t *masks[2];  // the two are the same where there is one; NULL: none
  int32_t *history;          // NULL: no state
  uint32_t *counts;
  uint32_t vocab_size;
  uint32_t length;  // positions of the history that the row sees
  uint32_t top_k;   // 0: off
  float inverse;    // 1 / temperature; 1 where nothing is drawn
  float scale;      // of the distribution that filters see: inverse or 1
  bool draws;       // else it is the most likely token, or the target
  bool xtc;         // its coin fell
  bool xtc_first;   // no filter comes before it: it sees all tokens
  bool in_place;    // the processed logits replace the row
  bool penalised, stopped;
  bool changes;                 // the processed logits are not the model's own
  bool own_sum, sum, tempered;  // sums to make, of the model's own logits (if they differ) and of the processed ones
} ms_sample_row;

// A candidate of a filtered row. Keys ascend as logits descend.
typedef struct {
  uint32_t key, token;
} ms_candidate;

// Candidates in order. mass: e^depth in the distribution that filters see, or that is drawn from.
typedef struct {
  ms_candidate *token;
  float *depth, *mass;  // depth: below the largest, 0 or less
  uint32_t count;
} ms_candidates;

static inline uint32_t ms_sample_chunks(uint32_t vocab_size) { return (vocab_size - 1) / MS_SAMPLE_CHUNK + 1; }
static inline uint32_t ms_sample_blocks(uint32_t vocab_size) { return (vocab_size - 1) / MS_SAMPLE_BLOCK + 1; }

// Memory is handed out in cache lines.
static inline uint64_t ms_sample_lines(uint64_t bytes) { return (bytes + 63) & ~(uint64_t)63; }
static inline uint64_t ms_sample_known_bytes(uint32_t vocab_size) {
  return ms_sample_lines(ms_sample_chunks(vocab_size) * sizeof(ms_chunk_sums)) +
         (uint64_t)ms_sample_blocks(vocab_size) * 16 * sizeof(float);
}
static inline uint64_t ms_sample_logits_bytes(uint32_t vocab_size) { return ms_sample_lines(4 * (uint64_t)vocab_size); }

// A row's: what is known of the model's own logits, and the processed logits with what is known of them.
static inline uint64_t ms_sample_row_bytes(uint32_t vocab_size) {
  return 2 * ms_sample_known_bytes(vocab_size) + ms_sample_logits_bytes(vocab_size);
}
// A thread's: one row's, logits without xtc's choices (before that, the marks of the penalties), candidates twice, three
// histograms.
static inline uint64_t ms_sample_thread_bytes(uint32_t vocab_size) {
  return ms_sample_row_bytes(vocab_size) + ms_sample_known_bytes(vocab_size) + ms_sample_logits_bytes(vocab_size) +
         2 * (uint64_t)vocab_size * sizeof(ms_candidate) + 3 * MS_SAMPLE_DIGIT * sizeof(uint32_t);
}

// `known` is ms_sample_known_bytes of memory.
static inline ms_logits ms_sample_logits(float *x, char *known, uint32_t vocab_size) {
  const uint64_t sums = ms_sample_lines(ms_sample_chunks(vocab_size) * sizeof(ms_chunk_sums));
  return (ms_logits){x, (float *)(known + sums), (ms_chunk_sums *)known};
}

#endif
