// One result of the pieces that contexts were taken in. Reference: kernels/attention.py; what the pieces are is said in
// attention_decode.metal and attention_tiles.metal.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "kv_codec.h"
#include "attention.h"
#include "attention_merge.h"

// Grid: [q heads, rows]. A simdgroup takes eight pieces at a time, all of which it reads at once, four simdgroups 32; rows of one
// piece have their results already. BACK: values are in rotated space. TILED: of attention_tiles.
template <int DV, bool BACK, bool TILED, typename Out>
[[kernel, max_total_threads_per_threadgroup(128)]] void attention_reduce(
    constant MSStep& step                [[buffer(0)]],
    device const int* positions          [[buffer(1)]],
    device const int* seq_ids            [[buffer(2)]],
    device const MSSequence* sequences   [[buffer(3)]],
    device const float* workspace        [[buffer(4)]],
    device const float* sinks            [[buffer(5)]],
    device Out* out                      [[buffer(6)]],
    constant MSGpuAttentionParams& p     [[buffer(7)]],
    uint3 at     [[threadgroup_position_in_grid]],
    uint3 grid   [[threadgroups_per_grid]],
    uint tid     [[thread_index_in_threadgroup]],
    uint sg      [[simdgroup_index_in_threadgroup]],
    uint lane    [[thread_index_in_simdgroup]]) {
  constexpr int NSG = 4, AT_ONCE = 8, N = (DV + 127) / 128;  // fours of elements that a lane has
  constexpr int BACK_DIM = BACK ? DV : 32;
  threadgroup float parts[NSG * DV];
  const bool there = at.y < step.num_tokens;
  const ms_view view = ms_view_of(there ? positions[at.y] : -1, there ? seq_ids[at.y] : -1, step, sequences, p);
  const int pieces = ms_pieces<TILED>(view, p);
  MS_WAIT_PREVIOUS(workspace);
  MS_LAUNCH_NEXT;
  if (pieces == 1) return;
  const ulong head = ulong(at.y) * p.num_q_heads + at.x;
  device const float* values = workspace + head * p.splits * DV;
  device const float* sums = workspace + (ulong(grid.y) * p.num_q_heads * DV + head * 2) * p.splits;
  float most = MS_NEG;
  for (int i = int(lane); i < pieces; i += 32) most = max(most, sums[i * 2]);
  most = simd_max(most);
  float sum = 0.0f;
  for (int i = int(lane); i < pieces; i += 32) sum = fma(sums[i * 2 + 1], ms_weight(sums[i * 2], most), sum);
  sum = simd_sum(sum);
  float value[N * 4];
  MS_UNROLL for (int i = 0; i < N * 4; i++) value[i] = 0.0f;
  for (int first = int(sg) * AT_ONCE; first < pieces; first += NSG * AT_ONCE) {
    const int own = first + int(lane) % AT_ONCE;
    const float weight = own < pieces ? ms_weight(sums[own * 2], most) : 0.0f;
    MS_UNROLL for (int j = 0; j < AT_ONCE; j++) {
      const float factor = simd_shuffle(weight, ushort(j));
      MS_UNROLL for (int i = 0; i < N; i++) {
        const int element = (i * 32 + int(lane)) * 4;
        if (first + j < pieces && element < DV) {
          float four[4];
          ms_read4(values + ulong(first + j) * DV + element, four);
          MS_UNROLL for (int e = 0; e < 4; e++) value[i * 4 + e] = fma(four[e], factor, value[i * 4 + e]);
        }
      }
    }
  }
  MS_UNROLL for (int i = 0; i < N * 4; i++) {
    const int element = (i / 4 * 32 + int(lane)) * 4 + i % 4;
    if (element < DV) parts[int(sg) * DV + element] = value[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float sink = p.has_sinks != 0 ? sinks[at.x] : 0.0f, factor = ms_last_factor(most, sum, p.has_sinks != 0, sink);
  for (int d = int(tid); d < DV; d += NSG * 32) {
    float all = 0.0f;
    MS_UNROLL for (int j = 0; j < NSG; j++) all += parts[j * DV + d];
    if (BACK) {
      parts[d] = all * factor;  // which this thread alone has read
    } else {
      ms_put(out + head * DV + d, all * factor);
    }
  }
  if (!BACK) return;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg != 0) return;
  ms_rotate_back<BACK_DIM>(parts, ms_kv_seeds[1], lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int d = int(lane); d < DV; d += 32) ms_put(out + head * DV + d, parts[d]);
}
