// x · Wᵀ by cuBLASLt, which is found when the program runs: a launch of the kernel "library_gemm" (params.h) on an NVIDIA GPU.
//
// A failing call writes what was wrong to `error`, whose `length` bytes always end in a zero.
#ifndef METALSTEP_LIBRARY_GEMM_H
#define METALSTEP_LIBRARY_GEMM_H
#include <stddef.h>
#include <stdint.h>
#include "params.h"

typedef struct ms_gemm_library ms_gemm_library;
typedef struct ms_gemm ms_gemm;

// The library in `path`, for the context that is current. NULL where it cannot be loaded or used.
ms_gemm_library *ms_gemm_library_open(const char *path, char *error, size_t length);
// After all its products. NULL is no library.
void ms_gemm_library_close(ms_gemm_library *library);

// Chooses how to compute products of these sizes. NULL where the library has no way, or a size does not fit.
ms_gemm *ms_gemm_create(ms_gemm_library *library, const MSGpuLibraryGemmParams *params, char *error, size_t length);
void ms_gemm_destroy(ms_gemm *gemm);
// Queues one product on a CUstream of the context, which may be capturing; allocates nothing. Device addresses, in the order of
// ms_library_gemm_slot, each a multiple of 16. 0, or else a cublasStatus_t.
int32_t ms_gemm_enqueue(const ms_gemm *gemm, void *stream, const uint64_t addresses[5], char *error, size_t length);

#endif
