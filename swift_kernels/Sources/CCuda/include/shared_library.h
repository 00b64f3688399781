// Shared libraries that are found when the program runs. What was wrong is written to `message`, of `bytes` bytes.
#ifndef METALSTEP_SHARED_LIBRARY_H
#define METALSTEP_SHARED_LIBRARY_H
#include <stddef.h>

// The library at `path`, or of that name where the loader looks; NULL when it cannot be loaded.
void *ms_shared_library_open(const char *path, char *message, size_t bytes);
// Stores the address of `name` to `function`, a pointer to a function pointer. False when the library, from `path`, has none.
_Bool ms_shared_library_find(void *library, const char *path, const char *name, void *function, char *message,
                             size_t bytes);
void ms_shared_library_close(void *library);

#endif
