"""Row programs on simulated Metal (or the Mac's own), many kernels to a plan: a compiler's start is most of what a small kernel costs."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_device import KIND
from gpu_harness import GpuHarness
from programs import own_buffers

from metalstep.kernels import params
from metalstep.kernels.gpu import row_program
from metalstep.kernels.launch import Buffer
from metalstep.kernels.program import Program, Register

Build = Callable[..., Register]
KINDS = ["nvidia"] if KIND == "nvidia" else ["apple", "nvidia"]  # a simulated device runs what is written for either


@dataclass
class Case:
    """build(program, *registers) returns a register; inputs as in programs.run: [rows, size] per row, [size] the same for all."""

    build: Build
    inputs: Sequence[np.ndarray]


def program_of(case: Case) -> tuple[Program, Register]:
    """The program, its inputs in the first slots and its result, stored, in the one behind them."""
    program, first = Program(), params.MS_SLOT_FIRST
    registers = []
    for slot, array in enumerate(case.inputs, first):
        size = array.shape[-1]
        address = dict(rows=params.MS_ROW_SELF, row_stride=size) if array.ndim == 2 else dict(rows=params.MS_ROW_SAME)
        registers.append(program.load(slot, size, **address))
    result = case.build(program, *registers)
    program.store(result, first + len(case.inputs), row_stride=result.size)
    return program, result


def run_all(h: GpuHarness, cases: Sequence[Case], rows: int, plan_rows: int | None = None, **step: Any) -> list[np.ndarray]:
    """The results of all cases, each [rows, size] float32, from one plan for `plan_rows`; rows beyond `rows` have to stay NaN."""
    plan_rows = plan_rows or rows + 1
    with own_buffers(h):
        steps, launches, outs = h.step(rows, **step), [], []
        for case in cases:
            program, result = program_of(case)
            out = h.empty((plan_rows, result.size))
            buffers = [*(h.put(array.astype(np.float32)) for array in case.inputs), out]
            launches += row_program.launches(
                program, steps, buffers, params.MS_ROWS_TOKENS, plan_rows, scratch=scratch(h, program, plan_rows), kind=h.kind
            )
            outs.append(out)
        h.run(launches, plan_rows)
        results = [h.get(out) for out in outs]
    for result in results:
        assert np.isnan(result[rows:]).all()
    return [result[:rows] for result in results]


def run(h: GpuHarness, build: Build, *inputs: np.ndarray, plan_rows: int | None = None, **step: Any) -> np.ndarray:
    """As programs.run, without the rows that do not run."""
    rows = next(len(array) for array in inputs if array.ndim == 2)
    return run_all(h, [Case(build, inputs)], rows, plan_rows, **step)[0]


def scratch(h: GpuHarness, program: Program, rows: int, buffers: Sequence[Buffer] | None = None) -> Buffer | None:
    """Scratch memory as the program needs it, poisoned; None if it needs none."""
    nbytes = row_program.scratch_bytes(program, rows, buffers, kind=h.kind)
    return h.empty((nbytes // 4,)) if nbytes else None
