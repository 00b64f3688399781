#include "shared_library.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

void *ms_shared_library_open(const char *path, char *message, size_t bytes) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *why = dlerror();
    snprintf(message, bytes, "%s", why ? why : path);
  }
  return library;
}

// A function pointer is as wide as an object pointer wherever dlsym exists; ISO C has no cast between them.
_Bool ms_shared_library_find(void *library, const char *path, const char *name, void *function, char *message,
                             size_t bytes) {
  void *found = dlsym(library, name);
  if (!found) {
    snprintf(message, bytes, "%s has no %s: it is another library, or too old", path, name);
    return 0;
  }
  memcpy(function, &found, sizeof found);
  return 1;
}

void ms_shared_library_close(void *library) { dlclose(library); }
