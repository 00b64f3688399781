"""Weights on a GPU: as MLX has them, read from the mapped file itself where their place in it allows."""
from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from metalstep import loading
from metalstep.capture.errors import CaptureError
from metalstep.checkpoint import Tensor, blocks
from metalstep.checkpoint.mapped_file import MappedFile
from metalstep.checkpoint.tensors import ITEM_SIZES, FileTensor
from metalstep.kernels import params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import PackedWeight
from metalstep.kernels.native import DeviceBuffer, NativeDevice
from metalstep.plan.weights import CHUNK, DTYPES, WeightStore, quantised_planes

LOAD_BYTES = 16  # of the widest load of a kernel
PIECE_BYTES = CHUNK  # of a tensor that is copied: so much of it is in memory twice
OWN_BYTES = CHUNK // 8  # a larger tensor has a buffer of its own: what it does not fill of a chunk would be memory taken for nothing


class GpuWeightStore(WeightStore):
    """As WeightStore; a linear's words, scales and biases are three buffers.

    A tensor that lies in a file in the model's order and at a multiple of 16 bytes is not copied. mapped_bytes: of those.
    """

    def __init__(self, device: NativeDevice, tensors: Mapping[str, Tensor], prepared: Mapping[str, mx.array]):
        super().__init__(device, tensors, prepared)
        self._files: dict[MappedFile, DeviceBuffer | None] = {}
        self.mapped_bytes = 0

    def _arena_bytes(self) -> int:
        return CHUNK

    def _reserve(self, nbytes: int) -> tuple[DeviceBuffer, int]:
        if nbytes > OWN_BYTES:
            return self._device.create_buffer(nbytes, shared=False), 0
        return super()._reserve(nbytes)

    def _pack(self, name: str, n: int, k: int, bits: int, group_size: int, first: int) -> PackedWeight:
        if name in self._prepared:
            values = self.array(name)[first : first + n]
            return PackedWeight(self.constant(values), n, k, 32, 0, params.MS_FLOAT32)
        if name not in self._tensors:
            raise CaptureError(f"the model uses a weight {name!r} that the checkpoint does not have")
        tensor = self._tensors[name]
        if tensor.format is not None:
            return self._from_blocks(tensor, n, k, first)
        if tensor.dtype != "uint32":
            if tensor.dtype not in DTYPES:
                raise CaptureError(f"{name} is {tensor.dtype}; a linear weight is float32, float16, bfloat16 or packed uint32")
            dense = 32 if tensor.dtype == "float32" else 16
            return PackedWeight(self._rows(tensor, n, first), n, k, dense, 0, DTYPES[tensor.dtype])
        dtype, planes = quantised_planes(self._tensors, name, bits, group_size)
        words = self._rows(tensor, n, first)
        return PackedWeight(words, n, k, bits, group_size, dtype, **{plane: self._rows(t, n, first) for plane, t in planes.items()})

    def _from_blocks(self, tensor: Tensor, n: int, k: int, first: int) -> PackedWeight:
        """GGUF blocks taken apart into MLX's triplet."""
        assert isinstance(tensor, FileTensor) and tensor.format is not None
        parts = tensor.affine(first, n)
        dtype = DTYPES[str(parts.scales.dtype)]
        tensor.drop_pages()
        return PackedWeight(
            self._copied(parts.words), n, k, blocks.FORMATS[tensor.format].bits, blocks.GROUP_SIZE, dtype,
            self._copied(parts.scales), self._copied(parts.biases),
        )  # fmt: skip

    def _rows(self, tensor: Tensor, n: int, first: int) -> Buffer:
        """Rows [first, first + n) of a tensor as they are stored."""
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.shape[-1] * ITEM_SIZES[tensor.dtype]
        mapped = self._mapped(tensor, first * row_bytes, n * row_bytes)
        if mapped is not None:
            return mapped
        region = (ctypes.c_uint8 * (rows * row_bytes)).from_address(tensor.address())
        stored = np.ctypeslib.as_array(region).reshape(rows, row_bytes)
        order, nbytes = tensor.row_order, n * row_bytes
        owner, offset = self._reserve(nbytes)
        piece = max(1, PIECE_BYTES // max(row_bytes, 1))
        for row in range(0, n, piece):
            end = min(row + piece, n)
            wanted = slice(first + row, first + end) if order is None else order[first + row : first + end]
            owner.write(stored[wanted], offset + row * row_bytes)
        tensor.drop_pages()
        loading.advance(nbytes)
        return Buffer(owner.handle, offset, (nbytes,), "uint8")

    def _copied(self, values: np.ndarray) -> Buffer:
        owner, offset = self._reserve(values.nbytes)
        owner.write(values, offset)
        loading.advance(values.nbytes)
        return Buffer(owner.handle, offset, (values.nbytes,), "uint8")

    def _mapped(self, tensor: Tensor, offset: int, nbytes: int) -> Buffer | None:
        """Bytes of the file that holds `tensor`, seen by the device; None where they must be copied."""
        if not self._device.unified:
            return None
        if not isinstance(tensor, FileTensor) or tensor.row_order is not None or (tensor.start + offset) % LOAD_BYTES:
            return None
        file = tensor.file
        if file not in self._files:
            self._files[file] = self._wrap(file)
        owner = self._files[file]
        if owner is None:
            return None
        self.mapped_bytes += nbytes
        return Buffer(owner.handle, tensor.start + offset, (nbytes,), "uint8")

    def _wrap(self, file: MappedFile) -> DeviceBuffer | None:
        """The whole mapping as a buffer; None where it is larger than the device's buffers may be."""
        try:
            return self._device.wrap_buffer(file.address(0), file.size, keep=file)
        except MemoryError:
            return None
