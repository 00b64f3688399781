"""The GGUF header: metadata and where the tensors are. Source: ggml, docs/gguf.md."""
from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalstep.checkpoint import blocks
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.mapped_file import MappedFile
from metalstep.checkpoint.safetensors_file import DAMAGED

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_NESTING = 4  # arrays in arrays
STRING, ARRAY = 8, 9
SCALARS = {  # value type: struct format
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i"},
    **{6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}
PLAIN_TYPES = {0: ("F32", "float32", 4), 1: ("F16", "float16", 2), 30: ("BF16", "bfloat16", 2)}
BLOCK_TYPES = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    **{20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"},
}
OTHER_TYPES = {  # names for messages only
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"},
    **{34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 40: "NVFP4", 41: "Q1_0"},
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in the file: bytes [start, end). shape: outermost axis first, the reverse of the file's own order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    start: int
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    """metadata: strings, numbers, lists of strings, numpy arrays of numbers, by key."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf(file: MappedFile) -> GGUFHeader:
    """Metadata and tensors. Reads the header only.

    Raises: CheckpointError for a header that is not valid or lies about the file, and for tensor types without a kernel.
    """
    return _Reader(file).header()


class _Reader:
    """Reads forward through the header; every length is checked against the file before anything of that size is made."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.data = file.data
        self.at = 0

    def header(self) -> GGUFHeader:
        if self.data[:4] != MAGIC:
            raise CheckpointError(
                f"{self.file.path}: begins with {self.data[:4]!r}, expected {MAGIC!r}; this is not a GGUF file, or a damaged one"
            )
        self.at = 4
        version = self.scalar("<I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            hint = "it is big-endian: convert it on this machine" if swapped else "convert the model again with a newer llama.cpp"
            raise CheckpointError(f"{self.file.path}: GGUF version {version}, expected 2 or 3; {hint}")
        tensor_count = self.count("<Q", 8 + 4 + 4 + 8, "tensors")
        metadata_count = self.count("<Q", 8 + 4 + 1, "metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.error(f"the metadata key {key!r} appears twice")
            metadata[key] = self.value(self.scalar("<I", f"the type of {key!r}"), key, 0)
        entries = [self.entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 24:
            raise self.error(f"general.alignment is {alignment!r}, expected a power of two")
        start = -(-self.at // alignment) * alignment
        return GGUFHeader(metadata, self.place(entries, start))

    def scalar(self, format: str, what: str) -> Any:
        try:
            (value,) = struct.unpack_from(format, self.data, self.at)
        except struct.error:
            raise self.error(f"the file ends inside {what}") from None
        self.at += struct.calcsize(format)
        return value

    def count(self, format: str, item_bytes: int, what: str) -> int:
        """A number of items that take at least `item_bytes` each."""
        count = self.scalar(format, f"the number of {what}")
        if count * item_bytes > self.file.size - self.at:
            raise self.error(f"{count} {what} are said to follow, more than the file's {self.file.size} bytes can hold")
        return int(count)

    def string(self, what: str) -> str:
        length = self.scalar("<Q", f"the length of {what}")
        if length > self.file.size - self.at:
            raise self.error(f"{what} is said to be {length} bytes long, beyond the file's end")
        begin, self.at = self.at, self.at + length
        try:
            return self.data[begin : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error})") from error

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind == STRING:
            return self.string(f"the value of {key!r}")
        if kind == ARRAY:
            return self.array(key, depth)
        if kind not in SCALARS:
            raise self.error(f"{key!r} has value type {kind}, expected 0 to 12")
        return self.scalar(SCALARS[kind], f"the value of {key!r}")

    def array(self, key: str, depth: int) -> Any:
        if depth == MAX_NESTING:
            raise self.error(f"{key!r} has arrays nested more than {MAX_NESTING} deep")
        kind = self.scalar("<I", f"the type of {key!r}")
        if kind == STRING:
            return self.strings(self.count("<Q", 8, f"strings of {key!r}"), key)
        if kind == ARRAY:
            return [self.array(key, depth + 1) for _ in range(self.count("<Q", 12, f"arrays of {key!r}"))]
        if kind not in SCALARS:
            raise self.error(f"{key!r} has element type {kind}, expected 0 to 12")
        dtype = np.dtype(SCALARS[kind])
        count = self.count("<Q", dtype.itemsize, f"elements of {key!r}")
        begin, self.at = self.at, self.at + count * dtype.itemsize
        return np.frombuffer(self.data[begin : self.at], dtype)

    def strings(self, count: int, key: str) -> list[str]:
        """`string`, `count` times. A loop of its own: a vocabulary has 100,000 of them."""
        data, at, size = self.data, self.at, self.file.size
        unpack = struct.Struct("<Q").unpack_from
        out = []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + unpack(data, at)[0]
                if at > size:
                    raise self.error(f"a string of {key!r} is said to be {at - begin} bytes long, beyond the file's end")
                out.append(data[begin:at].decode("utf-8"))
        except struct.error:
            raise self.error(f"the file ends inside {key!r}") from None
        except UnicodeDecodeError as error:
            raise self.error(f"a string of {key!r} is not UTF-8 ({error})") from error
        self.at = at
        return out

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of the next tensor."""
        name = self.string("a tensor's name")
        dims = self.scalar("<I", f"the dimensions of {name!r}")
        if dims > MAX_DIMS:
            raise self.error(f"tensor {name!r} has {dims} dimensions, expected at most {MAX_DIMS}")
        shape = tuple(self.scalar("<Q", f"the shape of {name!r}") for _ in range(dims))
        return name, shape[::-1], self.scalar("<I", f"the type of {name!r}"), self.scalar("<Q", f"the offset of {name!r}")

    def place(self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self.error(f"tensor {name!r} appears twice")
            if not all(0 < size < 1 << 31 for size in shape):
                raise self.error(f"tensor {name!r} has shape {shape}, expected positive 31-bit sizes")
            nbytes, dtype, format = self.layout(name, shape, kind)
            end = start + offset + nbytes
            if end > self.file.size:
                raise self.error(f"tensor {name!r} ends at byte {end}, but the file has {self.file.size}")
            tensors[name] = TensorInfo(name, shape, dtype, format, start + offset, end)
        last, end = "", start
        for info in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
            if info.start < end and info.end > info.start:
                raise self.error(f"tensors {last!r} and {info.name!r} overlap")
            last, end = info.name, max(end, info.end)
        return tensors

    def layout(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[int, str, str | None]:
        """Bytes, dtype and block format of a tensor."""
        if kind in PLAIN_TYPES:
            _, dtype, item = PLAIN_TYPES[kind]
            return math.prod(shape) * item, dtype, None
        if kind not in BLOCK_TYPES:
            known = ", ".join([label for label, *_ in PLAIN_TYPES.values()] + list(BLOCK_TYPES.values()))
            raise CheckpointError(
                f"{self.file.path}: tensor {name!r} has type {OTHER_TYPES.get(kind, kind)}, expected one of {known}; download the model "
                "in one of these, or quantise it again from a file in 16 bits (`llama-quantize model-f16.gguf out.gguf Q4_K_M`)"
            )
        label = BLOCK_TYPES[kind]
        format = label.lower()
        spec = blocks.FORMATS[format]
        if not shape or shape[-1] % spec.size:
            raise self.error(f"tensor {name!r} is {label} with shape {shape}, expected rows of a multiple of {spec.size}")
        return math.prod(shape) // spec.size * spec.nbytes, spec.dtype, format

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {what}; {DAMAGED}")
