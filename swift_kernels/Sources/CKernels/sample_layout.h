// Sizes that the sampler's kernel and its `prepare` share.
#ifndef METALSTEP_SAMPLE_LAYOUT_H
#define METALSTEP_SAMPLE_LAYOUT_H
#include <stdint.h>

enum {
  MS_SAMPLE_CHUNK = 4096,     // logits summed at once; their sums are added in order, whichever thread made them
  MS_SAMPLE_SPLIT_ROWS = 4,   // a thread: with fewer rows than this many, rows are split over the threads by chunks
  MS_SAMPLE_DIGIT = 1 << 11,  // of the radix sort: three digits of 11, 11 and 10 bits
};

typedef struct {
  float max;
  float sum;       // of e^(x - max)
  float tempered;  // of e^((x - max) / temperature)
  uint32_t bad;    // 1: a NaN or +infinity
} ms_chunk_sums;

// A candidate of a filtered row. Keys ascend as logits descend.
typedef struct {
  uint32_t key, token;
} ms_candidate;

static inline uint32_t ms_sample_chunks(uint32_t vocab_size) { return (vocab_size - 1) / MS_SAMPLE_CHUNK + 1; }

// A thread's scratch: sums of one row, candidates twice, three histograms.
static inline uint64_t ms_sample_scratch(uint32_t vocab_size) {
  return (uint64_t)ms_sample_chunks(vocab_size) * sizeof(ms_chunk_sums) +
         2 * (uint64_t)vocab_size * sizeof(ms_candidate) + 3 * MS_SAMPLE_DIGIT * sizeof(uint32_t);
}

#endif
