"""MLX's own ops for the cases of `metalstep bench kernels`: the same work with the functions that mlx-lm calls, on random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalstep.bench.host_cases import SAMPLED
from metalstep.bench.host_linear import ADDED, NORMED, outputs
from metalstep.bench.statistics import ratio, summary
from metalstep.kernels.gpu.bench_case import EPS, BenchCase, BenchSizes

Copy = Callable[[], list[mx.array]]  # the work of a case once, not evaluated
BASE = 10_000.0
GROUP = 64  # of mlx-lm's quantised cache
MAX_REPEATS = 256  # of the work in one evaluation
MAX_COPIES = 16  # of its inputs


@dataclass(frozen=True)
class MlxOp:
    """MLX's work for a case. ops: what it calls, in words; make: another copy of its inputs and the calls on them."""

    ops: str
    make: Callable[[], Copy]


class MlxRuns:
    """`copies` of an op's inputs, taken in turns. A sample is one evaluation of several of them, on MLX's default device.

    call_s: that a sample should take; one run takes as long as it takes.
    """

    def __init__(self, op: MlxOp, copies: int, call_s: float):
        self._copies = [op.make() for _ in range(copies)]
        self._next = 0
        self.seconds(1)
        self.repeats = max(1, min(MAX_REPEATS, round(call_s / self.seconds(1))))

    def sample(self) -> float:
        """Microseconds of the work once."""
        return self.seconds(self.repeats) / self.repeats * 1e6

    def seconds(self, repeats: int) -> float:
        """Of `repeats` times the work, their graphs' making included."""
        began = time.perf_counter()
        results = []
        for _ in range(repeats):
            results += self._copies[self._next]()
            self._next = (self._next + 1) % len(self._copies)
        mx.eval(results)
        return time.perf_counter() - began


def against_mlx(op: MlxOp | None, samples: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """What a row says of MLX: ops, run_us, and the ratio of speeds, above 1 where metalstep is faster. samples, ours: µs, in pairs."""
    if op is None:
        return {"ops": None, "run_us": None, "ratio": None}
    return {"ops": op.ops, "run_us": summary(samples, best="min"), "ratio": ratio(samples, ours)}


def dtype() -> mx.Dtype:
    """Of activations, scales and caches: float32 on the CPU, where it is the fastest, bfloat16 on a GPU."""
    return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16


def mlx_op(sizes: BenchSizes, case: BenchCase, codec: str | None = None) -> MlxOp | None:
    """MLX's work for `case`, or None where it has no such op. codec: of the KV cache, where it is not a plain one."""
    makers: dict[str, Callable[..., MlxOp | None]] = {
        "linear": _linear, "embedding": _embedding, "attention": _attention, "kv_write": _kv_write, "rms_norm": _rms_norm, "rope": _rope,
        "row_program": _row_program, "sample": _sample,
    }  # fmt: skip
    maker = makers.get(case.op)
    return maker(sizes, case, codec) if maker else None


def _normal(*shape: int) -> mx.array:
    out = mx.random.normal(shape).astype(dtype())
    mx.eval(out)
    return out


def _weight(sizes: BenchSizes, n: int, k: int) -> tuple[Callable[[mx.array], mx.array], str]:
    """x @ W.T for a random weight in the format of the sizes, and the function's name."""
    if sizes.bits == 16 or k % sizes.group_size:
        dense = _normal(n, k)
        return lambda x: x @ dense.T, "matmul"
    w = mx.random.randint(0, 1 << 31, (n, k * sizes.bits // 32)).astype(mx.uint32)
    scales, biases = _normal(n, k // sizes.group_size), _normal(n, k // sizes.group_size)
    mx.eval(w)
    group_size, bits = sizes.group_size, sizes.bits
    return lambda x: mx.quantized_matmul(x, w, scales, biases, True, group_size, bits), "quantized_matmul"


def _linear(sizes: BenchSizes, case: BenchCase, _: str | None) -> MlxOp:
    widths, k = outputs(sizes)[case.case]
    normed = case.case in NORMED and case.rows <= sizes.norm_rows
    swiglu = mx.compile(lambda gate, up: nn.silu(gate) * up, shapeless=True)
    matmul = "matmul" if sizes.bits == 16 or k % sizes.group_size else "quantized_matmul"
    each = f"{len(widths)} × {matmul}" if len(widths) > 1 else matmul
    ops = [*(["fast.rms_norm"] if normed else []), each]
    ops += ["swiglu"] if case.case == "gate_up" else ["add"] if case.case in ADDED else []

    def make() -> Copy:
        weights = [_weight(sizes, n, k)[0] for n in widths]
        x, norm, residual = _normal(case.rows, k), _normal(k), _normal(case.rows, widths[0])

        def run() -> list[mx.array]:
            inputs = mx.fast.rms_norm(x, norm, EPS) if normed else x
            results = [weight(inputs) for weight in weights]
            if case.case == "gate_up":
                return [swiglu(*results)]
            return [residual + results[0]] if case.case in ADDED else results

        return run

    return MlxOp(", ".join(ops), make)


def _embedding(sizes: BenchSizes, case: BenchCase, _: str | None) -> MlxOp:
    n, k = sizes.vocab_size, sizes.hidden_size
    dense = sizes.bits == 16 or bool(k % sizes.group_size)

    def make() -> Copy:
        ids = mx.random.randint(0, n, (case.rows,))
        if dense:
            table = _normal(n, k)
            return lambda: [table[ids]]
        w = mx.random.randint(0, 1 << 31, (n, k * sizes.bits // 32)).astype(mx.uint32)
        scales, biases = _normal(n, k // sizes.group_size), _normal(n, k // sizes.group_size)
        mx.eval(w, ids)
        return lambda: [mx.dequantize(w[ids], scales[ids], biases[ids], group_size=sizes.group_size, bits=sizes.bits)]

    return MlxOp("take" if dense else "take, dequantize", make)


def _attention(sizes: BenchSizes, case: BenchCase, codec: str | None) -> MlxOp | None:
    prompt = not case.case.startswith("decode")
    sequences, length = (1, case.rows) if prompt else (case.rows, 1)
    shape = (sequences, sizes.num_kv_heads, case.context, sizes.head_dim)
    scale = sizes.head_dim**-0.5
    mask: Any = "causal" if prompt else None
    if codec == "affine8" and sizes.head_dim % GROUP == 0:
        from mlx_lm.models.base import quantized_scaled_dot_product_attention

        def quantised() -> Copy:
            q = _normal(sequences, sizes.num_q_heads, length, sizes.head_dim)
            keys, values = (mx.quantize(_normal(*shape), GROUP, 8) for _ in range(2))
            mx.eval(keys, values)
            return lambda: [quantized_scaled_dot_product_attention(q + 0, keys, values, scale, mask, GROUP, 8)]

        return MlxOp("mlx-lm's quantized_scaled_dot_product_attention, 8 bits", quantised)
    if codec not in (None, "float16", "bfloat16", "float32"):
        return None

    def make() -> Copy:
        q, k, v = _normal(sequences, sizes.num_q_heads, length, sizes.head_dim), _normal(*shape), _normal(*shape)
        return lambda: [mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)]

    return MlxOp("fast.scaled_dot_product_attention", make)


def _write(sizes: BenchSizes, rows: int, codec: str | None) -> Callable[[], Callable[[mx.array, mx.array], list[mx.array]]] | None:
    """A cache of `rows` sequences that takes keys and values [rows, num_kv_heads, 1, head_dim], as mlx-lm's caches do."""
    if codec not in (None, "float16", "bfloat16", "float32", "affine8"):
        return None
    if codec == "affine8" and sizes.head_dim % GROUP:
        return None

    def make() -> Callable[[mx.array, mx.array], list[mx.array]]:
        shape = (rows, sizes.num_kv_heads, sizes.block_size, sizes.head_dim)
        planes = [mx.zeros(shape, dtype()) for _ in range(2)]
        caches = [list(mx.quantize(p, GROUP, 8)) if codec == "affine8" else [p] for p in planes]
        mx.eval(caches)

        def run(keys: mx.array, values: mx.array) -> list[mx.array]:
            for cache, new in zip(caches, (keys, values), strict=True):
                parts = mx.quantize(new, GROUP, 8) if codec == "affine8" else [new]
                for plane, part in zip(cache, parts, strict=True):
                    plane[..., 1:2, :] = part
            return [plane for cache in caches for plane in cache]

        return run

    return make


def _kv_write(sizes: BenchSizes, case: BenchCase, codec: str | None) -> MlxOp | None:
    write = _write(sizes, case.rows, codec)
    if write is None:
        return None

    def make() -> Copy:
        run = write()
        keys, values = (_normal(case.rows, sizes.num_kv_heads, 1, sizes.head_dim) for _ in range(2))
        return lambda: run(keys, values)

    return MlxOp("2 × quantize, 6 × slice_update" if codec == "affine8" else "2 × slice_update", make)


def _rms_norm(sizes: BenchSizes, case: BenchCase, _: str | None) -> MlxOp:
    def make() -> Copy:
        x, weight = _normal(case.rows, sizes.hidden_size), _normal(sizes.hidden_size)
        return lambda: [mx.fast.rms_norm(x, weight, EPS)]

    return MlxOp("fast.rms_norm", make)


def _rotated(sizes: BenchSizes, x: mx.array, offsets: mx.array) -> mx.array:
    return mx.fast.rope(x, sizes.rope_dims, traditional=False, base=BASE, scale=1.0, offset=offsets)


def _rope(sizes: BenchSizes, case: BenchCase, _: str | None) -> MlxOp:
    def make() -> Copy:
        x, offsets = _normal(case.rows, sizes.num_q_heads, 1, sizes.head_dim), mx.arange(case.rows)
        return lambda: [_rotated(sizes, x, offsets)]

    return MlxOp("fast.rope, its angles included", make)


def _row_program(sizes: BenchSizes, case: BenchCase, codec: str | None) -> MlxOp | None:
    if not case.case.startswith("norm_rope_cache"):  # the GPU's other cases are ops of their own
        return _rms_norm(sizes, case, codec) if case.case == "rms_norm" else _embedding(sizes, case, codec)
    write = _write(sizes, case.rows, codec)
    if write is None:
        return None

    def make() -> Copy:
        run, offsets, norm = write(), mx.arange(case.rows), _normal(sizes.head_dim)
        q, k, v = (_normal(case.rows, n, 1, sizes.head_dim) for n in (sizes.num_q_heads, sizes.num_kv_heads, sizes.num_kv_heads))

        def one() -> list[mx.array]:
            queries, keys = (mx.fast.rms_norm(x, norm, EPS) if sizes.head_norms else x for x in (q, k))
            return [_rotated(sizes, queries, offsets), *run(_rotated(sizes, keys, offsets), v)]

        return one

    norms = "2 × fast.rms_norm, " if sizes.head_norms else ""
    return MlxOp(f"{norms}2 × fast.rope, {'2 × quantize, 6' if codec == 'affine8' else '2'} × slice_update", make)


def _sample(sizes: BenchSizes, case: BenchCase, _: str | None) -> MlxOp:
    if case.case == "greedy":

        def greedy() -> Copy:
            logits = _normal(case.rows, sizes.vocab_size)
            return lambda: [mx.argmax(logits, axis=-1)]

        return MlxOp("argmax", greedy)
    from mlx_lm.sample_utils import make_sampler

    options: dict[str, Any] = {{"temperature": "temp"}.get(name, name): value for name, value in SAMPLED.items()}

    def make() -> Copy:
        sampler, logits = make_sampler(**options), _normal(case.rows, sizes.vocab_size)
        return lambda: [sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))]

    return MlxOp("logsumexp, mlx-lm's sampler (top_p, min_p, top_k, random.categorical)", make)
