// Which panels of a linear belong to which thread. The panels of a launch, segment after segment, are one sequence, and
// a round of it is run for each block of rows. Each thread has a contiguous share of the rounds.
#ifndef METALSTEP_LINEAR_SHARE_H
#define METALSTEP_LINEAR_SHARE_H
#include "linear_layout.h"

static inline size_t ms_linear_panel_bytes(const ms_linear_constants *c, const MSLinearPart *part) {
  return ms_panel_stride(c->params->k, part->bits, part->group_size, part->dtype);
}

// Bytes of one panel of all parts of a segment.
static inline size_t ms_linear_segment_bytes(const ms_linear_constants *c, const MSLinearSegment *s) {
  size_t bytes = 0;
  for (uint32_t i = 0; i < s->parts; ++i) bytes += ms_linear_panel_bytes(c, c->parts + s->first_part + i);
  return bytes;
}

static inline uint32_t ms_linear_segment_panels(const ms_linear_constants *c, const MSLinearSegment *s) {
  return ms_panel_count(c->parts[s->first_part].n);
}

// The first panel of `rounds` rounds that belongs to thread `thread` of `threads`; all panels for thread == threads.
// Shares are equal in bytes: the panels of segments differ.
static inline uint32_t ms_linear_share(const ms_linear_constants *c, uint32_t rounds, uint32_t thread,
                                       uint32_t threads) {
  uint64_t round = 0;  // bytes
  uint32_t panels = 0;
  for (uint32_t i = 0; i < c->params->segments; ++i) {
    const uint32_t count = ms_linear_segment_panels(c, c->segments + i);
    round += ms_linear_segment_bytes(c, c->segments + i) * (uint64_t)count;
    panels += count;
  }
  const uint64_t begin = round * rounds * thread / threads;
  uint32_t first = (uint32_t)(begin / round) * panels;
  uint64_t left = begin % round;
  for (const MSLinearSegment *s = c->segments; left > 0; ++s) {
    const size_t bytes = ms_linear_segment_bytes(c, s);
    const uint32_t count = ms_linear_segment_panels(c, s);
    const uint64_t before = (left + bytes - 1) / bytes;  // panels that begin before `begin`
    first += before < count ? (uint32_t)before : count;
    left = before <= count ? 0 : left - bytes * (uint64_t)count;
  }
  return first;
}

// At most `most`, and such that `count` is taken in steps of about the same size.
static inline uint32_t ms_linear_step(uint32_t count, uint32_t most) {
  const uint32_t steps = (count + most - 1) / most;
  return (count + steps - 1) / steps;
}

#endif
