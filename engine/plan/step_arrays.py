"""The step's arrays on the device: what a step runs on, what it leaves, and what a running request keeps there."""
from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import DeviceBuffer, NativeDevice
from metalstep.kernels.step import StepBuffers
from metalstep.plan.memory import ALIGN
from metalstep.plan.mirror import Mirror
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

    def __init__(self, sizes: StepSizes, view: Callable[[str], Any], block_tables: np.ndarray):
        """view: of one of INPUTS, writable. block_tables: where rows' positions lie."""
        self.sizes = sizes
        self._tables = block_tables
        for name in INPUTS:
            setattr(self, name, view(name))
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

    def write_results_to(self, row: int) -> None:
        """The row of `sampled` and `top` that the step leaves its results in."""
        self._index[0] = row


class StepArrays:
    """What kernels read and leave, as numpy views. Rows of block tables, sequences, history, counts and masks are a request's slot for as
    long as it runs.

    All but `sampled` and `top`, which the device writes, are for reading: `edit` gives a part of one for writing, `write` and `move_on` put
    a step's inputs in place, and before a run is queued `send` lets the device have what changed (see Mirror).
    """

    def __init__(self, device: NativeDevice, sizes: StepSizes):
        layout = _Layout(sizes)
        owner = device.create_buffer(layout.nbytes, shared=False)
        results = device.create_buffer(layout.result_bytes)
        mirror = Mirror(device, owner, layout.nbytes, layout.quiet)
        self.sizes = sizes
        self.edit, self.send = mirror.edit, mirror.send
        self._mirror = mirror
        views = {name: mirror.view(dtype, shape, layout.offsets[name]) for name, (shape, dtype) in layout.shapes.items()}
        self.step: Records = views["step"]
        self.tokens: np.ndarray = views["tokens"]
        self.positions: np.ndarray = views["positions"]
        self.seq_ids: np.ndarray = views["seq_ids"]
        self.slot_mappings: np.ndarray = views["slot_mappings"]
        self.sampled_rows: np.ndarray = views["sampled_rows"]
        self.limits: np.ndarray = views["limits"]
        self.sampling: Records = views["sampling"]
        self.block_tables: np.ndarray = views["block_tables"]
        self.sequences: Records = views["sequences"]
        self.embeddings: np.ndarray = views["embeddings"]
        self.biases: Records = views["biases"]
        self.masks: np.ndarray = views["masks"]
        self.history: np.ndarray = views["history"]
        self.counts: np.ndarray = views["counts"]
        self.sampled: np.ndarray = layout.result(results, "sampled")
        self.top: np.ndarray = layout.result(results, "top")
        grouped = {name: layout.groups(owner, name) for name in GROUPED}
        single = {name: layout.region(owner, name) for name in layout.shapes if name not in GROUPED}
        self.buffers = StepBuffers(**grouped, **single, **layout.results(results))  # type: ignore[arg-type]
        self.inputs = layout.inputs(owner)
        self._own = StepInputs(sizes, partial(layout.input, mirror), self.block_tables)
        self._device, self._layout = device, layout
        self.row = self._next = 0  # of the results of the latest run and of the next one; the device has `_next` as MSStep.index

    def write(self, batch: StepBatch) -> None:
        """Put a step's rows in place; block tables hold their places already. Raises: ValueError for more than there is room for."""
        self._own.write(batch)
        self._own.write_results_to(self._next % self.sizes.steps)  # as the device has it
        self._mirror.changed(0, self._layout.input_bytes)

    def move_on(self, positions: Rows[int] | np.ndarray, limits: Rows[int] | np.ndarray) -> None:
        """Of a decode step whose inputs the device has made: what changed block tables change. positions, limits: of all its rows."""
        self._own.limits[: len(limits)] = limits
        self._own.place(positions)
        self._mirror.changed(self._layout.offsets["positions"], self._layout.offsets["sampling"])  # no input that the device alone knows

    def next_results(self, steps: int) -> int:
        """The first row of `sampled` and `top` for a run of so many steps, `row` until the next. Runs use the rows in turn, so that the
        device, which counts them, seldom needs to be told."""
        if self._next + steps > self.sizes.steps:
            self.rewind()
        self.row = self._next
        self._next += steps
        return self.row

    def rewind(self) -> None:
        """The next run's results start at the first row, however far the last one came."""
        self._next = 0
        self._own.write_results_to(0)
        self._mirror.changed(*self._layout.index)

    @property
    def is_sent(self) -> bool:
        """Whether the device has every change."""
        return self._mirror.is_sent

    def stage(self, step_load: StepLoad) -> StepStage:
        """A place for a step's inputs while another step runs; each call makes one. step_load: the device's, see Target."""
        return StepStage(self._device, self._layout, self, step_load)


class StepStage(StepInputs):
    """Inputs of a step that waits for its turn. `load`, the first launch of that step, copies them to the step's own arrays.

    sources: int32 [rows]; a row's token is that of this place of `sampled`, flat over [steps, results]; -1: it is in `tokens`.
    The host sees the memory, so it is written when no step under way has yet to load it.
    """

    def __init__(self, device: NativeDevice, layout: _Layout, arrays: StepArrays, step_load: StepLoad):
        sizes = arrays.sizes
        owner = device.create_buffer(layout.input_bytes + 4 * sizes.rows)
        super().__init__(sizes, partial(layout.input, owner), arrays.block_tables)
        self.sources = owner.numpy(np.int32, (sizes.rows,), layout.input_bytes)
        self.load = step_load(
            Buffer(owner.handle, 0, (layout.input_bytes // 4 + sizes.rows,), "int32"),
            arrays.buffers.sampled,
            arrays.inputs,
            words=layout.input_bytes // 4,
            tokens_first=layout.offsets["tokens"] // 4,
            max_tokens=sizes.rows,
        )


class _Layout:
    """Where each array lies in one buffer: INPUTS first, so that one copy puts a step's inputs in place, then what the host alone writes,
    last what a sampler changes too. What a step leaves lies in a buffer of its own, which the host sees on every device."""

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
            "biases": ((sizes.seqs * MAX_TOKEN_ENTRIES,), BIAS),
            "masks": ((sizes.seqs * MASK_ROWS, sizes.mask_words), np.dtype(np.uint32)),
            "history": ((sizes.seqs, sizes.history_stride), int32),
            "counts": ((sizes.seqs, sizes.vocab_size), np.dtype(np.uint32)),
        }
        self._results: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "sampled": ((sizes.steps, sizes.results), SAMPLED),
            "top": ((sizes.steps, sizes.results, sizes.top), TOP),
        }
        self.offsets: dict[str, int] = {}
        self.nbytes, self.result_bytes = self._place(self.shapes), self._place(self._results)
        self.input_bytes = self.offsets["block_tables"]
        self.quiet = range(self.offsets["block_tables"], self.offsets["history"])
        assert STEP.fields is not None
        index, at = STEP.fields["index"][:2]
        self.index = (self.offsets["step"] + at, self.offsets["step"] + at + index.itemsize)

    def _place(self, shapes: dict[str, tuple[tuple[int, ...], np.dtype]]) -> int:
        """Give each array its offset; returns the bytes of all."""
        at = 0
        for name, (shape, dtype) in shapes.items():
            self.offsets[name] = at
            at += _padded(math.prod(shape) * dtype.itemsize)
        return at

    def input(self, owner: DeviceBuffer | Mirror, name: str) -> Any:
        """One of INPUTS, writable, of a region that begins with them."""
        shape, dtype = self.shapes[name]
        make = owner.writable if isinstance(owner, Mirror) else owner.numpy
        return make(dtype, shape, self.offsets[name])

    def result(self, owner: DeviceBuffer, name: str) -> Any:
        shape, dtype = self._results[name]
        return owner.numpy(dtype, shape, self.offsets[name])

    def results(self, owner: DeviceBuffer) -> dict[str, Buffer]:
        return {
            name: Buffer(owner.handle, self.offsets[name], (math.prod(shape) * dtype.itemsize,), "uint8")
            for name, (shape, dtype) in self._results.items()
        }

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
