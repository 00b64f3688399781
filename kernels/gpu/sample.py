"""sample on a GPU: one launch processes all rows by parts, the second ends each row. What they compute: kernels/sample.py."""
from __future__ import annotations

import functools
from collections.abc import Mapping

from metalstep.kernels import params
from metalstep.kernels.gpu.bench_case import BenchCase, BenchSizes, Inputs
from metalstep.kernels.launch import Buffer, KernelCode, Launch
from metalstep.kernels.step import StepBuffers

BLOCK = 512  # tokens of a simdgroup in the first launch: MS_BLOCK_TOKENS
MAX_TOP = 256  # far below MS_LIST_TOKENS
# Per device, by the largest vocabulary that a line is for: simdgroups of the first launch's threadgroups (each has 512 tokens), and of
# the second's, which has a threadgroup per row. Defaults from an H100; no Mac has measured them.
TUNING: Mapping[str, tuple[tuple[int, int, int], ...]] = {"apple": ((512, 1, 2), (8192, 4, 4), (2**31 - 1, 8, 16))}


def launches(
    logits: Buffer,
    step: StepBuffers,
    *,
    vocab_size: int,
    max_rows: int,
    max_top: int,
    history_stride: int,
    workspace: Buffer,
    rows: int | None = None,
) -> list[Launch]:
    """As kernels/sample.py, in two launches. rows: that a step samples at most; None: max_rows. workspace: workspace_bytes(vocab_size,
    rows), with anything in it.

    The second launch has `barrier` set; the first needs it wherever the logits are written before.
    Raises: ValueError for sizes that the kernels cannot have, or a workspace that is too small.
    """
    if not 1 <= vocab_size < 2**31:
        raise ValueError(f"sample: vocab_size is {vocab_size}, expected 1 to 2^31 - 1; pass the model's own")
    if not 0 <= max_top <= MAX_TOP:
        raise ValueError(f"sample: max_top is {max_top}, expected 0 to {MAX_TOP}; report fewer of the most likely tokens")
    if not 0 <= history_stride < params.MS_COUNT_IN_PROMPT:
        raise ValueError(f"sample: history_stride is {history_stride}, expected less than 2^30; pass the context's length")
    rows = max_rows if rows is None else rows
    if not 1 <= rows <= max_rows:
        raise ValueError(f"sample: rows is {rows}, expected 1 to {max_rows} (max_rows)")
    needed = workspace_bytes(vocab_size, rows)
    if workspace.nbytes < needed:
        raise ValueError(f"sample: the workspace has {workspace.nbytes} bytes, expected {needed}; see workspace_bytes")
    constants = params.pack(
        "MSSampleParams", vocab_size=vocab_size, max_rows=max_rows, max_top=max_top, history_stride=history_stride
    )
    first, second = _tuning(vocab_size)
    part = first * BLOCK
    process, finish = f"sample_process_{first}", f"sample_finish_{second}_{part}"
    given = [step.positions, step.sampled_rows, step.biases]
    return [
        Launch(
            process,
            [step.step, logits, step.sampling, *given, step.masks, step.history, step.counts, workspace],
            constants,
            grid=(-(-vocab_size // part), rows, 1),
            threads=(first * 32, 1, 1),
            code=KernelCode(("sample",), f"MS_INSTANCE({process}, sample_process<{first}>)"),
        ),
        Launch(
            finish,
            [step.step, logits, step.sampling, step.sampled, step.top, *given, step.history, step.counts, workspace],
            constants,
            grid=(rows, 1, 1),
            threads=(second * 32, 1, 1),
            barrier=True,
            code=KernelCode(("sample",), f"MS_INSTANCE({finish}, sample_finish<{second}, {part}>)"),
        ),
    ]


def workspace_bytes(vocab_size: int, rows: int) -> int:
    """What the first launch leaves for the second, for so many rows: ms_row_workspace."""
    parts, blocks = -(-vocab_size // (_tuning(vocab_size)[0] * BLOCK)), -(-vocab_size // BLOCK)
    return 4 * rows * (10 * parts + 64 * blocks + vocab_size + vocab_size % 2)


def _tuning(vocab_size: int) -> tuple[int, int]:
    return next((first, second) for most, first, second in TUNING["apple"] if vocab_size <= most)


def bench_cases(sizes: BenchSizes) -> list[BenchCase]:
    """Rows that are all greedy, or all filtered as chats are: temperature, top_k, top_p and min_p."""
    kinds = {"greedy": {}, "filtered": dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)}
    return [
        BenchCase("sample", name, rows, 0, 4 * rows * sizes.vocab_size, rows * sizes.vocab_size,
                  functools.partial(_bench_launches, sizes.vocab_size, rows, fields))
        for name, fields in kinds.items() for rows in sizes.sampled_rows
    ]  # fmt: skip


def _bench_launches(vocab_size: int, rows: int, fields: dict[str, float], inputs: Inputs) -> list[Launch]:
    logits, step = inputs.activation("logits", (rows, vocab_size)), inputs.step(rows, sampling=fields)
    workspace = inputs.activation("workspace", (workspace_bytes(vocab_size, rows),), "uint8")
    return launches(logits, step, vocab_size=vocab_size, max_rows=rows, max_top=0, history_stride=1, workspace=workspace)
