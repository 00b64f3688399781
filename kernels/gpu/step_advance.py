"""step_advance on a GPU: one threadgroup moves all rows on; the kernel is written for the number of groups of layers."""
from __future__ import annotations

import functools
from dataclasses import replace

from metalstep.kernels import params, step_advance
from metalstep.kernels.gpu.bench_case import BenchCase, BenchSizes, Inputs
from metalstep.kernels.launch import KernelCode, Launch
from metalstep.kernels.step import StepBuffers

THREADS = 64  # rows beyond them take turns
MAX_GROUPS = (31 - 1 - params.MS_ADVANCE_GROUPS) // 2  # Metal binds 31 buffers, the constants among them


def launches(step: StepBuffers, *, block_size: int, max_rows: int) -> list[Launch]:
    """As kernels/step_advance.py. MSStep.index grows once, after all threads have read it: the launch needs no other's help.

    Raises: NotImplementedError for more groups of layers than a launch can bind.
    """
    groups = len(step.block_tables)
    if groups > MAX_GROUPS:
        raise NotImplementedError(f"step_advance: {groups} groups of layers, and a GPU's launch binds {MAX_GROUPS}; share block tables")
    [launch] = step_advance.launches(step, block_size=block_size, max_rows=max_rows)
    name = f"step_advance_{groups}"
    return [replace(launch, kernel=name, threads=(THREADS, 1, 1), code=KernelCode(("step_advance",), _kernel(name, groups)))]


def _kernel(name: str, groups: int) -> str:
    first, buffers, calls = params.MS_ADVANCE_GROUPS, [], []
    for group in range(groups):
        slot = first + 2 * group
        buffers.append(f"device const int* tables_{group} [[buffer({slot})]], device int* slots_{group} [[buffer({slot + 1})]],")
        calls.append(f"ms_advance_slot(row, moves, *step, positions, seq_ids, tables_{group}, slots_{group}, p.block_size);")
    lines = ("\n    ".join(buffers), "\n      ".join(calls))
    return f"""[[kernel]] void {name}(
    device MSStep* step [[buffer({params.MS_ADVANCE_STEP})]],
    device int* tokens [[buffer({params.MS_ADVANCE_TOKENS})]],
    device int* positions [[buffer({params.MS_ADVANCE_POSITIONS})]],
    device const int* seq_ids [[buffer({params.MS_ADVANCE_SEQ_IDS})]],
    device const uint* sampled_rows [[buffer({params.MS_ADVANCE_SAMPLED_ROWS})]],
    device MSSampling* sampling [[buffer({params.MS_ADVANCE_SAMPLING})]],
    device const MSSampled* sampled [[buffer({params.MS_ADVANCE_SAMPLED})]],
    device const int* limits [[buffer({params.MS_ADVANCE_LIMITS})]],
    {lines[0]}
    constant MSStepAdvanceParams& p [[buffer({first + 2 * groups})]],
    uint tid [[thread_index_in_threadgroup]]) {{
  const uint index = step->index;
  threadgroup_barrier(mem_flags::mem_device);
  if (tid == 0) step->index = index + 1;
  if (step->advance) {{
    for (uint i = tid; i < step->num_sampled; i += {THREADS}) {{
      uint row;
      bool moves;
      ms_advance_row(i, *step, tokens, positions, sampled_rows, sampling, sampled + ulong(index) * p.max_rows, limits, row, moves);
      {lines[1]}
    }}
  }}
}}"""


def bench_cases(sizes: BenchSizes) -> list[BenchCase]:
    """Rows that all move on."""
    moved = params.size("MSSampled") + 13 * 4  # of a row: the result, and the fields of other arrays that are read or written
    return [
        BenchCase("step_advance", "decode", rows, 0, rows * moved, rows, functools.partial(_bench_launches, sizes.block_size, rows))
        for rows in sizes.sampled_rows
    ]


def _bench_launches(block_size: int, rows: int, inputs: Inputs) -> list[Launch]:
    return launches(inputs.step(rows, sampling={}), block_size=block_size, max_rows=rows)
