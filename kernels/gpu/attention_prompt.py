"""The kernel attention_prompt: mixed attention with products in half precision, and its geometry. See kernels/gpu/attention.py."""
from __future__ import annotations

from dataclasses import dataclass

from metalstep.kernels.gpu.attention_geometry import SIMD, THREADGROUP_BYTES
from metalstep.kernels.kv_codec import KVCodec

PIECE = 16  # positions that are read from one block: it has as many or more
PAD = 8  # halves between rows of a tile; half as many floats between vectors that are rotated


@dataclass(frozen=True)
class PromptTuning:
    """simdgroups: of a threadgroup; share: threadgroups that registers are left for; runs: threadgroups that share a tile's runs.
    tiles: of 8 matrix rows that a simdgroup has, and positions: of a tile, where they fit, for heads of up to `short` elements and for
    longer ones. elements: of a key and a value together at most, as a lane's registers hold them."""

    simdgroups: int
    share: int
    runs: int
    short: int
    tiles: tuple[int, int]
    positions: tuple[int, int]
    elements: int


# A kind of GPU that is not here keeps to attention_mixed.
TUNING = {"nvidia": PromptTuning(simdgroups=4, share=2, runs=8, short=64, tiles=(4, 2), positions=(64, 32), elements=512)}


@dataclass(frozen=True)
class PromptGeometry:
    """Template arguments: query heads of a threadgroup, 8-row tiles of a simdgroup, simdgroups, positions of a tile, threadgroups that
    registers are left for; and threadgroups that share a tile's runs."""

    heads: int
    tiles: int
    simdgroups: int
    positions: int
    share: int
    runs: int

    @property
    def name(self) -> str:
        """In a kernel's name."""
        return f"h{self.heads}_r{self.tiles}_s{self.simdgroups}_b{self.positions}_n{self.share}"

    @property
    def arguments(self) -> str:
        """As template arguments."""
        return f"{self.heads}, {self.tiles}, {self.simdgroups}, {self.positions}, {self.share}"

    @property
    def rows(self) -> int:
        """Rows of the step that a threadgroup has."""
        return self.simdgroups * self.tiles * 8 // self.heads

    def threadgroup_bytes(self, head_dim: int, value_dim: int) -> int:
        """Threadgroup memory of the kernel, in bytes, whatever the codecs."""
        parts = 3 * self.positions * (max(head_dim, value_dim) + PAD) * 2
        return parts + self.rows * 5 * 4 + self.positions * 4

    def turns(self, head_dim: int, value_dim: int) -> bool:
        """Whether a simdgroup has room for a vector to be rotated."""
        longest = max(head_dim, value_dim)
        return 3 * self.positions * (longest + PAD) // 2 // self.simdgroups >= longest + PAD // 2


def geometry(
    kind: str, k_codec: KVCodec, v_codec: KVCodec, group: int, head_dim: int, value_dim: int, block_size: int
) -> PromptGeometry | None:
    """For `group` query heads of a kv head; None where the kernel does not take what is asked for. block_size in positions.

    It takes caches of float16, bfloat16 and packed ones: float32 ones are read to their own precision.
    """
    tuning = TUNING.get(kind)
    if tuning is None or "float32" in (k_codec.name, v_codec.name) or block_size < PIECE or head_dim % 16 or value_dim % 16:
        return None
    if head_dim + value_dim > tuning.elements:
        return None
    turns = k_codec.is_turbo or v_codec.is_turbo
    which = 0 if max(head_dim, value_dim) <= tuning.short else 1
    tiles, positions = tuning.tiles[which], tuning.positions[which]
    slices = -(-group // (tuning.simdgroups * tiles * 8))
    while positions >= PIECE:
        found = PromptGeometry(-(-group // slices), tiles, tuning.simdgroups, positions, tuning.share, tuning.runs)
        fits = found.threadgroup_bytes(head_dim, value_dim) <= THREADGROUP_BYTES and positions <= tuning.simdgroups * SIMD
        if fits and (not turns or found.turns(head_dim, value_dim)):
            return found
        positions = positions // 2 // PIECE * PIECE
    return None
