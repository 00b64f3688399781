// Floats of 4 and 8 bits: the elements and scales of mxfp4, nvfp4 and mxfp8, as float and exact.
// Source: OCP Microscaling Formats (MX) 1.0, section 5.3; e8m0's 255 is infinity, as in MLX.
#ifndef METALSTEP_FLOATS_H
#define METALSTEP_FLOATS_H

// A sign, 2 bits of exponent, one of mantissa. Like half it has subnormals: its bits make one that is 2^-14 of it.
inline float ms_from_e2m1(uint bits) {
  return float(as_type<half>(ushort((bits & 8) << 12 | (bits & 7) << 9))) * 16384.0f;
}

// A sign, 4 bits of exponent, 3 of mantissa; 127 and 255 are NaN.
inline float ms_from_e4m3(uint bits) {
  const float value = float(as_type<half>(ushort((bits & 128) << 8 | (bits & 127) << 7))) * 256.0f;
  return (bits & 127) == 127 ? as_type<float>(0x7fc00000u | bits) : value;
}

// 2^(bits - 127); 2^-127 is subnormal.
inline float ms_from_e8m0(uint bits) { return as_type<float>(bits == 0 ? 0x00400000u : bits << 23); }

// An element of BITS bits, and a scale of groups of GROUP elements.
template <int BITS>
inline float ms_from_bits(uint bits) {
  return BITS == 4 ? ms_from_e2m1(bits) : ms_from_e4m3(bits);
}
template <int GROUP>
inline float ms_from_scale(uint bits) {
  return GROUP == 16 ? ms_from_e4m3(bits) : ms_from_e8m0(bits);
}

#endif
