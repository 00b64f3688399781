"""One plane of the paged KV cache: a layer's keys or its values on the device, and the same vectors as numpy arrays."""
from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import DeviceBuffer, NativeDevice

BLOCK_SIZE = 16  # tokens in a KV block
STORED = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}  # numpy's dtype of a float codec's elements


class Plane:
    """`count` blocks of `heads` heads of vectors of `dim` elements, encoded by `codec`, as ms_kv_codec (metal/params.h) lays them out.

    by_token: a vector's elements (its words, for codes) lie side by side; else those of a block's tokens do.
    What `read` and `write` exchange does not depend on it: [blocks, heads, BLOCK_SIZE, dim] of floats; of other codecs
    [blocks, heads, BLOCK_SIZE, vector_bytes] uint8, a vector's codes and then its scales.
    """

    def __init__(self, device: NativeDevice, count: int, heads: int, dim: int, codec: KVCodec, *, by_token: bool):
        self.codec, self.dim = codec, dim
        vectors = count * heads * BLOCK_SIZE
        nbytes = vectors * codec.vector_bytes(dim)
        owner = device.create_buffer(nbytes, shared=False)
        self._by_token = by_token
        if codec.is_float:
            width, dtype = dim, np.dtype(STORED[codec.name])
        else:
            width, dtype = codec.words(dim), np.dtype(np.uint32)
        block: tuple[int, ...] = (heads, BLOCK_SIZE, width) if by_token else (heads, width, BLOCK_SIZE)
        self._codes = Part(owner, 0, count, block, dtype)
        if codec.is_float:
            self.buffer = Buffer(owner.handle, 0, (count, *block), codec.name)
            return
        self.buffer = Buffer(owner.handle, 0, (nbytes,), "uint8")
        if codec.is_turbo:
            block, dtype = (heads, BLOCK_SIZE, 1), np.dtype(codec.norm_dtype)
        else:
            block, dtype = (heads, codec.groups(dim), 2, BLOCK_SIZE), np.dtype(np.float16)
        self._scales = Part(owner, 4 * vectors * width, count, block, dtype)

    @property
    def _parts(self) -> list[Part]:
        return [self._codes] if self.codec.is_float else [self._codes, self._scales]

    def read(self, blocks: list[int]) -> np.ndarray:
        """A copy of these blocks."""
        codes = np.ascontiguousarray(self._vectors(self._codes.read(blocks)))
        if self.codec.is_float:
            return codes
        scales = self._scales.read(blocks)
        scales = scales if self.codec.is_turbo else np.ascontiguousarray(np.moveaxis(scales, -1, 2))
        lead = codes.shape[:3]
        parts = [part.reshape(*lead, math.prod(part.shape[3:])).view(np.uint8) for part in (codes, scales)]
        return np.concatenate(parts, axis=3)

    def write(self, blocks: list[int], vectors: np.ndarray) -> None:
        """What `read` gave."""
        if self.codec.is_float:
            self._codes.write(blocks, self._vectors(vectors))
            return
        end = self.codec.code_bytes(self.dim)
        self._codes.write(blocks, self._vectors(np.ascontiguousarray(vectors[..., :end]).view(np.uint32)))
        scales = np.ascontiguousarray(vectors[..., end:]).view(self._scales.dtype)
        if not self.codec.is_turbo:
            scales = np.moveaxis(scales.reshape(*scales.shape[:3], -1, 2), 2, -1)
        self._scales.write(blocks, scales)

    def copy(self, source: int, target: int) -> None:
        for part in self._parts:
            part.copy(source, target)

    def _vectors(self, codes: np.ndarray) -> np.ndarray:
        """Codes as they lie in the plane, with the tokens' axis before the elements'; and back."""
        return codes if self._by_token else codes.swapaxes(2, 3)


class Part:
    """`count` blocks of one shape that lie one behind the other in a buffer, from byte `offset` on.

    Where the host does not see the buffer, blocks go through the device's queue, those that are neighbours together.
    """

    def __init__(self, owner: DeviceBuffer, offset: int, count: int, block: tuple[int, ...], dtype: np.dtype):
        self.dtype = dtype
        self._owner, self._offset, self._block = owner, offset, block
        self._nbytes = math.prod(block) * dtype.itemsize  # of a block
        self._view = owner.numpy(dtype, (count, *block), offset) if owner.device.unified else None

    def read(self, blocks: list[int]) -> np.ndarray:
        """Copies, [blocks, *block]."""
        if self._view is not None:
            return self._view[blocks]
        found = np.empty((len(blocks), *self._block), self.dtype)
        for first, count in _neighbours(blocks):
            at = self._offset + blocks[first] * self._nbytes
            found[first : first + count] = self._owner.read(self.dtype, (count, *self._block), at)
        return found

    def write(self, blocks: list[int], values: np.ndarray) -> None:
        """values: [blocks, *block]."""
        if self._view is not None:
            self._view[blocks] = values
            return
        values = np.ascontiguousarray(values, self.dtype)
        for first, count in _neighbours(blocks):
            self._owner.write(values[first : first + count], self._offset + blocks[first] * self._nbytes)

    def copy(self, source: int, target: int) -> None:
        """One block over another."""
        if self._view is not None:
            self._view[target] = self._view[source]
            return
        places = [
            Buffer(self._owner.handle, self._offset + block * self._nbytes, (self._nbytes,), "uint8") for block in (source, target)
        ]
        self._owner.device.copy(*places)


def _neighbours(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Where runs of consecutive numbers begin in the list, and how long they are."""
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield first, i - first
            first = i
