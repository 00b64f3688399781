#define _GNU_SOURCE  // RTLD_DEFAULT
#include "sanitizers.h"

#include <dlfcn.h>

#include "sim_dispatch.h"

sim_sanitizer_functions sim_sanitizers;

void sim_find_sanitizers(void* library) {
  if (!sim_sanitizers.poison) {
    sim_sanitizers.unpoison = dlsym(library, "__asan_unpoison_memory_region");
    sim_sanitizers.poison = dlsym(library, "__asan_poison_memory_region");
    if (sim_sanitizers.poison) sim_memory_poison_ends();
  }
  // ThreadSanitizer can only be there from the start.
  if (!sim_sanitizers.create_fiber && dlsym(RTLD_DEFAULT, "__tsan_create_fiber")) {
    sim_sanitizers.switch_fiber = dlsym(RTLD_DEFAULT, "__tsan_switch_to_fiber");
    sim_sanitizers.current_fiber = dlsym(RTLD_DEFAULT, "__tsan_get_current_fiber");
    sim_sanitizers.acquire = dlsym(RTLD_DEFAULT, "__tsan_acquire");
    sim_sanitizers.release = dlsym(RTLD_DEFAULT, "__tsan_release");
    sim_sanitizers.create_fiber = dlsym(RTLD_DEFAULT, "__tsan_create_fiber");
  }
}
