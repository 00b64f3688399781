"""How decode attention by products of half tiles (metal/attention_tiles.metal) divides its work: data of a kind of GPU."""
from __future__ import annotations

from dataclasses import dataclass

from metalstep.kernels.kv_codec import KVCodec

HEADS = 8  # columns of a tile: query heads of a threadgroup at most
TILE = 16  # positions
DIMS = (64, 128)  # elements of keys and values: their parts of a tile are registers
WHOLE = 1 << 30  # positions of a piece that has any context


@dataclass(frozen=True)
class Tuning:
    """How a GPU is filled. Figures of an H100.

    simdgroups: of a threadgroup where there are up to limits[0] threadgroups, up to limits[1], and more, which hide each other's latency:
    narrow for keys and values of 4 bits at most, wide for others. share: threadgroups whose registers a multiprocessor has, for each of
    these: the most that nothing is spilled with. merged_bytes: of threadgroup memory for results. enough: threadgroups that contexts are
    divided up to; pieces are not shorter than `piece_per_row` positions for each row, nor than `least_piece`. short: positions that one
    piece has in any case. invariant: positions of a piece where batches are invariant.
    """

    limits: dict[str, tuple[int, int]]
    simdgroups: tuple[int, int, int]
    share: dict[str, tuple[int, int, int]]
    merged_bytes: int
    enough: int
    piece_per_row: int
    least_piece: int
    short: int
    invariant: int


TUNING = {
    "nvidia": Tuning(
        limits={"narrow": (264, WHOLE), "wide": (132, 396)},
        simdgroups=(8, 4, 2),
        share={"narrow": (2, 4, 8), "wide": (1, 3, 6)},
        merged_bytes=16384,
        enough=256,
        piece_per_row=32,
        least_piece=64,
        short=256,
        invariant=1024,
    )
}


@dataclass(frozen=True)
class TiledGeometry:
    """Template arguments of attention_tiles: query heads of a threadgroup, simdgroups, heads that are merged at a time, threadgroups that
    registers are left for."""

    heads: int
    simdgroups: int
    merged: int
    share: int


def takes(kind: str, head_dim: int, value_dim: int, block_size: int, k_codec: KVCodec, v_codec: KVCodec) -> bool:
    """Whether GPUs of this kind attend by tiles here: halves and codes, whose blocks hold whole tiles."""
    known = all(not codec.is_float or codec.name == "float16" for codec in (k_codec, v_codec))
    return kind in TUNING and known and head_dim in DIMS and value_dim in DIMS and block_size >= TILE


def geometry(
    kind: str,
    group: int,
    kv_heads: int,
    value_dim: int,
    k_codec: KVCodec,
    v_codec: KVCodec,
    *,
    rows: int,
    splits: int,
    split_len: int,
    invariant: bool,
) -> TiledGeometry:
    """For `group` query heads of each of kv_heads: as few slices of them as there can be. invariant: whatever rows and splits."""
    tuning = TUNING[kind]
    width = "narrow" if k_codec.is_turbo and v_codec.is_turbo else "wide"
    slices = -(-group // HEADS)
    threadgroups, limits = rows * kv_heads * slices * splits, tuning.limits[width]
    which = sum(threadgroups > limit for limit in limits)
    # What is read is what wide ones wait for: long contexts in one piece want simdgroups, those in pieces more threadgroups.
    if width == "wide" and splits == 1 and split_len > tuning.short:
        which = 0
    if invariant or (width == "wide" and splits > 1):
        which = 1
    heads, simdgroups = -(-group // slices), tuning.simdgroups[which]
    merged = min(heads, max(1, tuning.merged_bytes // (simdgroups * value_dim * 4)))
    return TiledGeometry(heads, simdgroups, merged, tuning.share[width][which])


def pieces(kind: str, rows: int, context: int, kv_heads: int, invariant: bool) -> tuple[int, int]:
    """Pieces that launches of so many rows divide contexts of up to `context` positions into, and positions of each: powers of two."""
    tuning = TUNING[kind]
    if invariant:
        return _power(-(-context // tuning.invariant)), tuning.invariant
    if context <= tuning.short:
        return 1, tuning.short
    most = max(1, tuning.enough // (rows * kv_heads))
    most = 1 << (most.bit_length() - 1)
    if most == 1:
        return 1, WHOLE
    positions = _power(context)
    split_len = max(tuning.least_piece, _power(tuning.piece_per_row * rows), positions // most)
    return max(1, positions // split_len), split_len


def _power(n: int) -> int:
    """The least power of two from n on."""
    return 1 << (n - 1).bit_length()
