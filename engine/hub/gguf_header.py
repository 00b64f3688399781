"""The few facts of a GGUF file's header that a list of models shows. Source: ggml, docs/gguf.md.

metalstep.checkpoint.gguf.file reads all of it, and checks it; that takes the engine's libraries, and a file that is whole.
"""
from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_DIMS = 4
BLOCKS = {  # tensor type: weights and bytes of a block
    **{0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 20: (32, 18), 39: (32, 17)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 23: (256, 136)},
}
LONGEST = 1 << 16  # bytes of a string that is kept
FILE_TYPES = {  # general.file_type, llama.cpp's llama_ftype
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M"},
    **{13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S"},
    **{22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS"},
    **{31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4"},
}


def read_facts(path: Path) -> tuple[dict[str, Any], int | None]:
    """(the header's numbers and strings outside of arrays, up to the first that cannot be read; the bytes that the file has at least by
    its header, None where that cannot be read). Raises: ValueError for no GGUF file."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        facts: dict[str, Any] = {}
        try:
            _number(file, "<I")
            tensors = _number(file, "<Q")
            for _ in range(min(_number(file, "<Q"), 10_000)):
                key = _string(file)
                value = _value(file, _number(file, "<I"))
                if value is not None:
                    facts[key] = value
            ends = [_tensor(file) for _ in range(min(tensors, 1_000_000))]
            alignment = max(1, int(facts.get("general.alignment", 32)))
            return facts, -(-file.tell() // alignment) * alignment + max(ends, default=0)
        except (struct.error, KeyError, UnicodeDecodeError, OverflowError, RecursionError, ValueError, OSError):
            return facts, None  # OSError: of a seek to nowhere


def _tensor(file: BinaryIO) -> int:
    """The byte behind the next tensor, counted from the first one's start."""
    _string(file)
    if (dims := _number(file, "<I")) > MAX_DIMS:
        raise ValueError(f"{dims} dimensions")
    count = math.prod(_number(file, "<Q") for _ in range(dims))
    block, nbytes = BLOCKS.get(_number(file, "<I"), (count or 1, 1))  # of another type at least a byte
    return int(_number(file, "<Q") + count // block * nbytes)


def _number(file: BinaryIO, format: str) -> Any:
    return struct.unpack(format, file.read(struct.calcsize(format)))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    if length > LONGEST:  # a chat template may be; a length that is damaged ends the loop at the next read
        file.seek(length, 1)
        return ""
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _number(file, SCALARS[kind])
    kind, count = _number(file, "<I"), _number(file, "<Q")
    if kind == STRING:
        for _ in range(count):
            file.seek(_number(file, "<Q"), 1)
    elif kind == ARRAY:
        for _ in range(count):
            _value(file, ARRAY)
    else:
        file.seek(count * struct.calcsize(SCALARS[kind]), 1)
    return None
