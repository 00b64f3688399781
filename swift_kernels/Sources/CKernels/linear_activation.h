// Activations as a linear's tiles read them. A row has one stream for each group size that the launch's weights use,
// and one of float32 for its dense weights and those of 8-bit floats.
//
// A quantised stream is, for each group, an MSActivationGroup, then its integers v in quads of 8 bytes
// (linear_dot_body.h); x is scale * v.
#ifndef METALSTEP_LINEAR_ACTIVATION_H
#define METALSTEP_LINEAR_ACTIVATION_H
#include <stddef.h>
#include <stdint.h>

#include "panel.h"

enum ms_stream { MS_STREAM_DENSE, MS_STREAM_16, MS_STREAM_32, MS_STREAM_64, MS_STREAM_128, MS_STREAMS };

typedef struct {
  float scale;
  float sum;      // of scale * v: what a bias is multiplied with
  int32_t total;  // of v
  int32_t reserved;
} MSActivationGroup;

// Of what a weight is multiplied with.
static inline uint32_t ms_stream_of(const MSLinearPart *part) {
  if (part->group_size == 0 || (part->bits == 8 && ms_is_floats(part->dtype))) return MS_STREAM_DENSE;
  return part->group_size == 16   ? MS_STREAM_16
         : part->group_size == 32 ? MS_STREAM_32
         : part->group_size == 64 ? MS_STREAM_64
                                  : MS_STREAM_128;
}
static inline uint32_t ms_stream_group(uint32_t stream) { return stream == MS_STREAM_DENSE ? 0 : 8u << stream; }

// Bytes of a row of k elements, a multiple of 64.
static inline size_t ms_stream_bytes(uint32_t stream, uint32_t k) {
  const size_t bytes = stream == MS_STREAM_DENSE
                           ? (size_t)k * sizeof(float)
                           : k / ms_stream_group(stream) * sizeof(MSActivationGroup) + (size_t)k * 2;
  return (bytes + 63) / 64 * 64;
}

#endif
