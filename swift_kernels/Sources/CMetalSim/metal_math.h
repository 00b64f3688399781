// Metal's mathematical and integer functions on scalars and vectors. Transcendental functions are the C library's: equal
// to Metal's in meaning, not in the last bit. Of half the result is half, of integers and bfloat float.
namespace metal {

template <typename T>
using sim_result = conditional_t<is_same_v<T, half>, half, float>;
template <typename T>
inline constexpr bool sim_is_vec = false;
template <typename T, int N>
inline constexpr bool sim_is_vec<vec<T, N>> = true;
template <typename T, typename R = void>
using sim_if_scalar = enable_if_t<!sim_is_vec<T>, R>;

#define SIM_FUNCTION_1(name, expression)               \
  template <typename T>                                \
  inline sim_if_scalar<T, sim_result<T>> name(T a) {   \
    const float x = float(a);                          \
    return sim_result<T>(expression);                  \
  }                                                    \
  template <typename T, int N>                         \
  inline vec<T, N> name(vec<T, N> a) {                 \
    for (int i = 0; i < N; i++) a.v[i] = name(a.v[i]); \
    return a;                                          \
  }
#define SIM_FUNCTION_2(name, expression)                                    \
  template <typename T>                                                     \
  inline sim_if_scalar<T, sim_result<T>> name(T a, T b) {                   \
    const float x = float(a), y = float(b);                                 \
    return sim_result<T>(expression);                                       \
  }                                                                         \
  template <typename T, typename U, enable_if_t<!is_same_v<T, U>, int> = 0> \
  inline sim_if_scalar<T, sim_if_scalar<U, float>> name(T a, U b) {         \
    const float x = float(a), y = float(b);                                 \
    return expression;                                                      \
  }                                                                         \
  template <typename T, int N>                                              \
  inline vec<T, N> name(vec<T, N> a, vec<T, N> b) {                         \
    for (int i = 0; i < N; i++) a.v[i] = name(a.v[i], b.v[i]);              \
    return a;                                                               \
  }
#define SIM_BUILTIN_1(name) SIM_FUNCTION_1(name, __builtin_##name##f(x))
#define SIM_BUILTIN_2(name) SIM_FUNCTION_2(name, __builtin_##name##f(x, y))
// Those that Metal has in three forms: plain, precise:: and fast::.
#define SIM_FLOAT_FUNCTIONS                                     \
  SIM_BUILTIN_1(exp)                                            \
  SIM_BUILTIN_1(exp2)                                           \
  SIM_FUNCTION_1(exp10, __builtin_powf(10.0f, x))               \
  SIM_BUILTIN_1(log)                                            \
  SIM_BUILTIN_1(log2)                                           \
  SIM_BUILTIN_1(log10)                                          \
  SIM_BUILTIN_1(sqrt)                                           \
  SIM_FUNCTION_1(rsqrt, 1.0f / __builtin_sqrtf(x))              \
  SIM_BUILTIN_1(sin)                                            \
  SIM_BUILTIN_1(cos)                                            \
  SIM_BUILTIN_1(tan)                                            \
  SIM_FUNCTION_1(sinpi, __builtin_sinf(M_PI_F* x))              \
  SIM_FUNCTION_1(cospi, __builtin_cosf(M_PI_F* x))              \
  SIM_FUNCTION_1(tanpi, __builtin_tanf(M_PI_F* x))              \
  SIM_BUILTIN_1(asin)                                           \
  SIM_BUILTIN_1(acos)                                           \
  SIM_BUILTIN_1(atan)                                           \
  SIM_BUILTIN_1(sinh)                                           \
  SIM_BUILTIN_1(cosh)                                           \
  SIM_BUILTIN_1(tanh)                                           \
  SIM_BUILTIN_1(asinh)                                          \
  SIM_BUILTIN_1(acosh)                                          \
  SIM_BUILTIN_1(atanh)                                          \
  SIM_BUILTIN_1(floor)                                          \
  SIM_BUILTIN_1(ceil)                                           \
  SIM_BUILTIN_1(trunc)                                          \
  SIM_BUILTIN_1(round)                                          \
  SIM_BUILTIN_1(rint)                                           \
  SIM_BUILTIN_1(fabs)                                           \
  SIM_FUNCTION_1(fract, x - __builtin_floorf(x))                \
  SIM_BUILTIN_2(atan2)                                          \
  SIM_BUILTIN_2(pow)                                            \
  SIM_FUNCTION_2(powr, __builtin_powf(x, y))                    \
  SIM_BUILTIN_2(fmod)                                           \
  SIM_FUNCTION_2(divide, x / y)                                 \
  SIM_BUILTIN_2(fmin)                                           \
  SIM_BUILTIN_2(fmax)                                           \
  SIM_FUNCTION_2(fdim, __builtin_fdimf(x, y))                   \
  SIM_BUILTIN_2(copysign)                                       \
  template <typename T>                                         \
  inline sim_result<T> ldexp(T x, int exponent) {               \
    return sim_result<T>(__builtin_ldexpf(float(x), exponent)); \
  }                                                             \
  template <typename T>                                         \
  inline T sincos(T x, T& cosine) {                             \
    cosine = cos(x);                                            \
    return sin(x);                                              \
  }
SIM_FLOAT_FUNCTIONS
namespace precise {
SIM_FLOAT_FUNCTIONS
}
namespace fast {
SIM_FLOAT_FUNCTIONS
}
inline float nextafter(float x, float y) { return __builtin_nextafterf(x, y); }
inline float frexp(float x, int& exponent) { return __builtin_frexpf(x, &exponent); }
inline float modf(float x, float& whole) { return __builtin_modff(x, &whole); }

#define SIM_TEST(name)                                 \
  template <typename T>                                \
  inline sim_if_scalar<T, bool> name(T x) {            \
    return __builtin_##name(float(x));                 \
  }                                                    \
  template <typename T, int N>                         \
  inline vec<bool, N> name(vec<T, N> x) {              \
    vec<bool, N> r;                                    \
    for (int i = 0; i < N; i++) r.v[i] = name(x.v[i]); \
    return r;                                          \
  }
SIM_TEST(isnan)
SIM_TEST(isinf)
SIM_TEST(isfinite)
SIM_TEST(isnormal)
SIM_TEST(signbit)

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(__builtin_fmaf(float(a), float(b), float(c))); }
inline bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(__builtin_fmaf(float(a), float(b), float(c))); }
template <typename T, int N>
inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) a.v[i] = fma(a.v[i], b.v[i], c.v[i]);
  return a;
}
template <typename T>
inline T mad(T a, T b, T c) {
  return fma(a, b, c);
}

// ---- of every type --------------------------------------------------------------------------------------------------
// With a number that is no number, min and max of floats give the other one.
template <typename T>
inline constexpr sim_if_scalar<T, T> min(T a, T b) {
  if constexpr (is_floating_point_v<T>) {
    if (a != a) return b;
  }
  return b < a ? b : a;
}
template <typename T>
inline constexpr sim_if_scalar<T, T> max(T a, T b) {
  if constexpr (is_floating_point_v<T>) {
    if (a != a) return b;
  }
  return a < b ? b : a;
}
template <typename T>
inline constexpr sim_if_scalar<T, T> clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
inline constexpr sim_if_scalar<T, T> abs(T a) {
  if constexpr (is_same_v<T, float>)
    return __builtin_fabsf(a);
  else if constexpr (is_unsigned_v<T>)
    return a;
  else
    return a < T(0) ? T(-a) : a;
}
#define SIM_EACH_2(name)                                       \
  template <typename T, int N>                                 \
  inline constexpr vec<T, N> name(vec<T, N> a, vec<T, N> b) {  \
    for (int i = 0; i < N; i++) a.v[i] = name(a.v[i], b.v[i]); \
    return a;                                                  \
  }                                                            \
  template <typename T, int N>                                 \
  inline constexpr vec<T, N> name(vec<T, N> a, T b) {          \
    for (int i = 0; i < N; i++) a.v[i] = name(a.v[i], b);      \
    return a;                                                  \
  }
SIM_EACH_2(min)
SIM_EACH_2(max)
template <typename T, int N>
inline constexpr vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  return min(max(x, low), high);
}
template <typename T, int N>
inline constexpr vec<T, N> clamp(vec<T, N> x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T, int N>
inline constexpr vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) a.v[i] = abs(a.v[i]);
  return a;
}
template <typename T>
inline constexpr T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <typename T>
inline constexpr T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <typename T>
inline constexpr T median3(T a, T b, T c) {
  return max(min(a, b), min(max(a, b), c));
}
template <typename T>
inline constexpr sim_if_scalar<T, T> select(T otherwise, T chosen, bool condition) {
  return condition ? chosen : otherwise;
}
template <typename T, int N>
inline constexpr vec<T, N> select(vec<T, N> otherwise, vec<T, N> chosen, vec<bool, N> condition) {
  for (int i = 0; i < N; i++) otherwise.v[i] = condition.v[i] ? chosen.v[i] : otherwise.v[i];
  return otherwise;
}
template <typename T, int N>
inline constexpr vec<T, N> select(vec<T, N> otherwise, vec<T, N> chosen, bool condition) {
  return condition ? chosen : otherwise;
}
inline constexpr bool all(bool a) { return a; }
inline constexpr bool any(bool a) { return a; }
template <int N>
inline constexpr bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && a.v[i];
  return r;
}
template <int N>
inline constexpr bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r = r || a.v[i];
  return r;
}
template <typename T>
inline T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x == T(0) ? x : T(0);
}
template <typename T>
inline T saturate(T x) {
  return clamp(x, T(0.0f), T(1.0f));
}
template <typename T>
inline T mix(T x, T y, T a) {
  return x + (y - x) * a;
}
template <typename T>
inline T step(T edge, T x) {
  return x < edge ? T(0) : T(1);
}
template <typename T>
inline T smoothstep(T low, T high, T x) {
  const T t = saturate((x - low) / (high - low));
  return t * t * (T(3) - T(2) * t);
}

// ---- vectors --------------------------------------------------------------------------------------------------------
template <typename T, int N>
inline constexpr T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(a.v[0] * b.v[0]);
  for (int i = 1; i < N; i++) sum = T(sum + a.v[i] * b.v[i]);
  return sum;
}
template <typename T, int N>
inline T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <typename T, int N>
inline T length(vec<T, N> a) {
  return T(__builtin_sqrtf(float(dot(a, a))));
}
template <typename T, int N>
inline T distance(vec<T, N> a, vec<T, N> b) {
  return length(a - b);
}
template <typename T, int N>
inline vec<T, N> normalize(vec<T, N> a) {
  return a / length(a);
}
template <typename T>
inline vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return {T(a.y * b.z - a.z * b.y), T(a.z * b.x - a.x * b.z), T(a.x * b.y - a.y * b.x)};
}

// ---- integers -------------------------------------------------------------------------------------------------------
template <typename T>
using sim_unsigned = conditional_t<sizeof(T) == 8, ulong,
                                   conditional_t<sizeof(T) == 4, uint, conditional_t<sizeof(T) == 2, ushort, uchar>>>;
template <typename T>
inline T popcount(T x) {
  return T(__builtin_popcountll(sim_unsigned<T>(x)));
}
template <typename T>
inline T clz(T x) {
  return T(x ? __builtin_clzll(sim_unsigned<T>(x)) - (64 - 8 * int(sizeof(T))) : 8 * int(sizeof(T)));
}
template <typename T>
inline T ctz(T x) {
  return T(x ? __builtin_ctzll(sim_unsigned<T>(x)) : 8 * int(sizeof(T)));
}
template <typename T>
inline T mulhi(T a, T b) {
  return T((__int128(a) * __int128(b)) >> (8 * sizeof(T)));
}
template <typename T>
inline T madhi(T a, T b, T c) {
  return T(mulhi(a, b) + c);
}
template <typename T>
inline T mul24(T a, T b) {
  return T(a * b);
}
template <typename T>
inline T mad24(T a, T b, T c) {
  return T(a * b + c);
}
template <typename T>
inline T reverse_bits(T x) {
  sim_unsigned<T> from = sim_unsigned<T>(x), to = 0;
  for (int i = 0; i < 8 * int(sizeof(T)); i++, from >>= 1) to = sim_unsigned<T>(to << 1 | (from & 1));
  return T(to);
}
template <typename T>
inline T extract_bits(T x, uint offset, uint bits) {
  if (bits == 0) return T(0);
  const int width = 8 * int(sizeof(T));
  return T(T(sim_unsigned<T>(x) << (width - offset - bits)) >> (width - bits));
}
template <typename T>
inline T insert_bits(T base, T insert, uint offset, uint bits) {
  const ulong mask = (bits >= 64 ? ~0ul : (1ul << bits) - 1) << offset;
  return T((ulong(base) & ~mask) | ((ulong(insert) << offset) & mask));
}
template <typename T>
inline T rotate(T x, T by) {
  const int width = 8 * int(sizeof(T)), n = int(by) & (width - 1);
  return n ? T(sim_unsigned<T>(x) << n | sim_unsigned<T>(x) >> (width - n)) : x;
}
template <typename T>
inline T absdiff(T a, T b) {
  return a < b ? T(b - a) : T(a - b);
}
template <typename T>
inline T addsat(T a, T b) {
  return T(min(max(__int128(a) + b, __int128(numeric_limits<T>::min())), __int128(numeric_limits<T>::max())));
}
template <typename T>
inline T subsat(T a, T b) {
  return T(min(max(__int128(a) - b, __int128(numeric_limits<T>::min())), __int128(numeric_limits<T>::max())));
}

// ---- packing --------------------------------------------------------------------------------------------------------
inline float4 unpack_unorm4x8_to_float(uint x) {
  return float4(float(x & 255), float(x >> 8 & 255), float(x >> 16 & 255), float(x >> 24)) / 255.0f;
}
}  // namespace metal
