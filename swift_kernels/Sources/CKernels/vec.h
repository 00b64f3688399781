// Sixteen float32 lanes for every instruction set: clang's vectors, and intrinsics only where those give poor code.
//
// Included once per instruction set, behind a target attribute; one of MS_ISA_IS_{AVX512,AVX2,NEON,PORTABLE} is
// defined. All functions are inlined, so no vector crosses a call. Sums have one order: lanes i and i + 8, then i + 4,
// i + 2, i + 1.
#define MS_VEC static inline __attribute__((always_inline, unused))

typedef float f32x16 __attribute__((ext_vector_type(16)));
typedef int32_t i32x16 __attribute__((ext_vector_type(16)));
typedef uint32_t u32x16 __attribute__((ext_vector_type(16)));
typedef uint16_t u16x16 __attribute__((ext_vector_type(16)));

#pragma clang fp contract(fast)
// How wide vectors are passed differs by instruction set: here none is passed.
#pragma clang diagnostic ignored "-Wpsabi"

MS_VEC i32x16 vbits(f32x16 v) { return __builtin_bit_cast(i32x16, v); }
MS_VEC f32x16 vfloat(i32x16 v) { return __builtin_bit_cast(f32x16, v); }
MS_VEC f32x16 vsplat(float x) { return (f32x16)x; }

MS_VEC f32x16 vload(const float *p) {
  f32x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
MS_VEC void vstore(float *p, f32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n <= 16 elements; the other lanes are 0 and their memory is not touched.
MS_VEC f32x16 vload_n(const float *p, uint32_t n) {
#if defined(MS_ISA_IS_AVX512)
  return (f32x16)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  if (n >= 16) return vload(p);
  float lanes[16] = {0};
  for (uint32_t i = 0; i < n; ++i) lanes[i] = p[i];
  return vload(lanes);
#endif
}
MS_VEC void vstore_n(float *p, f32x16 v, uint32_t n) {
#if defined(MS_ISA_IS_AVX512)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  if (n >= 16) {
    vstore(p, v);
    return;
  }
  float lanes[16];
  vstore(lanes, v);
  for (uint32_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// The first n lanes of v, `fill` in the others.
MS_VEC f32x16 vfirst(f32x16 v, uint32_t n, f32x16 fill) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < (int32_t)n ? v : fill;
}

// Fused by name: left to the compiler, one tile might be fused and another not, and a row's bits would depend on its
// batch.
MS_VEC f32x16 vfma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(MS_ISA_IS_PORTABLE)
#pragma clang fp contract(off)
  return a * b + c;
#else
  return __builtin_elementwise_fma(a, b, c);
#endif
}
// The second operand when one is NaN: one instruction on x86. See vmax_nan where NaN must survive.
MS_VEC f32x16 vmax(f32x16 a, f32x16 b) { return a > b ? a : b; }
MS_VEC f32x16 vmin(f32x16 a, f32x16 b) { return a < b ? a : b; }
MS_VEC f32x16 vmax_nan(f32x16 a, f32x16 b) { return ((a > b) | (a != a)) ? a : b; }
MS_VEC f32x16 vmin_nan(f32x16 a, f32x16 b) { return ((a < b) | (a != a)) ? a : b; }
MS_VEC f32x16 vabs(f32x16 a) { return vfloat(vbits(a) & 0x7fffffff); }
MS_VEC f32x16 vsqrt(f32x16 a) { return __builtin_elementwise_sqrt(a); }
MS_VEC f32x16 vcopysign(f32x16 magnitude, f32x16 sign) {
  return vfloat((vbits(magnitude) & 0x7fffffff) | (vbits(sign) & (int32_t)0x80000000));
}

#if defined(MS_ISA_IS_PORTABLE)
// Without rounding instructions: values of 2^23 and more are integers (or not finite) and stay as they are.
MS_VEC f32x16 vtrunc(f32x16 a) {
  const i32x16 small = vabs(a) < 0x1p23f;
  const i32x16 whole = __builtin_convertvector(small ? a : vsplat(0), i32x16);
  return small ? vcopysign(__builtin_convertvector(whole, f32x16), a) : a;
}
MS_VEC f32x16 vround(f32x16 a) {  // half to even
  const f32x16 magic = vcopysign(vsplat(0x1p23f), a);
  return vabs(a) < 0x1p23f ? vcopysign((a + magic) - magic, a) : a;
}
MS_VEC f32x16 vfloor(f32x16 a) {
  const f32x16 t = vtrunc(a);
  return t > a ? t - 1.0f : t;
}
MS_VEC f32x16 vceil(f32x16 a) {
  const f32x16 t = vtrunc(a);
  return t < a ? vcopysign(t + 1.0f, a) : t;
}
#else
MS_VEC f32x16 vtrunc(f32x16 a) { return __builtin_elementwise_trunc(a); }
MS_VEC f32x16 vround(f32x16 a) { return __builtin_elementwise_rint(a); }
MS_VEC f32x16 vfloor(f32x16 a) { return __builtin_elementwise_floor(a); }
MS_VEC f32x16 vceil(f32x16 a) { return __builtin_elementwise_ceil(a); }
#endif

MS_VEC float vsum(f32x16 v) {
  typedef float f32x8 __attribute__((ext_vector_type(8)));
  typedef float f32x4 __attribute__((ext_vector_type(4)));
  const f32x8 a = v.lo + v.hi;
  const f32x4 b = a.lo + a.hi;
  return (b.x + b.z) + (b.y + b.w);
}
MS_VEC float vmaxall(f32x16 v) {
  v = vmax(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = vmax(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  v = vmax(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  return v[0] > v[1] ? v[0] : v[1];
}

// ---- 16-bit floats --------------------------------------------------------------------------------------------------
MS_VEC f32x16 vfrom_f16(u16x16 h) {
#if defined(MS_ISA_IS_AVX512)
  return (f32x16)_mm512_cvtph_ps(__builtin_bit_cast(__m256i, h));
#elif defined(MS_ISA_IS_PORTABLE)
  const i32x16 wide = __builtin_convertvector(h, i32x16);
  const i32x16 magnitude = (wide & 0x7fff) << 13;
  const i32x16 finite = vbits(vfloat(magnitude) * 0x1p112f);
  const i32x16 special = magnitude >= 0x7c00 << 13;
  return vfloat((special ? magnitude | 0x7f800000 : finite) | (wide & 0x8000) << 16);
#else
  typedef _Float16 f16x16 __attribute__((ext_vector_type(16)));
  return __builtin_convertvector(__builtin_bit_cast(f16x16, h), f32x16);
#endif
}
MS_VEC u16x16 vto_f16(f32x16 v) {  // half to even
#if defined(MS_ISA_IS_AVX512)
  return __builtin_bit_cast(u16x16, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(MS_ISA_IS_PORTABLE)
  const i32x16 bits = vbits(v), magnitude = bits & 0x7fffffff;
  const i32x16 subnormal = vbits(vfloat(magnitude) + 0.5f) - vbits(vsplat(0.5f));
  const i32x16 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const i32x16 special = magnitude > 0x7f800000 ? (i32x16)(0x7e00) | ((magnitude >> 13) & 0x3ff) : (i32x16)(0x7c00);
  const i32x16 half = magnitude >= 143 << 23 ? special : (magnitude < 113 << 23 ? subnormal : normal);
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), u16x16);
#else
  typedef _Float16 f16x16 __attribute__((ext_vector_type(16)));
  return __builtin_bit_cast(u16x16, __builtin_convertvector(v, f16x16));
#endif
}
MS_VEC f32x16 vfrom_bf16(u16x16 h) { return vfloat(__builtin_convertvector(h, i32x16) << 16); }
MS_VEC u16x16 vto_bf16(f32x16 v) {  // half to even
  const u32x16 bits = __builtin_bit_cast(u32x16, v);
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v != v ? bits >> 16 | 0x40 : rounded, u16x16);
}
MS_VEC u16x16 vload_u16(const uint16_t *p) {
  u16x16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return h;
}
MS_VEC void vstore_u16(uint16_t *p, u16x16 h) { __builtin_memcpy(p, &h, sizeof h); }
MS_VEC u16x16 vload_u16_n(const uint16_t *p, uint32_t n) {
  uint16_t lanes[16] = {0};
  for (uint32_t i = 0; i < n; ++i) lanes[i] = p[i];
  return vload_u16(lanes);
}
MS_VEC void vstore_u16_n(uint16_t *p, u16x16 h, uint32_t n) {
  uint16_t lanes[16];
  vstore_u16(lanes, h);
  for (uint32_t i = 0; i < n; ++i) p[i] = lanes[i];
}
MS_VEC f32x16 vload_f16(const uint16_t *p) { return vfrom_f16(vload_u16(p)); }
MS_VEC f32x16 vload_bf16(const uint16_t *p) { return vfrom_bf16(vload_u16(p)); }

// ---- functions ------------------------------------------------------------------------------------------------------
// x * 2^n for a whole n from -252 to 254.
MS_VEC f32x16 vscale2(f32x16 x, f32x16 n) {
#if defined(MS_ISA_IS_AVX512)
  return (f32x16)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const i32x16 whole = __builtin_convertvector(n, i32x16), half = whole >> 1;
  return x * vfloat((half + 127) << 23) * vfloat((whole - half + 127) << 23);
#endif
}

// e^r for |r| <= ln(2)/2 is 1 + r + r^2 p(r). Coefficients: Cephes expf.
MS_VEC f32x16 vexp_polynomial(f32x16 r) {
  f32x16 p = vfma(vsplat(1.9875691500e-4f), r, vsplat(1.3981999507e-3f));
  p = vfma(p, r, vsplat(8.3334519073e-3f));
  p = vfma(p, r, vsplat(4.1665795894e-2f));
  p = vfma(p, r, vsplat(1.6666665459e-1f));
  return vfma(p, r, vsplat(5.0000001201e-1f));
}

// At most 1 ulp from e^x (2 where the instruction set has no fma). Infinities and NaN as expf.
MS_VEC f32x16 vexp(f32x16 x) {
  const f32x16 bounded = vmax(vsplat(-104.0f), vmin(vsplat(89.0f), x));  // NaN stays: the second operand
  const f32x16 n = vround(bounded * 1.44269504f);
  f32x16 r = vfma(n, vsplat(-0.693359375f), bounded);
  r = vfma(n, vsplat(2.12194440e-4f), r);
  const f32x16 p = vfma(vexp_polynomial(r) * r, r, r) + 1.0f;
#if defined(MS_ISA_IS_AVX512)
  return vscale2(p, n);
#else
  return x != x ? x : vscale2(p, x != x ? vsplat(0) : n);  // NaN has no integer
#endif
}

// At most 2 ulp from ln x; -inf at 0, NaN below. Coefficients: Cephes logf.
MS_VEC f32x16 vlog(f32x16 x) {
  const i32x16 tiny = x < 0x1p-126f;
  const i32x16 bits = vbits(tiny ? x * 0x1p23f : x) - 0x3f3504f3;  // mantissa into [sqrt(1/2), sqrt(2))
  const f32x16 e = __builtin_convertvector((bits >> 23) - (tiny ? (i32x16)23 : (i32x16)0), f32x16);
  const f32x16 f = vfloat((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  f32x16 p = vfma(vsplat(7.0376836292e-2f), f, vsplat(-1.1514610310e-1f));
  p = vfma(p, f, vsplat(1.1676998740e-1f));
  p = vfma(p, f, vsplat(-1.2420140846e-1f));
  p = vfma(p, f, vsplat(1.4249322787e-1f));
  p = vfma(p, f, vsplat(-1.6668057665e-1f));
  p = vfma(p, f, vsplat(2.0000714765e-1f));
  p = vfma(p, f, vsplat(-2.4999993993e-1f));
  p = vfma(p, f, vsplat(3.3333331174e-1f));
  const f32x16 square = f * f;
  f32x16 y = p * f * square;
  y = vfma(e, vsplat(-2.12194440e-4f), y);
  y = vfma(square, vsplat(-0.5f), y);
  y = vfma(e, vsplat(0.693359375f), f + y);
  y = x == 0.0f ? vsplat(-__builtin_inff()) : y;
  y = x == __builtin_inff() ? x : y;
  return ((x < 0.0f) | (x != x)) ? vsplat(__builtin_nanf("")) : y;
}

// 1 / (1 + e^-x): at most 3 ulp.
MS_VEC f32x16 vsigmoid(f32x16 x) { return 1.0f / (1.0f + vexp(-x)); }

// At most 2 ulp from tanh x. Coefficients for small x: Cephes tanhf.
MS_VEC f32x16 vtanh(f32x16 x) {
  const f32x16 a = vabs(x), s = x * x;
  f32x16 p = vfma(vsplat(-5.70498872745e-3f), s, vsplat(2.06390887954e-2f));
  p = vfma(p, s, vsplat(-5.37397155531e-2f));
  p = vfma(p, s, vsplat(1.33314422036e-1f));
  p = vfma(p, s, vsplat(-3.33332819422e-1f));
  const f32x16 near = vfma(p * s, x, x);
  const f32x16 far = vcopysign(1.0f - 2.0f / (vexp(a + a) + 1.0f), x);
  return ((a < 0.625f) | (x != x)) ? near : far;
}

// At most 2 ulp from erf x: a polynomial near 0, 1 - e^polynomial beyond.
MS_VEC f32x16 verf(f32x16 x) {
  const f32x16 t = vabs(x), s = x * x;
  f32x16 far = vfma(vsplat(-1.72853470e-5f), t, vsplat(3.83197126e-4f));
  far = vfma(far, s, vfma(vsplat(-3.88396438e-3f), t, vsplat(2.42546219e-2f)));
  far = vfma(far, t, vsplat(-1.06777877e-1f));
  far = vfma(far, t, vsplat(-6.34846687e-1f));
  far = vfma(far, t, vsplat(-1.28717512e-1f));
  far = vcopysign(1.0f - vexp(vfma(far, t, -t)), x);
  f32x16 near = vfma(vsplat(-5.96761703e-4f), s, vsplat(4.99119423e-3f));
  near = vfma(near, s, vsplat(-2.67681349e-2f));
  near = vfma(near, s, vsplat(1.12819925e-1f));
  near = vfma(near, s, vsplat(-3.76125336e-1f));
  near = vfma(near, s, vsplat(1.28379166e-1f));
  near = vfma(near, x, x);
  far = t > 4.0f ? vcopysign(vsplat(1.0f), x) : far;
  return (t > 0.921875f) ? far : near;
}
