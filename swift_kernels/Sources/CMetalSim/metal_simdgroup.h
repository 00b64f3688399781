// Barriers and what the threads of a simdgroup tell one another: every thread, or every lane, must reach the same call.
// What all lanes get alike is computed once, by the lane that comes last. The functions' own memory is the runtime's:
// ThreadSanitizer does not look at it, and a shuffle orders nothing between lanes.
#define SIM_UNSEEN __attribute__((no_sanitize("thread")))

static const sim_runtime* sim;
extern "C" void sim_set_runtime(const sim_runtime* functions) { sim = functions; }

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline void threadgroup_barrier(mem_flags flags, uint line = __builtin_LINE()) {
  sim->threadgroup_barrier(line, flags != mem_flags::mem_none);
}
inline void simdgroup_barrier(mem_flags flags) {
  sim->simdgroup_wait("simdgroup_barrier", flags != mem_flags::mem_none);
}

// Every lane's value; or, of a reduction, its result in the first place.
template <typename T>
struct sim_lanes {
  const T* value;
  uint lane, count;
  SIM_UNSEEN sim_lanes(T mine, const char* operation, sim_combine combine = nullptr) {
    const sim_exchange all = sim->simdgroup_exchange(&mine, sizeof mine, combine, operation);
    value = (const T*)all.values;
    lane = all.lane;
    count = all.lanes;
  }
  // A lane that does not exist gives garbage, as Metal leaves it undefined.
  SIM_UNSEEN T at(uint index) const {
    if (index < count) return value[index];
    T garbage;
    __builtin_memset(&garbage, 0xa5, sizeof garbage);
    return garbage;
  }
};
inline uint sim_lane() { return sim->thread()->thread_index_in_simdgroup; }

template <typename T>
struct sim_sum {
  static T of(T a, T b) { return T(a + b); }
};
template <typename T>
struct sim_product {
  static T of(T a, T b) { return T(a * b); }
};
template <typename T>
struct sim_max {
  static T of(T a, T b) { return max(a, b); }
};
template <typename T>
struct sim_min {
  static T of(T a, T b) { return min(a, b); }
};
template <typename T>
struct sim_and {
  static T of(T a, T b) { return T(a & b); }
};
template <typename T>
struct sim_or {
  static T of(T a, T b) { return T(a | b); }
};
template <typename T>
struct sim_xor {
  static T of(T a, T b) { return T(a ^ b); }
};
template <typename T, typename Operation>
SIM_UNSEEN void sim_reduce(void* values, uint lanes) {  // by halves, as lanes of hardware do
  T* v = (T*)values;
  for (uint step = 1; step < 32; step *= 2)
    for (uint i = 0; i + step < lanes; i += 2 * step) v[i] = Operation::of(v[i], v[i + step]);
}
template <typename T, typename Operation>
SIM_UNSEEN void sim_scan(void* values, uint lanes) {
  T* v = (T*)values;
  for (uint i = 1; i < lanes; i++) v[i] = Operation::of(v[i - 1], v[i]);
}
template <typename T, typename Operation>
SIM_UNSEEN void sim_reduce_quads(void* values, uint lanes) {
  T* v = (T*)values;
  for (uint quad = 0; quad < lanes; quad += 4) sim_reduce<T, Operation>(v + quad, lanes - quad < 4 ? lanes - quad : 4);
}

#define SIM_REDUCTION(name)                                                       \
  template <typename T>                                                           \
  SIM_UNSEEN inline T simd_##name(T v) {                                          \
    return sim_lanes<T>(v, "simd_" #name, sim_reduce<T, sim_##name<T>>).value[0]; \
  }                                                                               \
  template <typename T>                                                           \
  SIM_UNSEEN inline T quad_##name(T v) {                                          \
    const sim_lanes<T> all(v, "quad_" #name, sim_reduce_quads<T, sim_##name<T>>); \
    return all.value[all.lane & ~3u];                                             \
  }
SIM_REDUCTION(sum)
SIM_REDUCTION(product)
SIM_REDUCTION(max)
SIM_REDUCTION(min)
SIM_REDUCTION(and)
SIM_REDUCTION(or)
SIM_REDUCTION(xor)
#define SIM_PREFIX(name, first)                                                            \
  template <typename T>                                                                    \
  SIM_UNSEEN inline T simd_prefix_inclusive_##name(T v) {                                  \
    const sim_lanes<T> all(v, "simd_prefix_inclusive_" #name, sim_scan<T, sim_##name<T>>); \
    return all.value[all.lane];                                                            \
  }                                                                                        \
  template <typename T>                                                                    \
  SIM_UNSEEN inline T simd_prefix_exclusive_##name(T v) {                                  \
    const sim_lanes<T> all(v, "simd_prefix_exclusive_" #name, sim_scan<T, sim_##name<T>>); \
    return all.lane ? all.value[all.lane - 1] : T(first);                                  \
  }
SIM_PREFIX(sum, 0)
SIM_PREFIX(product, 1)

#define SIM_SHUFFLE(name, second, index)         \
  template <typename T>                          \
  SIM_UNSEEN inline T name(T v, ushort second) { \
    const sim_lanes<T> all(v, #name);            \
    return all.at(index);                        \
  }
SIM_SHUFFLE(simd_shuffle, lane, lane)
SIM_SHUFFLE(simd_broadcast, lane, lane)
SIM_SHUFFLE(simd_shuffle_xor, mask, all.lane ^ mask)
SIM_SHUFFLE(simd_shuffle_down, delta, all.lane + delta)
SIM_SHUFFLE(simd_shuffle_up, delta, all.lane - delta)
SIM_SHUFFLE(simd_shuffle_rotate_down, delta, (all.lane + delta) & 31)
SIM_SHUFFLE(simd_shuffle_rotate_up, delta, (all.lane - delta) & 31)
SIM_SHUFFLE(quad_shuffle, lane, (all.lane & ~3u) + (lane & 3))
SIM_SHUFFLE(quad_broadcast, lane, (all.lane & ~3u) + (lane & 3))
SIM_SHUFFLE(quad_shuffle_xor, mask, (all.lane & ~3u) + ((all.lane ^ mask) & 3))
SIM_SHUFFLE(quad_shuffle_down, delta, (all.lane & 3) + delta < 4 ? all.lane + delta : 32)
SIM_SHUFFLE(quad_shuffle_up, delta, (all.lane & 3) >= delta ? all.lane - delta : 32)
SIM_SHUFFLE(quad_shuffle_rotate_down, delta, (all.lane & ~3u) + ((all.lane + delta) & 3))
SIM_SHUFFLE(quad_shuffle_rotate_up, delta, (all.lane & ~3u) + ((all.lane - delta) & 3))
template <typename T>
SIM_UNSEEN inline T simd_broadcast_first(T v) {
  return sim_lanes<T>(v, "simd_broadcast_first").value[0];
}
template <typename T>
struct sim_pair {
  T a, b;
};
// Lanes that would come from outside are those of `fill`, the other way round.
template <typename T>
SIM_UNSEEN inline T simd_shuffle_and_fill_up(T v, T fill, ushort delta, ushort modulo = 32) {
  const sim_lanes<sim_pair<T>> all({v, fill}, "simd_shuffle_and_fill_up");
  const uint in = all.lane % modulo, first = all.lane - in;
  return in >= delta ? all.at(first + in - delta).a : all.at(first + in + modulo - delta).b;
}
template <typename T>
SIM_UNSEEN inline T simd_shuffle_and_fill_down(T v, T fill, ushort delta, ushort modulo = 32) {
  const sim_lanes<sim_pair<T>> all({v, fill}, "simd_shuffle_and_fill_down");
  const uint in = all.lane % modulo, first = all.lane - in;
  return in + delta < modulo ? all.at(first + in + delta).a : all.at(first + in + delta - modulo).b;
}

SIM_UNSEEN inline bool simd_any(bool v) {
  return sim_lanes<bool>(v, "simd_any", sim_reduce<bool, sim_or<bool>>).value[0];
}
SIM_UNSEEN inline bool simd_all(bool v) {
  return sim_lanes<bool>(v, "simd_all", sim_reduce<bool, sim_and<bool>>).value[0];
}
SIM_UNSEEN inline bool quad_any(bool v) { return quad_or(v); }
SIM_UNSEEN inline bool quad_all(bool v) { return quad_and(v); }
struct simd_vote {
  using vote_t = ulong;
  ulong mask;
  simd_vote(ulong mask = 0) : mask(mask) {}
  explicit operator ulong() const { return mask; }
  bool any() const { return mask != 0; }
  bool all() const { return mask == 0xffffffffu; }
};
SIM_UNSEEN inline simd_vote simd_ballot(bool v) {
  const ulong bit = v ? 1ul << sim_lane() : 0;
  return simd_vote(sim_lanes<ulong>(bit, "simd_ballot", sim_reduce<ulong, sim_or<ulong>>).value[0]);
}
SIM_UNSEEN inline simd_vote simd_active_threads_mask() { return simd_ballot(true); }
inline bool simd_is_first() { return sim_lane() == 0; }
inline bool simd_is_helper_thread() { return false; }
}  // namespace metal
