"""The ids of one group's KV blocks: who holds them, which are free, and which still hold something worth finding."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Blocks 0..num_blocks-1. A block is held by one or more references, or free.

    A free block with a digest can still be found; it is taken for something new only when no blank one is left, the least
    recently held first. Every method but `check` and `rebuild` costs O(blocks named). After an exception out of any method
    (an interrupt), `rebuild` makes the pool whole again.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"a block pool has {num_blocks} blocks, expected at least 1; give the KV cache more memory")
        self.num_blocks = num_blocks
        self.rebuild(())

    @property
    def free_count(self) -> int:
        """Blocks that nobody holds, with a digest or without."""
        return len(self._blank) + len(self._findable)

    def references(self, block: int) -> int:
        return self._references[block]

    def published(self, block: int) -> bool:
        return self._digests[block] is not None

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing changed) when fewer are free."""
        blank, references = self._blank, self._references
        if count > len(blank) + len(self._findable):
            return None
        taken = []
        for _ in range(count):
            if blank:
                block = blank.pop()
            else:
                block, _ = self._findable.popitem(last=False)
                self.forget(block)
            references[block] = 1
            taken.append(block)
        return taken

    def share(self, block: int) -> None:
        """One more reference to a block that is held or findable."""
        if self._references[block] == 0:
            if block not in self._findable:
                raise ValueError(f"block {block} is shared but holds nothing; share a block that is held or was found")
            del self._findable[block]
        self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One reference less to each. The last one is evicted first: a sequence's tail is of no use without its head."""
        references = self._references
        for block in reversed(blocks):
            left = references[block] - 1
            if left < 0:
                raise ValueError(f"block {block} is released but nobody holds it; release each reference once")
            references[block] = left
            if left == 0:
                if self._digests[block] is None:
                    self._blank.append(block)
                else:
                    self._findable[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Make a held block findable. The first block published under a digest stays the one that is found."""
        if self._references[block] == 0:
            raise ValueError(f"block {block} is published but nobody holds it; publish before the release")
        if self._digests[block] is None and digest not in self._blocks:
            self._digests[block] = digest
            self._blocks[digest] = block

    def forget(self, block: int) -> None:
        """The block can no longer be found: it is about to hold something else."""
        digest = self._digests[block]
        if digest is not None:
            self._digests[block] = None
            del self._blocks[digest]
            if block in self._findable:
                del self._findable[block]
                self._blank.append(block)

    def find(self, digest: bytes) -> int | None:
        """The block published under `digest`, held or free. `share` it before anything is allocated."""
        return self._blocks.get(digest)

    def rebuild(self, held: Iterable[list[int]]) -> None:
        """Whatever state the pool is in: exactly `held` is held, once per mention, and nothing can be found.

        An interrupted call may have left a digest on a block with other content, so all digests go.
        """
        references = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                references[block] += 1
        self._references = references
        self._digests: list[bytes | None] = [None] * self.num_blocks
        self._blocks: dict[bytes, int] = {}
        self._findable: OrderedDict[int, None] = OrderedDict()  # free with a digest, least recently held first
        self._blank = [block for block in range(self.num_blocks - 1, -1, -1) if not references[block]]  # taken from the end

    def check(self, held: Iterable[list[int]] | None = None) -> None:
        """Raises: AssertionError when a block is lost, counted twice, or (with `held`) counted otherwise than held."""
        blank, findable = set(self._blank), set(self._findable)
        assert len(blank) == len(self._blank), "a block is twice in the list of blank ones"
        for block, (count, digest) in enumerate(zip(self._references, self._digests, strict=True)):
            assert count >= 0, f"block {block} has {count} references"
            places = [count > 0, block in blank, block in findable]
            assert sum(places) == 1, f"block {block} is (held, blank, findable) = {places}, expected exactly one"
            assert block not in blank or digest is None, f"blank block {block} has a digest"
            assert block not in findable or digest is not None, f"findable block {block} has no digest"
            assert digest is None or self._blocks.get(digest) == block, f"block {block}'s digest finds another block"
        assert len(self._blocks) == sum(digest is not None for digest in self._digests), "a digest finds a block that lost it"
        if held is not None:
            counts = [0] * self.num_blocks
            for blocks in held:
                for block in blocks:
                    counts[block] += 1
            wrong = {b: (r, c) for b, (r, c) in enumerate(zip(self._references, counts, strict=True)) if r != c}
            assert not wrong, f"blocks with (references, holders) that differ: {wrong}"
