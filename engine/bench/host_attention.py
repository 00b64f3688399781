"""The host device's cases of attention: decode over sequences' contexts, and the last rows of a prompt, in each codec of the cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from metalstep.bench.host_cases import PREFILL_FROM, HostCase, variant, vector_bytes
from metalstep.bench.host_inputs import HostInputs
from metalstep.kernels import attention
from metalstep.kernels.gpu.bench_case import ACTIVATION_BYTES, BenchSizes
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Launch


def bench_cases(sizes: BenchSizes, codecs: Sequence[str]) -> list[HostCase]:
    """decode: as many sequences as rows; prefill: the last rows of one prompt. Packed caches are scored in integers and floats, so that
    neither alone is their limit."""
    q, cases = sizes.num_q_heads * sizes.head_dim, []
    for codec, rows, context in itertools.product(codecs, sizes.rows, sizes.contexts):
        kinds = [("decode", rows, context)] if rows <= sizes.max_sampled else []
        kinds += [("prefill", 1, max(rows, context))] if rows >= PREFILL_FROM else []
        for name, sequences, length in kinds:
            seen = rows * length - (rows - sequences) * (rows // sequences - 1) // 2 if sequences == 1 else rows * length
            streamed = sequences * length * vector_bytes(sizes, codec)
            case = HostCase(
                "attention", variant(name, codec, sizes.kv_dtype), rows, length, streamed + 2 * rows * q * ACTIVATION_BYTES, 2 * seen * q,
                functools.partial(_launches, sizes, codec, rows, sequences, length), streamed, 2 * seen * q,
                "fp32" if KVCodec(codec).is_float else None, codec,
            )  # fmt: skip
            cases.append(case)
    return list({case.name: case for case in cases}.values())


def _launches(sizes: BenchSizes, codec_name: str, rows: int, sequences: int, context: int, inputs: HostInputs) -> list[Launch]:
    dim, width, codec = sizes.head_dim, sizes.num_q_heads * sizes.head_dim, KVCodec(codec_name)
    q, out = inputs.activation("q", (rows, width)), inputs.activation("out", (rows, width))
    return attention.launches(
        q, 0, width, *inputs.planes(codec, sequences, context), out, inputs.step(rows, context=context, sequences=sequences),
        num_q_heads=sizes.num_q_heads, num_kv_heads=sizes.num_kv_heads, head_dim=dim, value_dim=dim, block_size=sizes.block_size,
        k_codec=codec, v_codec=codec, scale=dim**-0.5, max_rows=rows,
    )  # fmt: skip
