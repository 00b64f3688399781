"""Planes of the KV cache, of any codec and device: empty ones, and what vectors they hold."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metalstep.kernels import turboquant
from metalstep.kernels.kv_codec import KVCodec, affine_group

POISON = 0xA5A5A5A5


@dataclass(frozen=True)
class Plane:
    """Of keys or of values: blocks of `block_size` vectors of `dim` elements for each head. across: words of codes, or elements of
    floats, have the place in the block as their fastest axis, as the host's keys do."""

    codec: KVCodec
    blocks: int
    heads: int
    block_size: int
    dim: int
    across: bool = False

    @property
    def vectors(self) -> int:
        return self.blocks * self.heads * self.block_size

    @property
    def nbytes(self) -> int:
        return self.vectors * self.codec.vector_bytes(self.dim)

    @property
    def scales_at(self) -> int:
        return self.codec.scales_at(self.nbytes, self.dim)

    def poisoned(self) -> np.ndarray:
        """uint32 words of a plane in which nothing was written, and of a few behind it."""
        return np.full(-(-self.nbytes // 4) + 8, POISON, np.uint32)

    def split(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint32 [block, head, place, words] and scales as turboquant.encode has them, [block, head, place, ...], of a plane.

        Raises: AssertionError where something was written behind the plane.
        """
        assert (words.view(np.uint8)[self.nbytes :] == POISON & 0xFF).all(), "written behind the plane"
        codec, lead = self.codec, (self.blocks, self.heads)
        width = self.dim if codec.is_float else codec.words(self.dim)
        unit = np.uint16 if codec.is_float and codec.bits == 16 else np.uint32
        codes = words.view(unit)[: self.vectors * width]
        codes = codes.reshape(*lead, width, self.block_size).swapaxes(2, 3) if self.across else codes.reshape(*lead, self.block_size, width)
        if codec.is_float:
            return turboquant.pack(codes, codec.bits), np.zeros((*lead, self.block_size, 0))
        dtype = np.float32 if codec.is_turbo and codec.norm_dtype == "float32" else np.float16
        scales = words[self.scales_at :].view(dtype)[: self.vectors * codec.scale_bytes(self.dim) // np.dtype(dtype).itemsize]
        if codec.is_turbo:
            return codes, scales.reshape(*lead, self.block_size, 1)
        return codes, np.moveaxis(scales.reshape(*lead, self.dim // affine_group(self.dim), 2, self.block_size), -1, 2)


def agree(plane: Plane, codes: np.ndarray, scales: np.ndarray, x: np.ndarray, seed: int) -> None:
    """Codes and scales of vectors x, [..., dim], are what turboquant.encode makes of them.

    Turbo indices may differ where an element of the unit vector is within 1e-5 of a boundary, its sums being in another order, and
    scales by a unit of float16 in the last place (of float32, by 1e-6); others are equal bit for bit.
    Raises: AssertionError.
    """
    codec = plane.codec
    want, want_scales = turboquant.encode(x, codec, seed)
    if not codec.is_turbo:
        np.testing.assert_array_equal(codes, want)
        np.testing.assert_array_equal(scales, want_scales)
        return
    got, indices = (turboquant.unpack(words, codec.bits, plane.dim) for words in (codes, want))
    np.testing.assert_array_equal(turboquant.pack(got, codec.bits), codes, "padding is not 0")
    odd = got != indices
    if odd.any():
        y = turboquant.unit(x, seed)[odd]
        boundaries = turboquant.codebook(codec.bits, plane.dim)[1]
        assert np.abs(y[:, None] - boundaries).min(1).max() < 1e-5, "another index, away from any boundary"
        assert y.all(), "0 is exact on every device, and has the index below"
    same = ~odd.any(-1)
    got_scales, want_scales = scales[same], want_scales[same]
    number = ~np.isnan(want_scales)
    np.testing.assert_array_equal(np.isnan(got_scales), ~number)
    if codec.norm_dtype == "float16":
        a, b = (np.ascontiguousarray(s).view(np.uint16).astype(np.int32)[number] for s in (got_scales, want_scales))
        assert (np.abs(a - b) <= 1).all()  # neither is negative
    else:
        np.testing.assert_allclose(got_scales[number], want_scales[number], rtol=1e-6)
