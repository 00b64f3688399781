"""The step's arrays in one device buffer: what a step runs on, what it leaves, and what a running request keeps there."""
from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.step import StepBuffers
from metalstep.plan.memory import ALIGN
from metalstep.sampling import MAX_TOKEN_ENTRIES

STEP = params.record("MSStep")
SEQUENCE = params.record("MSSequence")
SAMPLING = params.record("MSSampling")
SAMPLED = params.record("MSSampled")
TOP = params.record("MSTopLogprob")
BIAS = params.record("MSTokenBias")
Records = Any  # an array of records: numpy's stubs know no field names
MASK_ROWS = 2  # per slot: the request's own, then its grammar's


@dataclass(frozen=True)
class StepSizes:
    """The most of everything in a step. groups: of layers that share block tables. context: positions of a sequence."""

    rows: int
    results: int
    seqs: int
    steps: int
    top: int
    groups: int
    block_size: int
    context: int
    vocab_size: int
    hidden_size: int

    @property
    def max_blocks(self) -> int:
        """Columns of a block table."""
        return -(-self.context // self.block_size)

    @property
    def mask_words(self) -> int:
        return -(-self.vocab_size // 32)

    @property
    def history_stride(self) -> int:
        """A token may be sampled behind the last position."""
        return self.context + 1


@dataclass(frozen=True)
class StepBatch:
    """A step's rows, one per token. tokens, positions (in their sequence), seq_ids (row of the block tables): int32, one per row.

    sampled_rows: rows whose next token is wanted; sampling: their SAMPLING records, limits: positions that their sequences may have
    (of K-step runs). advance: every row is sampled and the steps of a run feed each other.
    """

    tokens: Rows[int] | np.ndarray
    positions: Rows[int] | np.ndarray
    seq_ids: Rows[int] | np.ndarray
    sampled_rows: Rows[int] | np.ndarray
    sampling: np.ndarray
    limits: Rows[int] | np.ndarray = field(default_factory=tuple)
    advance: bool = False


class StepArrays:
    """numpy views that the host writes and kernels read. Rows of block tables, sequences, history, counts and masks are a request's
    slot for as long as it runs."""

    def __init__(self, device: NativeDevice, sizes: StepSizes):
        self.sizes = sizes
        int32 = np.dtype(np.int32)
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "step": ((1,), STEP),
            "tokens": ((sizes.rows,), int32),
            "positions": ((sizes.rows,), int32),
            "seq_ids": ((sizes.rows,), int32),
            "slot_mappings": ((sizes.groups, sizes.rows), int32),
            "block_tables": ((sizes.groups, sizes.seqs, sizes.max_blocks), int32),
            "sequences": ((sizes.seqs,), SEQUENCE),
            "embeddings": ((sizes.rows, sizes.hidden_size), np.dtype(np.float32)),
            "sampled_rows": ((sizes.results,), int32),
            "limits": ((sizes.results,), int32),
            "sampling": ((sizes.results,), SAMPLING),
            "sampled": ((sizes.steps, sizes.results), SAMPLED),
            "top": ((sizes.steps, sizes.results, sizes.top), TOP),
            "biases": ((sizes.seqs * MAX_TOKEN_ENTRIES,), BIAS),
            "masks": ((sizes.seqs * MASK_ROWS, sizes.mask_words), np.dtype(np.uint32)),
            "history": ((sizes.seqs, sizes.history_stride), int32),
            "counts": ((sizes.seqs, sizes.vocab_size), np.dtype(np.uint32)),
        }
        offsets, at = {}, 0
        for name, (shape, dtype) in shapes.items():
            offsets[name] = at
            at += _padded(math.prod(shape) * dtype.itemsize)
        owner = device.create_buffer(at)

        def region(name: str, index: int = 0, parts: int = 1) -> Buffer:
            shape, dtype = shapes[name]
            nbytes = math.prod(shape) * dtype.itemsize // parts
            return Buffer(owner.handle, offsets[name] + index * nbytes, (nbytes,), "uint8")

        grouped = {
            name: tuple(region(name, i, sizes.groups) for i in range(sizes.groups)) for name in ("slot_mappings", "block_tables")
        }
        single = {name: region(name) for name in shapes if name not in grouped}
        self.buffers = StepBuffers(**grouped, **single)  # type: ignore[arg-type]
        views = {name: owner.numpy(dtype, shape, offsets[name]) for name, (shape, dtype) in shapes.items()}
        self.step: Records = views["step"]
        self.tokens: np.ndarray = views["tokens"]
        self.positions: np.ndarray = views["positions"]
        self.seq_ids: np.ndarray = views["seq_ids"]
        self.slot_mappings: np.ndarray = views["slot_mappings"]
        self.block_tables: np.ndarray = views["block_tables"]
        self.sequences: np.ndarray = views["sequences"]
        self.embeddings: np.ndarray = views["embeddings"]
        self.sampled_rows: np.ndarray = views["sampled_rows"]
        self.limits: np.ndarray = views["limits"]
        self.sampling: np.ndarray = views["sampling"]
        self.sampled: np.ndarray = views["sampled"]
        self.top: np.ndarray = views["top"]
        self.biases: Records = views["biases"]
        self.masks: np.ndarray = views["masks"]
        self.history: np.ndarray = views["history"]
        self.counts: np.ndarray = views["counts"]
        self.step["num_seqs"], self.step["max_blocks"] = sizes.seqs, sizes.max_blocks
        self._index = self.step["index"].data

    def write(self, batch: StepBatch) -> None:
        """Put a step's rows in place; block tables hold their places already.

        Raises: ValueError for more rows than there is room for.
        """
        rows, results = len(batch.tokens), len(batch.sampled_rows)
        if rows > self.sizes.rows or results > self.sizes.results:
            raise ValueError(
                f"a step of {rows} rows, {results} of them sampled; expected up to {self.sizes.rows} and {self.sizes.results}"
            )
        step = self.step
        step["num_tokens"], step["num_sampled"], step["advance"] = rows, results, batch.advance
        self.tokens[:rows], self.seq_ids[:rows] = batch.tokens, batch.seq_ids
        self.place(batch.positions)
        self.sampled_rows[:results] = batch.sampled_rows
        self.sampling[:results] = batch.sampling
        if len(batch.limits):
            self.limits[:results] = batch.limits

    def place(self, positions: Rows[int] | np.ndarray) -> None:
        """The rows' positions, and where their block tables put them."""
        rows = len(positions)
        self.positions[:rows] = positions
        blocks, places = divmod(self.positions[:rows], self.sizes.block_size)
        for tables, slots in zip(self.block_tables, self.slot_mappings, strict=True):
            slots[:rows] = tables[self.seq_ids[:rows], blocks] * self.sizes.block_size + places

    def rewind(self) -> None:
        """A run's results start at the first row again."""
        self._index[0] = 0


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
