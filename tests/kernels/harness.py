"""Runs an op's launches on a device with numpy arrays in and out."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from metalstep.kernels import params, sample, step_advance, step_load
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import PackedWeight
from metalstep.kernels.native import DeviceBuffer, NativeDevice
from metalstep.kernels.step import StepBuffers


class Harness:
    """A device with the buffers of one test. Outputs start as NaN, so that what is not written shows."""

    def __init__(self, threads: int = 2, device: str = "host"):
        """threads: of the host device; others have none to choose."""
        self.device = NativeDevice.open(device, threads if device == "host" else 0)
        self._made: list[DeviceBuffer] = []

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close()

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """What is made meanwhile is freed behind it: a process has a limit of mappings, and a simulated GPU takes two for each buffer."""
        kept, self._made = self._made, []
        try:
            yield
        finally:
            for buffer in self._made:
                buffer.close()
            self._made = kept

    def create(self, nbytes: int) -> DeviceBuffer:
        self._made.append(self.device.create_buffer(nbytes))
        return self._made[-1]

    def put(self, array: np.ndarray, dtype: str | None = None) -> Buffer:
        """A device copy of `array`; dtype names it where numpy has no such type."""
        array = np.ascontiguousarray(array)
        owner = self.create(max(array.nbytes, 16))
        owner.numpy(array.dtype, array.shape)[...] = array
        return Buffer(owner.handle, 0, array.shape, dtype or str(array.dtype))

    def empty(self, shape: tuple[int, ...]) -> Buffer:
        return self.put(np.full(shape, np.nan, np.float32))

    def get(self, buffer: Buffer, dtype: object = np.float32, shape: tuple[int, ...] | None = None) -> np.ndarray:
        return self.device.numpy(buffer, dtype, shape or buffer.shape).copy()

    def step(
        self,
        tokens: int,
        *,
        ids: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        seq_ids: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        tables: np.ndarray | None = None,
        sampled: Sequence[int] | None = None,
        sampling: np.ndarray | None = None,
        sequences: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
    ) -> StepBuffers:
        """Step buffers of `tokens` rows for one group of layers; what is not given is zero."""
        rows = list(range(tokens)) if sampled is None else list(sampled)
        tables = np.zeros((1, 1), np.int32) if tables is None else tables
        counts = np.zeros(1, params.record("MSStep"))
        counts["num_tokens"], counts["num_sampled"], counts["num_seqs"], counts["max_blocks"] = tokens, len(rows), *tables.shape

        def column(values: Sequence[int] | None) -> Buffer:
            return self.put(np.zeros(tokens, np.int32) if values is None else np.asarray(values, np.int32))

        def records(struct: str, count: int, values: np.ndarray | None = None) -> Buffer:
            array = np.zeros(count, params.record(struct)) if values is None else values
            return self.put(array.view(np.uint8).reshape(-1))

        return StepBuffers(
            step=self.put(counts.view(np.uint32)),
            tokens=column(ids),
            positions=column(positions),
            seq_ids=column(seq_ids),
            slot_mappings=(column(slots),),
            block_tables=(self.put(tables.astype(np.int32)),),
            sequences=records("MSSequence", len(tables), sequences),
            embeddings=self.put(np.zeros((1, 1), np.float32) if embeddings is None else embeddings),
            sampled_rows=self.put(np.asarray(rows, np.int32)),
            limits=self.put(np.zeros(len(rows), np.int32)),
            sampling=records("MSSampling", len(rows), sampling),
            sampled=records("MSSampled", len(rows)),
            top=records("MSTopLogprob", len(rows)),
            biases=records("MSTokenBias", 1),
            masks=self.put(np.zeros((1, 1), np.uint32)),
            history=self.put(np.zeros((1, 1), np.int32)),
            counts=self.put(np.zeros((1, 1), np.uint32)),
        )

    def run(self, launches: Sequence[Launch], max_tokens: int, max_sampled: int | None = None) -> None:
        plan = self.device.create_plan(list(launches), max_tokens, max_sampled or max_tokens)
        try:
            plan.wait(plan.run(1))
        finally:
            plan.close()

    def sample_launches(self, logits: Buffer, step: StepBuffers, **sizes: int) -> list[Launch]:
        return sample.launches(logits, step, **sizes)

    def step_advance_launches(self, step: StepBuffers, **sizes: int) -> list[Launch]:
        return step_advance.launches(step, **sizes)

    def step_load_launches(self, stage: Buffer, sampled: Buffer, region: Buffer, **sizes: int) -> list[Launch]:
        return step_load.launches(stage, sampled, region, **sizes)

    def pack(self, weight: np.ndarray, *, bits: int, group_size: int, dtype: int, n: int, k: int, **pointers: np.ndarray) -> PackedWeight:
        """`weight` (uint32 words, or dense elements as stored) as panels; pointers: scales and biases."""
        nbytes = self.device.weight_bytes(n, k, bits, group_size, dtype)
        owner = self.create(nbytes)
        quantised = params.MS_WEIGHT_AFFINE if "biases" in pointers else params.MS_WEIGHT_FLOATS
        fmt = params.MS_WEIGHT_DENSE if bits >= 16 else quantised
        arrays = {name: np.ascontiguousarray(a) for name, a in pointers.items()}
        weight = np.ascontiguousarray(weight)
        self.device.pack_weight(
            owner,
            0,
            format=fmt,
            n=n,
            k=k,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            data=weight.ctypes.data,
            **{name: a.ctypes.data for name, a in arrays.items()},
        )
        return PackedWeight(Buffer(owner.handle, 0, (nbytes,), "uint8"), n, k, bits, group_size, dtype)
