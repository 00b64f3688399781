// What generated row programs call: totals over spans, packed rows of a table. The kernels are written by
// kernels/gpu/row_codegen.py, one per program: a threadgroup per row, a simdgroup or several per span.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"
#include "expressions.h"
#include "kv_codec.h"
#include "floats.h"

// ---- totals over the threads of a span ------------------------------------------------------------------------------
// An operation has the numbers that it works on, from an element (of) and back (value), what changes none of them, a
// pair's and a simdgroup's total, which is the same in every lane, and a float of a number's bits and back. Lanes
// combine in one fixed order: totals do not depend on the batch. ms_most, for softmax, may pass a NaN over: the sum
// behind it does not.
struct ms_sum {
  typedef float number;
  static float none() { return 0.0f; }
  static float of(float x) { return x; }
  static float value(float x) { return x; }
  static float combine(float x, float y) { return x + y; }
  static float lanes(float x) { return simd_sum(x); }
  static float pack(float x) { return x; }
  static float unpack(float x) { return x; }
};
struct ms_product {
  typedef float number;
  static float none() { return 1.0f; }
  static float of(float x) { return x; }
  static float value(float x) { return x; }
  static float combine(float x, float y) { return x * y; }
  static float lanes(float x) { return simd_product(x); }
  static float pack(float x) { return x; }
  static float unpack(float x) { return x; }
};
struct ms_most {
  typedef float number;
  static float none() { return -3.402823466e+38f; }
  static float of(float x) { return x; }
  static float value(float x) { return x; }
  static float combine(float x, float y) { return x > y ? x : y; }
  static float lanes(float x) { return simd_max(x); }
  static float pack(float x) { return x; }
  static float unpack(float x) { return x; }
};

// Floats as integers in the same order: an empty span's infinity and NaN are plain numbers, in any maths mode.
inline int ms_ordered(float x) {
  const int bits = as_type<int>(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
inline float ms_unordered(int x) { return as_type<float>(x < 0 ? x ^ 0x7fffffff : x); }

struct ms_largest {  // NaN if an element is: it is above infinity
  typedef int number;
  static int none() { return int(0x80000000u); }
  static int of(float x) { return ms_is_nan(x) ? 0x7fc00000 : ms_ordered(x); }
  static float value(int x) { return ms_unordered(x); }
  static int combine(int x, int y) { return max(x, y); }
  static int lanes(int x) { return simd_max(x); }
  static float pack(int x) { return as_type<float>(x); }
  static int unpack(float x) { return as_type<int>(x); }
};
struct ms_smallest {  // NaN if an element is: it is below -infinity
  typedef int number;
  static int none() { return 0x7fffffff; }
  static int of(float x) { return ms_is_nan(x) ? int(0x803fffffu) : ms_ordered(x); }
  static float value(int x) { return ms_unordered(x); }
  static int combine(int x, int y) { return min(x, y); }
  static int lanes(int x) { return simd_min(x); }
  static float pack(int x) { return as_type<float>(x); }
  static int unpack(float x) { return as_type<int>(x); }
};

// The total over `count` simdgroups from `first` on, for all of their threads; every thread of the threadgroup calls
// it. partial: an element per simdgroup of the threadgroup, used by no other total.
template <typename Operation>
inline typename Operation::number ms_span_total(typename Operation::number x, threadgroup float* partial, uint first,
                                                uint count, uint sg, uint lane) {
  x = Operation::lanes(x);
  if (lane == 0) partial[sg] = Operation::pack(x);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return Operation::lanes(lane < count ? Operation::unpack(partial[first + lane]) : Operation::none());
}

// ---- embedding ------------------------------------------------------------------------------------------------------
// Element i of a packed row: BITS bits of a little-endian stream of words. A row is whole words.
template <uint BITS>
inline uint ms_packed_element(device const uint* words, uint i) {
  const uint bit = i * BITS;
  const uint shift = bit % 32;
  uint value = words[bit / 32] >> shift;
  if (32 % BITS != 0 && shift + BITS > 32) value |= words[bit / 32 + 1] << (32 - shift);
  return value & ((1u << BITS) - 1);
}

template <uint BITS, uint GROUP, typename T>
inline float ms_affine_element(device const uint* words, device const T* scales, device const T* biases, uint i) {
  return fma(float(ms_packed_element<BITS>(words, i)), float(scales[i / GROUP]), float(biases[i / GROUP]));
}

// Floats of 4 or 8 bits times scales of a byte: exact.
template <uint BITS, uint GROUP>
inline float ms_floats_element(device const uint* words, device const uchar* scales, uint i) {
  return ms_from_bits<int(BITS)>(ms_packed_element<BITS>(words, i)) * ms_from_scale<int(GROUP)>(scales[i / GROUP]);
}
