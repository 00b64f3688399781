// Metal's standard library, as far as the project's kernels use it, in CUDA C++ (NVRTC, -std=c++17 -default-device). Put in
// front of a source by kernels/gpu/cuda_source.py. A simdgroup is a warp; every lane of it must reach a simd function.
// It includes nothing: the compiler's headers need not be there.
#define MS_CUDA 1
#define __METAL_VERSION__ 310
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;

namespace cu {  // by CUDA's own names, before Metal's take their place
inline float f_exp(float x) { return ::expf(x); }
inline float f_exp2(float x) { return ::exp2f(x); }
inline float f_log(float x) { return ::logf(x); }
inline float f_log2(float x) { return ::log2f(x); }
inline float f_log10(float x) { return ::log10f(x); }
inline float f_sin(float x) { return ::sinf(x); }
inline float f_cos(float x) { return ::cosf(x); }
inline float f_tan(float x) { return ::tanf(x); }
inline float f_asin(float x) { return ::asinf(x); }
inline float f_acos(float x) { return ::acosf(x); }
inline float f_atan(float x) { return ::atanf(x); }
inline float f_atan2(float y, float x) { return ::atan2f(y, x); }
inline float f_sinh(float x) { return ::sinhf(x); }
inline float f_cosh(float x) { return ::coshf(x); }
inline float f_tanh(float x) { return ::tanhf(x); }
inline float f_pow(float x, float y) { return ::powf(x, y); }
inline float f_sqrt(float x) { return __fsqrt_rn(x); }
inline float f_rsqrt(float x) { return __frsqrt_rn(x); }
inline float f_floor(float x) { return ::floorf(x); }
inline float f_ceil(float x) { return ::ceilf(x); }
inline float f_rint(float x) { return ::rintf(x); }
inline float f_round(float x) { return ::roundf(x); }
inline float f_trunc(float x) { return ::truncf(x); }
inline float f_fmod(float x, float y) { return ::fmodf(x, y); }
inline float f_fabs(float x) { return ::fabsf(x); }
inline float f_copysign(float x, float y) { return ::copysignf(x, y); }
inline float f_ldexp(float x, int e) { return ::ldexpf(x, e); }
inline float f_fma(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float f_min(float a, float b) { return ::fminf(a, b); }
inline float f_max(float a, float b) { return ::fmaxf(a, b); }
inline float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
inline float fast_log2(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
inline float fast_exp(float x) { return __expf(x); }
inline float fast_log(float x) { return __logf(x); }
inline float fast_sin(float x) { return __sinf(x); }
inline float fast_cos(float x) { return __cosf(x); }
inline float fast_tanh(float x) { return 1.0f - 2.0f / (1.0f + fast_exp2(x * 2.885390082f)); }
inline uint thread_in_group() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }

// Storage types: arithmetic is of floats.
struct half_ {
  unsigned short bits;
  half_() = default;
  half_(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
struct bfloat_ {
  unsigned short bits;
  bfloat_() = default;
  explicit bfloat_(float x) {
    const uint u = __float_as_uint(x);
    bits = (unsigned short)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 64u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  operator float() const { return __uint_as_float(uint(bits) << 16); }
};
}  // namespace cu

// CUDA has these names for other things.
#define half cu::half_
#define bfloat cu::bfloat_
#define exp cu_exp
#define exp2 cu_exp2
#define log cu_log
#define log2 cu_log2
#define log10 cu_log10
#define sin cu_sin
#define cos cu_cos
#define tan cu_tan
#define asin cu_asin
#define acos cu_acos
#define atan cu_atan
#define atan2 cu_atan2
#define sinh cu_sinh
#define cosh cu_cosh
#define tanh cu_tanh
#define pow cu_pow
#define powr cu_powr
#define sqrt cu_sqrt
#define rsqrt cu_rsqrt
#define floor cu_floor
#define ceil cu_ceil
#define rint cu_rint
#define round cu_round
#define trunc cu_trunc
#define fmod cu_fmod
#define fabs cu_fabs
#define abs cu_abs
#define sign cu_sign
#define copysign cu_copysign
#define ldexp cu_ldexp
#define fma cu_fma
#define fmin cu_fmin
#define fmax cu_fmax
#define min cu_min
#define max cu_max
#define clamp cu_clamp
#define isnan cu_isnan
#define isinf cu_isinf
#define isfinite cu_isfinite
#define float2 cu_float2
#define float3 cu_float3
#define float4 cu_float4
#define half2 cu_half2
#define half3 cu_half3
#define half4 cu_half4
#define bfloat2 cu_bfloat2
#define bfloat3 cu_bfloat3
#define bfloat4 cu_bfloat4
#define int2 cu_int2
#define int3 cu_int3
#define int4 cu_int4
#define uint2 cu_uint2
#define uint3 cu_uint3
#define uint4 cu_uint4
#define short2 cu_short2
#define short3 cu_short3
#define short4 cu_short4
#define ushort2 cu_ushort2
#define ushort3 cu_ushort3
#define ushort4 cu_ushort4
#define char2 cu_char2
#define char3 cu_char3
#define char4 cu_char4
#define uchar2 cu_uchar2
#define uchar3 cu_uchar3
#define uchar4 cu_uchar4
#define long2 cu_long2
#define long3 cu_long3
#define long4 cu_long4
#define ulong2 cu_ulong2
#define ulong3 cu_ulong3
#define ulong4 cu_ulong4
#define device
#define constant const
#define thread
#define threadgroup
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)

namespace metal {
template <typename T, int N>
struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  explicit vec(T a) : x(a), y(a) {}
  vec(T a, T b) : x(a), y(b) {}
  template <typename U>
  explicit vec(vec<U, 2> v) : x(T(v.x)), y(T(v.y)) {}
  T& operator[](int i) { return i == 0 ? x : y; }
  T operator[](int i) const { return i == 0 ? x : y; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  explicit vec(T a) : x(a), y(a), z(a) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
  template <typename U>
  explicit vec(vec<U, 3> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
  T& operator[](int i) { return i == 0 ? x : i == 1 ? y : z; }
  T operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;  // .xy and .zw would need anonymous structs, which NVRTC before 13 does not have
  vec() = default;
  explicit vec(T a) : x(a), y(a), z(a), w(a) {}
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  template <typename U>
  explicit vec(vec<U, 4> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  T& operator[](int i) { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
  T operator[](int i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
};
#define CU_VECTOR_OPERATOR(op)                                            \
  template <typename T, int N>                                            \
  inline vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                \
    vec<T, N> r;                                                          \
    _Pragma("unroll") for (int i = 0; i < N; i++) r[i] = T(a[i] op b[i]); \
    return r;                                                             \
  }                                                                       \
  template <typename T, int N>                                            \
  inline vec<T, N> operator op(vec<T, N> a, T b) {                        \
    return a op vec<T, N>(b);                                             \
  }                                                                       \
  template <typename T, int N>                                            \
  inline vec<T, N> operator op(T a, vec<T, N> b) {                        \
    return vec<T, N>(a) op b;                                             \
  }                                                                       \
  template <typename T, int N, typename U>                                \
  inline vec<T, N>& operator op##=(vec<T, N>& a, U b) {                   \
    return a = a op b;                                                    \
  }
CU_VECTOR_OPERATOR(+)
CU_VECTOR_OPERATOR(-)
CU_VECTOR_OPERATOR(*)
CU_VECTOR_OPERATOR(/)
#define CU_VECTORS(T, name)  \
  using name##2 = vec<T, 2>; \
  using name##3 = vec<T, 3>; \
  using name##4 = vec<T, 4>;
CU_VECTORS(float, cu_float)
CU_VECTORS(half, cu_half)
CU_VECTORS(bfloat, cu_bfloat)
CU_VECTORS(int, cu_int)
CU_VECTORS(uint, cu_uint)
CU_VECTORS(short, cu_short)
CU_VECTORS(ushort, cu_ushort)
CU_VECTORS(char, cu_char)
CU_VECTORS(uchar, cu_uchar)
CU_VECTORS(long, cu_long)
CU_VECTORS(ulong, cu_ulong)

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Two halves at once are half arithmetic, as they are Metal's.
#define CU_HALF2_OPERATOR(op, name)                                                                   \
  inline cu_half2 operator op(cu_half2 a, cu_half2 b) {                                               \
    uint r;                                                                                           \
    asm(name ".f16x2 %0, %1, %2;" : "=r"(r) : "r"(as_type<uint>(a)), "r"(as_type<uint>(b)));          \
    return as_type<cu_half2>(r);                                                                      \
  }
CU_HALF2_OPERATOR(+, "add")
CU_HALF2_OPERATOR(-, "sub")
CU_HALF2_OPERATOR(*, "mul")
inline cu_half2 cu_fma(cu_half2 a, cu_half2 b, cu_half2 c) {
  uint r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(as_type<uint>(a)), "r"(as_type<uint>(b)), "r"(as_type<uint>(c)));
  return as_type<cu_half2>(r);
}

#define CU_UNARY(name) \
  inline float cu_##name(float x) { return cu::f_##name(x); }
#define CU_FUNCTIONS                                                                                                     \
  CU_UNARY(exp) CU_UNARY(exp2) CU_UNARY(log) CU_UNARY(log2) CU_UNARY(log10) CU_UNARY(sin) CU_UNARY(cos) CU_UNARY(tan)    \
  CU_UNARY(asin) CU_UNARY(acos) CU_UNARY(atan) CU_UNARY(sinh) CU_UNARY(cosh) CU_UNARY(tanh) CU_UNARY(sqrt)               \
  CU_UNARY(rsqrt) CU_UNARY(floor) CU_UNARY(ceil) CU_UNARY(rint) CU_UNARY(round) CU_UNARY(trunc) CU_UNARY(fabs)           \
  inline float cu_pow(float x, float y) { return cu::f_pow(x, y); }                                                 \
  inline float cu_powr(float x, float y) { return cu::f_pow(x, y); }                                                \
  inline float cu_atan2(float y, float x) { return cu::f_atan2(y, x); }                                             \
  inline float cu_fmod(float x, float y) { return cu::f_fmod(x, y); }                                               \
  inline float divide(float x, float y) { return x / y; }
CU_FUNCTIONS
namespace precise {
CU_FUNCTIONS
}
namespace fast {
CU_UNARY(sqrt)
CU_UNARY(rsqrt)
inline float cu_exp(float x) { return cu::fast_exp(x); }
inline float cu_exp2(float x) { return cu::fast_exp2(x); }
inline float cu_log(float x) { return cu::fast_log(x); }
inline float cu_log2(float x) { return cu::fast_log2(x); }
inline float cu_sin(float x) { return cu::fast_sin(x); }
inline float cu_cos(float x) { return cu::fast_cos(x); }
inline float cu_tanh(float x) { return cu::fast_tanh(x); }
inline float divide(float x, float y) { return __fdividef(x, y); }
}  // namespace fast
inline float cu_fma(float a, float b, float c) { return cu::f_fma(a, b, c); }
template <int N>
inline vec<float, N> cu_fma(vec<float, N> a, vec<float, N> b, vec<float, N> c) {
  vec<float, N> r;
  _Pragma("unroll") for (int i = 0; i < N; i++) r[i] = cu_fma(a[i], b[i], c[i]);
  return r;
}
inline float cu_copysign(float x, float y) { return cu::f_copysign(x, y); }
inline float cu_ldexp(float x, int e) { return cu::f_ldexp(x, e); }
inline float cu_sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == x ? x : 0.0f; }
inline float cu_fmin(float a, float b) { return cu::f_min(a, b); }
inline float cu_fmax(float a, float b) { return cu::f_max(a, b); }
inline float cu_abs(float x) { return cu::f_fabs(x); }
inline int cu_abs(int x) { return x < 0 ? -x : x; }
template <typename T>
inline T cu_min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T cu_max(T a, T b) {
  return a < b ? b : a;
}
inline float cu_min(float a, float b) { return cu::f_min(a, b); }
inline float cu_max(float a, float b) { return cu::f_max(a, b); }
template <typename T>
inline T cu_clamp(T x, T low, T high) {
  return cu_min(cu_max(x, low), high);
}
inline bool cu_isnan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }
inline bool cu_isinf(float x) { return (__float_as_uint(x) & 0x7fffffffu) == 0x7f800000u; }
inline bool cu_isfinite(float x) { return (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u; }
template <typename T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
inline uint popcount(uint x) { return __popc(x); }
inline uint clz(uint x) { return __clz(int(x)); }
inline uint ctz(uint x) { return x == 0 ? 32 : __ffs(int(x)) - 1; }
inline uint mulhi(uint a, uint b) { return __umulhi(a, b); }
inline uint reverse_bits(uint x) { return __brev(x); }
inline uint extract_bits(uint x, uint at, uint bits) { return bits == 0 ? 0 : (x >> at) & (0xffffffffu >> (32 - bits)); }

// ---- threads ----------------------------------------------------------------------------------------------------------
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

#define CU_ALL 0xffffffffu
template <typename T>
inline T simd_shuffle(T v, ushort lane) {
  return __shfl_sync(CU_ALL, v, lane);
}
template <typename T>
inline T simd_shuffle_xor(T v, ushort mask) {
  return __shfl_xor_sync(CU_ALL, v, mask);
}
template <typename T>
inline T simd_shuffle_down(T v, ushort by) {
  return __shfl_down_sync(CU_ALL, v, by);
}
template <typename T>
inline T simd_shuffle_up(T v, ushort by) {
  return __shfl_up_sync(CU_ALL, v, by);
}
template <typename T>
inline T simd_broadcast(T v, ushort lane) {
  return __shfl_sync(CU_ALL, v, lane);
}
template <typename T>
inline T simd_broadcast_first(T v) {
  return __shfl_sync(CU_ALL, v, 0);
}
#define CU_REDUCTION(name, expression)                                 \
  template <typename T>                                                \
  inline T simd_##name(T a) {                                          \
    _Pragma("unroll") for (int step = 1; step < 32; step *= 2) {       \
      const T b = __shfl_xor_sync(CU_ALL, a, step);                    \
      a = expression;                                                  \
    }                                                                  \
    return a;                                                          \
  }
CU_REDUCTION(sum, T(a + b))
CU_REDUCTION(product, T(a * b))
CU_REDUCTION(max, cu_max(a, b))
CU_REDUCTION(min, cu_min(a, b))
CU_REDUCTION(or, T(a | b))
CU_REDUCTION(and, T(a& b))
CU_REDUCTION(xor, T(a ^ b))
inline bool simd_all(bool v) { return __all_sync(CU_ALL, v); }
inline bool simd_any(bool v) { return __any_sync(CU_ALL, v); }
template <typename T>
inline T simd_prefix_inclusive_sum(T v) {
  const uint lane = cu::thread_in_group() % 32;
  _Pragma("unroll") for (uint step = 1; step < 32; step *= 2) {
    const T u = __shfl_up_sync(CU_ALL, v, step);
    if (lane >= step) v = T(v + u);
  }
  return v;
}
template <typename T>
inline T simd_prefix_exclusive_sum(T v) {
  const T up = __shfl_up_sync(CU_ALL, simd_prefix_inclusive_sum(v), 1);
  return cu::thread_in_group() % 32 == 0 ? T(0) : up;
}

enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
template <typename T>
inline T atomic_load_explicit(const volatile atomic<T>* a, memory_order) {
  return a->value;
}
template <typename T>
inline void atomic_store_explicit(volatile atomic<T>* a, T v, memory_order) {
  a->value = v;
}
#define CU_ATOMIC(name, function)                                             \
  template <typename T>                                                       \
  inline T atomic_##name##_explicit(volatile atomic<T>* a, T v, memory_order) { \
    return function(const_cast<T*>(&a->value), v);                            \
  }
CU_ATOMIC(exchange, atomicExch)
CU_ATOMIC(fetch_add, atomicAdd)
CU_ATOMIC(fetch_sub, atomicSub)
CU_ATOMIC(fetch_min, atomicMin)
CU_ATOMIC(fetch_max, atomicMax)
CU_ATOMIC(fetch_or, atomicOr)
CU_ATOMIC(fetch_and, atomicAnd)
CU_ATOMIC(fetch_xor, atomicXor)
}  // namespace metal

// ---- entries: a parameter's type is the kernel's own, where it comes from says its attribute ------------------------------
template <typename T>
struct cu_bound {
  static T of(void* p) { return (T)p; }
};
template <typename T>
struct cu_bound<T&> {
  static T& of(void* p) { return *(T*)p; }
};
template <typename T>
struct cu_position {
  static T of(uint x, uint, uint) { return T(x); }
};
template <typename T>
struct cu_position<metal::vec<T, 2>> {
  static metal::vec<T, 2> of(uint x, uint y, uint) { return metal::vec<T, 2>(T(x), T(y)); }
};
template <typename T>
struct cu_position<metal::vec<T, 3>> {
  static metal::vec<T, 3> of(uint x, uint y, uint z) { return metal::vec<T, 3>(T(x), T(y), T(z)); }
};
template <int N>
struct cu_at_buffer {
  template <typename T>
  static T get(void* const* buffers) {
    return cu_bound<T>::of(buffers[N]);
  }
};
#define CU_POSITION(name, expression)                                                            \
  struct cu_at_##name {                                                                          \
    template <typename T>                                                                        \
    static T get(void* const*) {                                                                 \
      return cu_position<T>::of(expression(x), expression(y), expression(z));                    \
    }                                                                                            \
  };
#define CU_INDEX(name, expression)     \
  struct cu_at_##name {                \
    template <typename T>              \
    static T get(void* const*) {       \
      return T(expression);            \
    }                                  \
  };
#define CU_AXIS_GRID_THREAD(c) blockIdx.c* blockDim.c + threadIdx.c
#define CU_AXIS_THREAD(c) threadIdx.c
#define CU_AXIS_GROUP(c) blockIdx.c
#define CU_AXIS_THREADS(c) blockDim.c
#define CU_AXIS_GROUPS(c) gridDim.c
#define CU_AXIS_ALL(c) gridDim.c* blockDim.c
CU_POSITION(thread_position_in_grid, CU_AXIS_GRID_THREAD)
CU_POSITION(thread_position_in_threadgroup, CU_AXIS_THREAD)
CU_POSITION(threadgroup_position_in_grid, CU_AXIS_GROUP)
CU_POSITION(threads_per_threadgroup, CU_AXIS_THREADS)
CU_POSITION(threadgroups_per_grid, CU_AXIS_GROUPS)
CU_POSITION(threads_per_grid, CU_AXIS_ALL)
CU_INDEX(thread_index_in_threadgroup, cu::thread_in_group())
CU_INDEX(thread_index_in_simdgroup, cu::thread_in_group() % 32)
CU_INDEX(simdgroup_index_in_threadgroup, cu::thread_in_group() / 32)
CU_INDEX(simdgroups_per_threadgroup, (blockDim.x * blockDim.y * blockDim.z + 31) / 32)
CU_INDEX(threads_per_simdgroup, 32)
// A launch's constants are the kernel's last parameter, by value: a struct as it is, or room for what a pointer shows.
template <int BYTES>
struct alignas(16) cu_room {
  uchar bytes[BYTES];
};
template <typename T, int BYTES>
struct cu_value;
template <typename T, int BYTES>
struct cu_value<const T&, BYTES> {
  using type = T;
};
template <typename T, int BYTES>
struct cu_value<const T*, BYTES> {
  using type = cu_room<BYTES>;
};
template <int I, typename P, typename... R>
struct cu_pick : cu_pick<I - 1, R...> {};
template <typename P, typename... R>
struct cu_pick<0, P, R...> {
  using type = P;
};
template <typename F, int I, int BYTES>
struct cu_constants;
template <typename... P, int I, int BYTES>
struct cu_constants<void (*)(P...), I, BYTES> : cu_value<typename cu_pick<I, P...>::type, BYTES> {};

// Where the launch before may still be running: nothing is read through a pointer in front of its cu_wait.
#if __CUDA_ARCH__ >= 900
#define CU_WAIT "griddepcontrol.wait;"
#define CU_LAUNCH "griddepcontrol.launch_dependents;"
#else
#define CU_WAIT ""
#define CU_LAUNCH ""
#endif
inline void cu_launder(void*& pointer) {
  asm volatile("" : "+l"(pointer) : : "memory");
  __builtin_assume(__isGlobal(pointer));
}
template <typename... P>
inline void cu_wait(P&... pointers) {
  asm volatile(CU_WAIT : : : "memory");
  (cu_launder(pointers), ...);
  asm volatile(CU_LAUNCH : : : "memory");
}

template <typename... A>
struct cu_list {};
template <auto F, typename List>
struct cu_entry;
template <typename... P, void (*F)(P...), typename... A>
struct cu_entry<F, cu_list<A...>> {
  static void call(void* const* buffers) { F(A::template get<P>(buffers)...); }
};
