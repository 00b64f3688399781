// Activations as a linear's tiles read them. A row has one stream for each group size that the launch's weights use,
// and one of float32 for its dense weights.
//
// A quantised stream is, for each group, an MSActivationGroup, then its integers v in quads of 8 bytes
// (linear_dot_body.h); x is scale * v.
#ifndef METALSTEP_LINEAR_ACTIVATION_H
#define METALSTEP_LINEAR_ACTIVATION_H
#include <stddef.h>
#include <stdint.h>

enum ms_stream { MS_STREAM_DENSE = 0, MS_STREAM_32 = 1, MS_STREAM_64 = 2, MS_STREAM_128 = 3, MS_STREAMS = 4 };

typedef struct {
  float scale;
  float sum;      // of scale * v: what a bias is multiplied with
  int32_t total;  // of v
  int32_t reserved;
} MSActivationGroup;

static inline uint32_t ms_stream_of(uint32_t group_size) {
  return group_size == 0    ? MS_STREAM_DENSE
         : group_size == 32 ? MS_STREAM_32
         : group_size == 64 ? MS_STREAM_64
                            : MS_STREAM_128;
}
static inline uint32_t ms_stream_group(uint32_t stream) { return stream == MS_STREAM_DENSE ? 0 : 16u << stream; }

// Bytes of a row of k elements, a multiple of 64.
static inline size_t ms_stream_bytes(uint32_t stream, uint32_t k) {
  const size_t bytes = stream == MS_STREAM_DENSE
                           ? (size_t)k * sizeof(float)
                           : k / ms_stream_group(stream) * sizeof(MSActivationGroup) + (size_t)k * 2;
  return (bytes + 63) / 64 * 64;
}

#endif
