"""The step's arrays in one device buffer: what a step runs on, what it leaves, and what a running request keeps there."""
from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import DeviceBuffer, NativeDevice
from metalstep.kernels.step import StepBuffers
from metalstep.plan.memory import ALIGN
from metalstep.sampling import MAX_TOKEN_ENTRIES

STEP = params.record("MSStep")
SEQUENCE = params.record("MSSequence")
SAMPLING = params.record("MSSampling")
SAMPLED = params.record("MSSampled")
TOP = params.record("MSTopLogprob")
BIAS = params.record("MSTokenBias")
StepLoad = Callable[..., list[Launch]]  # kernels/step_load.py's `launches`, or a GPU's
Records = Any  # an array of records: numpy's stubs know no field names
MASK_ROWS = 2  # per slot: the request's own, then its grammar's
INPUTS = ("step", "tokens", "positions", "seq_ids", "slot_mappings", "sampled_rows", "limits", "sampling")
GROUPED = ("slot_mappings", "block_tables")  # one per group of layers


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


class StepInputs:
    """The arrays that the host writes for each step, as numpy views. Of the step's own, or of a place where the next one waits."""

    step: Records
    tokens: np.ndarray
    positions: np.ndarray
    seq_ids: np.ndarray
    slot_mappings: np.ndarray
    sampled_rows: np.ndarray
    limits: np.ndarray
    sampling: np.ndarray

    def __init__(self, sizes: StepSizes, layout: _Layout, owner: DeviceBuffer, block_tables: np.ndarray):
        """owner: holds the region of INPUTS from its beginning on. block_tables: where rows' positions lie."""
        self.sizes = sizes
        self._tables = block_tables
        for name in INPUTS:
            setattr(self, name, layout.view(owner, name))
        self.step["num_seqs"], self.step["max_blocks"] = sizes.seqs, sizes.max_blocks
        self._index = self.step["index"].data
        self._records = words_of(self.sampling)

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
        self._records[:results] = words_of(batch.sampling)
        if len(batch.limits):
            self.limits[:results] = batch.limits

    def place(self, positions: Rows[int] | np.ndarray) -> None:
        """The rows' positions, and where their block tables put them."""
        rows = len(positions)
        self.positions[:rows] = positions
        blocks, places = divmod(self.positions[:rows], self.sizes.block_size)
        for tables, slots in zip(self._tables, self.slot_mappings, strict=True):
            slots[:rows] = tables[self.seq_ids[:rows], blocks] * self.sizes.block_size + places


class StepArrays(StepInputs):
    """numpy views that the host writes and kernels read. Rows of block tables, sequences, history, counts and masks are a request's
    slot for as long as it runs."""

    def __init__(self, device: NativeDevice, sizes: StepSizes):
        layout = _Layout(sizes)
        owner = device.create_buffer(layout.nbytes)
        super().__init__(sizes, layout, owner, layout.view(owner, "block_tables"))
        grouped = {name: layout.groups(owner, name) for name in GROUPED}
        single = {name: layout.region(owner, name) for name in layout.shapes if name not in GROUPED}
        self.buffers = StepBuffers(**grouped, **single)  # type: ignore[arg-type]
        self.inputs = layout.inputs(owner)
        self.block_tables = self._tables
        self.sequences: np.ndarray = layout.view(owner, "sequences")
        self.embeddings: np.ndarray = layout.view(owner, "embeddings")
        self.sampled: np.ndarray = layout.view(owner, "sampled")
        self.top: np.ndarray = layout.view(owner, "top")
        self.biases: Records = layout.view(owner, "biases")
        self.masks: np.ndarray = layout.view(owner, "masks")
        self.history: np.ndarray = layout.view(owner, "history")
        self.counts: np.ndarray = layout.view(owner, "counts")
        self._device, self._layout = device, layout

    def rewind(self) -> None:
        """A run's results start at the first row again."""
        self._index[0] = 0

    def stage(self, step_load: StepLoad) -> StepStage:
        """A place for a step's inputs while another step runs; each call makes one. step_load: the device's, see Target."""
        return StepStage(self._device, self._layout, self, step_load)


class StepStage(StepInputs):
    """Inputs of a step that waits for its turn. `load`, the first launch of that step, copies them to the step's own arrays.

    sources: int32 [rows]; a row's token is that of this place of `sampled`, flat over [steps, results]; -1: it is in `tokens`.
    """

    def __init__(self, device: NativeDevice, layout: _Layout, arrays: StepArrays, step_load: StepLoad):
        sizes = arrays.sizes
        owner = device.create_buffer(layout.input_bytes + 4 * sizes.rows)
        super().__init__(sizes, layout, owner, arrays.block_tables)
        self.sources = owner.numpy(np.int32, (sizes.rows,), layout.input_bytes)
        self.load = step_load(
            Buffer(owner.handle, 0, (layout.input_bytes // 4 + sizes.rows,), "int32"),
            arrays.buffers.sampled,
            arrays.inputs,
            words=layout.input_bytes // 4,
            tokens_first=layout.offsets["tokens"] // 4,
            max_tokens=sizes.rows,
        )

    def write_results_to(self, row: int) -> None:
        """The row of `sampled` and `top` that the step leaves its results in."""
        self._index[0] = row


class _Layout:
    """Where each array lies in one buffer: INPUTS first, so that one copy puts a step's inputs in place."""

    def __init__(self, sizes: StepSizes):
        int32 = np.dtype(np.int32)
        self._count = sizes.groups
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "step": ((1,), STEP),
            "tokens": ((sizes.rows,), int32),
            "positions": ((sizes.rows,), int32),
            "seq_ids": ((sizes.rows,), int32),
            "slot_mappings": ((sizes.groups, sizes.rows), int32),
            "sampled_rows": ((sizes.results,), int32),
            "limits": ((sizes.results,), int32),
            "sampling": ((sizes.results,), SAMPLING),
            "block_tables": ((sizes.groups, sizes.seqs, sizes.max_blocks), int32),
            "sequences": ((sizes.seqs,), SEQUENCE),
            "embeddings": ((sizes.rows, sizes.hidden_size), np.dtype(np.float32)),
            "sampled": ((sizes.steps, sizes.results), SAMPLED),
            "top": ((sizes.steps, sizes.results, sizes.top), TOP),
            "biases": ((sizes.seqs * MAX_TOKEN_ENTRIES,), BIAS),
            "masks": ((sizes.seqs * MASK_ROWS, sizes.mask_words), np.dtype(np.uint32)),
            "history": ((sizes.seqs, sizes.history_stride), int32),
            "counts": ((sizes.seqs, sizes.vocab_size), np.dtype(np.uint32)),
        }
        self.offsets: dict[str, int] = {}
        at = 0
        for name in self.shapes:
            self.offsets[name] = at
            at += _padded(self._size(name))
        self.nbytes = at
        self.input_bytes = self.offsets["block_tables"]

    def view(self, owner: DeviceBuffer, name: str) -> Any:
        shape, dtype = self.shapes[name]
        return owner.numpy(dtype, shape, self.offsets[name])

    def region(self, owner: DeviceBuffer, name: str) -> Buffer:
        return Buffer(owner.handle, self.offsets[name], (self._size(name),), "uint8")

    def groups(self, owner: DeviceBuffer, name: str) -> tuple[Buffer, ...]:
        """A region per group of layers."""
        nbytes = self._size(name) // self._count
        return tuple(Buffer(owner.handle, self.offsets[name] + i * nbytes, (nbytes,), "uint8") for i in range(self._count))

    def inputs(self, owner: DeviceBuffer) -> Buffer:
        return Buffer(owner.handle, 0, (self.input_bytes // 4,), "int32")

    def _size(self, name: str) -> int:
        shape, dtype = self.shapes[name]
        return math.prod(shape) * dtype.itemsize


def words_of(records: Records) -> np.ndarray:
    """The same memory as int32 [records, words]: numpy copies an array of records field by field, 40 times slower."""
    return records.view(np.int32).reshape(len(records), SAMPLING.itemsize // 4)


def join_records(records: Rows[Records]) -> Records:
    """SAMPLING arrays, one behind the other."""
    if not records:
        return np.empty(0, SAMPLING)
    return np.concatenate([words_of(part) for part in records]).reshape(-1).view(SAMPLING)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
