"""Sources of GPU kernels without a GPU: those of every instance that a launch can ask for, and those that whole models ask for."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, product

from metalstep.kernels import kv_write, params
from metalstep.kernels.gpu import (
    attention,
    library,
    linear,
    linear_library,
    row_program,
    sample,
    step_advance,
    step_load,
)
from metalstep.kernels.gpu.linear_tables import table
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import FLOATS, Input, Norm, PackedWeight, Segment, first_buffer_slot
from metalstep.kernels.program import Program
from metalstep.kernels.step import StepBuffers

DTYPES = {"f32": params.MS_FLOAT32, "f16": params.MS_FLOAT16, "bf16": params.MS_BFLOAT16}
CODECS = {"f32": KVCodec("float32"), "f16": KVCodec("float16"), "bf16": KVCodec("bfloat16")}
PACKED = {
    "turbo4-turbo2": (KVCodec("turbo4"), KVCodec("turbo2")),
    "turbo3w-turbo3": (KVCodec("turbo3", "float32", "raw"), KVCodec("turbo3", scale="unbiased")),
    "turbo2-turbo4w": (KVCodec("turbo2"), KVCodec("turbo4", "float32")),
    "f16-turbo4": (KVCodec("float16"), KVCodec("turbo4")),
    "turbo4-bf16": (KVCodec("turbo4"), KVCodec("bfloat16")),
    "affine8-turbo3": (KVCodec("affine8"), KVCodec("turbo3")),
    "affine8-affine8": (KVCodec("affine8"), KVCodec("affine8")),
}
FORMATS = [*product((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)), (16, 0)]
ROWS = (1, 2, 3, 4, 16, 64)  # of plans: both sides of every change of kernel
HEADS = [(4, 64), (3, 80), (4, 96), (2, 128), (1, 256)]  # query heads for each KV head, head_dim
ENCODED = (16, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512)  # elements of vectors, of each sort of Hadamard matrix
ENCODERS = [
    (KVCodec("turbo2"), KVCodec("turbo3", "float32", "raw")), (KVCodec("turbo4", scale="unbiased"), KVCodec("affine8")),
    (KVCodec("float16"), KVCodec("turbo4", "float32")),
]  # fmt: skip

_handles = count(1)


def buffer(*shape: int, dtype: str = "float32") -> Buffer:
    return Buffer(next(_handles), 0, shape, dtype)


def step_buffers() -> StepBuffers:
    grouped = {"slot_mappings", "block_tables"}
    names = StepBuffers.__dataclass_fields__
    return StepBuffers(**{name: (buffer(64),) if name in grouped else buffer(64) for name in names})


def linear_launches(bits: int, group: int, dtype: str, rows: int, floats: int | None = None, kind: str = "apple") -> list[Launch]:
    """silu(gate) * up with a residual, the input normed where few rows ask for it. floats: ms_dtype of scales of a byte."""
    n, k, code = 96, 256, DTYPES[dtype] if floats is None else floats
    dense = bits >= 16
    width = (32 if dtype == "f32" else 16) if dense else bits

    def weight() -> PackedWeight:
        planes = [] if dense else [buffer(n, k // group) for _ in range(2 if floats is None else 1)]
        return PackedWeight(buffer(n, k), n, k, width, group, code, *planes)

    segment, buffers = gated([weight(), weight()], rows)
    norm = Norm(buffer(k), 1e-6) if rows <= 16 else None
    dtype = "float16" if kind == "nvidia" and norm is None else "float32"
    x = Input(buffer(rows, k, dtype=dtype), 0, k, norm=norm)
    return linear.launches(x, [segment], step_buffers(), buffers, params.MS_ROWS_TOKENS, rows, tuning=table(kind))


def gated(weights: list[PackedWeight], rows: int) -> tuple[Segment, list[Buffer]]:
    """silu(gate) * up + residual, and the buffers behind the weights."""
    program, n = Program(epilogue=True), weights[0].n
    gate, up = program.register(n), program.register(n)
    slot = first_buffer_slot([weights])
    old = program.load(slot, n, rows=params.MS_ROW_SELF, row_stride=n)
    sigmoid, product_, out = (program.register(n) for _ in range(3))
    program.emit(params.MS_OP_SIGMOID, sigmoid, gate, n=n)
    program.emit(params.MS_OP_MUL, product_, sigmoid, up, n=n)
    program.emit(params.MS_OP_ADD, out, product_, old, n=n)
    program.store(out, slot + 1, row_stride=n)
    return Segment(weights, program), [buffer(rows, n), buffer(rows, n)]


def library_launches(dtype: str) -> list[Launch]:
    """The same for NVIDIA's library, with up of each format in turn."""
    n, k, found = 96, 256, []
    codes = [(bits, group, DTYPES[dtype], 2) for bits, group in FORMATS if group] + [(*floats, 1) for floats in FLOATS.values()]
    weights = []
    for bits, group, code, planes in codes:
        weights.append(PackedWeight(buffer(n, k), n, k, bits, group, code, *(buffer(n, k // group) for _ in range(planes))))
    weights.append(PackedWeight(buffer(n, k), n, k, 32 if dtype == "f32" else 16, 0, DTYPES[dtype]))
    for up in weights:
        segment, buffers = gated([weights[0], up], 256)
        x = Input(buffer(256, k, dtype="float16"), 0, k)
        found += linear_library.launches(x, [segment], step_buffers(), buffers, 256, lambda nbytes: buffer(nbytes, dtype="uint8"))
    return found


def plane(codec: KVCodec, dim: int) -> Buffer:
    """Of eight blocks of two heads' sixteen vectors."""
    return buffer(8, 2, 16, dim, dtype=codec.name) if codec.is_float else buffer(8 * 2 * 16 * codec.vector_bytes(dim), dtype="uint8")


def attention_launches(
    heads: int,
    dim: int,
    codecs: tuple[KVCodec, KVCodec],
    variant: str,
    kind: str = "apple",
    rows: int = 4,
    pieces: tuple[int, int] = (2, 1024),
) -> list[Launch]:
    """variant: decode, inside, or mixed. rows: of the launch at most. pieces: number and positions, of decode and inside. Results are
    halves on nvidia."""
    k, v = (plane(codec, dim) for codec in codecs)
    norm = Norm(buffer(dim), 1e-6)
    new = attention.Rows(buffer(rows, 2 * dim), 0, 2 * dim)
    angles = buffer(rows, dim)
    inside = attention.Inside(new, new, norm, norm, angles, dim) if variant == "inside" else None
    splits, split_len = (1, 1024) if variant == "mixed" else pieces
    workspace = Buffer(next(_handles), 0, (attention.workspace_bytes(2 * heads, dim, rows, splits),), "uint8")
    out = buffer(rows, 2 * heads, dim, dtype="float16" if kind == "nvidia" else "float32")
    return attention.launches(
        buffer(rows, 2 * heads * dim), 0, 2 * heads * dim, k, v, out, step_buffers(),
        num_q_heads=2 * heads, num_kv_heads=2, head_dim=dim, value_dim=dim, block_size=16, k_codec=codecs[0], v_codec=codecs[1], scale=0.1,
        max_rows=rows, variant="mixed" if variant == "mixed" else "decode", splits=splits, split_len=split_len, inside=inside,
        workspace=workspace if splits > 1 else None, kind=kind,
    )  # fmt: skip


def encode_launches(dim: int) -> list[Launch]:
    """Keys and values of two heads, encoded by each sort of codec."""
    found, first = [], int(params.MS_SLOT_FIRST)
    for codecs in ENCODERS:
        program = Program()
        keys, values = (program.load(first + i, 2 * dim, rows=params.MS_ROW_SELF, row_stride=2 * dim) for i in range(2))
        scales = [codec.scales_at(8 * 2 * 16 * codec.vector_bytes(dim), dim) for codec in codecs]
        kv_write.emit(program, keys, values, first + 2, first + 3, 2, 16, *codecs, *scales)
        buffers = [buffer(4, 2 * dim), buffer(4, 2 * dim), *(buffer(8, 2, 16, dim) for _ in range(2))]
        found += row_program.launches(program, step_buffers(), buffers, params.MS_ROWS_TOKENS, 4)
    return found


def sampler_launches(vocab_size: int) -> list[Launch]:
    step, workspace = step_buffers(), Buffer(next(_handles), 0, (sample.workspace_bytes(vocab_size, 2),), "uint8")
    options = dict(vocab_size=vocab_size, max_rows=2, max_top=20, history_stride=64)
    return [
        *sample.launches(buffer(2, vocab_size), step, workspace=workspace, **options),
        *step_advance.launches(step, block_size=16, max_rows=2),
        *step_load.launches(buffer(80), step.sampled, buffer(64), words=64, tokens_first=6, max_tokens=16),
    ]


def instances() -> dict[str, Callable[[], list[Launch]]]:
    """Launches by the name of what they cover: every format, head and vocabulary."""
    found: dict[str, Callable[[], list[Launch]]] = {}
    for (bits, group), dtype, rows in product(FORMATS, DTYPES, ROWS):
        found[f"linear-{bits}bit-g{group}-{dtype}-{rows}rows"] = lambda b=bits, g=group, d=dtype, r=rows: linear_launches(b, g, d, r)
        found[f"linear-nvidia-{bits}bit-g{group}-{dtype}-{rows}rows"] = lambda b=bits, g=group, d=dtype, r=rows: linear_launches(
            b, g, d, r, kind="nvidia"
        )
    for (mode, (bits, group, code)), rows in product(FLOATS.items(), ROWS):
        found[f"linear-nvidia-{mode}-{rows}rows"] = lambda b=bits, g=group, c=code, r=rows: linear_launches(b, g, "", r, c, "nvidia")
        found[f"linear-{mode}-{rows}rows"] = lambda b=bits, g=group, c=code, r=rows: linear_launches(b, g, "", r, c)
    pairs = {name: (codec, codec) for name, codec in CODECS.items()} | PACKED
    for (heads, dim), (name, codecs), variant in product(HEADS, pairs.items(), ("decode", "inside", "mixed")):
        found[f"attention-{variant}-{heads}x{dim}-{name}"] = lambda h=heads, n=dim, c=codecs, v=variant: attention_launches(h, n, c, v)
        found[f"attention-nvidia-{variant}-{heads}x{dim}-{name}"] = lambda h=heads, n=dim, c=codecs, v=variant: attention_launches(
            h, n, c, v, "nvidia"
        )
    for dtype in DTYPES:
        found[f"library-{dtype}"] = lambda d=dtype: library_launches(d)
    for vocab_size in (97, 5000, 151936):
        found[f"sampler-{vocab_size}"] = lambda n=vocab_size: sampler_launches(n)
    for dim in ENCODED:
        found[f"encode-{dim}"] = lambda n=dim: encode_launches(n)
    return found


def covering(names: list[str], every: int = 13) -> set[str]:
    """Names of the default run: one of `every`, a step that is prime to the number of dtypes and rows, so that all of each occur."""
    return {name for i, name in enumerate(names) if i % every == 0 or name.startswith("library")}


def texts(launches: list[Launch]) -> Iterator[str]:
    yield from (source for source, _ in library.sources(launches, set()))
