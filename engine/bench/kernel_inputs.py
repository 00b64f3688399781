"""Random buffers for the cases of `metalstep bench kernels`."""

from __future__ import annotations

from typing import Any

import numpy as np

from metalstep.kernels.gpu.bench_case import BenchSizes
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.step import StepBuffers
from metalstep.plan.step_arrays import SAMPLING, StepArrays, StepBatch, StepSizes
from metalstep.sampling import MAX_LOGPROBS

TILE = 1 << 18  # random numbers that are drawn; larger buffers repeat them


class CaseInputs:
    """Inputs (kernels/gpu/bench_case.py) on a device. Buffers live until it is closed.

    repeats: how often the launches run before `rewind`, at most. write: without it buffers are not filled, for a device on paper.
    weight_bytes, shared_bytes: of what differs from copy to copy, and of all else.
    """

    def __init__(self, device: NativeDevice, sizes: BenchSizes, repeats: int, *, write: bool = True):
        self._device, self._sizes, self._repeats, self._write = device, sizes, repeats, write
        self._rng = np.random.default_rng(0)
        self._handles: list[int] = []
        self._activations: dict[str, Buffer] = {}
        self._arrays: StepArrays | None = None
        self._positions = self._limits = np.zeros(0, np.int32)
        self.weight_bytes = self.shared_bytes = 0

    def weight(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        buffer = self._create(shape, dtype)
        self.weight_bytes += buffer.nbytes
        return buffer

    def activation(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        if name not in self._activations:
            buffer = self._activations[name] = self._create(shape, dtype)
            self.shared_bytes += buffer.nbytes
        return self._activations[name]

    def step(self, rows: int, *, context: int = 1, sequences: int = 0, sampling: dict[str, Any] | None = None) -> StepBuffers:
        if self._arrays is None:
            self._arrays = self._step(rows, context, sequences or rows, sampling)
        return self._arrays.buffers

    def rewind(self) -> None:
        """As before the first run: step_advance has counted steps and moved positions."""
        if self._arrays is not None:
            self._arrays.rewind()
            self._arrays.move_on(self._positions, self._limits)
            self._arrays.send()

    def close(self) -> None:
        """Free the buffers; plans that bind them are closed before."""
        self._arrays = None  # its views keep memory
        for handle in self._handles:
            self._device.destroy_buffer(handle)

    def _create(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        owner = self._device.create_buffer(Buffer(0, 0, shape, dtype).nbytes, shared=False)
        self._handles.append(owner.handle)
        if self._write:
            tile = self._random(dtype)
            for at in range(0, owner.nbytes, tile.nbytes):
                owner.write(tile[: (owner.nbytes - at) // tile.itemsize], at)
        return Buffer(owner.handle, 0, shape, dtype)

    def _random(self, dtype: str) -> np.ndarray:
        """TILE numbers: any bits of integers, else normal ones."""
        if dtype.startswith("uint"):
            return self._rng.integers(0, np.iinfo(dtype).max, TILE, dtype, endpoint=True)
        values = self._rng.standard_normal(TILE, np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)

    def _step(self, rows: int, context: int, sequences: int, sampling: dict[str, Any] | None) -> StepArrays:
        own, further = self._sizes, 0 if sampling is None else self._repeats
        sizes = StepSizes(
            rows=rows,
            results=rows,
            seqs=sequences,
            steps=self._repeats,
            top=MAX_LOGPROBS,
            groups=1,
            block_size=own.block_size,
            context=context + further,  # of rows that are sampled: as many positions as they may move on by
            vocab_size=own.vocab_size,
            hidden_size=own.hidden_size,
        )
        arrays = StepArrays(self._device, sizes)
        self._handles += [arrays.buffers.step.handle, arrays.buffers.sampled.handle]
        if self._write:
            each, blocks = rows // sequences, -(-context // own.block_size)
            tables = arrays.edit(arrays.block_tables[0])
            tables[...] = 0
            tables[:, :blocks] = self._rng.permutation(sequences * blocks).reshape(sequences, blocks)
            self._positions = np.tile(np.arange(context - each, context, dtype=np.int32), sequences)
            sampled = np.arange(0 if sampling is None else rows, dtype=np.int32)
            self._limits = np.full(sampled.size, sizes.context, np.int32)
            records = np.zeros(sampled.size, SAMPLING)
            records["target"], records["seed_lo"] = -1, sampled
            for name, value in (sampling or {}).items():
                records[name] = value
            arrays.write(
                StepBatch(
                    tokens=self._rng.integers(0, own.vocab_size, rows, np.int32),
                    positions=self._positions,
                    seq_ids=np.repeat(np.arange(sequences, dtype=np.int32), each),
                    sampled_rows=sampled,
                    sampling=records,
                    limits=self._limits,
                    advance=sampling is not None,
                )
            )
            arrays.send()
        return arrays
