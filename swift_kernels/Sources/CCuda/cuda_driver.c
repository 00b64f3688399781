#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

_Static_assert(sizeof(ms_cuda_launch_attribute) == 72, "CUlaunchAttribute");
_Static_assert(sizeof(ms_cuda_launch) == 56, "CUlaunchConfig");

static void *library(const char *path, char *message, size_t bytes) {
  void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char *why = dlerror();
    snprintf(message, bytes, "%s", why ? why : path);
  }
  return handle;
}

// A function pointer is as wide as an object pointer wherever dlsym exists; ISO C has no cast between them.
static _Bool symbol(void *handle, const char *path, const char *name, void *function, char *message, size_t bytes) {
  void *found = dlsym(handle, name);
  if (!found) {
    snprintf(message, bytes, "%s has no %s: it is another library, or too old", path, name);
    return 0;
  }
  memcpy(function, &found, sizeof found);
  return 1;
}

#define TAKE(member, name, parameters)                               \
  if (!symbol(handle, path, name, &table->member, message, bytes)) { \
    return 0;                                                        \
  }

_Bool ms_cuda_driver_load(ms_cuda_driver *table, const char *path, char *message, size_t bytes) {
  void *handle = library(path, message, bytes);
  if (!handle) {
    return 0;
  }
  MS_CUDA_FUNCTIONS(TAKE)
  return 1;
}

_Bool ms_nvrtc_load(ms_nvrtc *table, const char *path, char *message, size_t bytes) {
  void *handle = library(path, message, bytes);
  if (!handle) {
    return 0;
  }
  MS_NVRTC_FUNCTIONS(TAKE)
  return 1;
}
