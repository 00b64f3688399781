"""The safetensors header. Source: huggingface/safetensors, README, "Format"."""
from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.mapped_file import MappedFile
from metalstep.checkpoint.tensors import ITEM_SIZES, FileTensor

MAX_DIMS = 8
MAX_SIZE = (1 << 31) - 1  # of an axis, in MLX
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "uint8",  # as mlx loads it
}
DAMAGED = "the file is damaged or not complete: download or convert it again"


def read_safetensors(file: MappedFile) -> dict[str, FileTensor]:
    """Tensors by name. Reads the header only.

    Raises: CheckpointError for a header that is not valid or that lies about the file.
    """
    if file.size < 8:
        raise _error(file, f"{file.size} bytes long, expected at least the 8 bytes of the header's length")
    length = int.from_bytes(file.data[:8], "little")
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise _error(
            file, f"the header is said to be {length} bytes long, expected at most {min(MAX_HEADER_BYTES, file.size - 8)}"
        )
    start = 8 + length
    tensors: dict[str, FileTensor] = {}
    header = _json(file, file.data[8:start])
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _error(file, "__metadata__ is no object of strings")
    for name, entry in header.items():
        tensors[name] = _tensor(file, name, entry, start)
    last = ""
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start < end and tensor.end > tensor.start:
            raise _error(file, f"tensors {last!r} and {tensor.name!r} overlap")
        last, end = tensor.name, max(end, tensor.end)
    return tensors


def _json(file: MappedFile, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise _error(file, f"the name {twice!r} appears twice in the header")
        return entries

    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise _error(file, f"the header is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise _error(file, f"the header is a JSON {type(parsed).__name__}, expected an object")
    return parsed


def _tensor(file: MappedFile, name: str, entry: Any, start: int) -> FileTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _error(file, f"tensor {name!r} has no dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} has dtype {entry['dtype']!r}, expected one of {', '.join(DTYPES)}; convert the model "
            "with `mlx_lm.convert`"
        )
    if not _sizes(shape) or len(shape) > MAX_DIMS or any(size > MAX_SIZE for size in shape):
        raise _error(file, f"tensor {name!r} has shape {str(shape)[:80]}, expected up to {MAX_DIMS} sizes of 31 bits")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _error(file, f"tensor {name!r} has data_offsets {str(offsets)[:80]}, expected [begin, end]")
    begin, end = offsets
    if start + end > file.size:
        raise _error(file, f"tensor {name!r} ends at byte {start + end}, but the file has {file.size}")
    dtype = DTYPES[entry["dtype"]]
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if nbytes != end - begin:
        raise _error(file, f"tensor {name!r} has {end - begin} bytes, expected {nbytes} for {entry['dtype']} {shape}")
    return FileTensor(name, tuple(shape), dtype, file, start + begin, start + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _error(file: MappedFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: {what}; {DAMAGED}")
