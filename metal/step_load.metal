// The next step's arrays: what the host has staged, and tokens that it has not seen. A thread per word.
// Reference: kernels/step_load.py.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"

[[kernel]] void step_load(
    device const int* stage          [[buffer(0)]],  // [words + max_tokens]
    device const MSSampled* sampled  [[buffer(1)]],
    device int* region               [[buffer(2)]],  // [words]
    constant MSStepLoadParams& p     [[buffer(3)]],
    uint word [[thread_position_in_grid]]) {
  if (word >= p.words) return;
  int value = stage[word];
  const uint token = word - p.tokens_first;  // before the first: beyond every token
  if (token < p.max_tokens) {
    const int source = stage[p.words + token];
    if (source >= 0) value = sampled[source].status == MS_SAMPLE_OK ? sampled[source].token : 0;
  }
  region[word] = value;
}
