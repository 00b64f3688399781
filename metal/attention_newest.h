// A decode row's queries, key and value in threadgroup memory as products of tiles take them.
#ifndef METALSTEP_ATTENTION_NEWEST_H
#define METALSTEP_ATTENTION_NEWEST_H

// A query, times what its scores are to be in, from `x`, which lanes of this simdgroup have written, to halves: rotated where keys are,
// and by a power of two of elements of about 1; `unit` is what makes that good.
template <typename T, int D, int DV>
inline void ms_take_query(threadgroup half* to, threadgroup float* unit, threadgroup float* x, uint lane) {
  constexpr bool TURBO = ms_tiled<T, D, DV>::Key::turbo;
  constexpr int ROTATED = TURBO ? D : 32;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (TURBO) {
    ms_rotate<ROTATED>(x, ms_kv_seeds[0], lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  float most = 0.0f;
  for (int i = int(lane); i < D; i += 32) most = max(most, fabs(x[i]));
  const uint exponent = as_type<uint>(simd_max(most)) & 0x7f800000u;
  const bool some = exponent > 0x01000000u && exponent < 0x7e800000u;
  const float inverse = some ? as_type<float>(0x7f000000u - exponent) : 1.0f;
  for (int i = int(lane); i < D; i += 32) to[i] = half(x[i] * inverse);
  if (lane == 0) *unit = some ? as_type<float>(exponent) : 1.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);  // x may be written again
}

// A new vector in threadgroup memory as the cache has it: codes, and the bits of its scales in the order that they are stored in. Lanes
// of this simdgroup have written x, which is overwritten. WHICH: 0 for keys, 1 for values.
template <typename C, int D, int SCALE, int WHICH>
struct ms_holder {
  static void hold(threadgroup uint* held, threadgroup float* x, uint lane) {
    for (int i = int(lane); i < D / 2; i += 32) held[i] = ms_both(x[2 * i], x[2 * i + 1]);
  }
};

template <int CODEC, int SCALE, int D, bool AFFINE>
struct ms_scales_holder {
  static void hold(threadgroup uint* scales, thread ms_codes_of<D>& codes, thread ms_lanes<D>& v, threadgroup float* x, uint seed,
                   uint lane) {
    uint stored = 0;
    ms_encode_turbo<CODEC, SCALE, D>(codes, stored, v, x, seed, lane);
    if (lane == 0) scales[0] = stored;
  }
};
template <int CODEC, int SCALE, int D>
struct ms_scales_holder<CODEC, SCALE, D, true> {
  static void hold(threadgroup uint* scales, thread ms_codes_of<D>& codes, thread ms_lanes<D>& v, threadgroup float*, uint, uint lane) {
    constexpr int GROUP = ms_kv<CODEC, D>::group;
    uint stored[2 * ms_lanes<D>::registers];
    ms_encode_affine<CODEC, D>(codes, stored, v);
    MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++) {
      const int e = r * 32 + int(lane);
      if (e >= D || e % GROUP != 0) continue;
      scales[2 * (e / GROUP)] = stored[2 * r];
      scales[2 * (e / GROUP) + 1] = stored[2 * r + 1];
    }
  }
};

template <int CODEC, int D, int SCALE, int WHICH>
struct ms_holder<ms_packed<CODEC>, D, SCALE, WHICH> {
  static void hold(threadgroup uint* held, threadgroup float* x, uint lane) {
    using Facts = ms_kv<CODEC, D>;
    ms_lanes<D> v;
    ms_codes_of<D> codes;
    ms_take<D>(v, x, lane);
    ms_scales_holder<CODEC, SCALE, D, Facts::affine>::hold(held + Facts::words, codes, v, x, ms_kv_seeds[WHICH], lane);
    threadgroup uint* memory = (threadgroup uint*)x;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++)
      if (ms_has<D>(r, lane)) memory[r * 32 + int(lane)] = codes.code[r];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int w = int(lane); w < Facts::words; w += 32) held[w] = ms_packed_word<Facts::bits, D>(memory, w);
  }
};

template <typename C, int D, int SCALE, int WHICH>
inline void ms_hold(threadgroup uint* held, threadgroup float* x, uint lane) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  ms_holder<C, D, SCALE, WHICH>::hold(held, x, lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);  // x may be written again
}

// What is held into the plane, by all threads.
template <int D, typename C>
inline void ms_store_held(ms_stored<C> to, const threadgroup uint* held, ms_slot slot, int tid, int threads) {
  using Held = ms_held<C, D>;
  device uint* plane = (device uint*)to.plane;
  device uint* words = plane + ((slot.head << slot.shift) + slot.place) * ulong(Held::words);
  for (int i = tid; i < Held::words; i += threads) words[i] = held[i];
  // A scale of each sort for all positions of a block, then the next sort's.
  for (int i = tid; i < Held::scales; i += threads) {
    const ulong place = ((slot.head * ulong(Held::scales) + ulong(i)) << slot.shift) + slot.place;
    if (sizeof(typename ms_codec<C>::scale) == 4) {
      (plane + to.scales)[place] = held[Held::words + i];
    } else {
      ((device ushort*)(plane + to.scales))[place] = ushort(held[Held::words + i]);
    }
  }
}

#endif
