"""The host device's cases of linear: a layer's linears and the head with the norms and epilogues that plans give them."""

from __future__ import annotations

import functools

from metalstep.bench.host_cases import HostCase
from metalstep.bench.host_inputs import HostInputs
from metalstep.kernels import linear, params, rms_norm
from metalstep.kernels.gpu.bench_case import ACTIVATION_BYTES, EPS, BenchSizes
from metalstep.kernels.launch import Launch
from metalstep.kernels.linear import Input, Segment
from metalstep.kernels.program import Program

NORMED = ("qkv", "gate_up", "head")  # read the normed stream
ADDED = ("o", "down")  # are added to it


def outputs(sizes: BenchSizes) -> dict[str, tuple[list[int], int]]:
    """Rows of each weight of a case, and its k."""
    hidden, wide, heads = sizes.hidden_size, sizes.intermediate_size, sizes.num_q_heads * sizes.head_dim
    kv = sizes.num_kv_heads * sizes.head_dim
    return {
        "qkv": ([heads, kv, kv], hidden),
        "o": ([hidden], heads),
        "gate_up": ([wide, wide], hidden),
        "down": ([hidden], wide),
        "head": ([sizes.vocab_size], hidden),
    }


def bench_cases(sizes: BenchSizes, arithmetic: str) -> list[HostCase]:
    cases = []
    for name, (widths, k) in outputs(sizes).items():
        dense = sizes.bits == 16 or k % sizes.group_size != 0
        for rows in sizes.sampled_rows if name == "head" else sizes.rows:
            weights, macs = sum(sizes.weight_bytes(n, k) for n in widths), rows * k * sum(widths)
            written = widths[0] if name == "gate_up" else sum(widths)
            activations = rows * (k + written * (2 if name in ADDED else 1)) * ACTIVATION_BYTES
            made = functools.partial(_launches, sizes, name, widths, k, rows, arithmetic)
            kind = "fp32" if dense else arithmetic
            cases.append(HostCase("linear", name, rows, 0, weights + activations, macs, made, weights, macs, kind))
    return cases


def _launches(sizes: BenchSizes, name: str, widths: list[int], k: int, rows: int, arithmetic: str, inputs: HostInputs) -> list[Launch]:
    weights = [inputs.packed(n, k) for n in widths]
    grouped = [weights] if name == "gate_up" else [[weight] for weight in weights]
    slot = linear.first_buffer_slot(grouped)
    buffers = [inputs.activation(f"out {i}", (rows, group[0].n)) for i, group in enumerate(grouped)]
    segments = []
    for i, group in enumerate(grouped):
        program, n = Program(epilogue=True), group[0].n
        products = [program.register(n) for _ in group]
        result = products[0]
        if name == "gate_up":
            sigmoid, silu, result = (program.register(n) for _ in range(3))
            program.emit(params.MS_OP_SIGMOID, sigmoid, products[0], n=n)
            program.emit(params.MS_OP_MUL, silu, products[0], sigmoid, n=n)
            program.emit(params.MS_OP_MUL, result, silu, products[1], n=n)
        if name in ADDED:
            residual, result = program.load(slot + 1, n, rows=params.MS_ROW_SELF, row_stride=n), program.register(n)
            program.emit(params.MS_OP_ADD, result, residual, products[0], n=n)
            buffers.append(inputs.activation("residual", (rows, n)))
        program.store(result, slot + i, row_stride=n)
        segments.append(Segment(group, program))
    sampled = name == "head"
    step = inputs.step(rows, sampling={}) if sampled else inputs.step(rows)
    own = params.MS_ROW_SAMPLED if sampled else params.MS_ROW_SELF
    x = Input(inputs.activation("x", (rows, k)), 0, k, own)
    if name in NORMED:
        prologue = Program()
        assert x.buffer is not None
        buffers += [x.buffer, inputs.activation("norm", (k,))]
        row = prologue.load(slot + len(buffers) - 2, k, rows=own, row_stride=k)
        weight = prologue.load(slot + len(buffers) - 1, k, rows=params.MS_ROW_SAME)
        x = Input(None, prologue=prologue, result=rms_norm.emit(prologue, row, weight, EPS, k))
    kind = params.MS_ROWS_SAMPLED if sampled else params.MS_ROWS_TOKENS
    return linear.launches(x, segments, step, buffers, kind, rows, arithmetic)
