#include "library_gemm.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "shared_library.h"

// What is used of cublasLt.h, whose ABI is that of CUDA 11 and later.
typedef struct {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int32_t status;
  float waves;
  int32_t reserved[4];
} heuristic_result;

enum {
  R_32F = 0,  // cudaDataType
  R_16F = 2,
  COMPUTE_32F = 68,     // cublasComputeType_t
  TRANSPOSE_A = 3,      // cublasLtMatmulDescAttributes_t
  OPERATION_T = 1,      // cublasOperation_t
  WORKSPACE_BYTES = 1,  // cublasLtMatmulPreferenceAttributes_t
  ALIGNMENT_A = 5,      // of A, and behind it B, C and D
  ADDRESS_ALIGNMENT = 16,
};

#define SYMBOLS(X)                                                                                                     \
  X(int32_t, Create, (void **handle))                                                                                  \
  X(int32_t, Destroy, (void *handle))                                                                                  \
  X(const char *, GetStatusString, (int32_t status))                                                                   \
  X(int32_t, MatmulDescCreate, (void **description, int32_t compute, int32_t scale))                                   \
  X(int32_t, MatmulDescSetAttribute, (void *description, int32_t name, const void *value, size_t bytes))               \
  X(int32_t, MatmulDescDestroy, (void *description))                                                                   \
  X(int32_t, MatrixLayoutCreate, (void **layout, int32_t type, uint64_t rows, uint64_t columns, int64_t stride))       \
  X(int32_t, MatrixLayoutDestroy, (void *layout))                                                                      \
  X(int32_t, MatmulPreferenceCreate, (void **preference))                                                              \
  X(int32_t, MatmulPreferenceSetAttribute, (void *preference, int32_t name, const void *value, size_t bytes))          \
  X(int32_t, MatmulPreferenceDestroy, (void *preference))                                                              \
  X(int32_t, MatmulAlgoGetHeuristic,                                                                                   \
    (void *handle, void *description, void *a, void *b, void *c, void *d, void *preference, int32_t wanted,            \
     heuristic_result *results, int32_t *found))                                                                       \
  X(int32_t, Matmul,                                                                                                   \
    (void *handle, void *description, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout, \
     const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const uint64_t *algorithm,              \
     void *workspace, size_t workspace_bytes, void *stream))

struct ms_gemm_library {
  void *image;
  void *handle;
#define POINTER(result, name, parameters) result(*name) parameters;
  SYMBOLS(POINTER)
#undef POINTER
};

// The library stores matrices by columns: a row-major [rows, k] is its [k, rows]. D [n, rows] = (W [k, n])ᵀ · x [k, rows] + C [n, rows].
enum { LAYOUT_W, LAYOUT_X, LAYOUT_C, LAYOUT_D, LAYOUTS };
struct ms_gemm {
  const ms_gemm_library *library;
  void *description;
  void *layouts[LAYOUTS];
  uint64_t algorithm[8];
  size_t workspace_bytes;
  float beta;
};

static void fail(char *error, size_t length, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (length) vsnprintf(error, length, format, arguments);
  va_end(arguments);
}

// Whether a call worked; else says which did not.
static bool check(const ms_gemm_library *library, int32_t status, const char *call, char *error, size_t length) {
  if (status) fail(error, length, "cublasLt%s: %s", call, library->GetStatusString(status));
  return status == 0;
}
#define CALL(library, name, ...) check(library, (library)->name(__VA_ARGS__), #name, error, length)

static bool load(ms_gemm_library *library, const char *path, char *error, size_t length) {
  library->image = ms_shared_library_open(path, error, length);
#define FIND(result, name, parameters) \
  &&ms_shared_library_find(library->image, path, "cublasLt" #name, &library->name, error, length)
  return library->image SYMBOLS(FIND);
#undef FIND
}

ms_gemm_library *ms_gemm_library_open(const char *path, char *error, size_t length) {
  ms_gemm_library *library = calloc(1, sizeof *library);
  if (!library) {
    fail(error, length, "no memory");
    return NULL;
  }
  if (load(library, path, error, length) && CALL(library, Create, &library->handle)) return library;
  ms_gemm_library_close(library);
  return NULL;
}

void ms_gemm_library_close(ms_gemm_library *library) {
  if (!library) return;
  if (library->handle) library->Destroy(library->handle);
  if (library->image) ms_shared_library_close(library->image);
  free(library);
}

// The layouts, whose strides are what a column of the library, a row of ours, takes.
static bool make_layouts(ms_gemm *gemm, const MSGpuLibraryGemmParams *p, char *error, size_t length) {
  const ms_gemm_library *library = gemm->library;
  return CALL(library, MatrixLayoutCreate, &gemm->layouts[LAYOUT_W], R_16F, p->k, p->n, p->k) &&
         CALL(library, MatrixLayoutCreate, &gemm->layouts[LAYOUT_X], R_16F, p->k, p->rows, p->x_row_stride) &&
         CALL(library, MatrixLayoutCreate, &gemm->layouts[LAYOUT_C], R_32F, p->n, p->rows,
              p->add ? p->c_row_stride : p->d_row_stride) &&
         CALL(library, MatrixLayoutCreate, &gemm->layouts[LAYOUT_D], R_32F, p->n, p->rows, p->d_row_stride);
}

static bool set_preference(const ms_gemm_library *library, void *preference, uint64_t workspace_bytes, char *error,
                           size_t length) {
  const uint32_t alignment = ADDRESS_ALIGNMENT;
  for (int32_t matrix = 0; matrix < LAYOUTS; matrix++)
    if (!CALL(library, MatmulPreferenceSetAttribute, preference, ALIGNMENT_A + matrix, &alignment, sizeof alignment))
      return false;
  return CALL(library, MatmulPreferenceSetAttribute, preference, WORKSPACE_BYTES, &workspace_bytes,
              sizeof workspace_bytes);
}

// The way that the library expects to be the fastest.
static bool choose(ms_gemm *gemm, const MSGpuLibraryGemmParams *p, char *error, size_t length) {
  const ms_gemm_library *library = gemm->library;
  void *preference = NULL, **layouts = gemm->layouts;
  if (!CALL(library, MatmulPreferenceCreate, &preference)) return false;
  heuristic_result result = {0};
  int32_t found = 0;
  const bool asked = set_preference(library, preference, p->workspace_bytes, error, length) &&
                     CALL(library, MatmulAlgoGetHeuristic, library->handle, gemm->description, layouts[LAYOUT_W],
                          layouts[LAYOUT_X], layouts[LAYOUT_C], layouts[LAYOUT_D], preference, 1, &result, &found);
  library->MatmulPreferenceDestroy(preference);
  if (!asked) return false;
  if (found < 1 || result.status) {
    fail(error, length, "no way to multiply %u rows of %u by %u outputs", p->rows, p->k, p->n);
    return false;
  }
  for (int i = 0; i < 8; i++) gemm->algorithm[i] = result.algorithm[i];
  gemm->workspace_bytes = result.workspace_bytes;
  return true;
}

ms_gemm *ms_gemm_create(ms_gemm_library *library, const MSGpuLibraryGemmParams *p, char *error, size_t length) {
  ms_gemm *gemm = calloc(1, sizeof *gemm);
  if (!gemm) {
    fail(error, length, "no memory");
    return NULL;
  }
  gemm->library = library;
  gemm->beta = p->add ? 1.0f : 0.0f;
  const int32_t operation = OPERATION_T;
  if (CALL(library, MatmulDescCreate, &gemm->description, COMPUTE_32F, R_32F) &&
      CALL(library, MatmulDescSetAttribute, gemm->description, TRANSPOSE_A, &operation, sizeof operation) &&
      make_layouts(gemm, p, error, length) && choose(gemm, p, error, length))
    return gemm;
  ms_gemm_destroy(gemm);
  return NULL;
}

void ms_gemm_destroy(ms_gemm *gemm) {
  if (!gemm) return;
  for (int i = 0; i < LAYOUTS; i++)
    if (gemm->layouts[i]) gemm->library->MatrixLayoutDestroy(gemm->layouts[i]);
  if (gemm->description) gemm->library->MatmulDescDestroy(gemm->description);
  free(gemm);
}

int32_t ms_gemm_enqueue(const ms_gemm *gemm, void *stream, const uint64_t addresses[5], char *error, size_t length) {
  const ms_gemm_library *library = gemm->library;
  const float alpha = 1.0f;
  void *at[5];
  for (int i = 0; i < 5; i++) at[i] = (void *)(uintptr_t)addresses[i];
  // Without C its layout is D's, whose place is as good as any: nothing is read there.
  const void *c = gemm->beta == 0.0f ? at[MS_LIBRARY_GEMM_OUT] : at[MS_LIBRARY_GEMM_ADDED];
  const int32_t status = library->Matmul(
      library->handle, gemm->description, &alpha, at[MS_LIBRARY_GEMM_WEIGHT], gemm->layouts[LAYOUT_W],
      at[MS_LIBRARY_GEMM_X], gemm->layouts[LAYOUT_X], &gemm->beta, c, gemm->layouts[LAYOUT_C], at[MS_LIBRARY_GEMM_OUT],
      gemm->layouts[LAYOUT_D], gemm->algorithm, at[MS_LIBRARY_GEMM_WORKSPACE], gemm->workspace_bytes, stream);
  check(library, status, "Matmul", error, length);
  return status;
}
