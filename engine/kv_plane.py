"""One plane of the paged KV cache: a layer's keys or its values on the device, and the same vectors as numpy arrays."""
from __future__ import annotations

import math

import numpy as np

from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice

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
        owner = device.create_buffer(nbytes)
        if codec.is_float:
            shape = (count, heads, BLOCK_SIZE, dim) if by_token else (count, heads, dim, BLOCK_SIZE)
            self.buffer = Buffer(owner.handle, 0, shape, codec.name)
            codes = owner.numpy(STORED[codec.name], shape)
        else:
            words = codec.words(dim)
            self.buffer = Buffer(owner.handle, 0, (nbytes,), "uint8")
            end = 4 * vectors * words
            codes = owner.numpy(np.uint32, (count, heads, BLOCK_SIZE, words) if by_token else (count, heads, words, BLOCK_SIZE))
            if codec.is_turbo:
                self._scales = owner.numpy(np.dtype(codec.norm_dtype), (count, heads, BLOCK_SIZE, 1), end)
            else:
                self._scales = np.moveaxis(owner.numpy(np.float16, (count, heads, codec.groups(dim), 2, BLOCK_SIZE), end), -1, 2)
        self._codes = codes if by_token else codes.swapaxes(2, 3)

    def read(self, blocks: list[int]) -> np.ndarray:
        """A copy of these blocks."""
        codes = np.ascontiguousarray(self._codes[blocks])
        if self.codec.is_float:
            return codes
        scales = np.ascontiguousarray(self._scales[blocks])
        lead = codes.shape[:3]
        parts = [part.reshape(*lead, math.prod(part.shape[3:])).view(np.uint8) for part in (codes, scales)]
        return np.concatenate(parts, axis=3)

    def write(self, blocks: list[int], vectors: np.ndarray) -> None:
        """What `read` gave."""
        if self.codec.is_float:
            self._codes[blocks] = vectors
            return
        end = self.codec.code_bytes(self.dim)
        self._codes[blocks] = np.ascontiguousarray(vectors[..., :end]).view(np.uint32)
        scales = np.ascontiguousarray(vectors[..., end:]).view(self._scales.dtype)
        self._scales[blocks] = scales.reshape(*scales.shape[:3], *self._scales.shape[3:])

    def copy(self, source: int, target: int) -> None:
        self._codes[target] = self._codes[source]
        if not self.codec.is_float:
            self._scales[target] = self._scales[source]
