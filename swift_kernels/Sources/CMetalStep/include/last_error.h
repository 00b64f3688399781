// The message that ms_last_error returns, one per thread.
#ifndef METALSTEP_LAST_ERROR_H
#define METALSTEP_LAST_ERROR_H

enum { MS_LAST_ERROR_BYTES = 2048 };  // longer messages are cut; a compiler's log is longer than anyone reads

void ms_last_error_set(const char *text);
const char *ms_last_error_get(void);  // "" when no call of this thread has failed

#endif
