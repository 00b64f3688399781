// What becomes of results that simdgroups hold: one of a threadgroup's, one of a row's pieces, and where they are written.
#ifndef METALSTEP_ATTENTION_MERGE_H
#define METALSTEP_ATTENTION_MERGE_H

// What simdgroups leave for the threadgroup: HM heads' sums.
template <int DV, int HM, int NSG>
struct ms_shared {
  threadgroup float* o;  // [NSG, HM, DV]
  threadgroup float* m;  // [NSG, HM]
  threadgroup float* s;  // [NSG, HM]
};

// Where a threadgroup's results go.
struct ms_target {
  ulong row;
  int first_head;  // of H
  int heads;       // how many of them exist
  int piece;
  int pieces;      // of the row; 1: the result is final
};

inline void ms_put(device float* to, float x) { *to = x; }
// Finite ones stay finite.
inline void ms_put(device half* to, float x) {
  const float most = 65504.0f;
  *to = half(ms_is_finite(x) ? clamp(x, -most, most) : x);
}

// One result of what the simdgroups hold of heads [first, first + HM), written out. BACK: what is final is rotated back before.
template <int DV, int HM, int NSG, bool BACK, typename Out>
inline void ms_merge_simdgroups(ms_shared<DV, HM, NSG> all, int first, ms_target to, uint rows, device Out* out,
                                device const float* sinks, device float* workspace, constant MSGpuAttentionParams& p,
                                int tid) {
  for (int i = tid; i < min(HM, to.heads - first) * DV; i += NSG * 32) {
    const int g = i / DV, d = i % DV;
    float most = MS_NEG;
    MS_UNROLL for (int j = 0; j < NSG; j++) most = max(most, all.m[j * HM + g]);
    float sum = 0.0f, value = 0.0f;
    MS_UNROLL for (int j = 0; j < NSG; j++) {
      const float left = ms_weight(all.m[j * HM + g], most);
      sum = fma(all.s[j * HM + g], left, sum);
      value = fma(all.o[(j * HM + g) * DV + d], left, value);
    }
    const int in_model = to.first_head + first + g;
    const ulong head = to.row * p.num_q_heads + ulong(in_model);
    if (to.pieces == 1) {
      const float sink = p.has_sinks != 0 ? sinks[in_model] : 0.0f;
      const float result = value * ms_last_factor(most, sum, p.has_sinks != 0, sink);
      if (BACK) {
        all.o[g * DV + d] = result;  // which this thread alone has read
      } else {
        ms_put(out + head * DV + d, result);
      }
      continue;
    }
    const ulong part = head * p.splits + ulong(to.piece);
    workspace[part * DV + d] = value;
    if (d == 0) {
      device float* sums = workspace + ulong(rows) * p.num_q_heads * p.splits * DV;
      sums[part * 2] = most;
      sums[part * 2 + 1] = sum;
    }
  }
  if (!BACK || to.pieces != 1) return;
  constexpr int BACK_DIM = BACK ? DV : 32;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int g = tid / 32; g < min(HM, to.heads - first); g += NSG) {
    device Out* row = out + (to.row * p.num_q_heads + ulong(to.first_head + first + g)) * DV;
    ms_rotate_back<BACK_DIM>(all.o + g * DV, ms_kv_seeds[1], uint(tid % 32));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = tid % 32; d < DV; d += 32) ms_put(row + d, all.o[g * DV + d]);
  }
}

// Pieces of what a row sees. TILED: they begin and end with tiles, of which there is at least one in each.
template <bool TILED>
inline int ms_piece_length(constant MSGpuAttentionParams& p) {
  return TILED ? max(1, int(p.split_len) >> MS_TILE_SHIFT) : int(p.split_len);
}
template <bool TILED>
inline int ms_pieces(ms_view view, constant MSGpuAttentionParams& p) {
  const int length = ms_piece_length<TILED>(p), all = TILED ? ms_tiles(view) : ms_seen(view);
  return max(1, min((all + length - 1) / length, int(p.splits)));
}

// How a threadgroup finds its work: heads in slices of H, so that H is the same for all of them.
template <int H, bool TILED>
inline ms_target ms_target_of(uint3 at, ms_view view, constant MSGpuAttentionParams& p) {
  const int group = int(p.num_q_heads / p.num_kv_heads), slices = (group + H - 1) / H;
  const int first = int(at.x) % slices * H;
  ms_target to;
  to.row = at.z;
  to.first_head = int(at.x) / slices * group + first;
  to.heads = min(H, group - first);
  to.piece = int(at.y);
  to.pieces = ms_pieces<TILED>(view, p);
  return to;
}

template <int DV, int NSG, typename Out>
inline void ms_fill_nan(ms_target to, device Out* out, constant MSGpuAttentionParams& p, int tid) {
  device Out* row = out + (to.row * p.num_q_heads + ulong(to.first_head)) * DV;
  for (int i = tid; i < to.heads * DV; i += NSG * 32) row[i] = Out(ms_nan());
}

#endif
