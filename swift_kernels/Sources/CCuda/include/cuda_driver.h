// NVIDIA's driver and run-time compiler, found when a CUDA device is opened: what is used of them, written out, so that building
// needs none of their headers. Values and layouts are those of cuda.h 12.4; names carry the suffix of their ABI.
#ifndef METALSTEP_CUDA_DRIVER_H
#define METALSTEP_CUDA_DRIVER_H
#include <stddef.h>
#include <stdint.h>

typedef struct CUctx_st *ms_cuda_context;
typedef struct CUmod_st *ms_cuda_module;
typedef struct CUfunc_st *ms_cuda_function;
typedef struct CUstream_st *ms_cuda_stream;
typedef struct CUevent_st *ms_cuda_event;
typedef struct CUgraph_st *ms_cuda_graph;
typedef struct CUgraphExec_st *ms_cuda_graph_exec;
typedef struct ms_nvrtc_program_st *ms_nvrtc_program;
typedef uint64_t ms_cuda_address;

// CUlaunchAttribute. 72 bytes.
typedef struct {
  uint32_t id;  // MS_CUDA_ATTRIBUTE_EARLY_START
  uint32_t pad;
  int32_t value;
  uint32_t unused[15];
} ms_cuda_launch_attribute;

// CUlaunchConfig. 56 bytes.
typedef struct {
  uint32_t grid[3];     // blocks
  uint32_t threads[3];  // threads in a block
  uint32_t shared_bytes;
  ms_cuda_stream stream;
  ms_cuda_launch_attribute *attributes;
  uint32_t attribute_count;
} ms_cuda_launch;

enum {
  MS_CUDA_OK = 0,
  MS_CUDA_OUT_OF_MEMORY = 2,
  MS_CUDA_NOT_INITIALIZED = 3,
  MS_CUDA_UNAVAILABLE = 46,
  MS_CUDA_NO_DEVICE = 100,
  MS_CUDA_INVALID_IMAGE = 200,
  MS_CUDA_NO_BINARY_FOR_GPU = 209,
  MS_CUDA_UNSUPPORTED_BINARY = 222,
  MS_CUDA_NOT_FOUND = 500,
  MS_CUDA_NOT_READY = 600,
};
enum {
  MS_CUDA_MAX_THREADS = 1,  // of a block, then along each of its axes, then blocks along each axis
  MS_CUDA_MAX_THREADS_X = 2,
  MS_CUDA_MAX_GRID_X = 5,
  MS_CUDA_CAPABILITY_MAJOR = 75,
  MS_CUDA_CAPABILITY_MINOR = 76,
};
enum {
  MS_CUDA_FUNCTION_MAX_THREADS = 0,
  MS_CUDA_STREAM_NON_BLOCKING = 1,
  MS_CUDA_CAPTURE_RELAXED = 2,
  MS_CUDA_EVENT_NO_TIMING = 2,
  MS_CUDA_EVENT_EXTERNAL = 1,  // recorded by the graph, not by its capture
  MS_CUDA_HOST_PORTABLE = 1,
  MS_CUDA_HOST_MAPPED = 2,
  MS_CUDA_ATTRIBUTE_EARLY_START = 6,  // programmatic stream serialization
};

// X(member, symbol, parameters)
#define MS_CUDA_FUNCTIONS(X)                                                                                          \
  X(cuInit, "cuInit", (uint32_t flags))                                                                               \
  X(cuDriverGetVersion, "cuDriverGetVersion", (int32_t *version))                                                     \
  X(cuGetErrorName, "cuGetErrorName", (int32_t code, const char **name))                                              \
  X(cuGetErrorString, "cuGetErrorString", (int32_t code, const char **text))                                          \
  X(cuDeviceGetCount, "cuDeviceGetCount", (int32_t *count))                                                           \
  X(cuDeviceGet, "cuDeviceGet", (int32_t *device, int32_t ordinal))                                                   \
  X(cuDeviceGetName, "cuDeviceGetName", (char *name, int32_t bytes, int32_t device))                                  \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int32_t *value, int32_t attribute, int32_t device))                \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (ms_cuda_context * context, int32_t device))                \
  X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int32_t device))                                      \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (ms_cuda_context context))                                               \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (ms_cuda_context * context))                                               \
  X(cuMemGetInfo, "cuMemGetInfo_v2", (size_t *free, size_t *total))                                                   \
  X(cuMemAlloc, "cuMemAlloc_v2", (ms_cuda_address * address, size_t bytes))                                           \
  X(cuMemFree, "cuMemFree_v2", (ms_cuda_address address))                                                             \
  X(cuMemHostAlloc, "cuMemHostAlloc", (void **address, size_t bytes, uint32_t flags))                                 \
  X(cuMemFreeHost, "cuMemFreeHost", (void *address))                                                                  \
  X(cuMemsetD8Async, "cuMemsetD8Async", (ms_cuda_address to, uint8_t value, size_t bytes, ms_cuda_stream stream))     \
  X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2",                                                                        \
    (ms_cuda_address to, const void *from, size_t bytes, ms_cuda_stream stream))                                      \
  X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void *to, ms_cuda_address from, size_t bytes, ms_cuda_stream stream)) \
  X(cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2",                                                                        \
    (ms_cuda_address to, ms_cuda_address from, size_t bytes, ms_cuda_stream stream))                                  \
  X(cuModuleLoadData, "cuModuleLoadData", (ms_cuda_module * module, const void *image))                               \
  X(cuModuleUnload, "cuModuleUnload", (ms_cuda_module module))                                                        \
  X(cuModuleGetFunction, "cuModuleGetFunction",                                                                       \
    (ms_cuda_function * function, ms_cuda_module module, const char *name))                                           \
  X(cuFuncGetAttribute, "cuFuncGetAttribute", (int32_t *value, int32_t attribute, ms_cuda_function function))         \
  X(cuFuncGetParamInfo, "cuFuncGetParamInfo",                                                                         \
    (ms_cuda_function function, size_t index, size_t *offset, size_t *bytes))                                         \
  X(cuLaunchKernelEx, "cuLaunchKernelEx",                                                                             \
    (const ms_cuda_launch *launch, ms_cuda_function function, void **parameters, void **extra))                       \
  X(cuStreamCreate, "cuStreamCreate", (ms_cuda_stream * stream, uint32_t flags))                                      \
  X(cuStreamDestroy, "cuStreamDestroy_v2", (ms_cuda_stream stream))                                                   \
  X(cuStreamSynchronize, "cuStreamSynchronize", (ms_cuda_stream stream))                                              \
  X(cuStreamBeginCapture, "cuStreamBeginCapture_v2", (ms_cuda_stream stream, int32_t mode))                           \
  X(cuStreamEndCapture, "cuStreamEndCapture", (ms_cuda_stream stream, ms_cuda_graph * graph))                         \
  X(cuGraphInstantiate, "cuGraphInstantiateWithFlags",                                                                \
    (ms_cuda_graph_exec * exec, ms_cuda_graph graph, unsigned long long flags))                                       \
  X(cuGraphUpload, "cuGraphUpload", (ms_cuda_graph_exec exec, ms_cuda_stream stream))                                 \
  X(cuGraphLaunch, "cuGraphLaunch", (ms_cuda_graph_exec exec, ms_cuda_stream stream))                                 \
  X(cuGraphExecDestroy, "cuGraphExecDestroy", (ms_cuda_graph_exec exec))                                              \
  X(cuGraphDestroy, "cuGraphDestroy", (ms_cuda_graph graph))                                                          \
  X(cuEventCreate, "cuEventCreate", (ms_cuda_event * event, uint32_t flags))                                          \
  X(cuEventRecord, "cuEventRecord", (ms_cuda_event event, ms_cuda_stream stream))                                     \
  X(cuEventRecordWithFlags, "cuEventRecordWithFlags", (ms_cuda_event event, ms_cuda_stream stream, uint32_t flags))   \
  X(cuEventQuery, "cuEventQuery", (ms_cuda_event event))                                                              \
  X(cuEventElapsedTime, "cuEventElapsedTime", (float *milliseconds, ms_cuda_event from, ms_cuda_event to))            \
  X(cuEventDestroy, "cuEventDestroy_v2", (ms_cuda_event event))

#define MS_NVRTC_FUNCTIONS(X)                                                                                          \
  X(nvrtcVersion, "nvrtcVersion", (int32_t *major, int32_t *minor))                                                    \
  X(nvrtcGetNumSupportedArchs, "nvrtcGetNumSupportedArchs", (int32_t *count))                                          \
  X(nvrtcGetSupportedArchs, "nvrtcGetSupportedArchs", (int32_t *architectures))                                        \
  X(nvrtcCreateProgram, "nvrtcCreateProgram",                                                                          \
    (ms_nvrtc_program * program, const char *source, const char *name, int32_t headers, const char *const *texts,      \
     const char *const *names))                                                                                        \
  X(nvrtcCompileProgram, "nvrtcCompileProgram", (ms_nvrtc_program program, int32_t count, const char *const *options)) \
  X(nvrtcGetProgramLogSize, "nvrtcGetProgramLogSize", (ms_nvrtc_program program, size_t *bytes))                       \
  X(nvrtcGetProgramLog, "nvrtcGetProgramLog", (ms_nvrtc_program program, char *log))                                   \
  X(nvrtcGetCUBINSize, "nvrtcGetCUBINSize", (ms_nvrtc_program program, size_t *bytes))                                 \
  X(nvrtcGetCUBIN, "nvrtcGetCUBIN", (ms_nvrtc_program program, char *cubin))                                           \
  X(nvrtcDestroyProgram, "nvrtcDestroyProgram", (ms_nvrtc_program * program))

#define MS_CUDA_MEMBER(member, symbol, parameters) int32_t(*member) parameters;
typedef struct {
  MS_CUDA_FUNCTIONS(MS_CUDA_MEMBER)
} ms_cuda_driver;
typedef struct {
  MS_NVRTC_FUNCTIONS(MS_CUDA_MEMBER)
} ms_nvrtc;
#undef MS_CUDA_MEMBER

// Fill the table from the library at `path` (or of that name, where the loader looks). False, with why in `message`, when it
// cannot be loaded or lacks a function. The library stays loaded.
_Bool ms_cuda_driver_load(ms_cuda_driver *driver, const char *path, char *message, size_t bytes);
_Bool ms_nvrtc_load(ms_nvrtc *nvrtc, const char *path, char *message, size_t bytes);

#endif
