// Makes entry points of kernels, and lets their text pass as C++. Comes last.

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
struct sim_dispatch_threads_per_threadgroup : sim_threads_per_threadgroup {};
SIM_INDEX(thread_index_in_threadgroup, t->thread_index_in_threadgroup)
SIM_INDEX(thread_index_in_simdgroup, t->thread_index_in_simdgroup)
SIM_INDEX(simdgroup_index_in_threadgroup, t->simdgroup_index_in_threadgroup)
SIM_INDEX(simdgroups_per_threadgroup, t->simdgroups_per_threadgroup)
SIM_INDEX(threads_per_simdgroup, ((void)t, 32))
SIM_INDEX(thread_execution_width, ((void)t, 32))
SIM_INDEX(thread_index_in_quadgroup, t->thread_index_in_simdgroup % 4)
SIM_INDEX(quadgroup_index_in_threadgroup, t->thread_index_in_threadgroup / 4)

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

#if __has_feature(address_sanitizer)
// It is loaded with the first kernels, after the program started, and leaves faults to the simulator.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "verify_asan_link_order=0:detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_sigfpe=0:use_sigaltstack=0";
}
#endif

// ---- the language ---------------------------------------------------------------------------------------------------
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define METAL_FUNC inline
#define MS_SIM 1
#define device
#define constant const
#define threadgroup
#define thread
#define kernel
