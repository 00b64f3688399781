"""What ops produce and a device runs: launches, and the buffer regions that they bind."""
from __future__ import annotations

import math
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint32": 4, "uint16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Buffer:
    """A region of a device buffer. handle: the device's id of the buffer; offset in bytes; dtype by numpy's name, or bfloat16."""

    handle: int
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the region. Raises: ValueError for an unknown dtype."""
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"buffer: dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPE_BYTES)}")
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class KernelCode:
    """What a GPU compiles to have a kernel: the texts of metal/<family>.metal in order, then `text` (instances, or a generated kernel)."""

    families: tuple[str, ...]
    text: str


@dataclass
class Launch:
    """One kernel with all it reads and writes. The i-th binding is `[[buffer(i)]]`, the constants are bound after the last.

    grid: threadgroups, threads: threads in one, along x, y, z (the host device divides its work by itself).
    barrier: whether it waits for all launches before it. code: of a GPU's kernel, compiled when a plan first needs it; the host device
    has its kernels built in.
    """

    kernel: str
    bindings: list[Buffer]
    constants: bytes
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    barrier: bool = False
    code: KernelCode | None = None
