// Metal's scalar types, type traits and vectors. Vectors are structs: they take Metal's constructors, which C++ lacks for
// clang's own vectors, and bfloat elements. Operators are friends, so that `float4 * 2` converts as in Metal.

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

namespace metal {

// ---- traits ---------------------------------------------------------------------------------------------------------
template <typename T, T V>
struct integral_constant {
  static constexpr T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
  constexpr T operator()() const { return V; }
};
template <bool V>
using bool_constant = integral_constant<bool, V>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool C, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool C, typename T = void>
using enable_if_t = typename enable_if<C, T>::type;
template <bool C, typename A, typename B>
struct conditional {
  using type = A;
};
template <typename A, typename B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool C, typename A, typename B>
using conditional_t = typename conditional<C, A, B>::type;
template <typename A, typename B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <typename A, typename B>
inline constexpr bool is_same_v = __is_same(A, B);
template <typename T>
using remove_cv_t = __remove_cv(T);
template <typename T>
using remove_reference_t = __remove_reference_t(T);
template <typename T>
using remove_addrspace_t = __remove_cv(T);
template <typename T>
struct remove_cv {
  using type = __remove_cv(T);
};
template <typename T>
struct remove_reference {
  using type = __remove_reference_t(T);
};
template <typename From, typename To>
struct is_convertible : bool_constant<__is_convertible_to(From, To)> {};
template <typename From, typename To>
inline constexpr bool is_convertible_v = __is_convertible_to(From, To);
template <typename T>
inline constexpr bool is_integral_v = __is_integral(T);
template <typename T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <typename T>
inline constexpr bool is_signed_v = __is_signed(T);
template <typename T>
inline constexpr bool is_unsigned_v = __is_unsigned(T);
template <typename T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <typename T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <typename... Bases>
struct _disjunction : bool_constant<(Bases::value || ...)> {};
template <typename T>
T&& declval();

// ---- bfloat ---------------------------------------------------------------------------------------------------------
// As in Metal: from integers and to float without a word, from float and half only when asked to, rounding to nearest,
// ties to even.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <typename T, enable_if_t<__is_integral(T), int> = 0>
  constexpr bfloat(T value) : bits(rounded(float(value))) {}
  template <typename T, enable_if_t<__is_floating_point(T), long> = 0>
  explicit constexpr bfloat(T value) : bits(rounded(float(value))) {}
  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
  constexpr bfloat operator-() const { return __builtin_bit_cast(bfloat, uint16_t(bits ^ 0x8000)); }
  static constexpr uint16_t rounded(float value) {
    const uint32_t u = __builtin_bit_cast(uint32_t, value);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    return uint16_t(nan ? (u >> 16) | 64u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
#define SIM_BFLOAT_OPERATOR(op)                                                                    \
  friend constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  template <typename T, enable_if_t<__is_integral(T), int> = 0>                                    \
  friend constexpr bfloat operator op(bfloat a, T b) {                                             \
    return bfloat(float(a) op float(b));                                                           \
  }                                                                                                \
  template <typename T, enable_if_t<__is_integral(T), int> = 0>                                    \
  friend constexpr bfloat operator op(T a, bfloat b) {                                             \
    return bfloat(float(a) op float(b));                                                           \
  }                                                                                                \
  template <typename T>                                                                            \
  constexpr bfloat& operator op## = (T b) {                                                        \
    return *this = bfloat(float(*this) op float(b));                                               \
  }
#define SIM_BFLOAT_COMPARISON(op)                                                        \
  friend constexpr bool operator op(bfloat a, bfloat b) { return float(a) op float(b); } \
  template <typename T, enable_if_t<__is_integral(T), int> = 0>                          \
  friend constexpr bool operator op(bfloat a, T b) {                                     \
    return float(a) op float(b);                                                         \
  }
  SIM_BFLOAT_OPERATOR(+)
  SIM_BFLOAT_OPERATOR(-)
  SIM_BFLOAT_OPERATOR(*)
  SIM_BFLOAT_OPERATOR(/)
  SIM_BFLOAT_COMPARISON(==)
  SIM_BFLOAT_COMPARISON(!=)
  SIM_BFLOAT_COMPARISON(<)
  SIM_BFLOAT_COMPARISON(>)
  SIM_BFLOAT_COMPARISON(<=)
  SIM_BFLOAT_COMPARISON(>=)
};
static_assert(sizeof(bfloat) == 2, "bfloat");

template <typename T>
inline constexpr bool is_floating_point_v = __is_floating_point(T) || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};

// ---- vectors --------------------------------------------------------------------------------------------------------
template <typename T, int N>
struct vec;

#define SIM_VEC_ARITHMETIC(op)                                 \
  friend constexpr vec operator op(vec a, vec b) {             \
    for (int i = 0; i < N_; i++) a.v[i] = T(a.v[i] op b.v[i]); \
    return a;                                                  \
  }                                                            \
  friend constexpr vec operator op(vec a, T b) {               \
    for (int i = 0; i < N_; i++) a.v[i] = T(a.v[i] op b);      \
    return a;                                                  \
  }                                                            \
  friend constexpr vec operator op(T a, vec b) {               \
    for (int i = 0; i < N_; i++) b.v[i] = T(a op b.v[i]);      \
    return b;                                                  \
  }                                                            \
  template <typename U>                                        \
  constexpr vec& operator op## = (U b) {                       \
    return *this = *this op b;                                 \
  }
// Templates, so that they are looked at only where they are used: floats have no such operators.
#define SIM_VEC_INTEGRAL(op)                                   \
  template <typename V = vec>                                  \
  friend constexpr V operator op(vec a, vec b) {               \
    V r;                                                       \
    for (int i = 0; i < N_; i++) r.v[i] = T(a.v[i] op b.v[i]); \
    return r;                                                  \
  }                                                            \
  template <typename V = vec>                                  \
  friend constexpr V operator op(vec a, T b) {                 \
    V r;                                                       \
    for (int i = 0; i < N_; i++) r.v[i] = T(a.v[i] op b);      \
    return r;                                                  \
  }                                                            \
  template <typename V = vec>                                  \
  friend constexpr V operator op(T a, vec b) {                 \
    V r;                                                       \
    for (int i = 0; i < N_; i++) r.v[i] = T(a op b.v[i]);      \
    return r;                                                  \
  }                                                            \
  template <typename U>                                        \
  constexpr vec& operator op## = (U b) {                       \
    return *this = *this op b;                                 \
  }
#define SIM_VEC_COMPARISON(op)                              \
  template <typename B = bool>                              \
  friend constexpr vec<B, N_> operator op(vec a, vec b) {   \
    vec<B, N_> r;                                           \
    for (int i = 0; i < N_; i++) r.v[i] = a.v[i] op b.v[i]; \
    return r;                                               \
  }                                                         \
  template <typename B = bool>                              \
  friend constexpr vec<B, N_> operator op(vec a, T b) {     \
    vec<B, N_> r;                                           \
    for (int i = 0; i < N_; i++) r.v[i] = a.v[i] op b;      \
    return r;                                               \
  }
#define SIM_VEC_BODY(N)                                       \
  static constexpr int N_ = N;                                \
  vec() = default;                                            \
  constexpr vec(T a) {                                        \
    for (int i = 0; i < N; i++) v[i] = a;                     \
  }                                                           \
  template <typename U>                                       \
  explicit constexpr vec(const vec<U, N>& other) {            \
    for (int i = 0; i < N; i++) v[i] = T(other.v[i]);         \
  }                                                           \
  constexpr T& operator[](int i) { return v[i]; }             \
  constexpr const T& operator[](int i) const { return v[i]; } \
  SIM_VEC_ARITHMETIC(+)                                       \
  SIM_VEC_ARITHMETIC(-)                                       \
  SIM_VEC_ARITHMETIC(*)                                       \
  SIM_VEC_ARITHMETIC(/)                                       \
  SIM_VEC_INTEGRAL(%)                                         \
  SIM_VEC_INTEGRAL(&)                                         \
  SIM_VEC_INTEGRAL(|)                                         \
  SIM_VEC_INTEGRAL(^)                                         \
  SIM_VEC_INTEGRAL(<<)                                        \
  SIM_VEC_INTEGRAL(>>)                                        \
  SIM_VEC_COMPARISON(&&)                                      \
  SIM_VEC_COMPARISON(||)                                      \
  SIM_VEC_COMPARISON(==)                                      \
  SIM_VEC_COMPARISON(!=)                                      \
  SIM_VEC_COMPARISON(<)                                       \
  SIM_VEC_COMPARISON(>)                                       \
  SIM_VEC_COMPARISON(<=)                                      \
  SIM_VEC_COMPARISON(>=)                                      \
  friend constexpr vec operator-(vec a) {                     \
    for (int i = 0; i < N; i++) a.v[i] = T(-a.v[i]);          \
    return a;                                                 \
  }                                                           \
  template <typename V = vec>                                 \
  friend constexpr V operator~(vec a) {                       \
    V r;                                                      \
    for (int i = 0; i < N; i++) r.v[i] = T(~a.v[i]);          \
    return r;                                                 \
  }                                                           \
  template <typename B = bool>                                \
  friend constexpr vec<B, N> operator!(vec a) {               \
    vec<B, N> r;                                              \
    for (int i = 0; i < N; i++) r.v[i] = !a.v[i];             \
    return r;                                                 \
  }

template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T v[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
  };
  constexpr vec(T a, T b) : v{a, b} {}
  SIM_VEC_BODY(2)
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T v[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    vec<T, 2> xy;
  };
  constexpr vec(T a, T b, T c) : v{a, b, c} {}
  constexpr vec(vec<T, 2> a, T b) : v{a.v[0], a.v[1], b} {}
  constexpr vec(T a, vec<T, 2> b) : v{a, b.v[0], b.v[1]} {}
  SIM_VEC_BODY(3)
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T v[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    struct {
      vec<T, 2> xy, zw;
    };
    vec<T, 3> xyz;
  };
  constexpr vec(T a, T b, T c, T d) : v{a, b, c, d} {}
  constexpr vec(vec<T, 2> a, vec<T, 2> b) : v{a.v[0], a.v[1], b.v[0], b.v[1]} {}
  constexpr vec(vec<T, 2> a, T b, T c) : v{a.v[0], a.v[1], b, c} {}
  constexpr vec(T a, T b, vec<T, 2> c) : v{a, b, c.v[0], c.v[1]} {}
  constexpr vec(vec<T, 3> a, T b) : v{a.v[0], a.v[1], a.v[2], b} {}
  SIM_VEC_BODY(4)
};

// Without the alignment of vec: N elements, one after the other.
template <typename T, int N>
struct packed_vec {
  T v[N];
  packed_vec() = default;
  constexpr packed_vec(vec<T, N> a) {
    for (int i = 0; i < N; i++) v[i] = a.v[i];
  }
  constexpr operator vec<T, N>() const {
    vec<T, N> a;
    for (int i = 0; i < N; i++) a.v[i] = v[i];
    return a;
  }
  constexpr T& operator[](int i) { return v[i]; }
  constexpr const T& operator[](int i) const { return v[i]; }
};

#define SIM_VECTORS(T)                    \
  using T##2 = vec<T, 2>;                 \
  using T##3 = vec<T, 3>;                 \
  using T##4 = vec<T, 4>;                 \
  using packed_##T##2 = packed_vec<T, 2>; \
  using packed_##T##3 = packed_vec<T, 3>; \
  using packed_##T##4 = packed_vec<T, 4>;
SIM_VECTORS(float)
SIM_VECTORS(half)
SIM_VECTORS(bfloat)
SIM_VECTORS(int)
SIM_VECTORS(uint)
SIM_VECTORS(short)
SIM_VECTORS(ushort)
SIM_VECTORS(char)
SIM_VECTORS(uchar)
SIM_VECTORS(long)
SIM_VECTORS(ulong)
SIM_VECTORS(bool)

template <typename T, size_t N>
struct array {
  T values[N];
  constexpr T& operator[](size_t i) { return values[i]; }
  constexpr const T& operator[](size_t i) const { return values[i]; }
  constexpr size_t size() const { return N; }
};

template <typename To, typename From>
inline constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of one size");
  return __builtin_bit_cast(To, value);
}

// ---- limits ---------------------------------------------------------------------------------------------------------
template <typename T>
struct numeric_limits {
  static_assert(__is_integral(T), "numeric_limits of a type that has none");
  static constexpr bool is_specialized = true;
  static constexpr bool is_signed = __is_signed(T), is_integer = true, has_infinity = false;
  static constexpr int digits = 8 * sizeof(T) - (__is_signed(T) ? 1 : 0);
  static constexpr T max() { return T(~min()); }
  static constexpr T min() { return __is_signed(T) ? T(T(1) << (8 * sizeof(T) - 1)) : T(0); }
  static constexpr T lowest() { return min(); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
  static constexpr T epsilon() { return T(0); }
};
template <>
struct numeric_limits<bool> {
  static constexpr bool is_specialized = true;
  static constexpr bool max() { return true; }
  static constexpr bool min() { return false; }
  static constexpr bool lowest() { return false; }
};
#define SIM_FLOAT_LIMITS(T, Bits, Max, Min, Epsilon, Infinity, NaN, Digits)          \
  template <>                                                                        \
  struct numeric_limits<T> {                                                         \
    static constexpr bool is_specialized = true;                                     \
    static constexpr bool is_signed = true, is_integer = false, has_infinity = true; \
    static constexpr int digits = Digits;                                            \
    static constexpr T of(Bits bits) { return __builtin_bit_cast(T, bits); }         \
    static constexpr T max() { return of(Max); }                                     \
    static constexpr T lowest() { return -of(Max); }                                 \
    static constexpr T min() { return of(Min); }                                     \
    static constexpr T epsilon() { return of(Epsilon); }                             \
    static constexpr T infinity() { return of(Infinity); }                           \
    static constexpr T quiet_NaN() { return of(NaN); }                               \
  };
SIM_FLOAT_LIMITS(float, uint32_t, 0x7f7fffff, 0x00800000, 0x34000000, 0x7f800000, 0x7fc00000, 24)
SIM_FLOAT_LIMITS(half, uint16_t, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00, 11)
SIM_FLOAT_LIMITS(bfloat, uint16_t, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0, 8)

template <typename T>
struct uniform {
  T value;
  constexpr uniform(T a) : value(a) {}
  constexpr operator T() const { return value; }
};
template <typename T>
inline constexpr uniform<T> make_uniform(T value) {
  return {value};
}

struct os_log {  // what is logged goes nowhere
  template <typename... A>
  constexpr os_log(A...) {}
  template <typename... A>
  void log_debug(A...) const {}
};
}  // namespace metal
using metal::bfloat;  // a word of the language

inline constexpr half operator""h(long double value) { return half(value); }
inline constexpr half operator""h(unsigned long long value) { return half(value); }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.40282346638528859812e+38f
#define MAXHALF half(65504.0f)
#define FLT_MAX 3.40282346638528859812e+38f
#define FLT_MIN 1.17549435082228750797e-38f
#define FLT_EPSILON 1.19209289550781250000e-7f
#define HALF_MAX half(65504.0f)
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.785398163397448309616f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
