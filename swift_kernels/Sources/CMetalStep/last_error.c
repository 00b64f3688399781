// In C because Swift has no thread-local storage.
#include "last_error.h"

#include <string.h>

static _Thread_local char message[MS_LAST_ERROR_BYTES];

void ms_last_error_set(const char *text) {
  const char *end = memchr(text, '\0', sizeof message);
  size_t length = end ? (size_t)(end - text) : sizeof message - 1;
  // A cut inside a UTF-8 sequence would make the whole message undecodable: step back to the sequence's start.
  if (!end) {
    while (length > 0 && ((unsigned char)text[length] & 0xC0) == 0x80) length--;
  }
  memcpy(message, text, length);
  message[length] = '\0';
}

const char *ms_last_error_get(void) { return message; }
