// Weights of a linear as MLX stores them, read in chunks of C values along k by one lane.
#ifndef METALSTEP_LINEAR_WEIGHTS_H
#define METALSTEP_LINEAR_WEIGHTS_H
#include "floats.h"

// [n, k] affine: value i of a row is bits [i * BITS, (i + 1) * BITS) of its words, times a scale plus a bias per GROUP
// values. Rows and words start at multiples of ALIGN words (1, 2 or 4), which reads of several words at once need.
template <int BITS, int GROUP, typename T, int ALIGN>
struct ms_affine {
  device const uint* words;  // [n, k * BITS / 32]
  device const T* scales;    // [n, k / GROUP]
  device const T* biases;    // [n, k / GROUP]
};

// [n, k] floats of BITS bits, where ms_affine has integers, times a scale per GROUP values.
template <int BITS, int GROUP, int ALIGN>
struct ms_floats {
  device const uint* words;    // [n, k * BITS / 32]
  device const uchar* scales;  // [n, k / GROUP]
};

// [n, k] elements; rows start at multiples of ALIGN elements (1 or 4).
template <typename T, int ALIGN>
struct ms_dense {
  device const T* elements;
};

// Weights of one format that are multiplied together: each is a part of the segment's result.
template <typename Weight, int P>
struct ms_parts {
  Weight part[P];
};

// As they were read: converted when a value is asked for, so that chunks may be on their way for long.
template <int BITS, int C, typename T>
struct ms_affine_chunk {
  static_assert(C * BITS % 32 == 0 && 32 % C == 0, "a chunk is whole words of one group");
  uint words[C * BITS / 32];
  T scale;
  T bias;
};
template <int BITS, int GROUP, int C>
struct ms_floats_chunk {
  static_assert(C * BITS % 32 == 0 && 32 % C == 0, "a chunk is whole words of one group");
  uint words[C * BITS / 32];
  uchar scale;
};
template <int C, typename T>
struct ms_dense_chunk {
  static_assert(C % 4 == 0, "elements are read by fours");
  T elements[C];
};

// The chunk type of a format.
template <typename Weight, int C>
struct ms_chunk_of;
template <int BITS, int GROUP, typename T, int ALIGN, int C>
struct ms_chunk_of<ms_affine<BITS, GROUP, T, ALIGN>, C> {
  typedef ms_affine_chunk<BITS, C, T> type;
};
template <int BITS, int GROUP, int ALIGN, int C>
struct ms_chunk_of<ms_floats<BITS, GROUP, ALIGN>, C> {
  static_assert(GROUP % C == 0, "a chunk has one scale");
  typedef ms_floats_chunk<BITS, GROUP, C> type;
};
template <typename T, int ALIGN, int C>
struct ms_chunk_of<ms_dense<T, ALIGN>, C> {
  typedef ms_dense_chunk<C, T> type;
};

// Four elements from p, of which `left` exist (any number when WHOLE); the others are 0.
template <int ALIGN, bool WHOLE, typename T>
inline float4 ms_read4(device const T* p, int left) {
  if (WHOLE || left >= 4) {
    if (ALIGN >= 4) {
      const vec<T, 4> v = *(device const vec<T, 4>*)p;
      return float4(float(v.x), float(v.y), float(v.z), float(v.w));
    }
    return float4(float(p[0]), float(p[1]), float(p[2]), float(p[3]));
  }
  float4 v = float4(0.0f);
  if (left > 0) v.x = float(p[0]);
  if (left > 1) v.y = float(p[1]);
  if (left > 2) v.z = float(p[2]);
  return v;
}

// x, such that it stays finite as half if it is.
inline float ms_within_half(float x) {
  const float bounded = x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x);
  return fabs(x) < as_type<float>(0x7f800000u) ? bounded : x;
}

// The same weight from `row` on.
template <int BITS, int GROUP, typename T, int ALIGN>
inline ms_affine<BITS, GROUP, T, ALIGN> ms_from_row(ms_affine<BITS, GROUP, T, ALIGN> w, uint row, uint k) {
  w.words += ulong(row) * (k / 32 * BITS);
  w.scales += ulong(row) * (k / GROUP);
  w.biases += ulong(row) * (k / GROUP);
  return w;
}
template <int BITS, int GROUP, int ALIGN>
inline ms_floats<BITS, GROUP, ALIGN> ms_from_row(ms_floats<BITS, GROUP, ALIGN> w, uint row, uint k) {
  w.words += ulong(row) * (k / 8 * BITS / 4);
  w.scales += ulong(row) * (k / GROUP);
  return w;
}
template <typename T, int ALIGN>
inline ms_dense<T, ALIGN> ms_from_row(ms_dense<T, ALIGN> w, uint row, uint k) {
  w.elements += ulong(row) * k;
  return w;
}

// WORDS words from p, at a multiple of ALIGN words.
template <int WORDS, int ALIGN>
inline void ms_read_words(thread uint* to, device const uint* p) {
  constexpr int WIDE = ALIGN >= 4 && WORDS % 4 == 0 ? 4 : ALIGN >= 2 && WORDS % 2 == 0 ? 2 : 1;
  if (WIDE == 4) {
    MS_UNROLL for (int i = 0; i < WORDS / 4; i++) {
      const vec<uint, 4> v = ((device const vec<uint, 4>*)p)[i];
      to[4 * i] = v.x;
      to[4 * i + 1] = v.y;
      to[4 * i + 2] = v.z;
      to[4 * i + 3] = v.w;
    }
  } else if (WIDE == 2) {
    MS_UNROLL for (int i = 0; i < WORDS / 2; i++) {
      const vec<uint, 2> v = ((device const vec<uint, 2>*)p)[i];
      to[2 * i] = v.x;
      to[2 * i + 1] = v.y;
    }
  } else {
    MS_UNROLL for (int i = 0; i < WORDS; i++) to[i] = p[i];
  }
}

// The chunk at element `at` of the weight, where the row has `left` elements more; what lies behind them is 0.
template <int BITS, int GROUP, typename T, int ALIGN, int C>
inline void ms_read(thread ms_affine_chunk<BITS, C, T>& to, ms_affine<BITS, GROUP, T, ALIGN> w, uint at, int left) {
  constexpr int WORDS = C * BITS / 32;
  if (left <= 0) {
    MS_UNROLL for (int i = 0; i < WORDS; i++) to.words[i] = 0;
    to.scale = to.bias = T(0.0f);
    return;
  }
  ms_read_words<WORDS, ALIGN>(to.words, w.words + at / C * WORDS);
  to.scale = w.scales[at / GROUP];
  to.bias = w.biases[at / GROUP];
}
template <int BITS, int GROUP, int ALIGN, int C>
inline void ms_read(thread ms_floats_chunk<BITS, GROUP, C>& to, ms_floats<BITS, GROUP, ALIGN> w, uint at, int left) {
  constexpr int WORDS = C * BITS / 32;
  if (left <= 0) {
    MS_UNROLL for (int i = 0; i < WORDS; i++) to.words[i] = 0;
    to.scale = 0;
    return;
  }
  ms_read_words<WORDS, ALIGN>(to.words, w.words + at / C * WORDS);
  to.scale = w.scales[at / GROUP];
}
template <typename T, int ALIGN, int C>
inline void ms_read(thread ms_dense_chunk<C, T>& to, ms_dense<T, ALIGN> w, uint at, int left) {
  MS_UNROLL for (int i = 0; i < C; i += 4) {
    if (left - i >= 4 && ALIGN >= 4) {
      const vec<T, 4> v = *(device const vec<T, 4>*)(w.elements + at + i);
      to.elements[i] = v.x;
      to.elements[i + 1] = v.y;
      to.elements[i + 2] = v.z;
      to.elements[i + 3] = v.w;
    } else {
      MS_UNROLL for (int j = i; j < i + 4; j++) to.elements[j] = left > j ? w.elements[at + j] : T(0.0f);
    }
  }
}

// Bits of value i of the chunk; i is known when compiled.
template <int BITS, int C, typename T>
inline uint ms_code(thread const ms_affine_chunk<BITS, C, T>& chunk, int i) {
  const int word = i * BITS / 32;
  const int shift = i * BITS % 32;
  uint v = chunk.words[word] >> shift;
  if (shift + BITS > 32) v |= chunk.words[min(word + 1, C * BITS / 32 - 1)] << (32 - shift);
  return v & ((1u << BITS) - 1);
}

// Value i of the chunk before scale and bias.
template <int BITS, int C, typename T>
inline float ms_unscaled(thread const ms_affine_chunk<BITS, C, T>& chunk, int i) {
  return float(ms_code(chunk, i));
}
template <int BITS, int GROUP, int C>
inline float ms_unscaled(thread const ms_floats_chunk<BITS, GROUP, C>& chunk, int i) {
  return ms_from_bits<BITS>(chunk.words[i * BITS / 32] >> i * BITS % 32 & ((1u << BITS) - 1));
}
template <int C, typename T>
inline float ms_unscaled(thread const ms_dense_chunk<C, T>& chunk, int i) {
  return float(chunk.elements[i]);
}

// Value i of the chunk.
template <int BITS, int C, typename T>
inline float ms_value(thread const ms_affine_chunk<BITS, C, T>& chunk, int i) {
  return fma(ms_unscaled(chunk, i), float(chunk.scale), float(chunk.bias));
}
template <int BITS, int GROUP, int C>
inline float ms_value(thread const ms_floats_chunk<BITS, GROUP, C>& chunk, int i) {
  return ms_unscaled(chunk, i) * ms_from_scale<GROUP>(chunk.scale);
}
template <int C, typename T>
inline float ms_value(thread const ms_dense_chunk<C, T>& chunk, int i) {
  return float(chunk.elements[i]);
}

// sum plus the chunk's product with an x of which `dot` is the product with the unscaled values and `total` the sum.
template <int BITS, int C, typename T>
inline float ms_add(thread const ms_affine_chunk<BITS, C, T>& chunk, float dot, float total, float sum) {
  return fma(float(chunk.scale), dot, fma(float(chunk.bias), total, sum));
}
template <int BITS, int GROUP, int C>
inline float ms_add(thread const ms_floats_chunk<BITS, GROUP, C>& chunk, float dot, float, float sum) {
  return fma(ms_from_scale<GROUP>(chunk.scale), dot, sum);
}
template <int C, typename T>
inline float ms_add(thread const ms_dense_chunk<C, T>&, float dot, float, float sum) {
  return sum + dot;
}

#endif
