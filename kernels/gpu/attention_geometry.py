"""How attention on a GPU divides its work where products are of floats: template arguments of its kernels, by data of a kind of GPU."""
from __future__ import annotations

from dataclasses import dataclass

SIMD = 32  # lanes
THREADGROUP_BYTES = 32768  # of memory, the most that Apple's GPUs have
TABLE_BYTES = 2 * 16 * 4 + 8  # of it, with packed planes: what the codes of keys and of values stand for, the newest ones' scales

# Defaults from like kernels on an H100 and from MLX's, not measured on Apple's hardware.
# decode: registers of a thread for queries and sums, positions that a lane has at a time, simdgroups, and bytes of threadgroup memory
# to merge their results, each at most. mixed: rows of the matrices, tiles of 8 of them that a simdgroup has; positions of a tile, for
# heads of up to `short` elements or longer ones; elements that a simdgroup has at most; threadgroups that share a tile's runs, at most.
TUNING = {
    "apple": {
        "decode": {"registers": 64, "positions": 2, "simdgroups": 8, "merged_bytes": 8192},
        "mixed": {"matrix_rows": 32, "tiles": 1, "short": 96, "short_positions": 32, "long_positions": 16, "elements": 128, "runs": 8},
    }
}
TUNING["nvidia"] = TUNING["apple"]  # for what half tiles do not take


@dataclass(frozen=True)
class DecodeGeometry:
    """Template arguments of attention_decode: query heads of a threadgroup, lanes and positions of a read, simdgroups, heads that their
    results are merged of at a time."""

    heads: int
    lanes: int
    positions: int
    simdgroups: int
    merged: int

    def threadgroup_bytes(self, head_dim: int, value_dim: int, element_bytes: int, inside: bool, packed: bool = False) -> int:
        """Threadgroup memory of the kernel, in bytes. element_bytes: of an unpacked key or value."""
        merged = self.simdgroups * self.merged * (value_dim + 2) * 4
        queries = self.heads * head_dim * 4 if inside or packed else 0
        return merged + queries + ((head_dim + value_dim) * element_bytes if inside else 0) + (TABLE_BYTES if packed else 0)


@dataclass(frozen=True)
class MixedGeometry:
    """Template arguments of attention_mixed: query heads of a threadgroup, 8-row tiles of a simdgroup, simdgroups, parts that elements
    are divided in, positions of a tile; and threadgroups that share a tile's runs."""

    heads: int
    tiles: int
    simdgroups: int
    parts: int
    positions: int
    runs: int

    @property
    def rows(self) -> int:
        """Rows of the step that a threadgroup has."""
        return self.simdgroups // self.parts * self.tiles * 8 // self.heads

    def threadgroup_bytes(self, head_dim: int, value_dim: int, element_bytes: int, packed: bool = False) -> int:
        """Threadgroup memory of the kernel, in bytes. element_bytes: of an unpacked key or value."""
        tile = self.positions * (max(head_dim, value_dim) * element_bytes + 16)
        partial = self.simdgroups * self.tiles * self.positions * 8 * 4 if self.parts > 1 else 4
        return tile + partial + self.rows * 5 * 4 + self.positions * 2 * 4 + (TABLE_BYTES if packed else 0)


def decode_geometry(group: int, head_dim: int, value_dim: int, kind: str = "apple") -> DecodeGeometry:
    """Geometry for `group` query heads of a kv head: all of them in a threadgroup where the registers suffice."""
    tuning = TUNING[kind]["decode"]
    options = []
    for lanes in (8, 16, 32):
        most = max(1, tuning["registers"] // _registers(head_dim, value_dim, lanes))
        options.append((-(-group // most), lanes))
    slices, lanes = min(options)
    heads, simdgroups = -(-group // slices), tuning["simdgroups"]
    while simdgroups > 1 and simdgroups * value_dim * 4 > tuning["merged_bytes"]:
        simdgroups //= 2
    merged = min(heads, max(1, tuning["merged_bytes"] // (simdgroups * value_dim * 4)))
    return DecodeGeometry(heads, lanes, tuning["positions"], simdgroups, merged)


def _registers(head_dim: int, value_dim: int, lanes: int) -> int:
    """Of a thread, for one query head's elements and sums."""
    return 4 * (-(-head_dim // (4 * lanes)) + -(-value_dim // (4 * lanes)))


def mixed_geometry(
    group: int, head_dim: int, value_dim: int, element_bytes: int, kind: str = "apple", packed: bool = False
) -> MixedGeometry:
    """Geometry for `group` query heads of a kv head. element_bytes: of an unpacked key or value; a tile holds keys, then values, of
    `positions` positions of one kv head (32 at most) whatever the context.

    Raises: ValueError for heads whose tiles do not fit the threadgroup memory.
    """
    tuning = TUNING[kind]["mixed"]
    longest = max(head_dim, value_dim)
    divisors = [parts for parts in (1, 2, 4) if head_dim % (8 * parts) == 0 and value_dim % (8 * parts) == 0]
    parts = next((parts for parts in divisors if longest <= tuning["elements"] * parts), divisors[-1])
    tiles = tuning["tiles"]
    simdgroups = min(tuning["matrix_rows"] // (8 * tiles) * parts, 8)
    slices = -(-group // (simdgroups // parts * tiles * 8))
    positions = tuning["short_positions"] if longest <= tuning["short"] else tuning["long_positions"]
    while True:
        geometry = MixedGeometry(-(-group // slices), tiles, simdgroups, parts, positions, tuning["runs"])
        if geometry.threadgroup_bytes(head_dim, value_dim, element_bytes, packed) <= THREADGROUP_BYTES:
            return geometry
        if positions == 8:
            raise ValueError(
                f"attention: tiles of head_dim {head_dim} and value_dim {value_dim} take more than {THREADGROUP_BYTES} bytes of threadgroup"
                " memory; use the decode variant, or a cache of float16"
            )
        positions //= 2
