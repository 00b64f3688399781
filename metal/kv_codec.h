// Codecs of the KV cache on a GPU: rotations, packing and unpacking. What they compute: kernels/turboquant.py; how vectors are stored:
// ms_kv_codec in params.h, which has to come before this. One simdgroup of 32 lanes has a vector of D elements at a time: 16 to 512 of
// them, m * 2^k with m of 1, 12, 20 and 28. Its lanes hold element 32 r + lane in register r.
#ifndef METALSTEP_KV_CODEC_H
#define METALSTEP_KV_CODEC_H

// What a codec stores of a vector of D elements. CODEC: ms_kv_codec with its bits.
template <int CODEC, int D>
struct ms_kv {
  static constant constexpr int base = CODEC & ~int(MS_KV_WIDE_SCALES);
  static constant constexpr bool wide = CODEC != base;  // scales of float32
  static constant constexpr bool affine = base == int(MS_KV_AFFINE8);
  static constant constexpr bool turbo = base >= int(MS_KV_TURBO2) && base <= int(MS_KV_TURBO4);
  static constant constexpr bool packed = turbo || affine;
  static constant constexpr int bits = affine ? 8 : (turbo ? base - 16 : 0);
  static constant constexpr int words = (D * bits + 31) / 32;
  static constant constexpr int group = !affine ? D : (D % 64 == 0 ? 64 : (D % 32 == 0 ? 32 : 16));  // that share scales
  static constant constexpr int groups = D / group;
};

// ---- Lloyd-Max codebooks of N(0, 1), ascending: a unit vector of D elements has them times 1 / sqrt(D) ---------------
constant float ms_turbo_centroids_2[4] = {-1.5104176085f, -0.4527800346f, 0.4527800346f, 1.5104176085f};
constant float ms_turbo_centroids_3[8] = {-2.1519457045f, -1.3439092785f, -0.7560052812f, -0.2450941789f,
                                          0.2450941789f,  0.7560052812f,  1.3439092785f,  2.1519457045f};
constant float ms_turbo_centroids_4[16] = {
    -2.7325895710f, -2.0690172265f, -1.6180463860f, -1.2562311973f, -0.9423404565f, -0.6567591185f,
    -0.3880482995f, -0.1283950299f, 0.1283950299f,  0.3880482995f,  0.6567591185f,  0.9423404565f,
    1.2562311973f,  1.6180463860f,  2.0690172265f,  2.7325895710f};
constant float ms_turbo_boundaries_2[3] = {-0.9815988216f, 0.0f, 0.9815988216f};
constant float ms_turbo_boundaries_3[7] = {-1.7479274915f, -1.0499572799f, -0.5005497301f, 0.0f,
                                           0.5005497301f,  1.0499572799f,  1.7479274915f};
constant float ms_turbo_boundaries_4[15] = {-2.4008033988f, -1.8435318063f, -1.4371387917f, -1.0992858269f, -0.7995497875f,
                                            -0.5224037090f, -0.2582216647f, 0.0f,           0.2582216647f,  0.5224037090f,
                                            0.7995497875f,  1.0992858269f,  1.4371387917f,  1.8435318063f,  2.4008033988f};

template <int BITS>
inline float ms_turbo_centroid(uint index) {
  return BITS == 2 ? ms_turbo_centroids_2[index & 3]
                   : (BITS == 3 ? ms_turbo_centroids_3[index & 7] : ms_turbo_centroids_4[index & 15]);
}

template <int BITS>
inline float ms_turbo_boundary(int k) {
  return BITS == 2 ? ms_turbo_boundaries_2[k % 3] : (BITS == 3 ? ms_turbo_boundaries_3[k % 7] : ms_turbo_boundaries_4[k % 15]);
}

// Boundaries below y: what lies on one belongs to the cell below.
template <int BITS>
inline uint ms_turbo_index(float y) {
  uint index = 0;
  MS_UNROLL for (int k = 0; k < (1 << BITS) - 1; k++) index += y > ms_turbo_boundary<BITS>(k) ? 1 : 0;
  return index;
}

// ---- unpacking ------------------------------------------------------------------------------------------------------
// Code j of a vector of D.
template <int BITS, int D>
inline uint ms_code(device const uint* words, int j) {
  const int bit = j * BITS, shift = bit % 32;
  uint code = words[bit / 32] >> shift;
  if (32 % BITS != 0 && shift + BITS > 32) code |= words[bit / 32 + 1] << (32 - shift);
  return code & ((1u << BITS) - 1);
}

// Codes 4 chunk to 4 chunk + 3, the first in the lowest bits; what is above them is not 0.
template <int BITS>
inline uint ms_codes4(device const uint* words, int chunk) {
  const int bit = chunk * 4 * BITS, shift = bit % 32;
  uint codes = words[bit / 32] >> shift;
  if (32 % BITS != 0 && shift > 20) codes |= words[bit / 32 + 1] << (32 - shift);
  return codes;
}

template <int BITS>
inline uint ms_code_of4(uint codes, int e) {
  return (codes >> (e * BITS)) & ((1u << BITS) - 1);
}

// ---- rotation: signs, then the Hadamard matrix of D = m * 2^k, which is kron(H_m, H_2^k) ----------------------------
// Signs of SplitMix64: a set bit makes element 32 word + bit negative. Compilers make a constant of it where all arguments are.
inline uint ms_sign_word(int dim, uint seed, int word) {
  ulong z = ulong(seed) * 0x100000001ul + ulong(dim) + ulong(word / 2 + 1) * 0x9e3779b97f4a7c15ul;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ul;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebul;
  z ^= z >> 31;
  return word % 2 != 0 ? uint(z >> 32) : uint(z);
}

inline float ms_signed(float x, uint bit) { return as_type<float>(as_type<uint>(x) ^ (bit << 31)); }

// Rows of H_12, H_20 and H_28: a set bit is -1. H_12 is symmetric, the others are not.
constant uint ms_hadamard_12[12] = {0x002u, 0xaabu, 0x3c8u, 0x96eu, 0xf20u, 0x5bau, 0xc8cu, 0x6e6u, 0x23cu, 0xb96u, 0x8f0u, 0xe5au};
constant uint ms_hadamard_20[20] = {0x933deu, 0x2e3bdu, 0x5477bu, 0xa0ef7u, 0x499efu, 0x637c1u, 0xc6ba2u,
                                    0x8d764u, 0x1aee8u, 0x359f0u, 0x0fa53u, 0x174a7u, 0x26d4eu, 0x45e9cu,
                                    0x83d39u, 0xf7a6du, 0xef4fau, 0xdedd5u, 0xbdf8bu, 0x7bf36u};
constant uint ms_hadamard_28[28] = {0xcd69e7eu, 0x9ad7c7du, 0x37ab8fbu, 0x6d571f7u, 0xd8ae3efu, 0xb3587dfu, 0x66b4f3fu,
                                    0xb467f43u, 0x6acbe87u, 0xd593d8eu, 0xab27b9cu, 0x564f7b8u, 0xac9aff0u, 0x5b31fe1u,
                                    0x87fb325u, 0x0ff66cau, 0x1decd95u, 0x39ddb2au, 0x71bf654u, 0xe17eca9u, 0xc2fd9d2u,
                                    0xfcf1299u, 0xfbe2532u, 0xf7c4ae4u, 0xef8d549u, 0xdf1ea13u, 0xbe3d4a6u, 0x7e7a94cu};

template <int M>
inline uint ms_hadamard_row(int i) {
  return M == 12 ? ms_hadamard_12[i % 12] : (M == 20 ? ms_hadamard_20[i % 20] : ms_hadamard_28[i % 28]);
}

template <int D>
struct ms_hadamard_of {
  static constant constexpr bool power = (D & (D - 1)) == 0;
  static constant constexpr int m = power ? 1 : (D % 7 == 0 ? 28 : (D % 5 == 0 ? 20 : 12));
  static constant constexpr int block = D / m;
  static_assert(D >= 16 && D <= 512 && D % m == 0 && (block & (block - 1)) == 0, "no Hadamard matrix of that many elements");
  static_assert(power || block <= 32, "a block is within a simdgroup's lanes");
};

// A lane's elements of a vector; those past D are 0.
template <int D>
struct ms_lanes {
  static constant constexpr int registers = (D + 31) / 32;
  static constant constexpr bool whole = D % 32 == 0;
  float x[registers];
};

template <int D>
inline bool ms_has(int r, uint lane) {
  return ms_lanes<D>::whole || r * 32 + int(lane) < D;
}

template <int D>
inline void ms_take(thread ms_lanes<D>& v, const threadgroup float* from, uint lane) {
  MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++) v.x[r] = ms_has<D>(r, lane) ? from[r * 32 + int(lane)] : 0.0f;
}

template <int D>
inline void ms_leave(thread ms_lanes<D>& v, threadgroup float* to, uint lane) {
  MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++)
    if (ms_has<D>(r, lane)) to[r * 32 + int(lane)] = v.x[r];
}

template <int D>
inline void ms_change_signs(thread ms_lanes<D>& v, uint seed, uint lane) {
  MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++) v.x[r] = ms_signed(v.x[r], (ms_sign_word(D, seed, r) >> lane) & 1u);
}

// v <- H v, or H^T v if BACK, not scaled. memory: D elements of the simdgroup's own, untouched where D is a power of two; afterwards
// no lane reads it any more.
template <int D, bool BACK>
inline void ms_hadamard(thread ms_lanes<D>& v, threadgroup float* memory, uint lane) {
  using H = ms_hadamard_of<D>;
  constexpr int R = ms_lanes<D>::registers;
  MS_UNROLL for (int h = 1; h < (H::block < 32 ? H::block : 32); h *= 2) {
    const bool upper = (int(lane) & h) != 0;
    MS_UNROLL for (int r = 0; r < R; r++) {
      const float other = simd_shuffle_xor(v.x[r], ushort(h));
      v.x[r] = upper ? other - v.x[r] : v.x[r] + other;
    }
  }
  MS_UNROLL for (int h = 1; h < H::block / 32; h *= 2) {
    MS_UNROLL for (int r = 0; r < R; r++) {
      if ((r & h) == 0) {
        const float a = v.x[r], b = v.x[r | h];
        v.x[r] = a + b;
        v.x[r | h] = a - b;
      }
    }
  }
  if (H::m != 1) {
    simdgroup_barrier(mem_flags::mem_threadgroup);  // whoever read `memory` has done so
    ms_leave<D>(v, memory, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    MS_UNROLL for (int r = 0; r < R; r++) {
      const int e = ms_has<D>(r, lane) ? r * 32 + int(lane) : 0, i = e / H::block, j = e % H::block;
      const uint own = ms_hadamard_row<H::m>(i);
      float sum = 0.0f;
      MS_UNROLL for (int k = 0; k < H::m; k++) {
        const uint bit = (BACK ? ms_hadamard_row<H::m>(k) >> i : own >> k) & 1u;
        sum += ms_signed(memory[k * H::block + j], bit);
      }
      v.x[r] = ms_has<D>(r, lane) ? sum : 0.0f;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // it may be written again
  }
}

// x <- R x = H (signs x) / sqrt(D), in place, for one simdgroup, all of whose lanes have to be there. Elements are read and left by lane
// e % 32; when other lanes or simdgroups wrote them the caller has put a barrier between, and when they read them it puts one behind.
template <int D>
inline void ms_rotate(threadgroup float* x, uint seed, uint lane) {
  ms_lanes<D> v;
  ms_take<D>(v, x, lane);
  ms_change_signs<D>(v, seed, lane);
  ms_hadamard<D, false>(v, x, lane);
  const float factor = 1.0f / precise::sqrt(float(D));
  MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++) v.x[r] *= factor;
  ms_leave<D>(v, x, lane);
}

// x <- R^T x = signs (H^T x) / sqrt(D); barriers as for ms_rotate.
template <int D>
inline void ms_rotate_back(threadgroup float* x, uint seed, uint lane) {
  ms_lanes<D> v;
  ms_take<D>(v, x, lane);
  ms_hadamard<D, true>(v, x, lane);
  const float factor = 1.0f / precise::sqrt(float(D));
  MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++) v.x[r] *= factor;
  ms_change_signs<D>(v, seed, lane);
  ms_leave<D>(v, x, lane);
}

// ---- encoding -------------------------------------------------------------------------------------------------------
constant uint ms_kv_seeds[2] = {42, 43};  // of keys and of values
// 2^-100: a vector whose squared norm is less counts as zero. Below, squares are subnormal, and a device may take them for 0.
#define MS_TURBO_LEAST_SQUARE 7.888609052210118e-31f

inline bool ms_is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }

// x where `good`, else NaN, by bits: fast maths knows of no NaN.
inline float ms_or_nan(float x, bool good) { return as_type<float>(good ? as_type<uint>(x) : 0x7fc00000u); }

// Bits of the greatest half not above x, and of the least not below it; infinite beyond the finite ones.
inline ushort ms_half_below(float x) {
  const ushort bits = as_type<ushort>(half(x));
  if (float(as_type<half>(bits)) <= x) return bits;
  return (bits & 0x8000) != 0 ? ushort(bits + 1) : ushort(bits - 1);
}
inline ushort ms_half_above(float x) {
  const ushort bits = ms_half_below(-x);
  return bits == 0 ? bits : ushort(bits ^ 0x8000);
}

// A vector as it is stored: the code of each of a lane's elements, and what they are decoded to: of affine8 lo + code * s, of turbo codecs
// c / sqrt(D), which the vector's scale times is its element in rotated space.
template <int D>
struct ms_codes_of {
  uint code[ms_lanes<D>::registers];
  float value[ms_lanes<D>::registers];
};

// A turbo codec's. scale: the vector's, as it is stored; its bits in `stored`.
template <int CODEC, int SCALE, int D>
inline void ms_encode_turbo(thread ms_codes_of<D>& to, thread uint& stored, thread ms_lanes<D>& v, threadgroup float* memory,
                            uint seed, uint lane) {
  using Facts = ms_kv<CODEC, D>;
  constexpr int R = ms_lanes<D>::registers;
  float squares = 0.0f;
  MS_UNROLL for (int r = 0; r < R; r++) squares = fma(v.x[r], v.x[r], squares);
  squares = simd_sum(squares);
  const bool finite = ms_is_finite(squares), zero = squares < MS_TURBO_LEAST_SQUARE;
  const float norm = precise::sqrt(squares), root = precise::sqrt(float(D));
  const float inverse = finite && !zero ? 1.0f / norm : 0.0f;
  ms_change_signs<D>(v, seed, lane);
  ms_hadamard<D, false>(v, memory, lane);
  float own = 0.0f, with = 0.0f;  // the codebook's vector, in units of 1 / sqrt(D): with itself, with the rotated one
  MS_UNROLL for (int r = 0; r < R; r++) {
    const float y = v.x[r] * inverse;
    const bool has = ms_has<D>(r, lane) && finite && !zero;
    to.code[r] = has ? ms_turbo_index<Facts::bits>(y) : 0;
    to.value[r] = has ? ms_turbo_centroid<Facts::bits>(to.code[r]) : 0.0f;
    own = fma(to.value[r], to.value[r], own);
    with = fma(to.value[r], y, with);
  }
  float scale = norm;
  if (SCALE == int(MS_KV_SCALE_MATCHED)) scale = norm / (precise::sqrt(simd_sum(own)) / root);
  if (SCALE == int(MS_KV_SCALE_UNBIASED)) scale = norm / (simd_sum(with) / float(D));
  if (zero || !finite) scale = 0.0f;
  if (!Facts::wide) scale = float(half(min(scale, 65504.0f)));
  stored = Facts::wide ? as_type<uint>(scale) : uint(as_type<ushort>(half(scale)));
  if (!finite) stored = Facts::wide ? 0x7fc00000u : 0x7e00u;
  MS_UNROLL for (int r = 0; r < R; r++) to.value[r] = to.value[r] / root;
}

// affine8's. The scales of the group that register r is in, for this lane: stored[2 r] its step, [2 r + 1] its least element, bits of
// halves. A vector some of which is infinite, or would be in these, has none.
template <int CODEC, int D>
inline void ms_encode_affine(thread ms_codes_of<D>& to, thread uint* stored, thread ms_lanes<D>& v) {
  constexpr int R = ms_lanes<D>::registers, G = ms_kv<CODEC, D>::group, S = G == 64 ? 2 : 1;
  uint bad = 0;
  MS_UNROLL for (int r = 0; r < R; r += S) {
    float least = v.x[r], most = v.x[r];
    bad |= ms_is_finite(v.x[r]) && ms_is_finite(v.x[r + S - 1]) ? 0u : 1u;
    if (S == 2) {
      least = min(least, v.x[r + S - 1]);
      most = max(most, v.x[r + S - 1]);
    }
    MS_UNROLL for (int h = 1; h < (G < 32 ? G : 32); h *= 2) {
      least = min(least, simd_shuffle_xor(least, ushort(h)));
      most = max(most, simd_shuffle_xor(most, ushort(h)));
    }
    uint low = ms_half_below(least);
    if (low == 0x8000u) low = 0;  // of -0
    const uint step = ms_half_above((most - float(as_type<half>(ushort(low)))) / 255.0f);
    bad |= (low & 0x7c00u) == 0x7c00u || (step & 0x7c00u) == 0x7c00u ? 1u : 0u;
    MS_UNROLL for (int i = 0; i < S; i++) {
      stored[2 * (r + i)] = step;
      stored[2 * (r + i) + 1] = low;
    }
  }
  const bool finite = simd_or(bad) == 0;
  MS_UNROLL for (int r = 0; r < R; r++) {
    const float s = float(as_type<half>(ushort(stored[2 * r]))), lo = float(as_type<half>(ushort(stored[2 * r + 1])));
    const bool flat = stored[2 * r] == 0;
    const float index = min(rint((v.x[r] - lo) / (flat ? 1.0f : s)), 255.0f);  // not below 0: lo is not above x
    to.code[r] = finite && !flat ? uint(index) : 0u;
    to.value[r] = ms_or_nan(fma(float(to.code[r]), s, lo), finite);
    if (!finite) {
      stored[2 * r] = 0x7e00u;
      stored[2 * r + 1] = 0x7e00u;
    }
  }
}

// Word w of the codes that lie in threadgroup memory.
template <int BITS, int D>
inline uint ms_packed_word(const threadgroup uint* codes, int w) {
  const int first = w * 32 / BITS, shift = w * 32 - first * BITS;  // the first code's bits below `shift` are in the word before
  uint word = 0;
  MS_UNROLL for (int i = 0; i < (32 + BITS - 1) / BITS + (32 % BITS != 0 ? 1 : 0); i++) {
    const int at = i * BITS - shift;
    if (at < 32 && first + i < D) word |= at >= 0 ? codes[first + i] << at : codes[first + i] >> -at;
  }
  return word;
}

// One vector's codes and values, and its scales, which go to the plane if `writes`; the one of a turbo codec, else 1. AFFINE:
// ms_kv<CODEC, D>::affine.
template <int CODEC, int SCALE, int D, bool AFFINE>
struct ms_encoder {
  static float encode(thread ms_codes_of<D>& codes, thread ms_lanes<D>& v, threadgroup float* memory, uint seed, device uint* scales,
                      ulong head, uint block_size, uint place, uint lane, bool writes) {
    uint stored = 0;
    ms_encode_turbo<CODEC, SCALE, D>(codes, stored, v, memory, seed, lane);
    const ulong vector = head * block_size + place;
    if (ms_kv<CODEC, D>::wide) {
      if (writes && lane == 0) scales[vector] = stored;
      return as_type<float>(stored);
    }
    if (writes && lane == 0) ((device ushort*)scales)[vector] = ushort(stored);
    return float(as_type<half>(ushort(stored)));
  }
};
template <int CODEC, int SCALE, int D>
struct ms_encoder<CODEC, SCALE, D, true> {
  static float encode(thread ms_codes_of<D>& codes, thread ms_lanes<D>& v, threadgroup float*, uint, device uint* scales, ulong head,
                      uint block_size, uint place, uint lane, bool writes) {
    using Facts = ms_kv<CODEC, D>;
    uint stored[2 * ms_lanes<D>::registers];
    ms_encode_affine<CODEC, D>(codes, stored, v);
    device ushort* to = (device ushort*)scales + head * ulong(Facts::groups * 2) * block_size + place;
    MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++) {
      const int e = r * 32 + int(lane), group = e / Facts::group;
      if (writes && e < D && e % Facts::group == 0) {
        to[ulong(2 * group) * block_size] = ushort(stored[2 * r]);
        to[ulong(2 * group + 1) * block_size] = ushort(stored[2 * r + 1]);
      }
    }
    return 1.0f;
  }
};

// Encodes the D floats of x into the plane, if `writes`, for one simdgroup, all of whose lanes have to be there. head: block * kv heads +
// kv head; place: in that block. scales: 4-byte words of the plane before its scales. x is overwritten: if DECODE, with what was stored,
// decoded, and what is returned times this are the elements (in rotated space for turbo codecs). Barriers as for ms_rotate: one before
// where other lanes wrote x; behind, x may be read and written by any lane.
template <int CODEC, int SCALE, int D, bool DECODE>
inline float ms_encode(threadgroup float* x, uint seed, device uint* plane, uint scales, ulong head, uint block_size, uint place,
                       uint lane, bool writes = true) {
  using Facts = ms_kv<CODEC, D>;
  static_assert(Facts::packed, "floats are stored as they are");
  ms_lanes<D> v;
  ms_codes_of<D> codes;
  ms_take<D>(v, x, lane);
  const float factor = ms_encoder<CODEC, SCALE, D, Facts::affine>::encode(codes, v, x, seed, plane + scales, head, block_size, place,
                                                                          lane, writes);
  if (writes) {
    threadgroup uint* memory = (threadgroup uint*)x;
    MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++)
      if (ms_has<D>(r, lane)) memory[r * 32 + int(lane)] = codes.code[r];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    device uint* words = plane + (head * block_size + place) * ulong(Facts::words);
    for (int w = int(lane); w < Facts::words; w += 32) words[w] = ms_packed_word<Facts::bits, D>(memory, w);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (DECODE) {
    MS_UNROLL for (int r = 0; r < ms_lanes<D>::registers; r++)
      if (ms_has<D>(r, lane)) x[r * 32 + int(lane)] = codes.value[r];
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  return factor;
}

#endif
