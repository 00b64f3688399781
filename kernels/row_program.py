"""A row program: everything row-local between two matmuls in one launch (norms, rotations, cache writes, elementwise chains)."""
from __future__ import annotations

from collections.abc import Sequence

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.program import Program
from metalstep.kernels.step import StepBuffers

THREADS = 256  # threads of a threadgroup; one threadgroup per row on a GPU


def launches(
    program: Program, step: StepBuffers, buffers: Sequence[Buffer], rows: int, max_rows: int, group: int = 0
) -> list[Launch]:
    """Run `program` on every row.

    buffers: what the program's slots from MS_SLOT_FIRST on name. rows: ms_rows, which count of the step it runs over. group: of the
    layers whose cache it writes.
    Raises: NotImplementedError for a LOAD of planes, which this device's linears do not leave.
    """
    if any(instr["op"] == params.MS_OP_LOAD and instr.get("dims", [0])[0] > 1 for instr in program.instructions):
        raise NotImplementedError("row_program: the host device adds up no planes; load each and add")
    constants = params.pack(
        "MSRowProgramParams", rows=rows, instrs=len(program.instructions), registers=program.registers
    )
    return [
        Launch(
            "row_program",
            [*step.program_slots(group), *buffers],
            constants + program.constants(),
            grid=(max_rows, 1, 1),
            threads=(THREADS, 1, 1),
        )
    ]
