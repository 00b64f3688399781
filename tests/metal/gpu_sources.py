"""Sources of GPU kernels without a GPU: those of every instance that a launch can ask for, and those that whole models ask for."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, product

from metalstep.kernels import kv_write, params
from metalstep.kernels.gpu import attention, library, linear, row_program, sample, step_advance, step_load
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


def linear_launches(bits: int, group: int, dtype: str, rows: int, floats: int | None = None) -> list[Launch]:
    """silu(gate) * up with a residual, the input normed where few rows ask for it. floats: ms_dtype of scales of a byte."""
    n, k, code = 96, 256, DTYPES[dtype] if floats is None else floats
    dense = bits >= 16
    width = (32 if dtype == "f32" else 16) if dense else bits

    def weight() -> PackedWeight:
        planes = [] if dense else [buffer(n, k // group) for _ in range(2 if floats is None else 1)]
        return PackedWeight(buffer(n, k), n, k, width, group, code, *planes)

    weights, program = [weight(), weight()], Program(epilogue=True)
    gate, up = program.register(n), program.register(n)
    slot = first_buffer_slot([weights])
    old = program.load(slot, n, rows=params.MS_ROW_SELF, row_stride=n)
    sigmoid, product_, out = (program.register(n) for _ in range(3))
    program.emit(params.MS_OP_SIGMOID, sigmoid, gate, n=n)
    program.emit(params.MS_OP_MUL, product_, sigmoid, up, n=n)
    program.emit(params.MS_OP_ADD, out, product_, old, n=n)
    program.store(out, slot + 1, row_stride=n)
    norm = Norm(buffer(k), 1e-6) if rows <= 16 else None
    x = Input(buffer(rows, k), 0, k, norm=norm)
    buffers = [buffer(rows, n), buffer(rows, n)]
    return linear.launches(x, [Segment(weights, program)], step_buffers(), buffers, params.MS_ROWS_TOKENS, rows)


def plane(codec: KVCodec, dim: int) -> Buffer:
    """Of eight blocks of two heads' sixteen vectors."""
    return buffer(8, 2, 16, dim, dtype=codec.name) if codec.is_float else buffer(8 * 2 * 16 * codec.vector_bytes(dim), dtype="uint8")


def attention_launches(heads: int, dim: int, codecs: tuple[KVCodec, KVCodec], variant: str) -> list[Launch]:
    """variant: decode, inside, or mixed."""
    k, v = (plane(codec, dim) for codec in codecs)
    norm = Norm(buffer(dim), 1e-6)
    rows = attention.Rows(buffer(4, 2 * dim), 0, 2 * dim)
    angles = buffer(4, dim)
    inside = attention.Inside(rows, rows, norm, norm, angles, dim) if variant == "inside" else None
    splits = 1 if variant == "mixed" else 2
    workspace = Buffer(next(_handles), 0, (attention.workspace_bytes(2 * heads, dim, 4, splits),), "uint8")
    return attention.launches(
        buffer(4, 2 * heads * dim), 0, 2 * heads * dim, k, v, buffer(4, 2 * heads, dim), step_buffers(),
        num_q_heads=2 * heads, num_kv_heads=2, head_dim=dim, value_dim=dim, block_size=16, k_codec=codecs[0], v_codec=codecs[1], scale=0.1,
        max_rows=4, variant="mixed" if variant == "mixed" else "decode", splits=splits, inside=inside, workspace=workspace,
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
    for (mode, (bits, group, code)), rows in product(FLOATS.items(), ROWS):
        found[f"linear-{mode}-{rows}rows"] = lambda b=bits, g=group, c=code, r=rows: linear_launches(b, g, "", r, c)
    pairs = {name: (codec, codec) for name, codec in CODECS.items()} | PACKED
    for (heads, dim), (name, codecs), variant in product(HEADS, pairs.items(), ("decode", "inside", "mixed")):
        found[f"attention-{variant}-{heads}x{dim}-{name}"] = lambda h=heads, n=dim, c=codecs, v=variant: attention_launches(h, n, c, v)
    for vocab_size in (97, 5000, 151936):
        found[f"sampler-{vocab_size}"] = lambda n=vocab_size: sampler_launches(n)
    for dim in ENCODED:
        found[f"encode-{dim}"] = lambda n=dim: encode_launches(n)
    return found


def covering(names: list[str], every: int = 13) -> set[str]:
    """Names of the default run: one of `every`, a step that is prime to the number of dtypes and rows, so that all of each occur."""
    return {name for i, name in enumerate(names) if i % every == 0}


def texts(launches: list[Launch]) -> Iterator[str]:
    yield from (source for source, _ in library.sources(launches, set()))
