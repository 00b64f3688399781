"""The block pool against a model that keeps who holds what in plain lists."""
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from metalstep.scheduler import BlockPool


class PoolLaws(RuleBasedStateMachine):
    @initialize(size=st.integers(1, 12))
    def start(self, size):
        self.pool, self.size = BlockPool(size), size
        self.held: list[list[int]] = []
        self.digests: dict[int, bytes] = {}  # of blocks that can be found
        self.released: list[int] = []  # findable free blocks, least recently held first
        self.names = 0

    def free(self):
        return [b for b in range(self.size) if not any(b in blocks for blocks in self.held)]

    @rule(count=st.integers(0, 6))
    def allocate(self, count):
        free, findable = self.free(), list(self.released)
        got = self.pool.allocate(count)
        if count > len(free):
            assert got is None
            return
        assert len(set(got)) == count and set(got) <= set(free)
        evicted = findable[: max(0, count - (len(free) - len(findable)))]
        assert set(got) & set(findable) == set(evicted), "blank blocks go first, then the least recently held"
        for block in evicted:
            assert self.pool.find(self.digests.pop(block)) is None
            self.released.remove(block)
        self.held.append(got)

    @rule(data=st.data())
    def share(self, data):
        blocks = sorted({b for blocks in self.held for b in blocks} | set(self.released))
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            self.pool.share(block)
            if block in self.released:
                self.released.remove(block)
            self.held.append([block])

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.release(blocks)
            free = self.free()
            self.released += [b for b in reversed(blocks) if b in free and b in self.digests]

    @rule(data=st.data(), again=st.booleans())
    def publish(self, data, again):
        blocks = sorted({b for blocks in self.held for b in blocks})
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            known = sorted(self.digests.values())
            self.names += 1
            digest = data.draw(st.sampled_from(known)) if again and known else b"%04d" % self.names
            self.pool.publish(block, digest)
            if block not in self.digests and digest not in known:
                self.digests[block] = digest

    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.integers(0, self.size - 1))
        self.pool.forget(block)
        self.digests.pop(block, None)
        if block in self.released:
            self.released.remove(block)

    @rule()
    def rebuild(self):
        self.pool.rebuild(iter(self.held))
        self.digests, self.released = {}, []

    @invariant()
    def agrees(self):
        if hasattr(self, "pool"):
            self.pool.check(self.held)
            assert self.pool.free_count == len(self.free())
            for block in range(self.size):
                assert self.pool.published(block) == (block in self.digests)
                assert self.pool.references(block) == sum(blocks.count(block) for blocks in self.held)
            for block, digest in self.digests.items():
                assert self.pool.find(digest) == block


PoolLaws.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPoolLaws = PoolLaws.TestCase


def test_the_tail_of_a_sequence_is_evicted_before_its_head():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for i, block in enumerate(blocks):
        pool.publish(block, bytes([i]))
    pool.release(blocks)
    assert pool.allocate(2) == [blocks[2], blocks[1]]
    assert pool.find(bytes([0])) == blocks[0]


def test_wrong_calls_say_what_is_wrong():
    with pytest.raises(ValueError, match="has 0 blocks, expected at least 1"):
        BlockPool(0)
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="block 1 is shared but holds nothing"):
        pool.share(1)
    with pytest.raises(ValueError, match="block 0 is published but nobody holds it"):
        pool.publish(0, b"")
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="released but nobody holds it"):
        pool.release(blocks)


def test_check_finds_a_lost_block_and_a_wrong_count():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="references, holders"):
        pool.check([])
    pool._blank.clear()
    with pytest.raises(AssertionError, match="expected exactly one"):
        pool.check([blocks])
