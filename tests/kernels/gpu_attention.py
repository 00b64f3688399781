"""Sequences in a paged cache on a GPU, what rows of a step attend to there, and what they should."""
from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from gpu_harness import GpuHarness

from metalstep.kernels import attention as plain
from metalstep.kernels import params, turboquant
from metalstep.kernels.gpu import attention
from metalstep.kernels.kv_codec import KVCodec
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
        self.place(rng)
        self.fill(rng)
        for s, n in enumerate(lengths):
            self.write(s, range(n))

    def place(self, rng: np.random.Generator) -> None:
        """Blocks for the sequences."""
        counts = [-(-n // self.block) for n in self.lengths]
        order = iter(rng.permutation(sum(counts) + 1))
        self.tables = np.zeros((len(self.lengths), max(counts)), np.int32)
        for row, count in zip(self.tables, counts, strict=True):
            row[:count] = [next(order) for _ in range(count)]
        self.spare = next(order)
        for row, count in zip(self.tables, counts, strict=True):
            row[count:] = self.spare
        self.blocks = sum(counts) + 1

    def fill(self, rng: np.random.Generator) -> None:
        """Planes of NaN, and what is to be written to them."""
        h, dtype = self.h, self.dtype
        self.codecs = (KVCodec(dtype), KVCodec(dtype))
        poison = [np.full((self.blocks, self.heads, self.block, dim), np.nan, np.float32) for dim in self.dims]
        self.k_plane, self.v_plane = (h.put(stored(plane, dtype), dtype) for plane in poison)
        draws = [[rng.standard_normal((self.heads, n, dim)).astype(np.float32) for n in self.lengths] for dim in self.dims]
        self.keys, self.values = self.drawn = [[loaded(stored(a, dtype), dtype) for a in arrays] for arrays in draws]

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
        out_dtype: str = "float32",
        **options,
    ) -> np.ndarray:
        """[max_rows, q heads, value_dim] of rows (sequence, position); windows: (window, keep) of each sequence."""
        h, (head_dim, value_dim), max_rows = self.h, self.dims, max_rows or len(rows)
        heads = num_q_heads or q.shape[1]
        out = h.put(np.full((max_rows, heads, value_dim), np.nan, out_dtype))
        nbytes = attention.workspace_bytes(heads, value_dim, max_rows, splits)
        launches = attention.launches(
            q if isinstance(q, Buffer) else h.put(q), q_offset, q_row_stride or heads * head_dim, self.k_plane, self.v_plane, out,
            self.step(rows, windows, slots), num_q_heads=heads, num_kv_heads=self.heads, head_dim=head_dim, value_dim=value_dim,
            block_size=self.block, k_codec=self.codecs[0], v_codec=self.codecs[1], scale=head_dim**-0.5, max_rows=max_rows, splits=splits,
            sinks=None if sinks is None else h.put(sinks), workspace=h.empty((nbytes // 4,)) if nbytes else None, **options,
        )  # fmt: skip
        h.run(launches, max_rows)
        return h.get(out, out_dtype)

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


def vectors(codec: KVCodec, plane: np.ndarray, shape: tuple[int, int, int], dim: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Views of a plane's bytes, of (blocks, kv heads, block size): vectors [.., codes], and scales as ms_kv_codec has them."""
    blocks, heads, block = shape
    if codec.is_float:
        return plane.view(np.uint16 if codec.name == "bfloat16" else codec.name).reshape(*shape, dim), None
    scales_at = 4 * codec.scales_at(plane.nbytes, dim)
    codes = plane[:scales_at].view(np.uint32).reshape(*shape, codec.words(dim))
    scales = plane[scales_at:].view(codec.norm_dtype if codec.is_turbo else np.float16)
    return codes, scales.reshape(shape if codec.is_turbo else (blocks, heads, codec.groups(dim), 2, block))


class PackedCache(Cache):
    """As Cache, of any codecs. What is not a sequence's has codes of ones and scales of NaN. keys, values: as the cache holds them,
    decoded; drawn: before; packed: codes and scales of each sequence [kv heads, length, ..]."""

    def __init__(
        self,
        h: GpuHarness,
        rng: np.random.Generator,
        lengths: Sequence[int],
        k_codec: KVCodec,
        v_codec: KVCodec,
        size: float = 1,
        **options,
    ):
        """size: of the vectors' elements."""
        self.codecs, self.size = (k_codec, v_codec), size
        super().__init__(h, rng, lengths, **options)

    def fill(self, rng: np.random.Generator) -> None:
        planes, self.drawn, self.packed, decoded = [], [], [], []
        for seed, codec, dim in zip((turboquant.K_SEED, turboquant.V_SEED), self.codecs, self.dims, strict=True):
            nbytes = self.blocks * self.heads * self.block * codec.vector_bytes(dim)
            ones = np.full(nbytes, 0xFF, np.uint8)  # a NaN, of any float
            dtype = codec.name if codec.is_float else "uint8"
            shape = (self.blocks, self.heads, self.block, dim) if codec.is_float else (nbytes,)
            planes.append(Buffer(self.h.put(ones).handle, 0, shape, dtype))
            # Unlike normal ones these vectors have a mean, and some elements beyond the others.
            spread = np.where(rng.random(dim) < 0.05, 3, 1)
            draws = [self.size * (0.3 + spread * rng.standard_normal((self.heads, n, dim))).astype(np.float32) for n in self.lengths]
            self.drawn.append(draws)
            self.packed.append([turboquant.encode(x, codec, seed) for x in draws])
            decoded.append([turboquant.decode(*parts, codec, dim, seed) for parts in self.packed[-1]])
        (self.k_plane, self.v_plane), (self.keys, self.values) = planes, decoded

    def move(self, rng: np.random.Generator) -> None:
        """The sequences to other blocks."""
        self.place(rng)
        for plane in (self.k_plane, self.v_plane):
            self.h.device.numpy(plane, np.uint8, (plane.nbytes,))[...] = 0xFF
        for s, n in enumerate(self.lengths):
            self.write(s, range(n))

    def views(self, which: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Of the keys' plane (0) or the values' (1): `vectors`."""
        codec, plane = self.codecs[which], (self.k_plane, self.v_plane)[which]
        memory = self.h.device.numpy(plane, np.uint8, (plane.nbytes,))
        return vectors(codec, memory, (self.blocks, self.heads, self.block), self.dims[which])

    def write(self, s: int, positions: Sequence[int]) -> None:
        for which in range(2):
            (codes, scales), (all_codes, all_scales) = self.packed[which][s], self.views(which)
            for p in positions:
                block, place = self.tables[s, p // self.block], p % self.block
                all_codes[block, :, place] = codes[:, p].view(all_codes.dtype)
                if all_scales is not None:
                    all_scales[block, ..., place] = scales[:, p, 0] if self.codecs[which].is_turbo else scales[:, p]

    def read(self, which: int, slot: int) -> np.ndarray:
        """The keys or values [kv heads, dim] in a slot, decoded."""
        codec, (codes, scales) = self.codecs[which], self.views(which)
        block, place = divmod(slot, self.block)
        own = np.zeros((self.heads, 0), np.float16) if scales is None else scales[block, ..., place]
        own = own[:, None] if codec.is_turbo else own
        seed = (turboquant.K_SEED, turboquant.V_SEED)[which]
        return turboquant.decode(np.ascontiguousarray(codes[block, :, place]).view(np.uint32), own, codec, self.dims[which], seed)

    def spoil(self, which: int, s: int, positions: Sequence[int]) -> None:
        """Keys (0) or values (1) that were not finite."""
        codec, arrays = self.codecs[which], (self.keys, self.values)[which]
        codes, scales = self.packed[which][s]
        for p in positions:
            bad = np.full((self.heads, self.dims[which]), np.nan, np.float32)
            codes[:, p], scales[:, p] = turboquant.encode(bad, codec, 0)
            arrays[s][:, p] = np.nan
        self.write(s, positions)
