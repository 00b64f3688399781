"""Benchmark cases of the GPU kernels as data: each op's bench_cases() says what it is measured on, `metalstep bench kernels` runs them."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from metalstep.kernels import params
from metalstep.kernels.launch import DTYPE_BYTES, Buffer, Launch
from metalstep.kernels.linear import PackedWeight
from metalstep.kernels.step import StepBuffers

ACTIVATION_BYTES = 4  # float32
EPS = 1e-6  # of norms


class Inputs(Protocol):
    """Buffers of random numbers. A case that runs with several copies of its weights calls for all of its buffers once per copy."""

    def weight(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Another one for each call: what a step reads from memory, such as weights and the KV cache. uint32: any bits."""

    def activation(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        """The same one for each call with this name: what the launch before has just written, or scratch memory."""

    def step(self, rows: int, *, context: int = 1, sequences: int = 0, sampling: dict[str, Any] | None = None) -> StepBuffers:
        """The same one for each call: rows of as many sequences, or with `sequences` the newest rows of each of so few.

        context: tokens of a sequence, the rows included; its blocks lie in random order. sampling: fields of each row's MSSampling;
        without it no row is sampled.
        """


@dataclass(frozen=True)
class BenchSizes:
    """What cases are made for. rows: of plans; contexts: tokens of a sequence, its new ones included.

    norm_rows, max_sampled, split_len: as the engine plans: up to how many rows a linear norms its input, rows that are sampled at most,
    positions of a piece of a context. kv_dtype: "float32", "float16" or "bfloat16". Scales, biases and dense weights are bfloat16. kind: of
    the GPU, "apple" or "nvidia".
    """

    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dims: int
    head_norms: bool
    vocab_size: int
    bits: int
    group_size: int
    kv_dtype: str
    block_size: int
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    norm_rows: int
    max_sampled: int
    split_len: int
    kind: str = "apple"

    @property
    def qkv_size(self) -> int:
        return (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def sampled_rows(self) -> list[int]:
        """Rows of plans, each once, as far as they can all be sampled."""
        return sorted({min(rows, self.max_sampled) for rows in self.rows})

    @property
    def position_bytes(self) -> int:
        """Of a position's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.kv_dtype]

    def weight_bytes(self, n: int, k: int) -> int:
        """Of a linear weight as `packed` makes it."""
        return n * k * self.bits // 8 + 4 * n * (k // self.group_size) if self._quantised(k) else 2 * n * k

    def packed(self, inputs: Inputs, n: int, k: int) -> PackedWeight:
        """A weight of `bits` in groups of group_size; dense where k is no multiple of that, as mlx-lm leaves it."""
        if not self._quantised(k):
            return PackedWeight(inputs.weight((n, k), "bfloat16"), n, k, 16, 0, params.MS_BFLOAT16)
        words = inputs.weight((n, k * self.bits // 32), "uint32")
        scales, biases = (inputs.weight((n, k // self.group_size), "bfloat16") for _ in range(2))
        return PackedWeight(words, n, k, self.bits, self.group_size, params.MS_BFLOAT16, scales, biases)

    def _quantised(self, k: int) -> bool:
        return self.bits < 16 and k % self.group_size == 0

    def planes(self, inputs: Inputs, sequences: int, context: int) -> tuple[Buffer, Buffer]:
        """A layer's keys and values of so many sequences."""
        shape = (sequences * -(-context // self.block_size), self.num_kv_heads, self.block_size, self.head_dim)
        return inputs.weight(shape, self.kv_dtype), inputs.weight(shape, self.kv_dtype)


@dataclass(frozen=True)
class BenchCase:
    """One measurement of an op. case: what of it, unique with rows and context; context 0: it has none.

    nbytes: that must be read and written, each once, whatever caches save. work: multiply-adds, or elements where there are none: what a
    simulator's time grows with. launches: what is timed, with buffers from Inputs.
    """

    op: str
    case: str
    rows: int
    context: int
    nbytes: int
    work: int
    launches: Callable[[Inputs], list[Launch]]

    @property
    def name(self) -> str:
        return f"{self.op}-{self.case}-{self.rows}rows" + (f"-{self.context}" if self.context else "")
