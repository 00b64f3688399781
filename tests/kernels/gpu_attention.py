"""Sequences in a paged cache on a GPU, what rows of a step attend to there, and what they should."""
from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from gpu_harness import GpuHarness

from metalstep.kernels import attention as plain
from metalstep.kernels import params
from metalstep.kernels.gpu import attention
from metalstep.kernels.launch import Buffer

CODES = {"float32": params.MS_FLOAT32, "float16": params.MS_FLOAT16, "bfloat16": params.MS_BFLOAT16}
Row = tuple[int, int]  # sequence and position


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` as a plane holds it: bits of bfloat16, else numpy's own type."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    return np.array(mx.array(array).astype(mx.bfloat16).view(mx.uint16))


def loaded(array: np.ndarray, dtype: str) -> np.ndarray:
    """What `stored` holds, as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array.astype(np.float32)


class Cache:
    """Random keys and values of sequences in shuffled blocks; what is not theirs is NaN, and so is the block that tables do not name."""

    def __init__(
        self,
        h: GpuHarness,
        rng: np.random.Generator,
        lengths: Sequence[int],
        *,
        kv_heads: int = 2,
        head_dim: int = 32,
        value_dim: int | None = None,
        dtype: str = "float32",
        block: int = 16,
    ):
        self.h, self.heads, self.dims, self.dtype, self.block = h, kv_heads, (head_dim, value_dim or head_dim), dtype, block
        self.lengths = list(lengths)
        counts = [-(-n // block) for n in lengths]
        order = iter(rng.permutation(sum(counts) + 1))
        self.tables = np.zeros((len(lengths), max(counts)), np.int32)
        for row, count in zip(self.tables, counts, strict=True):
            row[:count] = [next(order) for _ in range(count)]
        self.spare = next(order)
        for row, count in zip(self.tables, counts, strict=True):
            row[count:] = self.spare
        poison = [np.full((sum(counts) + 1, kv_heads, block, dim), np.nan, np.float32) for dim in self.dims]
        self.k_plane, self.v_plane = (h.put(stored(plane, dtype), dtype) for plane in poison)
        draws = [[rng.standard_normal((kv_heads, n, dim)).astype(np.float32) for n in lengths] for dim in self.dims]
        self.keys, self.values = ([loaded(stored(a, dtype), dtype) for a in arrays] for arrays in draws)
        for s, n in enumerate(lengths):
            self.write(s, range(n))

    def view(self, plane: Buffer) -> np.ndarray:
        """The plane's memory."""
        return self.h.device.numpy(plane, np.uint16 if self.dtype == "bfloat16" else self.dtype, plane.shape)

    def slot(self, s: int, position: int) -> int:
        return int(self.tables[s, position // self.block]) * self.block + position % self.block

    def write(self, s: int, positions: Sequence[int]) -> None:
        """Put the sequence's keys and values at `positions` where they belong."""
        for plane, rows in ((self.view(self.k_plane), self.keys[s]), (self.view(self.v_plane), self.values[s])):
            for p in positions:
                plane[self.tables[s, p // self.block], :, p % self.block] = stored(rows[:, p], self.dtype)

    def step(self, rows: Sequence[Row], windows: Sequence[tuple[int, int]] | None = None, slots: Sequence[int] | None = None):
        sequences = np.zeros(len(self.tables), params.record("MSSequence"))
        if windows:
            sequences["window"], sequences["keep"] = zip(*windows, strict=True)
        return self.h.step(
            len(rows), seq_ids=[s for s, _ in rows], positions=[p for _, p in rows], tables=self.tables, sequences=sequences, slots=slots
        )

    def attend(
        self,
        q: np.ndarray | Buffer,
        rows: Sequence[Row],
        *,
        num_q_heads: int | None = None,
        windows: Sequence[tuple[int, int]] | None = None,
        slots: Sequence[int] | None = None,
        sinks: np.ndarray | None = None,
        splits: int = 1,
        max_rows: int | None = None,
        q_offset: int = 0,
        q_row_stride: int | None = None,
        **options,
    ) -> np.ndarray:
        """[max_rows, q heads, value_dim] of rows (sequence, position); windows: (window, keep) of each sequence."""
        h, (head_dim, value_dim), max_rows = self.h, self.dims, max_rows or len(rows)
        heads = num_q_heads or q.shape[1]
        out = h.empty((max_rows, heads, value_dim))
        nbytes = attention.workspace_bytes(heads, value_dim, max_rows, splits)
        launches = attention.launches(
            q if isinstance(q, Buffer) else h.put(q), q_offset, q_row_stride or heads * head_dim, self.k_plane, self.v_plane, out,
            self.step(rows, windows, slots), num_q_heads=heads, num_kv_heads=self.heads, head_dim=head_dim, value_dim=value_dim,
            block_size=self.block, kv_dtype=CODES[self.dtype], scale=head_dim**-0.5, max_rows=max_rows, splits=splits,
            sinks=None if sinks is None else h.put(sinks), workspace=h.empty((nbytes // 4,)) if nbytes else None, **options,
        )  # fmt: skip
        h.run(launches, max_rows)
        return h.get(out)

    def expected(self, q, rows, *, window=0, softcap=0.0, sinks=None, windows=None) -> np.ndarray:
        """What rows should come to, by the reference and what the cache holds."""
        results = [
            plain.reference(
                mx.array(row), mx.array(self.keys[s]), mx.array(self.values[s]), p, self.dims[0] ** -0.5, window, softcap,
                None if sinks is None else mx.array(sinks), *(windows[s] if windows else ()),
            )
            for row, (s, p) in zip(q, rows, strict=True)
        ]  # fmt: skip
        return np.stack([np.array(result) for result in results])
