// The C ABI of the launcher: the one place where Python (cffi), Swift and C agree. Same rules as params.h: no macros.
//
// Every call that can fail returns an ms_status; the message of a failure is ms_last_error() of the calling thread.
// Handles are opaque; a handle of a closed device is invalid. Calls on one device may come from any thread.
#ifndef METALSTEP_H
#define METALSTEP_H
#include <stdint.h>
#include "params.h"

enum { MS_ABI_VERSION = 2 };

enum ms_status {
  MS_OK = 0,
  MS_ERROR_ARGUMENT = 1,  // wrong call: ValueError
  MS_ERROR_DEVICE = 2,    // the device's own text: RuntimeError
  MS_ERROR_MEMORY = 3,    // MemoryError
  MS_ERROR_TIMEOUT = 4,   // TimeoutError; the ticket stays valid
};

// One launch of a plan. 48 bytes.
typedef struct {
  int32_t kernel;             // of ms_kernel_find
  uint32_t barrier;           // 1: wait for all launches before it
  uint32_t grid[3];           // threadgroups; the host device divides its work by itself
  uint32_t threads[3];        // threads in a threadgroup
  uint32_t bind_first, binds; // range of MSBind; the i-th binding is [[buffer(i)]]
  uint32_t const_first, const_bytes; // byte range of the constants, bound after the last buffer
} MSLaunch;

typedef struct {
  int32_t buffer;
  uint32_t reserved;
  uint64_t offset;  // bytes
} MSBind;

typedef struct {
  char name[64];         // the device's, e.g. "host" or a GPU's
  char isa[32];          // host: avx512, avx2, neon or portable; else empty
  int32_t threads;       // host: of the pool
  int32_t unified;       // 1: the host sees all memory of the device; 0: only what is MS_MEMORY_SHARED
  uint64_t memory_bytes; // what buffers may take beyond those there are (host: in all); 0: unknown
} MSDeviceInfo;

// Whose memory a buffer is. Where memory is unified there is no difference.
enum ms_memory {
  MS_MEMORY_SHARED = 0,  // seen by host and device; on a GPU with memory of its own the host's, pinned, and slow for its kernels
  MS_MEMORY_DEVICE = 1,  // the device's own, which the host may only write, read and copy by the calls below
};

// Where a packed weight comes from. Pointers are into the caller's memory (a mapped file), read during the call only.
enum ms_weight_format {
  MS_WEIGHT_DENSE = 0,  // data: [n, k] of dtype
  MS_WEIGHT_AFFINE = 1, // MLX: data uint32 [n, k*bits/32], scales and biases [n, k/group_size] of dtype
  MS_WEIGHT_GGUF_Q4_0 = 2,
  MS_WEIGHT_GGUF_Q4_1 = 3,
  MS_WEIGHT_GGUF_Q8_0 = 4,
  MS_WEIGHT_FLOATS = 5,  // MLX's mxfp4, nvfp4, mxfp8: data uint32 [n, k*bits/32], scales uint8 [n, k/group_size]
};

typedef struct {
  uint32_t format;      // ms_weight_format
  uint32_t n, k;
  uint32_t bits;        // affine: 1, 2, 3, 4, 5, 6, 8; floats: 4, 8; GGUF: of the result (4 or 8)
  uint32_t group_size;  // affine: 32, 64, 128; floats: 32 (MS_E8M0), 16 (MS_E4M3); GGUF: 32
  uint32_t dtype;       // ms_dtype of dense data, or of scales and biases (GGUF: MS_FLOAT16)
  const void *data;
  const void *scales;   // affine and floats
  const void *biases;   // affine only
  const int32_t *row_order;  // result row i is source row row_order[i]; NULL: as stored
} MSWeightSource;

int32_t ms_abi_version(void);
const char *ms_last_error(void);

// A folder in which devices look for shared libraries that the loader does not know (NVIDIA's, from their wheels).
int32_t ms_folder_add(const char *folder);

// name: "host"; "metal", Apple's GPU; "metal-sim", which runs the same shaders on the CPU, slowly, where there is no Metal; or
// "cuda" and "cuda:N", NVIDIA's GPU 0 or N.
// threads: of the host's pool; 0 picks the machine's (METALSTEP_THREADS overrides). 0 for other devices.
int32_t ms_device_open(const char *name, int32_t threads, void **device);
void ms_device_close(void *device);
int32_t ms_device_info(void *device, MSDeviceInfo *info);

// Zeroed, at least 64-byte aligned (metal-sim: 16). memory: ms_memory.
int32_t ms_buffer_create(void *device, uint64_t bytes, uint32_t memory, int32_t *buffer);
void *ms_buffer_contents(void *device, int32_t buffer);  // NULL when there is no such buffer, or the host does not see it
int32_t ms_buffer_destroy(void *device, int32_t buffer);
// The caller's memory as a buffer, without a copy: launches may read it and must not write it. `address` is a multiple of
// the page; the last page is the caller's to its end, as in a mapped file, since a GPU maps whole pages. The memory stays
// mapped until the buffer is destroyed and every plan that uses it has been destroyed and has finished its runs.
// MS_ERROR_MEMORY where the device cannot take it (a GPU limits the length of a buffer): copy it instead.
int32_t ms_buffer_wrap(void *device, void *address, uint64_t bytes, int32_t *buffer);
// Bytes to, from and between buffers of any memory. Where memory is not unified, in the order of the runs queued before and
// after: write returns when `data` may be reused, read when the bytes are there, copy at once. Where it is unified they are
// done at once, and no run in flight may use the bytes.
int32_t ms_buffer_write(void *device, int32_t buffer, uint64_t offset, const void *data, uint64_t bytes);
int32_t ms_buffer_read(void *device, int32_t buffer, uint64_t offset, void *data, uint64_t bytes);
int32_t ms_buffer_copy(void *device, int32_t from, uint64_t from_offset, int32_t to, uint64_t to_offset, uint64_t bytes);

// Sources of a GPU device, quoted includes already inlined: Metal's language, for CUDA as kernels/gpu/cuda_source.py translates it.
// The host device has its kernels built in.
int32_t ms_library_add(void *device, const char *source);
int32_t ms_kernel_find(void *device, const char *name, int32_t *kernel);

// max_tokens, max_sampled: the most rows a step of this plan will have; scratch is sized for them.
int32_t ms_plan_create(void *device, const MSLaunch *launches, uint32_t launch_count, const MSBind *binds, uint32_t bind_count,
                       const void *constants, uint64_t constant_bytes, uint32_t max_tokens, uint32_t max_sampled, void **plan);
void ms_plan_destroy(void *plan);

// Queues `steps` runs of the plan and returns at once (Metal has 64 steps in flight: beyond that, when the rest fits).
// Tickets of one device finish in order.
int32_t ms_plan_run(void *plan, uint32_t steps, uint64_t *ticket);
// timeout_ns < 0: no limit. The error of a failed run is returned here, once. After one, a CUDA device refuses everything.
int32_t ms_ticket_wait(void *device, uint64_t ticket, int64_t timeout_ns);
// Runs one step and gives each launch's wall time in nanoseconds, barrier included. For explain and bench.
int32_t ms_plan_profile(void *plan, uint64_t *nanoseconds);
// The host device: so many threads of its pool run the plan from now on, 1 to all. Without effect elsewhere.
int32_t ms_plan_limit_threads(void *plan, int32_t threads);

// Bytes of the panels that ms_weight_pack writes; 0 for an unsupported combination (ms_last_error says which).
uint64_t ms_weight_bytes(uint32_t n, uint32_t k, uint32_t bits, uint32_t group_size, uint32_t dtype);
int32_t ms_weight_pack(void *device, const MSWeightSource *source, int32_t buffer, uint64_t offset);

#endif
