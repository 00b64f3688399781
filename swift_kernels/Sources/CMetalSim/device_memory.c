#define _DEFAULT_SOURCE  // mmap: MAP_ANONYMOUS
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sanitizers.h"
#include "sim_dispatch.h"

enum { ALIGN = 16 };  // bytes: the start of a buffer, for vectors of four floats

// A buffer's end is that of a page, up to ALIGN - 1 bytes, and behind it lies a page that nobody may touch.
typedef struct block {
  char *pages, *memory;
  size_t pages_size, size;
  struct block* next;
} block;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static block* blocks;

static size_t rounded(size_t size, size_t multiple) { return (size + multiple - 1) / multiple * multiple; }

static void poison(const block* b) {
  if (!sim_sanitizers.poison) return;
  sim_sanitizers.poison(b->pages, (size_t)(b->memory - b->pages));
  sim_sanitizers.poison(b->memory + b->size, b->pages_size - (size_t)(b->memory - b->pages) - b->size);
}

void* sim_memory_allocate(size_t size) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  if (size == 0 || size > SIZE_MAX / 2) return NULL;
  const size_t usable = rounded(size, page);
  block* b = malloc(sizeof *b);
  char* pages = mmap(NULL, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (!b || pages == MAP_FAILED) {
    if (pages != MAP_FAILED) munmap(pages, usable + page);
    free(b);
    return NULL;
  }
  mprotect(pages + usable, page, PROT_NONE);
  *b = (block){pages, pages + usable - rounded(size, ALIGN), usable + page, size, NULL};
  pthread_mutex_lock(&mutex);
  b->next = blocks;
  blocks = b;
  poison(b);
  pthread_mutex_unlock(&mutex);
  return b->memory;
}

void sim_memory_free(void* memory) {
  pthread_mutex_lock(&mutex);
  block** at = &blocks;
  while (*at && (*at)->memory != memory) at = &(*at)->next;
  block* b = *at;
  if (b) {
    *at = b->next;
    if (sim_sanitizers.unpoison) sim_sanitizers.unpoison(b->pages, b->pages_size);
    munmap(b->pages, b->pages_size);
    free(b);
  }
  pthread_mutex_unlock(&mutex);
}

void sim_memory_poison_ends(void) {
  pthread_mutex_lock(&mutex);
  for (const block* b = blocks; b; b = b->next) poison(b);
  pthread_mutex_unlock(&mutex);
}
