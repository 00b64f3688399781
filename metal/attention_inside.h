// What a decode row's own query heads, key and value go through before they are attended to: norm, rotation, the write to the cache.
#ifndef METALSTEP_ATTENTION_INSIDE_H
#define METALSTEP_ATTENTION_INSIDE_H

// A head's D elements, normed and rotated where there is a norm and are angles, times `factor`; by one simdgroup, which
// puts a barrier behind it. All is read at once: pairs of elements that an angle turns, those without angles beside each other.
template <int D, typename To>
inline void ms_prepare(threadgroup To* to, device const float* x, uint norm, float eps, device const float* weight,
                       device const float* angles, constant MSGpuAttentionParams& p, float factor, int lane) {
  constexpr int N = (D / 2 + 31) / 32;
  const int half_dims = int(p.rope_dims) / 2;
  const bool weighted = norm == MS_HEAD_NORM_WEIGHT;
  int at[N], with[N];
  float first[N], second[N], first_weight[N], second_weight[N], c[N], s[N];
  float sum = 0.0f;
  MS_UNROLL for (int i = 0; i < N; i++) {
    const int pair = i * 32 + lane;
    const bool has = D % 64 == 0 || pair < D / 2, turned = pair < half_dims, halves = turned && p.traditional == 0;
    at[i] = halves ? pair : 2 * pair;
    with[i] = halves ? pair + half_dims : 2 * pair + 1;
    first[i] = has ? x[at[i]] : 0.0f;
    second[i] = has ? x[with[i]] : 0.0f;
    first_weight[i] = has && weighted ? weight[at[i]] : 1.0f;
    second_weight[i] = has && weighted ? weight[with[i]] : 1.0f;
    c[i] = turned ? angles[pair] : 1.0f;
    s[i] = turned ? angles[half_dims + pair] : 0.0f;
  }
  MS_UNROLL for (int i = 0; i < N; i++) sum = fma(first[i], first[i], fma(second[i], second[i], sum));
  sum = simd_sum(sum);
  const float inverse = norm != MS_HEAD_NORM_NONE ? precise::rsqrt(sum / float(D) + eps) : 1.0f;
  MS_UNROLL for (int i = 0; i < N; i++) {
    const float a = first[i] * inverse * first_weight[i], b = second[i] * inverse * second_weight[i];
    if (D % 64 == 0 || i * 32 + lane < D / 2) {
      to[at[i]] = To(fma(a, c[i], -(b * s[i])) * factor);
      to[with[i]] = To(fma(a, s[i], b * c[i]) * factor);
    }
  }
}

// Where a vector is written.
struct ms_slot {
  ulong head;  // block * kv heads + kv head
  uint place;  // in the block
  uint shift;  // log2 of the positions in a block
};

// A plane that is written.
template <typename C>
struct ms_stored {
  device typename ms_codec<C>::stored* plane;
  uint scales;  // 4-byte words before its scales
};

template <typename C>
inline ms_stored<C> ms_stored_at(device typename ms_codec<C>::stored* plane, uint scales) {
  ms_stored<C> to;
  to.plane = plane;
  to.scales = scales;
  return to;
}

// A new vector into the plane if `writes`, and x to what ms_read_lane would have of it there; what that is still to be multiplied by. By
// one simdgroup; lane i % 32 has written element i. WHICH: 0 for keys, 1 for values.
template <int D, int SCALE, int WHICH, typename C>
inline float ms_store(ms_stored<C> to, threadgroup C* x, ms_slot slot, bool writes, uint lane) {
  const ulong vector = (slot.head << slot.shift) + slot.place;
  for (int i = int(lane); writes && i < D; i += 32) to.plane[vector * D + i] = x[i];
  return 1.0f;
}
template <int D, int SCALE, int WHICH, int CODEC>
inline float ms_store(ms_stored<ms_packed<CODEC>> to, threadgroup float* x, ms_slot slot, bool writes, uint lane) {
  return ms_encode<CODEC, SCALE, D, true>(x, ms_kv_seeds[WHICH], to.plane, to.scales, slot.head, 1u << slot.shift, slot.place,
                                          lane, writes);
}

#endif
