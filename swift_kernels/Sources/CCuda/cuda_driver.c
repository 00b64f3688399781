#include "cuda_driver.h"

#include "shared_library.h"

_Static_assert(sizeof(ms_cuda_launch_attribute) == 72, "CUlaunchAttribute");
_Static_assert(sizeof(ms_cuda_launch) == 56, "CUlaunchConfig");

#define TAKE(member, name, parameters)                                               \
  if (!ms_shared_library_find(handle, path, name, &table->member, message, bytes)) { \
    return 0;                                                                        \
  }

_Bool ms_cuda_driver_load(ms_cuda_driver *table, const char *path, char *message, size_t bytes) {
  void *handle = ms_shared_library_open(path, message, bytes);
  if (!handle) {
    return 0;
  }
  MS_CUDA_FUNCTIONS(TAKE)
  return 1;
}

_Bool ms_nvrtc_load(ms_nvrtc *table, const char *path, char *message, size_t bytes) {
  void *handle = ms_shared_library_open(path, message, bytes);
  if (!handle) {
    return 0;
  }
  MS_NVRTC_FUNCTIONS(TAKE)
  return 1;
}
