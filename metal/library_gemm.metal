// x · Wᵀ of float16 matrices, sums in float32: what the launch computes, an output per thread. On CUDA NVIDIA's library takes its
// place (swift_kernels/Sources/CLibraryGemm). Reference: kernels/linear.py.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"

[[kernel]] void library_gemm(
    device const half* x                [[buffer(0)]],  // [rows, k]
    device const half* weight           [[buffer(1)]],  // [n, k]
    device const float* added           [[buffer(2)]],  // [rows, n]
    device float* out                   [[buffer(3)]],  // [rows, n]
    device uint* workspace              [[buffer(4)]],
    constant MSGpuLibraryGemmParams& p  [[buffer(5)]],
    uint3 at [[thread_position_in_grid]]) {
  if (at.x >= p.n || at.y >= p.rows) return;
  device const half* a = x + ulong(at.y) * p.x_row_stride;
  device const half* b = weight + ulong(at.x) * p.k;
  float sum = p.add ? added[ulong(at.y) * p.c_row_stride + at.x] : 0.0f;
  for (uint i = 0; i < p.k; i++) sum = fma(float(a[i]), float(b[i]), sum);
  out[ulong(at.y) * p.d_row_stride + at.x] = sum;
}
