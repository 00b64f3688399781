"""What `metalstep bench kernels` measures on the host device: each op by its base name, on the sizes of a shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metalstep.bench.host_inputs import HostInputs
from metalstep.kernels import embedding, kv_write, params, rms_norm, rope, row_program, sample, step_advance, step_load
from metalstep.kernels.gpu import step_advance as gpu_step_advance
from metalstep.kernels.gpu import step_load as gpu_step_load
from metalstep.kernels.gpu.bench_case import ACTIVATION_BYTES, EPS, BenchCase, BenchSizes
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.program import Program, Register

PREFILL_FROM = 8  # rows from which on a step of one prompt is measured


@dataclass(frozen=True)
class HostCase(BenchCase):
    """streamed: of nbytes, what lies in memory (weights and caches, of which copies take turns); the rest may lie in a cache.

    macs: multiply-adds; arithmetic: fp32, int16 or int8, which limits them, or None where the processor's limit is not known by one of
    these. codec: of the KV cache, where there is one.
    """

    streamed: int = 0
    macs: int = 0
    arithmetic: str | None = None
    codec: str | None = None


def bench_cases(sizes: BenchSizes, ops: Sequence[str], codecs: Sequence[str], arithmetic: str) -> list[HostCase]:
    """The cases of `ops`, in order. codecs: of the KV cache, of keys and values alike; arithmetic: of quantised weights."""
    from metalstep.bench import host_attention, host_linear

    makers: dict[str, Callable[[], list[HostCase]]] = {
        "linear": lambda: host_linear.bench_cases(sizes, arithmetic),
        "embedding": lambda: _row_cases(sizes, "embedding", "rows", sizes.weight_bytes(1, sizes.hidden_size), 4 * sizes.hidden_size),
        "attention": lambda: host_attention.bench_cases(sizes, codecs),
        "kv_write": lambda: [case for codec in codecs for case in _cache_cases(sizes, "kv_write", codec)],
        "rms_norm": lambda: _row_cases(sizes, "rms_norm", "hidden", 0, 8 * sizes.hidden_size),
        "rope": lambda: _row_cases(sizes, "rope", "q", 0, 4 * (2 * sizes.num_q_heads * sizes.head_dim + sizes.rope_dims)),
        "row_program": lambda: [case for codec in codecs for case in _cache_cases(sizes, "row_program", codec)],
        "sample": lambda: _sample_cases(sizes),
        "step_advance": lambda: _of_gpu(sizes, gpu_step_advance.bench_cases(sizes)),
        "step_load": lambda: _of_gpu(sizes, gpu_step_load.bench_cases(sizes)),
    }
    return [case for op in ops for case in makers[op]()]


OPS = ("linear", "embedding", "attention", "kv_write", "rms_norm", "rope", "row_program", "sample", "step_advance", "step_load")


def vector_bytes(sizes: BenchSizes, codec: str) -> int:
    """Of a position's keys and values in one layer."""
    return 2 * sizes.num_kv_heads * KVCodec(codec).vector_bytes(sizes.head_dim)


def variant(name: str, codec: str, plain: str) -> str:
    """A case's name; a codec that is not the plain one is named."""
    return name if codec == plain else f"{name}-{codec}"


def _row_cases(sizes: BenchSizes, op: str, name: str, streamed: int, cached: int) -> list[HostCase]:
    """streamed, cached: bytes of a row."""
    made = functools.partial(_row_launches, sizes, op, "float16")
    return [
        HostCase(op, name, rows, 0, rows * (streamed + cached), rows * sizes.hidden_size, functools.partial(made, rows), rows * streamed)
        for rows in sizes.rows
    ]


def _cache_cases(sizes: BenchSizes, op: str, codec: str) -> list[HostCase]:
    """kv_write alone, or the row program that has norms and rotations of queries and keys before it."""
    q, kv = sizes.num_q_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    moved = 2 * kv if op == "kv_write" else 2 * q + 2 * kv + sizes.rope_dims
    name, written = variant("cache" if op == "kv_write" else "norm_rope_cache", codec, sizes.kv_dtype), vector_bytes(sizes, codec)
    return [
        HostCase(op, name, rows, 0, rows * (ACTIVATION_BYTES * moved + written), rows * moved,
                 functools.partial(_row_launches, sizes, op, codec, rows), rows * written, codec=codec)
        for rows in sizes.rows
    ]  # fmt: skip


def _row_launches(sizes: BenchSizes, op: str, codec_name: str, rows: int, inputs: HostInputs) -> list[Launch]:
    program, buffers, first = Program(), [], int(params.MS_SLOT_FIRST)
    dim, q, kv = sizes.head_dim, sizes.num_q_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim

    def slot(buffer: Buffer) -> int:
        buffers.append(buffer)
        return first + len(buffers) - 1

    def rows_of(name: str, size: int) -> Register:
        return program.load(slot(inputs.activation(name, (rows, size))), size, rows=params.MS_ROW_SELF, row_stride=size)

    def normed(name: str, size: int, width: int) -> Register:
        weight = program.load(slot(inputs.activation(f"norm {name}", (width,))), width, rows=params.MS_ROW_SAME)
        return rms_norm.emit(program, rows_of(name, size), weight, EPS, width)

    def heads(name: str, size: int) -> Register:
        return normed(name, size, dim) if sizes.head_norms else rows_of(name, size)

    step, out = inputs.step(rows), None
    if op == "embedding":
        table = inputs.packed(sizes.vocab_size, sizes.hidden_size)
        facts = (sizes.hidden_size, table.n, table.bits, table.group_size, table.dtype)
        out = embedding.emit(program, slot(table.buffer), *facts, slot(step.embeddings))
    elif op == "rms_norm":
        out = normed("x", sizes.hidden_size, sizes.hidden_size)
    elif op == "rope":
        out = rope.emit(program, rows_of("q", q), rows_of("angles", sizes.rope_dims), dim, traditional=False)
    else:
        keys = rows_of("k", kv) if op == "kv_write" else None
        if keys is None:
            angles = rows_of("angles", sizes.rope_dims)
            out = rope.emit(program, heads("q", q), angles, dim, traditional=False)
            keys = rope.emit(program, heads("k", kv), angles, dim, traditional=False)
        codec = KVCodec(codec_name)
        k_plane, v_plane = inputs.planes(codec, rows, 1)
        scales = [codec.scales_at(plane.nbytes, dim) for plane in (k_plane, v_plane)]
        values = rows_of("v", kv)
        kv_write.emit(
            program, keys, values, slot(k_plane), slot(v_plane), sizes.num_kv_heads, sizes.block_size, codec, codec, *scales
        )  # fmt: skip
    if out is not None:
        program.store(out, slot(inputs.activation("out", (rows, out.size))), row_stride=out.size)
    return row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, rows)


def _sample_cases(sizes: BenchSizes) -> list[HostCase]:
    """Rows that are all greedy, or all filtered as chats are."""
    kinds: dict[str, dict[str, Any]] = {"greedy": {}, "filtered": SAMPLED}
    return [
        HostCase("sample", name, rows, 0, 4 * rows * sizes.vocab_size, rows * sizes.vocab_size,
                 functools.partial(_sample_launches, sizes.vocab_size, rows, fields))
        for name, fields in kinds.items() for rows in sizes.sampled_rows
    ]  # fmt: skip


SAMPLED = dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)


def _sample_launches(vocab_size: int, rows: int, fields: dict[str, float], inputs: HostInputs) -> list[Launch]:
    logits, step = inputs.activation("logits", (rows, vocab_size)), inputs.step(rows, sampling=fields)
    return sample.launches(logits, step, vocab_size=vocab_size, max_rows=rows, max_top=0, history_stride=1)


def _of_gpu(sizes: BenchSizes, cases: Sequence[BenchCase]) -> list[HostCase]:
    """The GPU's cases of an op that differs in its launches alone."""
    return [
        HostCase(case.op, case.case, case.rows, case.context, case.nbytes, case.work,
                 functools.partial(_step_launches, sizes, case.op, case.rows, case.work))
        for case in cases
    ]  # fmt: skip


def _step_launches(sizes: BenchSizes, op: str, rows: int, words: int, inputs: HostInputs) -> list[Launch]:
    if op == "step_advance":
        return step_advance.launches(inputs.step(rows, sampling={}), block_size=sizes.block_size, max_rows=rows)
    stage = inputs.activation("stage", (words + rows,), "int32")
    sampled = inputs.activation("sampled", (16 * params.size("MSSampled"),), "uint8")
    region = inputs.activation("region", (words,), "int32")
    return step_load.launches(stage, sampled, region, words=words, tokens_first=params.size("MSStep") // step_load.WORD, max_tokens=rows)
