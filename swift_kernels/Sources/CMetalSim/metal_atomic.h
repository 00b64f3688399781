// Metal's atomics: true ones, as threadgroups of one launch run on several threads of the operating system.
namespace metal {

enum memory_order { memory_order_relaxed, memory_order_seq_cst };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
inline void atomic_thread_fence(mem_flags, memory_order = memory_order_relaxed, thread_scope = thread_scope_device) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

template <typename T>
struct _atomic {
  T value;
};
template <typename T>
using atomic = _atomic<T>;
using atomic_int = _atomic<int>;
using atomic_uint = _atomic<uint>;
using atomic_ulong = _atomic<ulong>;
using atomic_bool = _atomic<bool>;
using atomic_float = _atomic<float>;

template <typename T>
struct sim_same {  // an argument that takes no part in deduction
  using type = T;
};
template <typename T>
using sim_operand = typename sim_same<T>::type;

template <typename T>
inline T atomic_load_explicit(const volatile _atomic<T>* p, memory_order) {
  T value;
  __atomic_load((T*)&p->value, &value, __ATOMIC_RELAXED);
  return value;
}
template <typename T>
inline void atomic_store_explicit(volatile _atomic<T>* p, sim_operand<T> value, memory_order) {
  __atomic_store((T*)&p->value, &value, __ATOMIC_RELAXED);
}
template <typename T>
inline T atomic_exchange_explicit(volatile _atomic<T>* p, sim_operand<T> value, memory_order) {
  T old;
  __atomic_exchange((T*)&p->value, &value, &old, __ATOMIC_RELAXED);
  return old;
}
// Weak: it may fail, now and then, although the values are equal.
template <typename T>
inline bool atomic_compare_exchange_weak_explicit(volatile _atomic<T>* p, T* expected, sim_operand<T> value,
                                                  memory_order, memory_order) {
  return __atomic_compare_exchange((T*)&p->value, expected, &value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
#define SIM_FETCH(name, result)                                                                              \
  template <typename T>                                                                                      \
  inline T atomic_fetch_##name##_explicit(volatile _atomic<T>* p, sim_operand<T> b, memory_order) {          \
    T a, value;                                                                                              \
    __atomic_load((T*)&p->value, &a, __ATOMIC_RELAXED);                                                      \
    do value = T(result);                                                                                    \
    while (!__atomic_compare_exchange((T*)&p->value, &a, &value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return a;                                                                                                \
  }
SIM_FETCH(add, a + b)
SIM_FETCH(sub, a - b)
SIM_FETCH(min, b < a ? b : a)
SIM_FETCH(max, a < b ? b : a)
SIM_FETCH(and, a& b)
SIM_FETCH(or, a | b)
SIM_FETCH(xor, a ^ b)
}  // namespace metal
