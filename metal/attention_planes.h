// How attention reads planes: of floats, or of codes whose elements it unpacks (ms_kv_codec).
#ifndef METALSTEP_ATTENTION_PLANES_H
#define METALSTEP_ATTENTION_PLANES_H

// What keys and values are stored as, a template argument T of the kernels: a float type for both of them, or ms_planes of two, each a
// float type or ms_packed.
template <int CODEC>
struct ms_packed {};
template <typename K, typename V>
struct ms_planes {};

// One of the two. stored: what a plane is an array of, scale: what it has scales of; unpacked: what an element becomes.
template <typename C>
struct ms_codec {
  using stored = C;
  using scale = C;
  using unpacked = C;
  static constant constexpr int code = MS_KV_FLOAT32;  // or another float
};
template <bool WIDE>
struct ms_scale_type {
  using type = half;
};
template <>
struct ms_scale_type<true> {
  using type = float;
};
template <int CODEC>
struct ms_codec<ms_packed<CODEC>> {
  using stored = uint;
  using scale = typename ms_scale_type<(CODEC & int(MS_KV_WIDE_SCALES)) != 0>::type;
  using unpacked = float;
  static constant constexpr int code = CODEC;
};

// tile: what unpacked elements are in threadgroup memory.
template <typename T>
struct ms_cache {
  using key = T;
  using value = T;
  using tile = T;
};
template <typename K, typename V>
struct ms_cache<ms_planes<K, V>> {
  using key = K;
  using value = V;
  using tile = float;
};

// How a codec stores vectors of D elements.
template <typename C, int D>
struct ms_layout {
  using facts = ms_kv<ms_codec<C>::code, D>;
  static constant constexpr bool packed = facts::packed;
  static constant constexpr bool turbo = facts::turbo;
  static constant constexpr int bits = packed ? facts::bits : 8;
  static constant constexpr int words = packed ? facts::words : D;  // `stored` of a vector
  static constant constexpr int scales = turbo ? 1 : (packed ? facts::groups * 2 : 0);
  static constant constexpr int group = facts::group;
  static constant constexpr int table = turbo ? 1 << bits : 1;  // elements that a code may stand for
};

// A kv head's part of a plane, from block 0 on.
template <typename C>
struct ms_plane {
  device const typename ms_codec<C>::stored* codes;
  device const typename ms_codec<C>::scale* scales;
};

// scales_at: 4-byte words of the plane before its scales, which floats have none of.
template <typename C, int D>
inline ms_plane<C> ms_plane_of(device const typename ms_codec<C>::stored* plane, uint scales_at, uint kv_head, uint block_shift) {
  using Layout = ms_layout<C, D>;
  const ulong first = ulong(kv_head) << block_shift;
  ms_plane<C> part;
  part.codes = plane + first * ulong(Layout::words);
  part.scales = (device const typename ms_codec<C>::scale*)(plane + scales_at) + first * ulong(Layout::scales);
  return part;
}

// What codes of a turbo codec stand for, in threadgroup memory: a vector's scale times this is its element in rotated space.
template <typename C, int D>
inline void ms_fill_table(threadgroup float* table, int tid) {
  using Layout = ms_layout<C, D>;
  constexpr int BITS = Layout::turbo ? Layout::bits : 2;
  if (Layout::turbo && tid < Layout::table) table[tid] = ms_turbo_centroid<BITS>(uint(tid)) / precise::sqrt(float(D));
}

// E codes of B bits that follow one another, from the lowest bit of the first word on.
template <int B, int E>
struct ms_code_run {
  static constant constexpr int words = (E * B + 31) / 32;
  uint word[words];
};

// Code e, which is known to the compiler.
template <int B, int E>
inline uint ms_code_at(thread ms_code_run<B, E>& run, int e) {
  const int bit = e * B, shift = bit % 32;
  uint code = run.word[bit / 32] >> shift;
  if (32 % B != 0 && shift + B > 32) code |= run.word[bit / 32 + 1] << (32 - shift);
  return code & ((1u << B) - 1);
}

// The codes from element `first` on, a multiple of E, of a vector of W words. PAST: some may lie behind its end, and are anything.
template <int B, int E, int W, bool PAST>
inline void ms_read_codes(device const uint* from, int first, thread ms_code_run<B, E>& run) {
  constexpr int N = ms_code_run<B, E>::words;
  const int word = first * B / 32, shift = first * B % 32;
  if (E * B % 32 != 0) {
    uint low = from[PAST ? min(word, W - 1) : word];
    MS_UNROLL for (int i = 0; i < N; i++) {
      if (32 % (E * B) == 0) {  // never in two words
        run.word[i] = low >> shift;
      } else {
        const uint high = from[min(word + i + 1, W - 1)];
        run.word[i] = shift == 0 ? low : (low >> shift) | (high << (32 - shift));
        low = high;
      }
    }
  } else if (!PAST && N % 4 == 0 && W % 4 == 0) {
    MS_UNROLL for (int i = 0; i < N / 4; i++) {
      const vec<uint, 4> four = *(device const vec<uint, 4>*)(from + word + i * 4);
      run.word[i * 4] = four.x;
      run.word[i * 4 + 1] = four.y;
      run.word[i * 4 + 2] = four.z;
      run.word[i * 4 + 3] = four.w;
    }
  } else if (!PAST && N % 2 == 0 && W % 2 == 0) {
    MS_UNROLL for (int i = 0; i < N / 2; i++) {
      const vec<uint, 2> two = *(device const vec<uint, 2>*)(from + word + i * 2);
      run.word[i * 2] = two.x;
      run.word[i * 2 + 1] = two.y;
    }
  } else {
    MS_UNROLL for (int i = 0; i < N; i++) run.word[i] = from[PAST ? min(word + i, W - 1) : word + i];
  }
}

// E elements from `first` on of the vector at `place`; what turbo elements are still to be multiplied by, else 1. Elements behind the
// vector's end are finite where it is.
template <int D, int E, bool PAST, int CODEC>
inline float ms_unpack(ms_plane<ms_packed<CODEC>> plane, ulong place, uint block_shift, int first, const threadgroup float* table,
                       thread float* to) {
  using Layout = ms_layout<ms_packed<CODEC>, D>;
  constexpr int B = Layout::bits;
  ms_code_run<B, E> run;
  ms_read_codes<B, E, Layout::words, PAST>(plane.codes + place * ulong(Layout::words), first, run);
  if (Layout::turbo) {
    MS_UNROLL for (int e = 0; e < E; e++) to[e] = table[ms_code_at(run, e)];
    return float(plane.scales[place]);
  }
  // Scales [block, kv_head, group, 2, block_size].
  const ulong in_block = place & ((1ul << block_shift) - 1);
  device const typename ms_codec<ms_packed<CODEC>>::scale* scales =
      plane.scales + ((place - in_block) * ulong(Layout::scales) + in_block);
  float step = 0.0f, least = 0.0f;
  MS_UNROLL for (int e = 0; e < E; e++) {
    if (e % 4 == 0 && (e == 0 || Layout::group % E != 0)) {
      const int group = PAST ? min((first + e) / Layout::group, D / Layout::group - 1) : (first + e) / Layout::group;
      step = float(scales[ulong(group * 2) << block_shift]);
      least = float(scales[ulong(group * 2 + 1) << block_shift]);
    }
    to[e] = fma(float(ms_code_at(run, e)), step, least);
  }
  return 1.0f;
}

#endif
