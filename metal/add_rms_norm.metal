// Residual add, then RMSNorm of the sum. Reference: kernels/add_rms_norm.py. Source: arXiv 1910.07467, section 4.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"

// One threadgroup per row, whose threads are a multiple of 32. Sums are float32: squares of small bfloat16 elements
// vanish in a long row. They are of what residual holds afterwards, rounded: the norm of the sum, as two launches
// would give it.
template <typename T>
[[kernel]] void add_rms_norm(
    device const T* x            [[buffer(0)]],  // [tokens, hidden_size]
    device T* residual           [[buffer(1)]],  // [tokens, hidden_size]; becomes x + residual
    device const T* weight       [[buffer(2)]],  // [hidden_size]
    device T* out                [[buffer(3)]],  // [tokens, hidden_size]
    constant AddRMSNormParams& p [[buffer(4)]],
    uint token [[threadgroup_position_in_grid]],
    uint tid   [[thread_index_in_threadgroup]],
    uint width [[threads_per_threadgroup]],
    uint sg    [[simdgroup_index_in_threadgroup]],
    uint lane  [[thread_index_in_simdgroup]]) {
  threadgroup float partial[32];
  const ulong row = ulong(token) * p.hidden_size;
  float sum = 0.0f;
  for (uint i = tid; i < p.hidden_size; i += width) {
    const T h = T(float(x[row + i]) + float(residual[row + i]));
    residual[row + i] = h;
    sum += float(h) * float(h);
  }
  sum = simd_sum(sum);
  if (lane == 0) partial[sg] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = simd_sum(lane < width / 32 ? partial[lane] : 0.0f);
  const float scale = rsqrt(sum / float(p.hidden_size) + p.eps);
  for (uint i = tid; i < p.hidden_size; i += width)  // the elements that this same thread wrote: no barrier is needed
    out[row + i] = T(float(residual[row + i]) * scale * float(weight[i]));
}
MS_INSTANCE(add_rms_norm_float, add_rms_norm<float>)
MS_INSTANCE(add_rms_norm_half, add_rms_norm<half>)
MS_INSTANCE(add_rms_norm_bfloat, add_rms_norm<bfloat>)
