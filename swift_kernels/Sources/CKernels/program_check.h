// Checks of row programs when a plan is made, so that the interpreter (program_body.h) needs none.
#ifndef METALSTEP_PROGRAM_CHECK_H
#define METALSTEP_PROGRAM_CHECK_H
#include <stdbool.h>
#include <stdint.h>
#include "params.h"

// Elements behind the last register of a scratch row: the last vector of an operand may be read past its end.
#define MS_PROGRAM_SLACK 32
// An opcode that no launch carries: x^3, which the interpreter makes of POW.
#define MS_CUBE 0x100

// Bytes of a scratch row of `registers` elements.
static inline uint64_t ms_program_row_bytes(uint32_t registers) {
  return ((uint64_t)registers + 15) / 16 * 64 + MS_PROGRAM_SLACK * sizeof(float);
}

// NULL when the interpreter may run these instructions, or what is wrong, in `message`. registers: elements of the
// scratch row, or, in an epilogue, registers of one column block each. binds: bindings of the launch.
const char *ms_program_check(const MSInstr *instrs, uint32_t count, uint32_t registers, uint32_t binds, bool epilogue,
                             const char *kernel, char message[256]);

#endif
