// The part of Metal's standard library that the project's kernels use, for the CPU. The simulator compiles it in front
// of a kernel, after sim_runtime.h; it is C++17 and needs no C++ library.
//
// Unlike Metal's, transcendental functions here are the C library's: equal in meaning, not in the last bit.

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

static const sim_runtime* sim;
extern "C" void sim_set_runtime(const sim_runtime* functions) { sim = functions; }

namespace metal {

// As in Metal: to float without a word, from float only when asked to, rounding to nearest even.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float value) {
    const uint32_t u = __builtin_bit_cast(uint32_t, value);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = uint16_t(nan ? (u >> 16) | 64u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};

template <typename T, int N>
struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  explicit vec(T a) : x(a), y(a) {}
  vec(T a, T b) : x(a), y(b) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  explicit vec(T a) : x(a), y(a), z(a) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
};
using uint2 = vec<uint, 2>;
using uint3 = vec<uint, 3>;
using ushort2 = vec<ushort, 2>;
using ushort3 = vec<ushort, 3>;

template <typename To, typename From>
inline To as_type(From value) {
  return __builtin_bit_cast(To, value);
}

#define SIM_FLOAT_FUNCTIONS                                 \
  inline float exp(float x) { return __builtin_expf(x); }   \
  inline float exp2(float x) { return __builtin_exp2f(x); } \
  inline float log(float x) { return __builtin_logf(x); }   \
  inline float log2(float x) { return __builtin_log2f(x); } \
  inline float sin(float x) { return __builtin_sinf(x); }   \
  inline float cos(float x) { return __builtin_cosf(x); }   \
  inline float tanh(float x) { return __builtin_tanhf(x); } \
  inline float sqrt(float x) { return __builtin_sqrtf(x); } \
  inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
SIM_FLOAT_FUNCTIONS
namespace precise {
SIM_FLOAT_FUNCTIONS
}
namespace fast {
SIM_FLOAT_FUNCTIONS
}
inline float floor(float x) { return __builtin_floorf(x); }
inline float ceil(float x) { return __builtin_ceilf(x); }
inline float rint(float x) { return __builtin_rintf(x); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}

// ---- barriers and simdgroup functions: every thread, or every lane, must reach the same call ------------------------
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline void threadgroup_barrier(mem_flags, uint line = __builtin_LINE()) { sim->threadgroup_barrier(line); }
inline void simdgroup_barrier(mem_flags) { sim->simdgroup_wait("simdgroup_barrier"); }

template <typename T>
struct sim_lanes {
  T value[32];
  uint count;
  sim_lanes(T mine, const char* operation) { count = sim->simdgroup_exchange(&mine, sizeof mine, value, operation); }
  // A lane that does not exist gives garbage, as Metal leaves it undefined.
  T at(uint lane) const {
    if (lane < count) return value[lane];
    T garbage;
    __builtin_memset(&garbage, 0xa5, sizeof garbage);
    return garbage;
  }
};
inline uint sim_lane() { return sim->thread()->thread_index_in_simdgroup; }

template <typename T>
inline T simd_sum(T v) {  // by halves, as lanes of hardware do
  sim_lanes<T> all(v, "simd_sum");
  for (uint step = 1; step < 32; step *= 2)
    for (uint i = 0; i + step < all.count; i += 2 * step) all.value[i] = T(all.value[i] + all.value[i + step]);
  return all.value[0];
}
template <typename T>
inline T simd_max(T v) {
  sim_lanes<T> all(v, "simd_max");
  for (uint i = 1; i < all.count; i++) all.value[0] = max(all.value[0], all.value[i]);
  return all.value[0];
}
template <typename T>
inline T simd_min(T v) {
  sim_lanes<T> all(v, "simd_min");
  for (uint i = 1; i < all.count; i++) all.value[0] = min(all.value[0], all.value[i]);
  return all.value[0];
}
template <typename T>
inline T simd_shuffle(T v, ushort lane) {
  return sim_lanes<T>(v, "simd_shuffle").at(lane);
}
template <typename T>
inline T simd_shuffle_xor(T v, ushort mask) {
  return sim_lanes<T>(v, "simd_shuffle_xor").at(sim_lane() ^ mask);
}
template <typename T>
inline T simd_shuffle_down(T v, ushort delta) {
  return sim_lanes<T>(v, "simd_shuffle_down").at(sim_lane() + delta);
}
template <typename T>
inline T simd_shuffle_up(T v, ushort delta) {
  return sim_lanes<T>(v, "simd_shuffle_up").at(sim_lane() - delta);
}
template <typename T>
inline T simd_broadcast(T v, ushort lane) {
  return sim_lanes<T>(v, "simd_broadcast").at(lane);
}

}  // namespace metal

// ---- entries: a parameter's type is deduced from the kernel, its attribute comes from the translator ----------------
template <typename T>
inline T sim_bound(void* pointer, T (*)()) {
  return (T)pointer;
}
template <typename T>
inline T& sim_bound(void* pointer, T& (*)()) {
  return *(T*)pointer;
}
template <typename T>
struct sim_position {  // a position as one, two or three numbers
  static T of(const uint32_t* p) { return T(p[0]); }
};
template <typename T>
struct sim_position<metal::vec<T, 2>> {
  static metal::vec<T, 2> of(const uint32_t* p) { return {T(p[0]), T(p[1])}; }
};
template <typename T>
struct sim_position<metal::vec<T, 3>> {
  static metal::vec<T, 3> of(const uint32_t* p) { return {T(p[0]), T(p[1]), T(p[2])}; }
};

template <int N>
struct sim_buffer {
  template <typename T>
  static T get(void* const* buffers, const sim_thread*) {
    return sim_bound(buffers[N], (T (*)()) nullptr);
  }
};
#define SIM_POSITION(name)                            \
  struct sim_##name {                                 \
    template <typename T>                             \
    static T get(void* const*, const sim_thread* t) { \
      return sim_position<T>::of(t->name);            \
    }                                                 \
  };
#define SIM_INDEX(name, expression)                   \
  struct sim_##name {                                 \
    template <typename T>                             \
    static T get(void* const*, const sim_thread* t) { \
      return T(expression);                           \
    }                                                 \
  };
SIM_POSITION(thread_position_in_grid)
SIM_POSITION(thread_position_in_threadgroup)
SIM_POSITION(threadgroup_position_in_grid)
SIM_POSITION(threads_per_threadgroup)
SIM_POSITION(threadgroups_per_grid)
SIM_POSITION(threads_per_grid)
SIM_INDEX(thread_index_in_threadgroup, t->thread_index_in_threadgroup)
SIM_INDEX(thread_index_in_simdgroup, t->thread_index_in_simdgroup)
SIM_INDEX(simdgroup_index_in_threadgroup, t->simdgroup_index_in_threadgroup)
SIM_INDEX(simdgroups_per_threadgroup, t->simdgroups_per_threadgroup)
SIM_INDEX(threads_per_simdgroup, ((void)t, 32))

template <typename... Attributes>
struct sim_list {};
template <typename... Parameters, typename... Attributes>
inline void sim_call(void (*function)(Parameters...), void* const* buffers, const sim_thread* t,
                     sim_list<Attributes...>) {
  function(Attributes::template get<Parameters>(buffers, t)...);
}
#define SIM_ENTRY(name, attributes, ...)                                        \
  extern "C" void sim_entry_##name(void* const* buffers, const sim_thread* t) { \
    sim_call(&__VA_ARGS__, buffers, t, attributes());                           \
  }

// ---- the language ---------------------------------------------------------------------------------------------------
#define __METAL_VERSION__ 310
#define MS_SIM 1
#define device
#define constant const
#define threadgroup
#define thread
#define kernel
