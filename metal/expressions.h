// Elementwise functions that Metal lacks, or has without the meaning that row programs and epilogues give them
// (ms_instr_op in params.h). Generated kernels call them: kernels/gpu/expressions.py. All are float to float,
// infinities and NaN pass as in C; NaN is told by its bits, which holds in any maths mode.
#ifndef METALSTEP_EXPRESSIONS_H
#define METALSTEP_EXPRESSIONS_H

inline bool ms_is_nan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }

// ---- one operation, one rounding or none ----------------------------------------------------------------------------
inline float ms_truth(bool condition) { return condition ? 1.0f : 0.0f; }
inline float ms_sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f); }
inline float ms_square(float x) { return x * x; }
inline float ms_cube(float x) { return x * x * x; }
// Finite numbers beyond float16's are its largest; infinities and NaN stay.
inline half ms_to_half(float x) {
  const uint size = as_type<uint>(x) & 0x7fffffffu;
  const bool beyond = size >= 0x477ff000u && size < 0x7f800000u;  // 65520, which rounds to infinity
  return half(beyond ? (x < 0.0f ? -65504.0f : 65504.0f) : x);
}
inline float ms_to_f16(float x) { return float(half(x)); }
inline float ms_to_bf16(float x) { return float(bfloat(x)); }

// NaN if one of them is.
inline float ms_max(float x, float y) { return x > y || ms_is_nan(x) ? x : y; }
inline float ms_min(float x, float y) { return x < y || ms_is_nan(x) ? x : y; }

// x - floor(x / y) * y, exactly: of the divisor's sign, as in Python.
inline float ms_remainder(float x, float y) {
  const float r = precise::fmod(x, y);
  return r != 0.0f && (r < 0.0f) != (y < 0.0f) ? r + y : r;
}

// As a cast of C saturates; NaN becomes 0.
inline int ms_to_int(float x) {
  if (ms_is_nan(x)) return 0;
  if (x >= 2147483648.0f) return 2147483647;
  return x < -2147483648.0f ? int(0x80000000u) : int(x);
}

// ---- functions ------------------------------------------------------------------------------------------------------
// 2^n for a whole n from -126 to 127.
inline float ms_exp2_whole(int n) { return as_type<float>(uint(n + 127) << 23); }

inline float ms_sigmoid(float x) { return 1.0f / (1.0f + precise::exp(-x)); }

// e^r - 1 = r + r^2 p(r) for |r| <= ln(2)/2. Coefficients: Cephes expf.
inline float ms_exp_polynomial(float r) {
  float p = fma(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = fma(p, r, 8.3334519073e-3f);
  p = fma(p, r, 4.1665795894e-2f);
  p = fma(p, r, 1.6666665459e-1f);
  return fma(p, r, 5.0000001201e-1f);
}

// e^x - 1 with the digits of x near 0: at most 2 units in the last place off.
inline float ms_expm1(float x) {
  if (x == 0.0f || ms_is_nan(x)) return x;
  const float bounded = x > 89.0f ? 89.0f : (x < -30.0f ? -30.0f : x);
  const float n = rint(bounded * 1.44269504f);
  float r = fma(n, -0.693359375f, bounded);
  r = fma(n, 2.12194440e-4f, r);
  const float p = ms_exp_polynomial(r);
  if (n == 0.0f) return fma(p, r * r, r);
  if (n == 1.0f) return 2.0f * fma(p, r * r, r + 0.5f);  // 1/2 joins what is small: the sum is rounded once
  const float half_scale = ms_exp2_whole(int(n) - 1);    // the whole one, 2^128, is no float32
  return 2.0f * fma(fma(p, r * r, r), half_scale, half_scale - 0.5f);
}

// ln(1 + x) with the digits of x near 0: at most 2 units in the last place off. Coefficients: Cephes logf.
inline float ms_log1p(float x) {
  const float u = 1.0f + x;
  if (u == 1.0f || ms_is_nan(x)) return x;
  if (u <= 0.0f) return u == 0.0f ? as_type<float>(0xff800000u) : as_type<float>(0x7fc00000u);
  if (as_type<uint>(u) == 0x7f800000u) return u;
  // 1 + x = 2^e (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1], f of x itself: u has lost its last digits.
  const int e = (as_type<int>(u) - 0x3f3504f3) >> 23;
  const float scaled = as_type<float>(as_type<uint>(x) - (uint(e) << 23));  // x 2^-e
  const float f = scaled + ((e < 127 ? ms_exp2_whole(-e) : 0.0f) - 1.0f);
  float p = fma(7.0376836292e-2f, f, -1.1514610310e-1f);
  p = fma(p, f, 1.1676998740e-1f);
  p = fma(p, f, -1.2420140846e-1f);
  p = fma(p, f, 1.4249322787e-1f);
  p = fma(p, f, -1.6668057665e-1f);
  p = fma(p, f, 2.0000714765e-1f);
  p = fma(p, f, -2.4999993993e-1f);
  p = fma(p, f, 3.3333331174e-1f);
  const float square = f * f;
  float y = p * f * square;
  y = fma(float(e), -2.12194440e-4f, y);
  y = fma(square, -0.5f, y);
  return fma(float(e), 0.693359375f, f + y);
}

// ln(e^x + e^y)
inline float ms_logaddexp(float x, float y) {
  if (ms_is_nan(x) || ms_is_nan(y)) return x + y;
  const float most = x > y ? x : y;
  const float least = x > y ? y : x;
  if (as_type<uint>(most) == 0x7f800000u || as_type<uint>(least) == 0xff800000u) return most;
  return most + ms_log1p(precise::exp(least - most));
}

// At most 2 units in the last place off: a polynomial near 0, 1 - e^polynomial beyond.
inline float ms_erf(float x) {
  const float t = fabs(x);
  const float s = x * x;
  if (t > 0.921875f) {
    float far = fma(-1.72853470e-5f, t, 3.83197126e-4f);
    far = fma(far, s, fma(-3.88396438e-3f, t, 2.42546219e-2f));
    far = fma(far, t, -1.06777877e-1f);
    far = fma(far, t, -6.34846687e-1f);
    far = fma(far, t, -1.28717512e-1f);
    const float y = t > 4.0f ? 1.0f : 1.0f - precise::exp(fma(far, t, -t));
    return x < 0.0f ? -y : y;
  }
  float near = fma(-5.96761703e-4f, s, 4.99119423e-3f);
  near = fma(near, s, -2.67681349e-2f);
  near = fma(near, s, 1.12819925e-1f);
  near = fma(near, s, -3.76125336e-1f);
  near = fma(near, s, 1.28379166e-1f);
  return fma(near, x, x);
}

#endif
