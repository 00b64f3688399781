"""Linear on GPUs: epilogue(x · Wᵀ) for one or several weights that read the same x, one generated kernel per set of formats.

What multiplies is a choice of a tuning table: a matvec reads each weight once for up to four rows; tiles multiply 8x8 matrices,
in float or in half precision. Sizes, offsets and strides are parameters: layers that differ in them alone share a kernel.

Accuracy: sums are float32 in all of them, and matvecs and float tiles take x and weights as float32. Half tiles round each element of x
(normed, where they norm) and each weight to float16: a result differs from the exact one by at most 2^-11 * sum(|x| (2 |w| + m)) and what
float32 sums lose, where m is the sum of the magnitudes of what w is made from (scale times code, bias; of floats and dense weights |w|).
Below 2^-14 float16 loses digits: 2^-25 of an element of x, of a scale or of a weight. A finite x, and a finite result that is stored as
float16, stays within its ±65504.
"""
from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from metalstep.kernels import params
from metalstep.kernels.gpu.bench_case import ACTIVATION_BYTES, EPS, BenchCase, BenchSizes, Inputs
from metalstep.kernels.gpu.linear_half_text import HalfKernel
from metalstep.kernels.gpu.linear_matvec_text import MatvecKernel
from metalstep.kernels.gpu.linear_tables import table
from metalstep.kernels.gpu.linear_text import TYPES, Format, Kernel, Path, accesses_of, epilogue_of, row_stride
from metalstep.kernels.gpu.linear_tiles_text import TilesKernel
from metalstep.kernels.gpu.linear_tuning import SIMD_WIDTH, HalfTiles, Matvec, Shape, Tuning
from metalstep.kernels.launch import Buffer, KernelCode, Launch
from metalstep.kernels.linear import FLOATS, Input, Norm, PackedWeight, Segment, first_buffer_slot
from metalstep.kernels.program import Program
from metalstep.kernels.step import StepBuffers

ELEMENT_BYTES = {"float": 4, "half": 2, "bfloat": 2}
X_BYTES = {"float32": 4, "float16": 2}


def launches(
    x: Input,
    segments: Sequence[Segment],
    step: StepBuffers,
    buffers: Sequence[Buffer],
    rows: int,
    max_rows: int,
    *,
    invariant: bool = False,
    tuning: Tuning | None = None,
    planes: int = 1,
    shape: Shape | None = None,
) -> list[Launch]:
    """One launch for all segments.

    x: float32 or float16 rows of a buffer, normed first with x.norm. buffers: what slots from `first_buffer_slot` on name, for the
    epilogues; they load and store any ms_dtype. rows: ms_rows; max_rows: as many as a step of the plan has at most. tuning: the device's
    table; None: the one for Apple's. invariant: a row's result has the same bits in any batch and any plan (else: in any batch of plans
    with the same shape). planes: parts of k, whose sums are left to others to add up: each segment's epilogue is then one STORE of its
    float32 product, and plane p of row r goes to row p * max_rows + r. shape: instead of the table's.
    Raises: ValueError for weights of one launch whose k differ, of one segment whose n differ, or in a format or place that no
    kernel reads, and for planes with another epilogue or of a shape that has none; NotImplementedError for a prologue, an instruction
    that is not elementwise, or more buffers than Metal binds.
    """
    k = _check(x, segments)
    outputs = sum(weight.n for segment in segments for weight in segment.weights)
    tuning = tuning or table("apple")
    if shape is None:
        bits = max(weight.bits for segment in segments for weight in segment.weights)
        shape = tuning.entry(outputs, k, max_rows, bits, invariant=invariant).shape
    paths = _paths(segments, shape, tuning)
    given = (x, segments, step, buffers, rows, max_rows, paths)
    saturate = tuning.kind != "apple"
    kernel: Kernel
    if isinstance(shape, HalfTiles):
        if planes > 1:
            _check_planes(segments)
        kernel = HalfKernel(shape, k, *given, planes=planes, saturate=saturate)
    elif planes > 1:
        raise ValueError(f"linear: {planes} planes of {shape}; only half tiles leave them")
    elif isinstance(shape, Matvec):
        kernel = MatvecKernel(shape, *given, saturate=saturate)
    else:
        kernel = TilesKernel(shape, *given, saturate=saturate)
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
            grid=(tiles, kernel.grid_rows, planes),
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
    if x.buffer.dtype not in X_BYTES or x.buffer.offset % X_BYTES[x.buffer.dtype]:
        raise ValueError(
            f"linear: x is {x.buffer.dtype} at byte {x.buffer.offset}, expected float32 at a multiple of 4, or float16 at one of 2"
        )
    norm = x.norm.weight if x.norm else None
    if norm is not None and (norm.dtype != "float32" or norm.offset % 4):
        raise ValueError(f"linear: the norm's weight is {norm.dtype} at byte {norm.offset}, expected float32 at a multiple of 4")
    return k


def _check_planes(segments: Sequence[Segment]) -> None:
    for segment in segments:
        only = segment.epilogue.instructions
        if len(segment.weights) != 1 or len(only) != 1 or only[0]["op"] != params.MS_OP_STORE or only[0].get("dtype", 0) != 0:
            raise ValueError("linear: an epilogue of a linear with planes is one STORE of its product as float32, and nothing else")


def weight_format(weight: PackedWeight, choices: Mapping[int, Sequence[int]], lanes: int) -> Format:
    """How a kernel reads a weight. choices: by bits, the values that a lane may read at once. lanes: that read side by side along k; 0:
    the most values, whatever is idle. The more values each has, the wider are the reads, and the fewer lanes have work: of the choices
    the widest that leaves none idle, or else the widest of which there is enough for all.
    """
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
    if not lanes:
        return choices[0]
    return next((v for v in choices if k % (v * lanes) == 0), next((v for v in choices if v * lanes <= k), choices[-1]))


def _align(weight: PackedWeight) -> int:
    """Words at a multiple of which each row starts."""
    row_words = weight.k * weight.bits // 32
    return next(a for a in (4, 2, 1) if weight.buffer.offset % (4 * a) == 0 and row_words % a == 0)


def _require_place(buffer: Buffer, size: int, what: str) -> None:
    if buffer.offset % size:
        raise ValueError(f"linear: a weight's {what} start at byte {buffer.offset} of their buffer, expected a multiple of {size}")


def _paths(segments: Sequence[Segment], shape: Shape, tuning: Tuning) -> list[Path]:
    choices, lanes = _values_of(shape, tuning)
    paths: dict[tuple[Any, ...], Path] = {}
    for number, segment in enumerate(segments):
        formats = tuple(weight_format(weight, choices, lanes) for weight in segment.weights)
        epilogue = epilogue_of(segment)
        paths.setdefault((formats, epilogue), Path(formats, epilogue, [])).segments.append(number)
    return list(paths.values())


def _values_of(shape: Shape, tuning: Tuning) -> tuple[Mapping[int, Sequence[int]], int]:
    """By bits, the values that a lane may read at once, and how many lanes share k."""
    if isinstance(shape, Matvec):
        return tuning.matvec_values, shape.splits * SIMD_WIDTH
    if isinstance(shape, HalfTiles):  # as the shape says, whatever k is: a row's sums have one order
        return {bits: [v for v in values if v <= 8 * shape.words] or values[-1:] for bits, values in tuning.tile_values.items()}, 0
    return tuning.tile_values, shape.splits * 4


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
    halves, tuning = sizes.kind == "nvidia", table(sizes.kind)
    within = sizes.norm_rows if sizes.kind == "apple" else tuning.most_normed(k)
    norm = None
    if name in ("qkv", "gate_up", "head") and rows <= within:
        norm = Norm(inputs.activation(f"norm {k}", (k,)), EPS)
    x_dtype = "float16" if halves and norm is None else "float32"
    x = Input(inputs.activation(f"x {x_dtype}", (rows, k), x_dtype), 0, k, norm=norm)
    weights = [sizes.packed(inputs, n, k) for n in outputs]
    grouped = [weights] if name == "gate_up" else [[weight] for weight in weights]
    adds = name in ("o", "down")
    planes = tuning.planes(outputs[0], k, rows, max(w.bits for w in weights)) if adds else 1
    dtype = "float16" if halves and name == "gate_up" else "float32"
    buffers = [inputs.activation(f"out {i} {dtype}", (planes * rows, group[0].n), dtype) for i, group in enumerate(grouped)]
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
        if adds and planes == 1:
            residual, result = program.load(slot + 1, n, rows=params.MS_ROW_SELF, row_stride=n), program.register(n)
            program.emit(params.MS_OP_ADD, result, residual, products[0], n=n)
            buffers.append(inputs.activation("residual", (rows, n)))
        program.store(result, slot + i, row_stride=n, dtype=params.MS_FLOAT16 if dtype == "float16" else params.MS_FLOAT32)
        segments.append(Segment(group, program))
    step = inputs.step(rows, sampling={}) if name == "head" else inputs.step(rows)
    which = params.MS_ROWS_SAMPLED if name == "head" else params.MS_ROWS_TOKENS
    return launches(x, segments, step, buffers, which, rows, tuning=tuning, planes=planes)
