"""Row programs on a GPU: one generated kernel per program, a threadgroup per row."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from metalstep.kernels import embedding, kv_write, params, rms_norm, rope
from metalstep.kernels.gpu.bench_case import EPS, BenchCase, BenchSizes, Inputs
from metalstep.kernels.gpu.linear_tables import table
from metalstep.kernels.gpu.row_check import check
from metalstep.kernels.gpu.row_codegen import Kernel, RowKernel
from metalstep.kernels.gpu.row_nests import LANES, Aliases, fused, widest
from metalstep.kernels.gpu.row_values import Reader, needed
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer, KernelCode, Launch
from metalstep.kernels.program import Program, Register
from metalstep.kernels.step import StepBuffers


@dataclass(frozen=True)
class Tuning:
    """elements: of the widest op per thread, which set the threads of a row; run: of them side by side, read and written at once.
    nvidia: what RowKernel does there."""

    elements: int
    max_threads: int
    run: int
    nvidia: bool


# Apple's are defaults as in public row kernels, not measured on a device.
TUNING = {
    "apple": Tuning(elements=4, max_threads=1024, run=1, nvidia=False),
    "nvidia": Tuning(elements=4, max_threads=1024, run=4, nvidia=True),
}
RUN_BYTES = 16
MAX_BINDINGS = 31  # of a Metal kernel
WRITES = {params.MS_OP_STORE: ("slot",), params.MS_OP_KV_WRITE: ("slot", "slot2")}


def launches(
    program: Program,
    step: StepBuffers,
    buffers: Sequence[Buffer],
    rows: int,
    max_rows: int,
    group: int = 0,
    scratch: Buffer | None = None,
    kind: str = "apple",
) -> list[Launch]:
    """Run `program` on every row.

    buffers, rows, group: as for the host device. scratch: of `scratch_bytes`, for rows that threadgroup memory is too small for.
    kind: of device, in TUNING. With "nvidia" a LOAD that is the same for every row is of a weight or constant, which no launch of the
    plan writes, and a STORE of float16 saturates finite numbers.
    Raises: ValueError for a program that the host device refuses too, more buffers than a kernel can bind, or missing scratch.
    """
    bound = [*step.program_slots(group), *buffers]
    if rows > params.MS_ROWS_SAMPLED:
        raise ValueError(f"row_program: rows is {rows}, neither MS_ROWS_TOKENS nor MS_ROWS_SAMPLED")
    made = _kernel(program.constants(), program.registers, rows, len(bound), _overlaps(program, bound), _aligned(bound), kind)
    need = 4 * made.scratch * max_rows
    if need and (scratch is None or scratch.nbytes < need):
        given = 0 if scratch is None else scratch.nbytes
        raise ValueError(f"row_program: {given} bytes of scratch, expected {need} for {max_rows} rows; see scratch_bytes")
    if scratch is not None and need:
        bound.append(scratch)
    bindings = len(bound) + (1 if made.constants else 0)
    if bindings > MAX_BINDINGS:
        raise ValueError(f"row_program: {bindings} bindings, expected {MAX_BINDINGS} or fewer; split the program")
    code = KernelCode(("row_program",), made.text)
    return [Launch(made.name, bound, made.constants, (max_rows, 1, 1), (made.threads, 1, 1), code=code)]


def scratch_bytes(program: Program, max_rows: int, buffers: Sequence[Buffer] | None = None, kind: str = "apple") -> int:
    """Bytes of device memory that `launches` needs with these buffers, or at most with any; 0 while threadgroup memory is enough."""
    constants, rows = program.constants(), params.MS_ROWS_TOKENS
    sharing: list[frozenset[tuple[int, int]] | None] = [frozenset(), None]
    if buffers is not None:
        step = [Buffer(-1 - i, 0, (0,), "float32") for i in range(params.MS_SLOT_FIRST)]
        sharing = [_overlaps(program, [*step, *buffers])]
    made = [_kernel(constants, program.registers, rows, MAX_BINDINGS, overlaps, frozenset(), kind) for overlaps in sharing]
    return 4 * max(kernel.scratch for kernel in made) * max_rows


def _aligned(bound: Sequence[Buffer]) -> frozenset[int]:
    """Slots whose buffers begin where vectors may."""
    return frozenset(slot for slot, buffer in enumerate(bound) if buffer.offset % RUN_BYTES == 0)


def _overlaps(program: Program, bound: Sequence[Buffer]) -> frozenset[tuple[int, int]]:
    """Pairs of slots that share memory which the program writes."""
    written = {instr[f] for instr in program.instructions for f in WRITES.get(instr["op"], ())}
    pairs = set()
    for a in written:
        for b, other in enumerate(bound):
            if a != b and a < len(bound) and bound[a].handle == other.handle:
                first, second = sorted([bound[a], other], key=lambda buffer: buffer.offset)
                if second.offset < first.offset + first.nbytes:
                    pairs.add((min(a, b), max(a, b)))
    return frozenset(pairs)


@functools.lru_cache(maxsize=1024)
def _kernel(
    constants: bytes,
    registers: int,
    rows: int,
    bindings: int,
    overlaps: frozenset[tuple[int, int]] | None,
    aligned: frozenset[int],
    kind: str,
) -> Kernel:
    instrs = params.ffi.from_buffer("MSInstr[]", constants)
    check(instrs, registers, bindings)
    ops = needed(Reader(instrs).ops)
    tuning = TUNING[kind]
    threads = LANES
    if tuning.run > 1:
        threads = min(max(-(-widest(ops) // (tuning.elements * LANES)), 1) * LANES, tuning.max_threads)
    while tuning.run == 1 and threads < tuning.max_threads and threads * tuning.elements < widest(ops):
        threads *= 2
    aliases = Aliases(overlaps)
    nests = fused(ops, threads, aliases, tuning.run)
    return RowKernel(nests, threads, rows, bindings, aliases, aligned, tuning.nvidia).kernel()


def bench_cases(sizes: BenchSizes) -> list[BenchCase]:
    """What plans have between linears: an embedding, a norm (of a residual and what linears left in planes, where they do, else plain),
    and norms, rotation and cache write of queries, keys and values."""
    hidden, qkv = sizes.hidden_size, sizes.qkv_size
    out = 2 if sizes.kind == "nvidia" else 4  # bytes of an element that linears read
    cases, tuning = [], table(sizes.kind)
    for rows in sizes.rows:
        planes = tuning.planes(hidden, sizes.num_q_heads * sizes.head_dim, rows, sizes.bits)
        moved = {
            "embedding": sizes.weight_bytes(1, hidden) + 4 * hidden,
            "rms_norm": (4 + out) * hidden,
            "sum_rms_norm": (8 + 4 * planes + out) * hidden,
            "norm_rope_cache": 4 * (qkv + sizes.num_q_heads * sizes.head_dim + sizes.rope_dims) + sizes.position_bytes,
        }
        for name, nbytes in moved.items():
            if name != ("rms_norm" if planes > 1 else "sum_rms_norm"):
                made = functools.partial(_bench_launches, sizes, name, rows, planes)
                work = rows * (qkv if name == "norm_rope_cache" else hidden)
                cases.append(BenchCase("row_program", name, rows, 0, rows * nbytes, work, made))
    return cases


def _bench_launches(sizes: BenchSizes, name: str, rows: int, planes: int, inputs: Inputs) -> list[Launch]:
    program, buffers, first = Program(), [], int(params.MS_SLOT_FIRST)
    hidden = sizes.hidden_size

    def slot(buffer: Buffer) -> int:
        buffers.append(buffer)
        return first + len(buffers) - 1

    def rows_of(name: str, size: int) -> Register:
        return program.load(slot(inputs.activation(name, (rows, size))), size, rows=params.MS_ROW_SELF, row_stride=size)

    def normed(name: str, size: int, width: int, x: Register | None = None) -> Register:
        weight = program.load(slot(inputs.activation(f"norm {name}", (width,))), width, rows=params.MS_ROW_SAME)
        return rms_norm.emit(program, x or rows_of(name, size), weight, EPS, width)

    step = inputs.step(rows)
    if name == "embedding":
        table = sizes.packed(inputs, sizes.vocab_size, hidden)
        weight = [slot(plane) for plane in (table.buffer, table.scales, table.biases) if plane is not None]
        facts = (hidden, table.n, table.bits, table.group_size, table.dtype)
        out = embedding.emit(program, weight[0], *facts, slot(step.embeddings), *weight[1:])
    elif name == "rms_norm":
        out = normed("x", hidden, hidden)
    elif name == "sum_rms_norm":
        x, parts = rows_of("x", hidden), slot(inputs.activation("planes", (planes, rows, hidden)))
        options = dict(rows=params.MS_ROW_SELF, row_stride=hidden, planes=planes, plane_stride=rows * hidden)
        added, total = program.load(parts, hidden, **options), program.register(hidden)
        program.emit(params.MS_OP_ADD, total, x, added, n=hidden)
        out = normed("x", hidden, hidden, total)
        program.store(total, slot(inputs.activation("residual", (rows, hidden))), row_stride=hidden)
    else:
        dim, kv = sizes.head_dim, sizes.num_kv_heads * sizes.head_dim

        def heads(name: str, size: int) -> Register:
            return normed(name, size, dim) if sizes.head_norms else rows_of(name, size)

        queries, angles = heads("q", sizes.num_q_heads * dim), rows_of("angles", sizes.rope_dims)
        out = rope.emit(program, queries, angles, dim, traditional=False)
        keys = rope.emit(program, heads("k", kv), angles, dim, traditional=False)
        codec = KVCodec(sizes.kv_dtype)
        values, (k_slot, v_slot) = rows_of("v", kv), (slot(plane) for plane in sizes.planes(inputs, rows, 1))
        kv_write.emit(program, keys, values, k_slot, v_slot, sizes.num_kv_heads, sizes.block_size, codec, codec)
    half = sizes.kind == "nvidia" and name in ("rms_norm", "sum_rms_norm")
    place = slot(inputs.activation("out", (rows, out.size), "float16" if half else "float32"))
    program.store(out, place, row_stride=out.size, dtype=params.MS_FLOAT16 if half else params.MS_FLOAT32)
    nbytes = scratch_bytes(program, rows, buffers, sizes.kind)
    scratch = inputs.activation("scratch", (nbytes,), "uint8") if nbytes else None
    return launches(program, step, buffers, params.MS_ROWS_TOKENS, rows, scratch=scratch, kind=sizes.kind)
