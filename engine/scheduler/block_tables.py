"""The blocks that one sequence, or one prompt cache, holds: a table per group of layers."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class BlockCopy(NamedTuple):
    """Copy all of block `source` to block `target` in every layer of `group` before the step runs."""

    group: int
    source: int
    target: int


@dataclass(slots=True, eq=False, kw_only=True)
class BlockTables:
    """Blocks in order of position, per group. KVBlocks fills in everything but window and keep.

    Blocks that no later row can see are gone: given back, their entries 0 (a valid id, so ask `gone` and not the entry). They
    are the first `heads[group]` entries (behind the group's own window) and those from `keep_blocks` up to `tails[group]`
    (behind the sequence's window).
    """

    window: int = 0  # positions that a row sees, itself and the first `keep` included; 0: all (MSSequence)
    keep: int = 0  # first positions that stay visible
    computed: int = 0  # tokens whose keys and values are in the blocks
    tables: list[list[int]] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    tails: list[int] = field(default_factory=list)
    keep_blocks: int = 0  # blocks that the first `keep` positions touch
    room: int = 0  # tokens that the shortest table holds
    borrowed: bool = False  # the block at `computed` may be somebody else's too: copy it before writing into it
    copies: list[BlockCopy] = field(default_factory=list)  # not done yet; each keeps a reference to its source
    changed: bool = True  # an entry changed since the last schedule that named this sequence

    def __post_init__(self) -> None:
        if self.window and not 0 <= self.keep < self.window:
            raise ValueError(
                f"a window of {self.window} positions keeps the first {self.keep}, expected fewer than the window; keep fewer"
            )

    def gone(self, group: int, index: int) -> bool:
        """Whether the table's entry was given back."""
        return index < self.heads[group] or self.keep_blocks <= index < self.tails[group]

    def gone_count(self, group: int) -> int:
        head, tail, keep = self.heads[group], self.tails[group], self.keep_blocks
        return max(head, tail) if head >= keep else head + max(0, tail - keep)

    def live(self, group: int) -> list[int]:
        """The blocks still held, in order of position."""
        table, head, tail, keep = self.tables[group], self.heads[group], self.tails[group], self.keep_blocks
        if head >= keep:
            return table[max(head, tail) :]
        return table[head:keep] + table[max(tail, keep) :]

    def live_indices(self, group: int) -> list[int]:
        """The tables' indices of `live`."""
        size, head, tail, keep = len(self.tables[group]), self.heads[group], self.tails[group], self.keep_blocks
        if head >= keep:
            return list(range(max(head, tail), size))
        return [*range(head, min(keep, size)), *range(max(tail, keep), size)]

    def held(self, group: int) -> list[int]:
        """Every reference of this group: `live` and the sources of copies that are not done yet."""
        if not self.tables:
            return []
        return self.live(group) + [copy.source for copy in self.copies if copy.group == group]
