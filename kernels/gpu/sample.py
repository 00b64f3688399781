"""sample on a GPU: one launch processes all rows by parts, one weighs the tokens of rows that draw from a nucleus, the last ends each
row. What they compute: kernels/sample.py."""
from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from metalstep.kernels import params
from metalstep.kernels.gpu.bench_case import BenchCase, BenchSizes, Inputs
from metalstep.kernels.launch import Buffer, KernelCode, Launch
from metalstep.kernels.step import StepBuffers

BLOCK = 512  # tokens of a simdgroup in the first launch: MS_BLOCK_TOKENS
DEPTH_BINS = 1024  # MS_DEPTH_BINS
MAX_TOP = 256  # far below MS_LIST_TOKENS


@dataclass(frozen=True)
class Tuning:
    """A line of a table, for vocabularies of up to `vocab` tokens and plans of up to `rows` rows. process, weigh: simdgroups of the first
    launches' threadgroups (each has 512 tokens); finish: of the last one's, which has a threadgroup per row."""

    vocab: int
    rows: int
    process: int
    weigh: int
    finish: int


ANY = 2**31 - 1
# By kind of device, the first line that fits. A row's logprob depends on `process` in its last digit: it is the same for all rows.
TABLES: Mapping[str, tuple[Tuning, ...]] = {
    "apple": (Tuning(512, ANY, 1, 1, 2), Tuning(8192, ANY, 4, 4, 4), Tuning(ANY, ANY, 8, 8, 16)),  # no Mac has measured them
    "nvidia": (Tuning(512, ANY, 1, 1, 2), Tuning(8192, ANY, 4, 4, 4), Tuning(ANY, 8, 8, 8, 16), Tuning(ANY, ANY, 8, 32, 16)),  # of an H100
}


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
    kind: str = "apple",
) -> list[Launch]:
    """As kernels/sample.py, in three launches. rows: that a step samples at most; None: max_rows. workspace: workspace_bytes(vocab_size,
    rows), with anything in it. kind: of device, in TABLES.

    All launches but the first have `barrier` set; that needs it wherever the logits are written before.
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
    needed = workspace_bytes(vocab_size, rows, kind)
    if workspace.nbytes < needed:
        raise ValueError(f"sample: the workspace has {workspace.nbytes} bytes, expected {needed}; see workspace_bytes")
    constants = params.pack(
        "MSSampleParams", vocab_size=vocab_size, max_rows=max_rows, max_top=max_top, history_stride=history_stride
    )
    tuning = _tuning(vocab_size, rows, kind)
    part, weighed = tuning.process * BLOCK, tuning.weigh * BLOCK
    process, weigh = f"sample_process_{tuning.process}", f"sample_weigh_{tuning.weigh}_{part}"
    finish = f"sample_finish_{tuning.finish}_{part}"
    where = [step.positions, step.sampled_rows]
    return [
        Launch(
            process,
            [step.step, logits, step.sampling, *where, step.biases, step.masks, step.history, step.counts, workspace],
            constants,
            grid=(-(-vocab_size // part), rows, 1),
            threads=(tuning.process * 32, 1, 1),
            code=KernelCode(("sample",), f"MS_INSTANCE({process}, sample_process<{tuning.process}>)"),
        ),
        Launch(
            weigh,
            [step.step, logits, step.sampling, *where, workspace],
            constants,
            grid=(-(-vocab_size // weighed), rows, 1),
            threads=(tuning.weigh * 32, 1, 1),
            barrier=True,
            code=KernelCode(("sample",), f"MS_INSTANCE({weigh}, sample_weigh<{tuning.weigh}, {part}>)"),
        ),
        Launch(
            finish,
            [step.step, logits, step.sampling, step.sampled, step.top, *where, step.biases, step.history, step.counts, workspace],
            constants,
            grid=(rows, 1, 1),
            threads=(tuning.finish * 32, 1, 1),
            barrier=True,
            code=KernelCode(("sample",), f"MS_INSTANCE({finish}, sample_finish<{tuning.finish}, {part}>)"),
        ),
    ]


def workspace_bytes(vocab_size: int, rows: int, kind: str = "apple") -> int:
    """What launches leave for those behind them, for so many rows: ms_row_workspace."""
    parts, blocks = -(-vocab_size // (_tuning(vocab_size, rows, kind).process * BLOCK)), -(-vocab_size // BLOCK)
    return 4 * rows * (4 * DEPTH_BINS + 10 * parts + 64 * blocks + vocab_size + vocab_size % 2)


def _tuning(vocab_size: int, rows: int, kind: str) -> Tuning:
    return next(tuning for tuning in TABLES[kind] if vocab_size <= tuning.vocab and rows <= tuning.rows)


def bench_cases(sizes: BenchSizes) -> list[BenchCase]:
    """Rows that are all greedy, or all filtered as chats are: temperature, top_k, top_p and min_p."""
    kinds = {
        "greedy": {},
        "top_p": dict(temperature=0.8, top_p=0.95),
        "filtered": dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    }
    return [
        BenchCase("sample", name, rows, 0, 4 * rows * sizes.vocab_size, rows * sizes.vocab_size,
                  functools.partial(_bench_launches, sizes, rows, fields))
        for name, fields in kinds.items() for rows in sizes.sampled_rows
    ]  # fmt: skip


def _bench_launches(sizes: BenchSizes, rows: int, fields: dict[str, float], inputs: Inputs) -> list[Launch]:
    vocab_size = sizes.vocab_size
    logits, step = inputs.activation("logits", (rows, vocab_size)), inputs.step(rows, sampling=fields)
    workspace = inputs.activation("workspace", (workspace_bytes(vocab_size, rows, sizes.kind),), "uint8")
    return launches(
        logits, step, vocab_size=vocab_size, max_rows=rows, max_top=0, history_stride=1, workspace=workspace, kind=sizes.kind
    )
