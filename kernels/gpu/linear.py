"""Linear on GPUs: epilogue(x · Wᵀ) for one or several weights that read the same x, one generated kernel per set of formats.

Three variants by how many rows a plan holds: a matvec reads each weight once for up to four rows; two shapes of tiles multiply 8x8
matrices. Sizes, offsets and strides are parameters: layers that differ in them alone share a kernel.
"""
from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from metalstep.kernels import params
from metalstep.kernels.gpu.bench_case import ACTIVATION_BYTES, EPS, BenchCase, BenchSizes, Inputs
from metalstep.kernels.gpu.linear_text import (
    SIMD_WIDTH,
    TYPES,
    Format,
    Kernel,
    Path,
    accesses_of,
    epilogue_of,
    row_stride,
)
from metalstep.kernels.gpu.linear_tuning import TUNING, Matvec, Tiles, Tuning, geometry
from metalstep.kernels.launch import Buffer, KernelCode, Launch
from metalstep.kernels.linear import FLOATS, Input, Norm, PackedWeight, Segment, first_buffer_slot
from metalstep.kernels.program import Program
from metalstep.kernels.step import StepBuffers

MATVEC_ROWS = 4  # rows of x that a matvec multiplies at a time
ELEMENT_BYTES = {"float": 4, "half": 2, "bfloat": 2}


def launches(
    x: Input,
    segments: Sequence[Segment],
    step: StepBuffers,
    buffers: Sequence[Buffer],
    rows: int,
    max_rows: int,
    *,
    invariant: bool = False,
    kind: str = "apple",
) -> list[Launch]:
    """One launch for all segments.

    x: float32 rows of a buffer, normed first with x.norm. buffers: what slots from `first_buffer_slot` on name, for the epilogues;
    they load and store any ms_dtype. rows: ms_rows; max_rows: as many as a step of the plan has at most. kind: of device, in TUNING.
    invariant: a row's result has the same bits in any batch and any plan (else: in any batch of plans with the same variant).
    Raises: ValueError for weights of one launch whose k differ, of one segment whose n differ, or in a format or place that no
    kernel reads; NotImplementedError for a prologue, an instruction that is not elementwise, or more buffers than Metal binds.
    """
    k = _check(x, segments)
    outputs = sum(weight.n for segment in segments for weight in segment.weights)
    shape = geometry(outputs, max_rows, invariant=invariant, kind=kind)
    paths = _paths(segments, shape, TUNING[kind])
    kernel = Kernel(x, segments, step, buffers, rows, shape, min(max_rows, MATVEC_ROWS), paths)
    text = kernel.text()
    # A digest of the text names the kernel: equal texts are one kernel, whatever they were made from.
    name = f"{kernel.family}_{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    tiles = 0
    packed: list[bytes] = []
    accesses: list[bytes] = []
    for path in paths:
        for segment in (segments[index] for index in path.segments):
            n = segment.weights[0].n
            packed.append(params.pack("MSGpuLinearSegment", first_tile=tiles, n=n, first_access=len(accesses)))
            accesses += [
                params.pack("MSGpuLinearAccess", offset=i.get("offset", 0), row_stride=row_stride(i)) for i in accesses_of(segment)
            ]
            tiles += -(-n // kernel.tile_columns(path))
    head = params.pack(
        "MSGpuLinearParams",
        k=k,
        x_offset=x.offset,
        x_row_stride=0 if x.rows == params.MS_ROW_SAME else x.row_stride,
        eps=x.norm.eps if x.norm else 0.0,
    )
    return [
        Launch(
            name,
            kernel.bindings.buffers,
            b"".join([head, *packed, *accesses]),
            grid=(tiles, -(-max_rows // kernel.tile_rows), 1),
            threads=(kernel.threads, 1, 1),
            code=KernelCode((kernel.family,), text.replace("KERNEL_NAME", name)),
        )
    ]


def _check(x: Input, segments: Sequence[Segment]) -> int:
    """k, where everything fits."""
    if x.prologue is not None or x.buffer is None:
        raise NotImplementedError("linear: a GPU runs no prologue; give x as rows of a buffer, with x.norm for a norm of them")
    weights = [weight for segment in segments for weight in segment.weights]
    if not weights:
        raise ValueError("linear: no weights; expected at least one segment with one weight")
    k = weights[0].k
    for weight in weights:
        if weight.k != k:
            raise ValueError(f"linear: weights of one launch have k = {k} and {weight.k}; they must read the same input")
    for segment in segments:
        if len({weight.n for weight in segment.weights}) != 1:
            raise ValueError(f"linear: weights of one segment have n = {[w.n for w in segment.weights]}; they must agree")
    for what, buffer in (("x", x.buffer), ("the norm's weight", x.norm.weight if x.norm else None)):
        if buffer is not None and (buffer.dtype != "float32" or buffer.offset % 4):
            raise ValueError(f"linear: {what} is {buffer.dtype} at byte {buffer.offset}, expected float32 at a multiple of 4")
    return k


def _format(weight: PackedWeight, choices: dict[int, Sequence[int]], lanes: int) -> Format:
    """lanes: that read side by side along k. The more values each has, the wider are the reads, and the fewer lanes have work: of the
    choices the widest that leaves none idle, or else the widest of which there is enough for all."""
    dense = weight.bits >= 16
    known = weight.dtype in (params.MS_FLOAT32, params.MS_FLOAT16, params.MS_BFLOAT16)
    floats = (weight.bits, weight.group_size, weight.dtype) in FLOATS.values()
    if floats and weight.k % weight.group_size == 0:
        return _floats_format(weight, [v for v in choices[weight.bits] if weight.group_size % v == 0], lanes)
    fits = (
        weight.group_size == 0 and weight.bits == (32 if weight.dtype == params.MS_FLOAT32 else 16)
        if dense
        else weight.group_size in (32, 64, 128) and weight.k % weight.group_size == 0 and weight.bits in choices
    )
    if not fits or not known:
        raise ValueError(
            f"linear: no kernel reads a weight of k={weight.k}, bits={weight.bits}, group_size={weight.group_size},"
            f" dtype={weight.dtype}; expected 1, 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128 that divide k, {', '.join(FLOATS)}, or"
            " dense elements"
        )
    scalar = TYPES[weight.dtype]
    values = _values(weight.k, choices[weight.bits], lanes)
    if dense:
        _require_place(weight.buffer, ELEMENT_BYTES[scalar], "elements")
        wide = weight.buffer.offset % (4 * ELEMENT_BYTES[scalar]) == 0 and weight.k % 4 == 0
        return Format(f"ms_dense<{scalar}, {4 if wide else 1}>", (scalar,), values, weight.k % values == 0)
    if weight.scales is None or weight.biases is None:
        raise ValueError(f"linear: a weight of {weight.bits} bits without scales or biases; a GPU reads them from buffers of their own")
    _require_place(weight.buffer, 4, "words")
    for plane in (weight.scales, weight.biases):
        _require_place(plane, ELEMENT_BYTES[scalar], "scales or biases")
    text = f"ms_affine<{weight.bits}, {weight.group_size}, {scalar}, {_align(weight)}>"
    return Format(text, ("uint", scalar, scalar), values, True)


def _floats_format(weight: PackedWeight, choices: Sequence[int], lanes: int) -> Format:
    if weight.scales is None:
        raise ValueError(f"linear: a weight of {weight.bits}-bit floats without scales; a GPU reads them from a buffer of their own")
    _require_place(weight.buffer, 4, "words")
    values = _values(weight.k, choices, lanes)
    return Format(f"ms_floats<{weight.bits}, {weight.group_size}, {_align(weight)}>", ("uint", "uchar"), values, weight.k % values == 0)


def _values(k: int, choices: Sequence[int], lanes: int) -> int:
    return next((v for v in choices if k % (v * lanes) == 0), next((v for v in choices if v * lanes <= k), choices[-1]))


def _align(weight: PackedWeight) -> int:
    """Words at a multiple of which each row starts."""
    row_words = weight.k * weight.bits // 32
    return next(a for a in (4, 2, 1) if weight.buffer.offset % (4 * a) == 0 and row_words % a == 0)


def _require_place(buffer: Buffer, size: int, what: str) -> None:
    if buffer.offset % size:
        raise ValueError(f"linear: a weight's {what} start at byte {buffer.offset} of their buffer, expected a multiple of {size}")


def _paths(segments: Sequence[Segment], shape: Matvec | Tiles, tuning: Tuning) -> list[Path]:
    choices = tuning.matvec_values if isinstance(shape, Matvec) else tuning.tile_values
    lanes = shape.splits * (SIMD_WIDTH if isinstance(shape, Matvec) else 4)
    paths: dict[tuple[Any, ...], Path] = {}
    for number, segment in enumerate(segments):
        formats = tuple(_format(weight, choices, lanes) for weight in segment.weights)
        epilogue = epilogue_of(segment)
        paths.setdefault((formats, epilogue), Path(formats, epilogue, [])).segments.append(number)
    return list(paths.values())


def bench_cases(sizes: BenchSizes) -> list[BenchCase]:
    """A layer's linears and the head, as plans have them: few rows are normed inside, silu(gate) * up, residuals added at the end."""
    hidden, wide, heads = sizes.hidden_size, sizes.intermediate_size, sizes.num_q_heads * sizes.head_dim
    kv = sizes.num_kv_heads * sizes.head_dim
    kinds = {"qkv": ([heads, kv, kv], hidden), "o": ([hidden], heads), "gate_up": ([wide, wide], hidden), "down": ([hidden], wide)}
    cases = []
    for name, (outputs, k), rows in [
        *((name, kind, rows) for name, kind in kinds.items() for rows in sizes.rows),
        *(("head", ([sizes.vocab_size], hidden), rows) for rows in sizes.sampled_rows),
    ]:
        weights = sum(sizes.weight_bytes(n, k) for n in outputs)
        written = outputs[0] if name == "gate_up" else sum(outputs)
        activations = rows * (k + written * (2 if name in ("o", "down") else 1)) * ACTIVATION_BYTES
        made = functools.partial(_bench_launches, sizes, name, outputs, k, rows)
        cases.append(BenchCase("linear", name, rows, 0, weights + activations, rows * k * sum(outputs), made))
    return cases


def _bench_launches(sizes: BenchSizes, name: str, outputs: list[int], k: int, rows: int, inputs: Inputs) -> list[Launch]:
    norm = None
    if name in ("qkv", "gate_up", "head") and rows <= sizes.norm_rows:
        norm = Norm(inputs.activation(f"norm {k}", (k,)), EPS)
    x = Input(inputs.activation("x", (rows, k)), 0, k, norm=norm)
    weights = [sizes.packed(inputs, n, k) for n in outputs]
    grouped = [weights] if name == "gate_up" else [[weight] for weight in weights]
    buffers = [inputs.activation(f"out {i}", (rows, group[0].n)) for i, group in enumerate(grouped)]
    slot, segments = first_buffer_slot(grouped), []
    for i, group in enumerate(grouped):
        program, n = Program(epilogue=True), group[0].n
        products = [program.register(n) for _ in group]
        result = products[0]
        if name == "gate_up":
            sigmoid, silu, result = (program.register(n) for _ in range(3))
            program.emit(params.MS_OP_SIGMOID, sigmoid, products[0], n=n)
            program.emit(params.MS_OP_MUL, silu, products[0], sigmoid, n=n)
            program.emit(params.MS_OP_MUL, result, silu, products[1], n=n)
        if name in ("o", "down"):
            residual, result = program.load(slot + 1, n, rows=params.MS_ROW_SELF, row_stride=n), program.register(n)
            program.emit(params.MS_OP_ADD, result, residual, products[0], n=n)
            buffers.append(inputs.activation("residual", (rows, n)))
        program.store(result, slot + i, row_stride=n)
        segments.append(Segment(group, program))
    if name == "head":
        return launches(x, segments, inputs.step(rows, sampling={}), buffers, params.MS_ROWS_SAMPLED, rows)
    return launches(x, segments, inputs.step(rows), buffers, params.MS_ROWS_TOKENS, rows)
