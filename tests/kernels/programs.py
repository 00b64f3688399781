"""Small row programs with numpy arrays in and out, on the host device."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from harness import Harness

from metalstep.kernels import params, row_program
from metalstep.kernels.launch import Launch
from metalstep.kernels.program import Program, Register

Build = Callable[..., Register]


@contextmanager
def own_buffers(h: Harness) -> Iterator[None]:
    """Frees what is created inside: a device shared by many examples keeps nothing of them."""
    before = set(h.device._memory)
    yield
    for handle in set(h.device._memory) - before:
        h.device.destroy_buffer(handle)


def run(h: Harness, build: Build, *inputs: np.ndarray, plan_rows: int | None = None, **step: Any) -> np.ndarray:
    """The register that `build(program, *registers)` returns, as [rows, size] float32; rows that do not run stay NaN.

    inputs: float32; [rows, size] gives each row its own register, [size] all rows the same. The program runs on as many rows
    as the first of the two-dimensional ones has, in a plan for `plan_rows`. step: arguments of Harness.step.
    """
    rows = next(len(array) for array in inputs if array.ndim == 2)
    program, first = Program(), params.MS_SLOT_FIRST
    registers = []
    for slot, array in enumerate(inputs, first):
        size = array.shape[-1]
        if array.ndim == 2:
            registers.append(program.load(slot, size, rows=params.MS_ROW_SELF, row_stride=size))
        else:
            registers.append(program.load(slot, size, rows=params.MS_ROW_SAME))
    result = build(program, *registers)
    program.store(result, first + len(inputs), row_stride=result.size)
    with own_buffers(h):
        out = h.empty((plan_rows or rows, result.size))
        buffers = [*(h.put(array.astype(np.float32)) for array in inputs), out]
        launches = row_program.launches(program, h.step(rows, **step), buffers, params.MS_ROWS_TOKENS, plan_rows or rows)
        h.run(launches, plan_rows or rows)
        return h.get(out)


def launch_of(h: Harness, *instructions: dict[str, Any], registers: int = 64, **changes: Any) -> Launch:
    """A row_program launch with these MSInstr fields and two buffers of 64 elements; `changes` are MSRowProgramParams'."""
    fields = dict(rows=params.MS_ROWS_TOKENS, instrs=len(instructions), registers=registers) | changes
    constants = params.pack("MSRowProgramParams", **fields)
    constants += b"".join(params.pack("MSInstr", **instruction) for instruction in instructions)
    buffers = [*h.step(0).program_slots(), h.empty((64,)), h.empty((64,))]
    return Launch("row_program", buffers, constants, (1, 1, 1), (1, 1, 1))


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|got - exact| in float32 units in the last place of `exact` (float64); 0 where both are the same infinity or NaN."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        unit = np.spacing(np.minimum(np.abs(rounded), np.finfo(np.float32).max)).astype(np.float64)
        distance = np.abs(got.astype(np.float64) - exact) / unit
    return np.where(same, 0, np.where(np.isnan(distance), np.inf, distance))
