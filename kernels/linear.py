"""Linear: epilogue(x · Wᵀ) for one or several weights that read the same x, in one launch.

Weights are affine-quantised (1, 2, 3, 4, 5, 6, 8 bits; groups of 32, 64, 128 along k), floats of 4 or 8 bits with a scale of a byte
per group (mxfp4, nvfp4, mxfp8) or dense (float16, bfloat16, float32), packed into panels of 16 rows when the model is loaded. The host
device's arithmetic is near-exact by default: activations as 16-bit integers with a scale per row and group; of dense weights and
8-bit floats it is float32.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.program import Program, Register
from metalstep.kernels.step import StepBuffers

PANEL = 16  # rows of a weight in a panel
THREADS = 256
FLOATS = {  # MLX's modes of floats: bits, group size and ms_dtype of scales, by which a weight is told from others
    "mxfp4": (4, 32, params.MS_E8M0),
    "nvfp4": (4, 16, params.MS_E4M3),
    "mxfp8": (8, 32, params.MS_E8M0),
}
ARITHMETIC = {"int16": params.MS_ARITHMETIC_INT16, "int8": params.MS_ARITHMETIC_INT8}


@dataclass(frozen=True)
class PackedWeight:
    """A weight on the device. n outputs, k inputs; bits 16 or 32 and group_size 0 when dense; dtype (ms_dtype) of the
    scales and biases, or of the dense elements.

    buffer: on the host device all of it in panels; on a GPU the words [n, k * bits / 32] as MLX has them (or the dense elements
    [n, k]), with scales and biases [n, k / group_size] of their own; weights of FLOATS have no biases.
    """

    buffer: Buffer
    n: int
    k: int
    bits: int
    group_size: int
    dtype: int
    scales: Buffer | None = None
    biases: Buffer | None = None

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self.buffer, self.scales, self.biases) if buffer is not None)


@dataclass(frozen=True)
class Norm:
    """x / rms(x) * weight: weight float32 [k] or None, eps added to the mean square."""

    weight: Buffer | None
    eps: float


@dataclass(frozen=True)
class Input:
    """Where a linear reads its rows: a register of its prologue, or float32 rows of a buffer (on a GPU normed, with `norm`)."""

    buffer: Buffer | None
    offset: int = 0  # elements
    row_stride: int = 0  # elements
    rows: int = params.MS_ROW_SELF  # ms_row_address
    prologue: Program | None = None
    result: Register | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Segment:
    """One epilogue and the weights it reads: their products are registers 0, 1, … of `epilogue`, all of the same n."""

    weights: Sequence[PackedWeight]
    epilogue: Program


def reference(
    x: mx.array,
    weight: mx.array,
    bits: int,
    group_size: int,
    scales: mx.array | None,
    biases: mx.array | None,
    mode: str = "affine",
) -> mx.array:
    """x [rows, k] float32 times the dequantised weight [n, k], in float32; `bits` 16 or 32 means a dense weight. mode: MLX's."""
    if mode != "affine":
        assert scales is not None
        weight = mx.dequantize(weight, scales, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)
    elif bits < 16:
        assert scales is not None and biases is not None
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)
    return x.astype(mx.float32) @ weight.astype(mx.float32).T


def first_buffer_slot(segments: Sequence[Sequence[PackedWeight]]) -> int:
    """The slot of the first buffer behind the step's and the weights' of these segments."""
    return int(params.MS_SLOT_FIRST) + sum(len(weights) for weights in segments)


def launches(
    x: Input, segments: Sequence[Segment], step: StepBuffers, buffers: Sequence[Buffer], rows: int, max_rows: int, arithmetic: str
) -> list[Launch]:
    """One launch for all segments.

    buffers: what slots from `first_buffer_slot` on name, for the prologue and the epilogues. rows: ms_rows. arithmetic: "int16"
    (near-exact) or "int8"; dense weights always use float32.
    Raises: ValueError for weights of one launch whose k differ, or of one segment whose n differ.
    """
    weights = [weight for segment in segments for weight in segment.weights]
    k = weights[0].k
    for weight in weights:
        if weight.k != k:
            raise ValueError(f"linear: weights of one launch have k = {k} and {weight.k}; they must read the same input")
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"linear: arithmetic {arithmetic!r} is unknown; expected one of {sorted(ARITHMETIC)}")
    parts = [
        params.pack(
            "MSLinearPart",
            slot=params.MS_SLOT_FIRST + i,
            n=w.n,
            bits=w.bits,
            group_size=w.group_size,
            dtype=w.dtype,
        )
        for i, w in enumerate(weights)
    ]
    packed_segments, first_part, first_instr = [], 0, 0
    for segment in segments:
        if len({weight.n for weight in segment.weights}) != 1:
            raise ValueError(f"linear: weights of one segment have n = {[w.n for w in segment.weights]}; they must agree")
        packed_segments.append(
            params.pack(
                "MSLinearSegment",
                first_part=first_part,
                parts=len(segment.weights),
                first_instr=first_instr,
                instrs=len(segment.epilogue.instructions),
                registers=segment.epilogue.registers,
            )
        )
        first_part += len(segment.weights)
        first_instr += len(segment.epilogue.instructions)
    prologue = x.prologue or Program()
    bindings = [*step.program_slots(), *(weight.buffer for weight in weights), *buffers]
    if x.buffer is not None:
        bindings.append(x.buffer)
    head = params.pack(
        "MSLinearParams",
        rows=rows,
        k=k,
        parts=len(parts),
        segments=len(segments),
        prologue=len(prologue.instructions),
        prologue_result=x.result.start if x.result else 0,
        registers=prologue.registers,
        x_slot=len(bindings) - 1,
        x_rows=x.rows,
        x_offset=x.offset,
        x_row_stride=x.row_stride,
        arithmetic=ARITHMETIC[arithmetic],
    )
    programs = prologue.constants() + b"".join(segment.epilogue.constants() for segment in segments)
    panels = sum(-(-weight.n // PANEL) for weight in weights)
    constants = b"".join([head, *parts, *packed_segments, programs])
    return [Launch("linear", bindings, constants, grid=(panels, max_rows, 1), threads=(THREADS, 1, 1))]
