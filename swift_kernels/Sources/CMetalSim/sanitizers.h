// What the simulator tells AddressSanitizer and ThreadSanitizer, where kernels are compiled with one. It is not itself.
#ifndef METALSTEP_SANITIZERS_H
#define METALSTEP_SANITIZERS_H
#include <stddef.h>

// NULL where the sanitizer is not loaded.
typedef struct {
  void (*poison)(const volatile void* memory, size_t size);
  void (*unpoison)(const volatile void* memory, size_t size);
  void* (*create_fiber)(unsigned flags);
  void (*switch_fiber)(void* fiber, unsigned flags);
  void* (*current_fiber)(void);
  void (*acquire)(void* object);
  void (*release)(void* object);
} sim_sanitizer_functions;

extern sim_sanitizer_functions sim_sanitizers;

#endif
