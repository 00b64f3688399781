"""Refuses row programs that name what is not there, in the host device's words: a GPU would read or write somewhere else."""
from __future__ import annotations

from typing import Any

from metalstep.kernels import kv_codec, params
from metalstep.kernels.gpu.row_values import ELEMENTWISE, NAMES, NORMS, embedding_slots, extent, operand_ranges
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.linear import FLOATS

AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
DTYPES = (params.MS_FLOAT32, params.MS_FLOAT16, params.MS_BFLOAT16)
CODECS = {codec.code: codec for codec in (KVCodec(name, norm) for name in kv_codec.NAMES for norm in ("float32", "float16"))}
SPANS = (*NORMS, params.MS_OP_SOFTMAX, params.MS_OP_ROPE)


def check(instrs: Any, registers: int, bindings: int) -> None:
    """registers: elements of the scratch row. Raises: ValueError naming the first instruction that does not fit, and why."""
    for number, instr in enumerate(instrs):
        why = _problem(instr, -(-registers // 16) * 16, bindings)
        if why:
            raise ValueError(f"row_program: instruction {number} (op {instr.op}): {why}")


def _problem(i: Any, registers: int, bindings: int) -> str | None:
    """What is wrong with an instruction."""
    if i.n == 0:
        return "n is 0"
    if i.op not in NAMES:
        return "unknown"
    if i.op not in ELEMENTWISE and i.op != params.MS_OP_KV_WRITE and i.imm:
        return "takes no scalar operands"
    own = {
        params.MS_OP_LOAD: _buffer,
        params.MS_OP_STORE: _buffer,
        params.MS_OP_GATHER: _strided,
        params.MS_OP_SCATTER: _strided,
        params.MS_OP_EMBEDDING: _embedding,
        params.MS_OP_ROPE_ANGLES: _angles,
        params.MS_OP_ROPE: _rope,
        params.MS_OP_REDUCE: _reduce,
        params.MS_OP_KV_WRITE: _kv_write,
    }.get(i.op)
    if i.op in SPANS and (i.inner == 0 or i.n % i.inner):
        return f"{i.n} elements are no whole spans of {i.inner}"
    why = own(i, bindings) if own else None
    return why or _registers(i, registers)


def _registers(i: Any, registers: int) -> str | None:
    """Whether operands and result lie in the scratch row, and apart from each other."""
    strided = i.op in (params.MS_OP_GATHER, params.MS_OP_SCATTER)
    stores = i.op in (params.MS_OP_STORE, params.MS_OP_KV_WRITE)
    results = 2 * i.n if i.op == params.MS_OP_ROPE_ANGLES else i.n
    operands = operand_ranges(i)
    for name, start, size in operands:
        if getattr(i, name) == params.MS_NONE:
            return f"operand {name} is absent"
        if i.op == params.MS_OP_GATHER:
            least, most = start - i.a, start - i.a + size - 1
            if least < 0 or i.a + most >= registers:
                return f"elements {least} to {most} of register {i.a} leave the scratch row"
        elif start + size > registers:
            return f"{name} is {start} + {size}, past the {registers} of the scratch row"
        elif not (strided or stores) and i.dst != start and i.dst < start + size and start < i.dst + results:
            return f"dst {i.dst} overlaps operand {name} at {start}"
    if i.op == params.MS_OP_SCATTER:
        least, most = extent(i.offset, list(i.dims), list(i.strides))
        if least < 0 or i.dst + most >= registers:
            return f"elements {least} to {most} of register {i.dst} leave the scratch row"
    elif not stores:
        whole = -(-results // 16) * 16
        if i.dst + whole > registers:
            return f"dst is {i.dst} + {whole}, past the {registers} of the scratch row"
    return None


def _slot(slot: int, bindings: int) -> str | None:
    return None if slot < bindings else f"slot {slot} of a launch with {bindings} bindings"


def _buffer(i: Any, bindings: int) -> str | None:
    if i.dtype > params.MS_INT32:
        return f"dtype {i.dtype} is unknown"
    if i.rows > params.MS_ROW_SAMPLED:
        return f"rows {i.rows} is unknown"
    if i.op == params.MS_OP_STORE and i.rows == params.MS_ROW_SAME:
        return "every row would store to the same place"
    if i.op == params.MS_OP_LOAD and i.dims[0] > 1 and i.dims[1] < i.n:
        return f"{i.dims[0]} planes of {i.n} elements, each {i.dims[1]} behind the one before"
    if i.slot == params.MS_SLOT_STEP or (i.op == params.MS_OP_STORE and i.slot < params.MS_SLOT_FIRST):
        return f"slot {i.slot} is the step's own"
    return _slot(i.slot, bindings)


def _strided(i: Any, bindings: int) -> str | None:
    if i.op == params.MS_OP_SCATTER and i.inner > params.MS_MIN:
        return f"ms_combine {i.inner} is unknown"
    count = 1
    for length in i.dims:
        count *= length
        if length == 0 or count > i.n:
            return f"dims do not multiply to {i.n}"
    return None if count == i.n else f"dims multiply to {count}, n is {i.n}"


def _embedding(i: Any, bindings: int) -> str | None:
    bits, group, dtype, vocab = i.dims
    why = weight_problem(vocab, i.n, bits, group, dtype)
    if why:
        return f"a table of {vocab} rows of {i.n}: {why}"
    return next((why for why in (_slot(slot, bindings) for slot in embedding_slots(i)) if why), None)


def weight_problem(n: int, k: int, bits: int, group_size: int, dtype: int) -> str | None:
    """What is wrong with the format of a weight of n rows of k."""
    if n == 0 or k == 0:
        return "a weight has no elements"
    if bits in (16, 32):
        if group_size:
            return "a dense weight has a group size; expected 0"
        if dtype in ((params.MS_FLOAT16, params.MS_BFLOAT16) if bits == 16 else (params.MS_FLOAT32,)):
            return None
        return "a dense weight is neither 16 bits of float16 or bfloat16 nor 32 of float32"
    if dtype in (params.MS_E8M0, params.MS_E4M3):
        if (bits, group_size, dtype) not in FLOATS.values():
            return "e8m0 scales are of 4 or 8 bits in groups of 32, e4m3 scales of 4 bits in groups of 16"
        return "k is not a multiple of the group size" if k % group_size else None
    if bits not in AFFINE_BITS:
        return "bits are not 1, 2, 3, 4, 5, 6, 8 (affine) or 16, 32 (dense)"
    if group_size not in GROUPS:
        return "the group size is not 32, 64 or 128"
    if dtype not in DTYPES:
        return "scales are not float32, float16 or bfloat16"
    return "k is not a multiple of the group size" if k % group_size else None


def _angles(i: Any, bindings: int) -> str | None:
    return f"base {i.imm0:g} is not positive" if i.b == params.MS_NONE and not i.imm0 > 0 else None


def _rope(i: Any, bindings: int) -> str | None:
    half = i.dims[0]
    return None if 0 < half <= i.inner // 2 else f"rotates 2 * {half} elements of heads of {i.inner}"


def _reduce(i: Any, bindings: int) -> str | None:
    if i.inner == 0:
        return "inner is 0"
    return None if params.MS_SUM <= i.dims[0] <= params.MS_MIN else f"reduction {i.dims[0]} is unknown"


def _kv_write(i: Any, bindings: int) -> str | None:
    heads, key_dim, value_dim, block_size = i.dims
    if not (heads and key_dim and value_dim and block_size):
        return "heads, dims and block_size must not be 0"
    if heads * key_dim != i.n:
        return f"{i.n} keys of {heads} heads of {key_dim}"
    if max(i.imm & 3, i.imm >> 2) > params.MS_KV_SCALE_UNBIASED:
        return f"imm {i.imm} is no ms_kv_scales"
    slots = _slot(i.slot, bindings) or _slot(i.slot2, bindings)
    vectors = heads * block_size
    return slots or _plane(i.dtype, key_dim, i.offset, vectors) or _plane(i.inner, value_dim, i.row_stride, vectors)


def _plane(code: int, dim: int, scales: int, vectors: int) -> str | None:
    """What is wrong with the keys' or the values' plane of the cache; scales: its words before them; vectors: in a block."""
    codec = CODECS.get(code)
    if codec is None:
        return f"the cache has no codec {code}"
    try:
        codec.check_dim(dim)
    except ValueError:
        return f"codec {code} does not take vectors of {dim}"
    if codec.is_float:
        return f"scales at {scales} of a plane of floats" if scales else None
    words = codec.words(dim)
    if scales == 0 or scales % (vectors * words):
        return f"scales at {scales} are not behind blocks of {vectors} vectors of {words} words"
    return None
