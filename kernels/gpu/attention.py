"""Attention over the paged KV cache on a GPU: rows by themselves (decode), and rows of a sequence together (mixed).

Planes: keys [block, kv_head, block_size, head_dim], values [block, kv_head, block_size, value_dim], of floats or of codes (ms_kv_codec).
Reference: kernels/attention.py, on keys and values as kernels/turboquant.py decodes them.
"""
from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

from metalstep.kernels import check, params
from metalstep.kernels.gpu import attention_prompt, attention_tiles
from metalstep.kernels.gpu.attention_geometry import SIMD, TUNING, decode_geometry, mixed_geometry
from metalstep.kernels.gpu.bench_case import ACTIVATION_BYTES, EPS, BenchCase, BenchSizes, Inputs
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import DTYPE_BYTES, Buffer, KernelCode, Launch
from metalstep.kernels.linear import Norm
from metalstep.kernels.step import StepBuffers

OP = "attention"
TYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
OUT_DTYPES = {"decode": ("float32", "float16"), "mixed": ("float32", "float16")}
OUT_BY_KIND = {"apple": "float32", "nvidia": "float16"}  # as plans have it
OUT_TYPES = {"float32": "float", "float16": "half"}
SPLIT_LEN = 1024  # visible positions of a piece of a context: up to here attention is one launch
REDUCE_THREADS = 128
MIXED_FROM = 8  # rows of a benchmark, from which on they may be of one prompt
@dataclass(frozen=True)
class Rows:
    """float32 rows of a buffer: offset of the first and row_stride in elements."""

    buffer: Buffer
    offset: int
    row_stride: int


@dataclass(frozen=True)
class Inside:
    """What a decode launch does before its rows attend: each is the newest token of a sequence of its own.

    k [num_kv_heads, head_dim] and v [num_kv_heads, value_dim] of each row, as the linear before left them. q_norm, k_norm: of each head,
    weight float32 [head_dim] or None; no norm: None. angles: float32 [max_tokens, rope_dims], cosines then sines (kernels/rope.py), of the
    first rope_dims elements of each head; None: no rotation. The step's slot_mapping says where keys and values are written.
    """

    k: Rows
    v: Rows
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    angles: Buffer | None = None
    rope_dims: int = 0
    traditional: bool = False


def pieces(kind: str, rows: int, context: int, *, kv_heads: int = 8, invariant: bool = False) -> tuple[int, int]:
    """(splits, split_len) of decode launches of up to `rows` rows whose longest context has `context` positions: powers of two, so that
    a growing context needs few plans. kv_heads: of the model, as far as it is known. invariant: split_len is the same for all rows and
    contexts, and so are a row's bits where `launches` is told too."""
    if kind in attention_tiles.TUNING:
        return attention_tiles.pieces(kind, rows, context, kv_heads, invariant)
    splits = 1
    while splits * SPLIT_LEN < context:
        splits *= 2
    return splits, SPLIT_LEN


def workspace_bytes(num_q_heads: int, value_dim: int, max_rows: int, splits: int) -> int:
    """Bytes of the workspace of a decode launch; 0 without pieces."""
    return max_rows * num_q_heads * splits * (value_dim + 2) * 4 if splits > 1 else 0


def launches(
    q: Buffer,
    q_offset: int,
    q_row_stride: int,
    k_plane: Buffer,
    v_plane: Buffer,
    out: Buffer,
    step: StepBuffers,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    block_size: int,
    k_codec: KVCodec,
    v_codec: KVCodec,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Buffer | None = None,
    max_rows: int,
    group: int = 0,
    variant: str = "decode",
    splits: int = 1,
    split_len: int = SPLIT_LEN,
    inside: Inside | None = None,
    workspace: Buffer | None = None,
    kind: str = "apple",
    invariant: bool = False,
) -> list[Launch]:
    """Attend with q (float32 rows of num_q_heads * head_dim elements from `q_offset`, `q_row_stride` elements apart) over the planes.

    variant: "decode" takes each row by itself: a row's result is the same bits in any step (see invariant). "mixed" takes rows of a
    sequence that follow one another together. Both take any rows. out: [max_rows, num_q_heads, value_dim] of OUT_DTYPES[variant]; finite
    results stay finite.
    splits: decode only: pieces of a context at most, split_len visible positions each but the last, which has the rest; their partial
    results go through `workspace` (workspace_bytes) and a second launch. A row of one piece is the same bits with any number of splits,
    on nvidia where `invariant` says so.
    inside: decode only: q holds raw queries, and the launch norms, rotates and writes to the cache.
    Units: window, split_len and block_size in positions (window 0: all; step.sequences has each sequence's own), q_offset and
    q_row_stride in elements. group: of the layers that share this one's block tables.
    k_codec, v_codec: of the planes; both of one float type, or at least one packed. Planes of floats have the shape that this page begins
    with, packed ones any shape of their bytes: all blocks' codes, then all blocks' scales.
    kind: of GPU, apple or nvidia. On nvidia caches of float16 or codes go through half tiles (attention_tiles.takes): queries and weights
    are rounded to half there, pieces are of split_len positions rounded down to a multiple of 16, and begin and end at such; with `inside`
    the step's arrays and what the cache holds are read before the launch in front has ended.
    invariant: on nvidia launches with other max_rows or splits give a row the same bits; apple's always do.
    Changes in place: out, workspace, and with `inside` the planes.
    Raises: ValueError for sizes, dtypes or options that do not fit.
    """
    check.divides(OP, "num_q_heads", num_q_heads, "num_kv_heads", num_kv_heads)
    for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
        if dim < 16 or dim > 1024 or dim % 8:
            raise ValueError(f"{OP}: {name} is {dim}, expected a multiple of 8 from 16 to 1024; pad the heads")
    if block_size < 8 or block_size & (block_size - 1):
        raise ValueError(f"{OP}: block_size is {block_size}, expected a power of two from 8")
    if k_codec.is_float and v_codec.is_float and v_codec.name != k_codec.name:
        raise ValueError(f"{OP}: codecs are {k_codec.name} and {v_codec.name}, expected one of {', '.join(TYPES)} for both, or packed ones")
    for name, dim, codec in (("head_dim", head_dim, k_codec), ("value_dim", value_dim, v_codec)):
        try:
            codec.check_dim(dim)
        except ValueError as error:
            raise ValueError(f"{OP}: {name} is {dim}: {error}") from None
    if not math.isfinite(scale) or not math.isfinite(softcap) or softcap < 0:
        raise ValueError(f"{OP}: scale is {scale} and softcap {softcap}, expected finite numbers, softcap 0 or more")
    if window < 0 or max_rows < 1:
        raise ValueError(f"{OP}: window is {window} and max_rows {max_rows}, expected 0 or more and 1 or more")
    if variant not in ("decode", "mixed"):
        raise ValueError(f"{OP}: variant is {variant!r}, expected 'decode' or 'mixed'")
    if kind not in TUNING:
        raise ValueError(f"{OP}: kind is {kind!r}, expected {' or '.join(TUNING)}")
    if out.dtype not in OUT_DTYPES[variant]:
        raise ValueError(f"{OP}: out is {out.dtype}, expected {' or '.join(OUT_DTYPES[variant])} of the {variant} variant")
    _check_plane("k_plane", k_plane, k_codec, num_kv_heads, block_size, "head_dim", head_dim)
    _check_plane("v_plane", v_plane, v_codec, num_kv_heads, block_size, "value_dim", value_dim)
    for name, buffer, elements in (("q", q, q_offset | q_row_stride), ("k_plane", k_plane, 0), ("v_plane", v_plane, 0)):
        if buffer.offset % 16 or elements % 4:
            raise ValueError(
                f"{OP}: {name} starts at byte {buffer.offset}"
                + (f" and has rows at {q_offset} + i * {q_row_stride} elements" if name == "q" else "")
                + ", expected multiples of 16 bytes"
            )
    if splits < 1 or split_len < 1:
        raise ValueError(f"{OP}: splits is {splits} and split_len {split_len}, expected 1 or more")
    if variant == "mixed" and (splits > 1 or inside is not None):
        raise ValueError(f"{OP}: the mixed variant has neither splits nor anything inside; use decode")
    needed = workspace_bytes(num_q_heads, value_dim, max_rows, splits)
    if needed and (workspace is None or workspace.nbytes < needed):
        have = "none" if workspace is None else f"one of {workspace.nbytes} bytes"
        raise ValueError(f"{OP}: {splits} splits need a workspace of {needed} bytes, and there is {have} (workspace_bytes)")

    fields = dict(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        block_shift=block_size.bit_length() - 1,
        window=window,
        q_offset=q_offset,
        q_row_stride=q_row_stride,
        has_sinks=int(sinks is not None),
        splits=splits,
        split_len=split_len,
        k_scales=k_codec.scales_at(k_plane.nbytes, head_dim),
        v_scales=v_codec.scales_at(v_plane.nbytes, value_dim),
        scale=scale,
        softcap=softcap,
    )
    if inside is not None:
        fields |= _inside_fields(inside, head_dim, value_dim, num_kv_heads)
    constants = params.pack("MSGpuAttentionParams", **fields)
    given_sinks = sinks or step.step  # never read without has_sinks
    before = [step.step, step.positions, step.seq_ids, step.block_tables[group], step.sequences, q, k_plane, v_plane, out, given_sinks]
    packed, heads_of_kv = not (k_codec.is_float and v_codec.is_float), num_q_heads // num_kv_heads
    kv_name, kv_type = _kv_type(k_codec, v_codec)
    dims = f"{head_dim}, {value_dim}"
    to_half = "_f16" if out.dtype == "float16" else ""
    if variant == "mixed":
        prompt = attention_prompt.geometry(kind, k_codec, v_codec, heads_of_kv, head_dim, value_dim, block_size)
        if prompt is not None:
            name = f"attention_prompt_{kv_name}_d{head_dim}_v{value_dim}_{prompt.name}{'_capped' if softcap else ''}{to_half}"
            arguments = f"{kv_type}, {OUT_TYPES[out.dtype]}, {dims}, {str(softcap != 0).lower()}, {prompt.arguments}"
            code = KernelCode(("attention_prompt",), f"MS_INSTANCE({name}, attention_prompt<{arguments}>)")
            slices, tiles = -(-heads_of_kv // prompt.heads), -(-max_rows // prompt.rows)
            grid = (num_kv_heads * slices, tiles, min(prompt.runs, prompt.rows))
            return [Launch(name, before, constants, grid, (prompt.simdgroups * SIMD, 1, 1), code=code)]
        m = mixed_geometry(heads_of_kv, head_dim, value_dim, 4 if packed or k_codec.name == "float32" else 2, kind, packed)
        shape = f"h{m.heads}_r{m.tiles}_s{m.simdgroups}_p{m.parts}_b{m.positions}"
        name = f"attention_mixed_{kv_name}_d{head_dim}_v{value_dim}_{shape}{to_half}"
        arguments = f"{kv_type}, {dims}, {m.heads}, {m.tiles}, {m.simdgroups}, {m.parts}, {m.positions}, {OUT_TYPES[out.dtype]}"
        code = KernelCode(("attention_mixed",), f"MS_INSTANCE({name}, attention_mixed<{arguments}>)")
        slices, tiles = -(-heads_of_kv // m.heads), -(-max_rows // m.rows)
        grid = (num_kv_heads * slices, tiles, min(m.runs, m.rows))
        return [Launch(name, before, constants, grid, (m.simdgroups * SIMD, 1, 1), code=code)]

    tiled = attention_tiles.takes(kind, head_dim, value_dim, block_size, k_codec, v_codec)
    code_name = "attention_tiles" if tiled else "attention_decode"
    if tiled:
        t = attention_tiles.geometry(
            kind, heads_of_kv, num_kv_heads, value_dim, k_codec, v_codec,
            rows=max_rows, splits=splits, split_len=split_len, invariant=invariant,
        )  # fmt: skip
        heads, simdgroups, shape = t.heads, t.simdgroups, f"h{t.heads}_s{t.simdgroups}_m{t.merged}_t{t.share}"
        geometry = f"{t.heads}, {t.simdgroups}, {t.merged}, {t.share}"
    else:
        d = decode_geometry(heads_of_kv, head_dim, value_dim, kind)
        heads, simdgroups, shape = d.heads, d.simdgroups, f"h{d.heads}_l{d.lanes}_u{d.positions}_s{d.simdgroups}_m{d.merged}"
        geometry = f"{d.heads}, {d.lanes}, {d.positions}, {d.simdgroups}, {d.merged}"
    families, result_type = (code_name, "attention_reduce"), OUT_TYPES[out.dtype]
    kernel = code_name if inside is None else f"{code_name}_inside"
    name = f"{kernel}_{kv_name}_d{head_dim}_v{value_dim}_{shape}{to_half}"
    arguments = f"{kv_type}, {dims}, {geometry}, {result_type}"
    scales = sum(codec.scale_code * factor for codec, factor in ((k_codec, 1), (v_codec, 4)) if codec.is_turbo)
    if inside is not None and scales:
        name, arguments = f"{name}_c{scales}", f"{arguments}, {scales}"
    code = KernelCode(families, f"MS_INSTANCE({name}, {kernel}<{arguments}>)")
    bindings = [*before, workspace or out]
    if inside is not None:
        weights = [norm.weight if norm is not None else None for norm in (inside.q_norm, inside.k_norm)]
        # What is not there is never read: the step stands in for it.
        bindings += [
            step.slot_mappings[group], inside.angles or step.step, inside.k.buffer, inside.v.buffer, *[w or step.step for w in weights],
        ]  # fmt: skip
    grid = (num_kv_heads * -(-heads_of_kv // heads), splits, max_rows)
    result = [Launch(name, bindings, constants, grid, (simdgroups * SIMD, 1, 1), code=code)]
    if splits > 1:
        assert workspace is not None
        back = v_codec.is_turbo
        name = f"attention_reduce{'_back' if back else ''}{'_tiled' if tiled else ''}_v{value_dim}{to_half}"
        arguments = f"{value_dim}, {str(back).lower()}, {str(tiled).lower()}, {result_type}"
        code = KernelCode(families, f"MS_INSTANCE({name}, attention_reduce<{arguments}>)")
        bindings = [step.step, step.positions, step.seq_ids, step.sequences, workspace, given_sinks, out]
        result.append(Launch(name, bindings, constants, (num_q_heads, max_rows, 1), (REDUCE_THREADS, 1, 1), barrier=True, code=code))
    return result


def _check_plane(name: str, plane: Buffer, codec: KVCodec, num_kv_heads: int, block_size: int, dim_name: str, dim: int) -> None:
    """Raises: ValueError for a plane that has not whole blocks of the codec's vectors."""
    if codec.is_float:
        check.shape(OP, name, plane, (plane.shape[0], num_kv_heads, block_size, dim), f"[block, kv_head, block_size, {dim_name}]")
        return
    nbytes = codec.vector_bytes(dim)
    if plane.nbytes % (num_kv_heads * block_size * nbytes):
        raise ValueError(
            f"{OP}: {name} has {plane.nbytes} bytes, expected a multiple of {num_kv_heads} * {block_size} * {nbytes} (num_kv_heads,"
            f" block_size, a {codec.name} vector of {dim_name} {dim})"
        )


def _kv_type(k_codec: KVCodec, v_codec: KVCodec) -> tuple[str, str]:
    """The codecs in a kernel's name, and the template argument for them."""
    if k_codec.is_float and v_codec.is_float:
        return TYPES[k_codec.name], TYPES[k_codec.name]
    names, arguments = [], []
    for codec in (k_codec, v_codec):
        wide = codec.is_turbo and codec.norm_dtype == "float32"
        names.append(TYPES.get(codec.name, f"{codec.name}w" if wide else codec.name))
        code = f"MS_KV_{codec.name.upper()}" + (" | MS_KV_WIDE_SCALES" if wide else "")
        arguments.append(TYPES.get(codec.name, f"ms_packed<{code}>"))
    return "_".join(names), f"ms_planes<{', '.join(arguments)}>"


def _inside_fields(inside: Inside, head_dim: int, value_dim: int, num_kv_heads: int) -> dict[str, int | float]:
    """The fields of MSGpuAttentionParams for what is done inside. Raises: ValueError for what does not fit."""
    dims = inside.rope_dims
    if (inside.angles is None) != (dims == 0) or dims % 2 or not 0 <= dims <= head_dim:
        raise ValueError(
            f"{OP}: rope_dims is {dims} with{'out' if inside.angles is None else ''} angles, expected an even number up to head_dim"
            f" {head_dim}, and 0 without them"
        )
    if inside.angles is not None and inside.angles.shape[-1] != dims:
        raise ValueError(f"{OP}: angles has shape {inside.angles.shape}, expected (max_tokens, {dims}) (rope_dims)")
    for name, rows, width in (("k", inside.k, head_dim), ("v", inside.v, value_dim)):
        if rows.offset < 0 or rows.row_stride < num_kv_heads * width:
            raise ValueError(f"{OP}: rows of {name} are {rows.row_stride} elements apart, expected {num_kv_heads * width} or more")
    fields: dict[str, int | float] = dict(
        k_offset=inside.k.offset,
        k_row_stride=inside.k.row_stride,
        v_offset=inside.v.offset,
        v_row_stride=inside.v.row_stride,
        rope_dims=dims,
        traditional=int(inside.traditional),
    )
    for name, norm in (("q", inside.q_norm), ("k", inside.k_norm)):
        if norm is None:
            continue
        if norm.weight is not None and (math.prod(norm.weight.shape) != head_dim or norm.weight.dtype != "float32"):
            raise ValueError(
                f"{OP}: the weight of {name}'s norm is {norm.weight.dtype} {norm.weight.shape}, expected float32 ({head_dim},) (head_dim)"
            )
        if not math.isfinite(norm.eps) or norm.eps < 0:
            raise ValueError(f"{OP}: eps of {name}'s norm is {norm.eps}, expected a finite number, 0 or more")
        fields[f"{name}_norm"] = params.MS_HEAD_NORM_PLAIN if norm.weight is None else params.MS_HEAD_NORM_WEIGHT
        fields[f"{name}_eps"] = norm.eps
    return fields


def bench_cases(sizes: BenchSizes) -> list[BenchCase]:
    """decode: as many sequences as rows, norms, rotation and cache inside; mixed: the last rows of one prompt. All of a context is seen."""
    q = sizes.num_q_heads * sizes.head_dim
    cases = []
    for rows, context in itertools.product(sizes.rows, sizes.contexts):
        kinds = [("decode", rows, context)] if rows <= sizes.max_sampled else []
        kinds += [("mixed", 1, max(rows, context))] if rows >= MIXED_FROM else []
        for variant, sequences, length in kinds:
            seen = rows * length - (rows - sequences) * rows // 2  # positions, of all rows
            read = rows * (sizes.qkv_size + sizes.rope_dims if variant == "decode" else q)
            written = rows * q * DTYPE_BYTES[OUT_BY_KIND[sizes.kind]]
            nbytes = sequences * length * sizes.position_bytes + read * ACTIVATION_BYTES + written
            made = functools.partial(_bench_launches, sizes, variant, rows, sequences, length)
            cases.append(BenchCase(OP, variant, rows, length, nbytes, 2 * seen * q, made))
    return list({case.name: case for case in cases}.values())


def _bench_launches(sizes: BenchSizes, variant: str, rows: int, sequences: int, context: int, inputs: Inputs) -> list[Launch]:
    dim, widths = sizes.head_dim, {"q": sizes.num_q_heads * sizes.head_dim, "k": sizes.num_kv_heads * sizes.head_dim}
    q = inputs.activation("q", (rows, widths["q"]))
    out = inputs.activation("out", (rows, sizes.num_q_heads, dim), OUT_BY_KIND[sizes.kind])
    inside, (splits, split_len) = None, (1, SPLIT_LEN)
    if variant == "decode":
        q_norm, k_norm = (Norm(inputs.activation(name, (dim,)), EPS) if sizes.head_norms else None for name in ("q_norm", "k_norm"))
        keys, values = (Rows(inputs.activation(name, (rows, widths["k"])), 0, widths["k"]) for name in ("k", "v"))
        inside = Inside(keys, values, q_norm, k_norm, inputs.activation("angles", (rows, sizes.rope_dims)), sizes.rope_dims)
        splits, split_len = pieces(sizes.kind, rows, context, kv_heads=sizes.num_kv_heads)
    nbytes = workspace_bytes(sizes.num_q_heads, dim, rows, splits)
    codec = KVCodec(sizes.kv_dtype)
    return launches(
        q, 0, widths["q"], *sizes.planes(inputs, sequences, context), out, inputs.step(rows, context=context, sequences=sequences),
        num_q_heads=sizes.num_q_heads, num_kv_heads=sizes.num_kv_heads, head_dim=dim, value_dim=dim, block_size=sizes.block_size,
        k_codec=codec, v_codec=codec, scale=dim**-0.5, max_rows=rows, variant=variant, splits=splits, split_len=split_len,
        kind=sizes.kind, inside=inside, workspace=inputs.activation("workspace", (nbytes,), "uint8") if nbytes else None,
    )  # fmt: skip
