#include <stdio.h>
#include "prepare.h"
#include "program_check.h"

MS_PREPARE(row_program) {
  const MSRowProgramParams *p = constants;
  (void)max_tokens, (void)max_sampled, (void)threads;
  if (const_bytes < sizeof *p || (uintptr_t)constants % 4 != 0) {
    return "row_program: constants are shorter than MSRowProgramParams or not aligned to 4 bytes";
  }
  if (const_bytes != sizeof *p + (uint64_t)p->instrs * sizeof(MSInstr)) {
    snprintf(message, 256, "row_program: %u bytes of constants, expected %llu for %u instructions", const_bytes,
             (unsigned long long)(sizeof *p + (uint64_t)p->instrs * sizeof(MSInstr)), p->instrs);
    return message;
  }
  if (p->rows > MS_ROWS_SAMPLED) return "row_program: rows is neither MS_ROWS_TOKENS nor MS_ROWS_SAMPLED";
  if (binds < MS_SLOT_FIRST) return "row_program: fewer bindings than the step's own (ms_program_slot)";
  scratch->per_thread = ms_program_row_bytes(p->registers);
  scratch->shared = 0;
  return ms_program_check((const MSInstr *)(p + 1), p->instrs, p->registers, binds, false, "row_program", message);
}
