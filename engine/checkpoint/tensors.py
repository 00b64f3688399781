"""A weight of a checkpoint: where its bytes are, and its values on demand."""
from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from metalstep.checkpoint import blocks
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.mapped_file import MappedFile

# Dtypes of files that numpy has under the same name; bfloat16 is handled apart.
NUMPY_DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}
ITEM_SIZES = {**{name: dtype.itemsize for name, dtype in NUMPY_DTYPES.items()}, "bfloat16": 2}


class Tensor:
    """One parameter of the model.

    shape: logical, so [n, k] for GGUF blocks; packed MLX weights are uint32 [n, k * bits / 32], as in their file.
    dtype: of an element as stored, e.g. "bfloat16"; of a block's scales when `format` is set.
    format: None, or one of blocks.FORMATS for GGUF blocks. row_order: int32 [n] or None; row i of the parameter is row
    row_order[i] of what is stored at `address()`. parameter_shape: of the mlx-lm parameter and of `numpy()`.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: str, format: str | None = None, row_order: np.ndarray | None = None
    ):
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.format = format
        self.row_order = row_order

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored; 0 for what is stored inside another tensor."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    def address(self) -> int:
        """Where the stored bytes begin, at any alignment; valid until the checkpoint is closed.

        Raises: CheckpointError when it is closed, or when the values are computed and have no bytes in a file.
        """
        raise NotImplementedError

    def numpy(self) -> np.ndarray:
        """A copy of the parameter, rows in the model's order: float32 for floating dtypes, integers as they are.

        GGUF blocks give MLX's packed uint32 words.
        """
        raise NotImplementedError

    def drop_pages(self) -> None:
        """The bytes are not needed for now: give their memory back where that is possible."""


class FileTensor(Tensor):
    """Bytes [start, end) of a mapped file."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        file: MappedFile,
        start: int,
        end: int,
        format: str | None = None,
        row_order: np.ndarray | None = None,
    ):
        super().__init__(name, shape, dtype, format, row_order)
        self.file = file
        self.start = start
        self.end = end

    def renamed(self, name: str) -> FileTensor:
        """The same bytes under another name."""
        return FileTensor(name, self.shape, self.dtype, self.file, self.start, self.end, self.format, self.row_order)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        if self.format is None:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] * blocks.FORMATS[self.format].bits // 32)

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def address(self) -> int:
        return self.file.address(self.start)

    def drop_pages(self) -> None:
        self.file.drop_pages(self.start, self.end)

    def numpy(self) -> np.ndarray:
        if self.format is not None:
            return self.affine().words.reshape(self.parameter_shape)
        stored = self.file.array(self.start, self.end)
        values = _to_float32(stored, self.dtype).reshape(self.shape)
        return values if self.row_order is None else values[self.row_order]

    def affine(self, first: int = 0, count: int | None = None) -> blocks.Affine:
        """GGUF blocks as MLX's triplet, made anew: rows [first, first + count) in the model's order, or all from `first` on.

        Rows are those of [n, k], whatever axes come before k.
        """
        rows, spec = math.prod(self.shape[:-1]), blocks.FORMATS[str(self.format)]
        stored = self.file.array(self.start, self.end).reshape(rows, self.shape[-1] // spec.size, spec.nbytes)
        wanted = slice(first, rows if count is None else first + count)
        if self.row_order is None:
            return blocks.affine(stored[wanted], str(self.format))
        return blocks.affine(stored, str(self.format), self.row_order[wanted])


class ShiftedTensor(FileTensor):
    """A small tensor without blocks that the file has with `shift` added to every element. Its values are in memory."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: str, file: MappedFile, start: int, end: int, shift: float
    ):
        super().__init__(name, shape, "float32", file, start, end)
        self.stored_dtype = dtype
        self.shift = shift
        self._kept: np.ndarray | None = None

    def numpy(self) -> np.ndarray:
        stored = _to_float32(self.file.array(self.start, self.end), self.stored_dtype)
        return (stored - np.float32(self.shift)).reshape(self.shape)

    def address(self) -> int:
        if self._kept is None:
            self._kept = self.numpy()
        return int(self._kept.ctypes.data)

    def renamed(self, name: str) -> ShiftedTensor:
        return ShiftedTensor(name, self.shape, self.stored_dtype, self.file, self.start, self.end, self.shift)


class BlockPart(Tensor):
    """The scales or biases of a tensor of GGUF blocks, as MLX names them. They have no bytes of their own."""

    def __init__(self, name: str, weight: FileTensor, part: str):
        shape = (*weight.shape[:-1], weight.shape[-1] // blocks.GROUP_SIZE)
        super().__init__(name, shape, weight.dtype)
        self._weight = weight
        self._part = part

    @property
    def nbytes(self) -> int:
        return 0

    def address(self) -> int:
        raise CheckpointError(
            f"{self.name} is stored inside the blocks of {self._weight.name} and has no address; use that tensor's, or numpy()"
        )

    def numpy(self) -> np.ndarray:
        parts = self._weight.affine()
        values = parts.scales if self._part == "scales" else parts.biases
        return values.astype(np.float32).reshape(self.shape)


class ComputedTensor(Tensor):
    """A parameter that mlx-lm computes from others when it sanitizes a checkpoint. Evaluated on first use, kept until close.

    array: lazy. It stays in memory once evaluated, since asking for one expert at a time would otherwise compute all each time.
    """

    def __init__(self, name: str, array: mx.array):
        super().__init__(name, tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))
        self._array: mx.array | None = array
        self._bytes: np.ndarray | None = None

    def address(self) -> int:
        if self._bytes is None:
            self._bytes = np.array(mx.contiguous(self._open()).view(mx.uint8), copy=False)
        return int(self._bytes.ctypes.data)

    def numpy(self) -> np.ndarray:
        array = self._open()
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(mx.float32)
        return np.array(array)

    def close(self) -> None:
        self._array = self._bytes = None

    def _open(self) -> mx.array:
        if self._array is None:
            raise CheckpointError(f"{self.name}: the checkpoint is closed; open it again to read its weights")
        return self._array


def _to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """A copy of bytes as float32; integers and booleans keep their dtype."""
    if dtype == "bfloat16":
        return (stored.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    values = stored.view(NUMPY_DTYPES[dtype])
    return values.astype(np.float32) if values.dtype.kind == "f" else values.copy()
