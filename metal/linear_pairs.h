// Weights as pairs of half: what a lane puts into the tiles of a product in half precision.
// A chunk is taken in runs of 8 values. Pair t of a run is values t, t + 4 if ms_is_split (so lie the nibbles of a word when
// it is masked), else 2t, 2t + 1; an x must be paired likewise (ms_split).
#ifndef METALSTEP_LINEAR_PAIRS_H
#define METALSTEP_LINEAR_PAIRS_H
#include "linear_weights.h"

// 8 values in order, two a word, as pairs t, t + 4.
inline uint4 ms_split(uint4 u) {
  return uint4(ms_choose_bytes(u.x, u.z, 0x5410u), ms_choose_bytes(u.x, u.z, 0x7632u), ms_choose_bytes(u.y, u.w, 0x5410u),
               ms_choose_bytes(u.y, u.w, 0x7632u));
}

// ---- pairs of a run -------------------------------------------------------------------------------------------------
template <typename Weight>
struct ms_is_split {
  static constexpr constant bool value = false;
};
template <int GROUP, typename T, int ALIGN>
struct ms_is_split<ms_affine<4, GROUP, T, ALIGN>> {
  static constexpr constant bool value = true;
};
template <int GROUP, int ALIGN>
struct ms_is_split<ms_floats<4, GROUP, ALIGN>> {
  static constexpr constant bool value = true;
};

struct ms_pairs {
  half2 pair[4];
};

// What a chunk's values are multiplied with and added to.
struct ms_half_scale {
  half2 scale;
  half2 bias;
};
inline half2 ms_both(half v) { return half2(v, v); }
inline half2 ms_both(float v) { return ms_halves(v, v); }
inline half2 ms_both(bfloat v) { return ms_both(float(v)); }
template <int BITS, int C, typename T>
inline ms_half_scale ms_half_scale_of(thread const ms_affine_chunk<BITS, C, T>& chunk) {
  ms_half_scale s;
  s.scale = ms_both(chunk.scale);
  s.bias = ms_both(chunk.bias);
  return s;
}
template <int BITS, int GROUP, int C>
inline ms_half_scale ms_half_scale_of(thread const ms_floats_chunk<BITS, GROUP, C>& chunk) {
  ms_half_scale s;
  s.scale = ms_both(ms_from_scale<GROUP>(chunk.scale));
  s.bias = s.scale;  // unused
  return s;
}
template <int C, typename T>
inline ms_half_scale ms_half_scale_of(thread const ms_dense_chunk<C, T>&) {
  ms_half_scale s;
  s.scale = s.bias = ms_both(1.0f);  // unused
  return s;
}

// A number n below 1024 in the low bits of a half whose others are 0x6400 is 1024 + n; 16 bits further up are those of another one.
inline half2 ms_less_1024(uint bits) { return as_type<half2>(bits) - as_type<half2>(0x64006400u); }
inline half2 ms_low_nibbles(uint q) { return ms_less_1024(ms_and_or(q, 0x000f000fu, 0x64006400u)); }
inline half2 ms_high_nibbles(uint q) {  // (1024 + 16 n) / 16 - 64
  return fma(as_type<half2>(ms_and_or(q, 0x00f000f0u, 0x64006400u)), as_type<half2>(0x2c002c00u), as_type<half2>(0xd400d400u));
}

// Run `run` of the chunk.
template <int BITS, int C, typename T>
inline ms_pairs ms_run(thread const ms_affine_chunk<BITS, C, T>& chunk, ms_half_scale s, int run) {
  ms_pairs r;
  if (BITS == 4) {
    const uint q = chunk.words[run % (C * BITS / 32)];
    r.pair[0] = ms_low_nibbles(q);
    r.pair[1] = ms_high_nibbles(q);
    r.pair[2] = ms_low_nibbles(q >> 8);
    r.pair[3] = ms_high_nibbles(q >> 8);
  } else if (BITS == 8) {
    MS_UNROLL for (int i = 0; i < 2; i++) {
      const uint q = chunk.words[(run * 2 + i) % (C * BITS / 32)];
      r.pair[2 * i] = ms_less_1024(ms_choose_bytes(q, 0x64646464u, 0x4140u));
      r.pair[2 * i + 1] = ms_less_1024(ms_choose_bytes(q, 0x64646464u, 0x4342u));
    }
  } else {
    MS_UNROLL for (int t = 0; t < 4; t++) {
      const uint low = ms_code(chunk, run * 8 + 2 * t);
      const uint high = ms_code(chunk, run * 8 + 2 * t + 1);
      r.pair[t] = ms_less_1024(low | high << 16 | 0x64006400u);
    }
  }
  MS_UNROLL for (int t = 0; t < 4; t++) r.pair[t] = fma(r.pair[t], s.scale, s.bias);
  return r;
}
template <int BITS, int GROUP, int C>
inline ms_pairs ms_run(thread const ms_floats_chunk<BITS, GROUP, C>& chunk, ms_half_scale s, int run) {
  ms_pairs r;
  MS_UNROLL for (int t = 0; t < 4; t++) {
    if (BITS == 4) {
      // The code's bits make a half that is 2^-14 of it.
      const uint q = chunk.words[run % (C * BITS / 32)] << (12 - 4 * t);
      const half2 small = as_type<half2>(ms_and_or(q, 0x80008000u, (q >> 3) & 0x0e000e00u));
      r.pair[t] = small * as_type<half2>(0x74007400u) * s.scale;
    } else {
      const int at = run * 8 + 2 * t;
      r.pair[t] = ms_halves(ms_value(chunk, at), ms_value(chunk, at + 1));
    }
  }
  return r;
}
template <int C, typename T>
inline ms_pairs ms_run(thread const ms_dense_chunk<C, T>& chunk, ms_half_scale, int run) {
  ms_pairs r;
  MS_UNROLL for (int t = 0; t < 4; t++) {
    const int at = run * 8 + 2 * t;
    r.pair[t] = ms_halves(float(chunk.elements[at]), float(chunk.elements[at + 1]));
  }
  return r;
}

#endif
