// cuBLASLt without a GPU, on the driver of fake_cuda.c: a product of matrices happens when its turn on the stream comes. Options
// (METALSTEP_FAKE_CUDA) and log are that file's: `way=0`, there is no way to multiply; `matmul=N`, products fail with status N.
#include <dlfcn.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_log.h"

typedef struct { int type; uint64_t rows, columns; int64_t stride; } Layout;
typedef struct { int compute, scale, transposed; } Description;
typedef struct { uint64_t workspace; uint32_t alignment[4]; } Preference;
typedef struct { uint64_t algorithm[8]; size_t workspace; int status; float waves; int reserved[4]; } Result;
typedef struct { const uint16_t *a, *b; const float *c; float *d; float beta; Layout la, lb, lc, ld; } Product;

static int live;
static int option(const char *name, int otherwise) {
  const char *all = getenv("METALSTEP_FAKE_CUDA"), *at = all ? strstr(all, name) : NULL;
  return at ? atoi(at + strlen(name)) : otherwise;
}
static int made(void **to, const void *from, size_t bytes) {
  live++;
  *to = malloc(bytes);
  memcpy(*to, from, bytes);
  return 0;
}
static int freed(void *what) { return live--, free(what), 0; }

int cublasLtCreate(void **handle) { return made(handle, "", 1); }
int cublasLtDestroy(void *handle) {
  freed(handle);
  note("cublas closed: %d left", live);
  return 0;
}
const char *cublasLtGetStatusString(int status) { return status == 14 ? "an internal operation failed" : "something else"; }
int cublasLtMatmulDescCreate(void **description, int compute, int scale) {
  return made(description, &(Description){compute, scale, 0}, sizeof(Description));
}
int cublasLtMatmulDescSetAttribute(Description *description, int name, const void *value, size_t bytes) {
  if (name != 3 || bytes != 4) return 7;
  return description->transposed = *(const int *)value, 0;
}
int cublasLtMatmulDescDestroy(void *description) { return freed(description); }
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  return made(layout, &(Layout){type, rows, columns, stride}, sizeof(Layout));
}
int cublasLtMatrixLayoutDestroy(void *layout) { return freed(layout); }
int cublasLtMatmulPreferenceCreate(void **preference) { return made(preference, &(Preference){0}, sizeof(Preference)); }
int cublasLtMatmulPreferenceSetAttribute(Preference *preference, int name, const void *value, size_t bytes) {
  if (name == 1 && bytes == 8) return preference->workspace = *(const uint64_t *)value, 0;
  if (name < 5 || name > 8 || bytes != 4) return 7;
  return preference->alignment[name - 5] = *(const uint32_t *)value, 0;
}
int cublasLtMatmulPreferenceDestroy(void *preference) { return freed(preference); }
int cublasLtMatmulAlgoGetHeuristic(void *handle, Description *description, Layout *a, Layout *b, Layout *c, Layout *d, Preference *preference,
                                   int wanted, Result *results, int *found) {
  (void)handle, (void)description, (void)a, (void)b, (void)c, (void)d;
  *found = option("way=", 1);
  if (wanted < 1) return 7;
  *results = (Result){.algorithm = {0xa190}, .workspace = preference->workspace / 2};
  note("way: aligned to %u %u %u %u", preference->alignment[0], preference->alignment[1], preference->alignment[2], preference->alignment[3]);
  return 0;
}

static float half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                      : exponent     ? ldexpf((float)(1024 + mantissa), exponent - 25)
                                     : ldexpf((float)mantissa, -24);
  return h >> 15 ? -value : value;
}
// D = Aᵀ B + beta C; matrices are stored by columns.
static void multiply(void *argument) {
  const Product *p = argument;
  for (uint64_t column = 0; column < p->ld.columns; column++)
    for (uint64_t row = 0; row < p->ld.rows; row++) {
      float sum = p->beta == 0 ? 0 : p->beta * p->c[column * (uint64_t)p->lc.stride + row];
      for (uint64_t i = 0; i < p->la.rows; i++)
        sum += half(p->a[row * (uint64_t)p->la.stride + i]) * half(p->b[column * (uint64_t)p->lb.stride + i]);
      p->d[column * (uint64_t)p->ld.stride + row] = sum;
    }
}
int cublasLtMatmul(void *handle, Description *description, const float *alpha, const void *a, Layout *la, const void *b, Layout *lb,
                   const float *beta, const void *c, Layout *lc, void *d, Layout *ld, const uint64_t *algorithm, void *workspace,
                   size_t workspace_bytes, void *stream) {
  (void)handle;
  if (option("matmul=", 0)) return option("matmul=", 0);
  const int types = la->type == 2 && lb->type == 2 && lc->type == 0 && ld->type == 0 && description->compute == 68 && description->scale == 0;
  const int sizes = la->rows == lb->rows && la->columns == ld->rows && lb->columns == ld->columns && lc->rows == ld->rows;
  if (!types || !sizes || !description->transposed || *alpha != 1 || *algorithm != 0xa190 || !workspace) return 7;
  // The last of the memory that it may use, which is somebody's error if it is not there.
  memset((char *)workspace + workspace_bytes - 1, 0xff, 1);
  Product *product = malloc(sizeof *product);
  *product = (Product){a, b, c, d, *beta, *la, *lb, *lc, *ld};
  static int (*enqueue)(void *, void (*)(void *), void *);
  enqueue = (int (*)(void *, void (*)(void *), void *))dlsym(dlopen(getenv("METALSTEP_CUDA_DRIVER"), RTLD_NOW | RTLD_NOLOAD), "fakeEnqueue");
  note("product of %d rows", (int)ld->columns);
  return enqueue(stream, multiply, product) ? 13 : 0;
}
