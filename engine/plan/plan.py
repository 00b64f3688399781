"""A plan on a device: launches resolved once, the step's arrays, and one native call per step."""
from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.step import StepBuffers
from metalstep.plan.logits import Logits, LogitsRing
from metalstep.plan.lower import Lowered, Sizes
from metalstep.plan.memory import ALIGN
from metalstep.sampling import SamplingParams

SAMPLING = params.record("MSSampling")
SAMPLED = params.record("MSSampled")


@dataclass(frozen=True)
class StepBatch:
    """What a step runs on. Rows are tokens; arrays are int32.

    tokens, positions (in their sequence), seq_ids (row of block_tables), slot_mapping (place in the cache): one per row.
    block_tables: a list of blocks per sequence. sampled_rows: rows whose next token is wanted; sampling and counters
    (tokens this request has sampled before): one per sampled row.
    """

    tokens: Rows[int] | np.ndarray
    positions: Rows[int] | np.ndarray
    seq_ids: Rows[int] | np.ndarray
    slot_mapping: Rows[int] | np.ndarray
    block_tables: Rows[Rows[int]]
    sampled_rows: Rows[int] | np.ndarray
    sampling: Rows[SamplingParams]
    counters: Rows[int]


class StepArrays:
    """The step's arrays in one device buffer, as numpy views that the host writes and kernels read."""

    def __init__(self, device: NativeDevice, sizes: Sizes, max_seqs: int, max_blocks: int):
        shapes = {
            "step": ((4,), np.dtype("u4")),
            "tokens": ((sizes.tokens,), np.dtype("i4")),
            "positions": ((sizes.tokens,), np.dtype("i4")),
            "seq_ids": ((sizes.tokens,), np.dtype("i4")),
            "slot_mapping": ((sizes.tokens,), np.dtype("i4")),
            "block_tables": ((max_seqs, max_blocks), np.dtype("i4")),
            "sampled_rows": ((sizes.sampled,), np.dtype("i4")),
            "sampling": ((sizes.sampled,), SAMPLING),
            "sampled": ((sizes.sampled,), SAMPLED),
        }
        offsets, at = {}, 0
        for name, (shape, dtype) in shapes.items():
            offsets[name] = at
            at += -(-int(np.prod(shape)) * dtype.itemsize // ALIGN) * ALIGN
        owner = device.create_buffer(at)
        regions = {
            name: Buffer(owner.handle, offsets[name], (int(np.prod(shape)) * dtype.itemsize,), "uint8")
            for name, (shape, dtype) in shapes.items()
        }
        self.buffers = StepBuffers(**regions)
        views = {name: owner.numpy(dtype, shape, offsets[name]) for name, (shape, dtype) in shapes.items()}
        self.step: np.ndarray = views["step"]
        self.tokens: np.ndarray = views["tokens"]
        self.positions: np.ndarray = views["positions"]
        self.seq_ids: np.ndarray = views["seq_ids"]
        self.slot_mapping: np.ndarray = views["slot_mapping"]
        self.block_tables: np.ndarray = views["block_tables"]
        self.sampled_rows: np.ndarray = views["sampled_rows"]
        self.sampling: np.ndarray = views["sampling"]
        self.sampled: np.ndarray = views["sampled"]
        self.step[3] = max_blocks
        self.owner: object = None  # whose decode the arrays are filled for (DecodeInputs); None: a batch's

    def write(self, batch: StepBatch) -> None:
        """Put a step's rows in place. The caller has checked that they fit."""
        self.owner = None
        rows, sampled = len(batch.tokens), len(batch.sampled_rows)
        self.step[0], self.step[1], self.step[2] = rows, sampled, len(batch.block_tables)
        self.tokens[:rows] = batch.tokens
        self.positions[:rows] = batch.positions
        self.seq_ids[:rows] = batch.seq_ids
        self.slot_mapping[:rows] = batch.slot_mapping
        for i, blocks in enumerate(batch.block_tables):
            self.block_tables[i, : len(blocks)] = blocks
        self.sampled_rows[:sampled] = batch.sampled_rows
        for i, (sampling, counter) in enumerate(zip(batch.sampling, batch.counters, strict=True)):
            self.sampling[i] = _sampling_record(sampling, counter)

    def fill_one(self, sampling: SamplingParams, blocks: Rows[int]) -> None:
        """What stays the same from one decode step of a lone sequence to the next."""
        self.step[:3] = 1
        self.seq_ids[0] = 0
        self.block_tables[0, : len(blocks)] = blocks
        self.sampled_rows[0] = 0
        self.sampling[0] = _sampling_record(sampling, 0)


def _sampling_record(sampling: SamplingParams, counter: int) -> tuple[float, float, float, int, int, int, int]:
    """The fields of MSSampling."""
    seed = sampling.seed or 0
    return (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.top_k,
        seed & 0xFFFFFFFF,
        seed >> 32,
        counter,
    )


class Plan:
    """The native plan of one lowered graph, its step arrays and where its logits are.

    A plan of one row has two places for logits and uses them in turn (see LogitsRing).
    """

    def __init__(self, device: NativeDevice, lowered: Lowered, arrays: StepArrays, sizes: Sizes):
        self.sizes = sizes
        self.arrays = arrays
        self.launches = lowered.launches
        self.arena_bytes = lowered.arena.nbytes
        self._device = device
        launches = [entry.launch for entry in lowered.launches]
        places = [lowered.logits]  # in the arena, where another step's values may overlap them
        if sizes.tokens == 1:
            owners = [device.create_buffer(lowered.logits.nbytes) for _ in range(2)]
            places = [replace(lowered.logits, handle=owner.handle, offset=0) for owner in owners]
        self._native = [
            device.create_plan(_rebound(launches, lowered.logits, place), sizes.tokens, sizes.sampled) for place in places
        ]
        shape = (sizes.sampled, lowered.logits.shape[1])
        self._ring = LogitsRing([device.numpy(place, np.float32, shape) for place in places])

    @property
    def vocab_size(self) -> int:
        return int(self.logits.shape[1])

    @property
    def logits(self) -> np.ndarray:
        """What the latest step left: float32 [max_sampled, vocab], valid until the next step."""
        return self._ring.views[self._ring.current]

    def lend_logits(self) -> Logits:
        """The first row of the latest step's logits, for longer than the next step."""
        return self._ring.lend()

    def run(self, batch: StepBatch) -> np.ndarray:
        """One step; returns the sampled rows' results (SAMPLED), valid until the next step of this plan.

        Raises: ValueError for more rows than the plan has room for; RuntimeError with the device's text.
        """
        if len(batch.tokens) > self.sizes.tokens or len(batch.sampled_rows) > self.sizes.sampled:
            raise ValueError(
                f"a step of {len(batch.tokens)} rows, {len(batch.sampled_rows)} of them sampled, on a plan for up to "
                f"{self.sizes.tokens} and {self.sizes.sampled}"
            )
        self.arrays.write(batch)
        self.replay()
        return self.arrays.sampled[: len(batch.sampled_rows)]

    def replay(self) -> None:
        """One step on what the arrays hold already."""
        native = self._native[self._ring.advance()]
        native.wait(native.run(1))

    def profile(self) -> list[int]:
        """Nanoseconds of each launch in one step on what the arrays hold, barriers included."""
        return self._native[self._ring.advance()].profile()

    def close(self) -> None:
        for native in self._native:
            native.close()


def _rebound(launches: list[Launch], old: Buffer, new: Buffer) -> list[Launch]:
    """The launches with buffer `new` where they bind `old`."""
    return [replace(x, bindings=[new if buffer == old else buffer for buffer in x.bindings]) for x in launches]
