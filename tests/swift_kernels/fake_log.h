// A line in the log of the libraries that are not there.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static void note(const char *format, ...) {
  const char *path = getenv("METALSTEP_FAKE_CUDA_LOG");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  vfprintf(file, format, arguments);
  va_end(arguments);
  fputc('\n', file);
  fclose(file);
}
