"""The KV cache's bookkeeping: a block pool per group of layers, moved together."""
from __future__ import annotations

import sys
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from metalstep.scheduler.block_pool import BlockPool
from metalstep.scheduler.block_tables import BlockCopy, BlockTables
from metalstep.scheduler.prefix_cache import chain_digests
from metalstep.scheduler.sequence import Sequence


@dataclass(frozen=True)
class GroupSpec:
    """Layers that share block tables. window: positions that a row of theirs sees, itself included; None: all."""

    window: int | None
    num_blocks: int

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a group's window is {self.window} positions, expected at least 1, or None for all")


class KVBlocks:
    """Blocks of `block_size` tokens for sequences (and prompt caches) in every group at once. Holds no keys or values.

    max_rows: rows of one sequence in one step, at most; a window's blocks are given back only between steps.
    After an exception out of any method (an interrupt), `rebuild` makes it whole again.
    """

    def __init__(self, groups: Items[GroupSpec], block_size: int = 16, max_rows: int = 512):
        if not groups:
            raise ValueError("the KV cache has no groups, expected one per attention window; pass at least one GroupSpec")
        self.groups = tuple(groups)
        self.block_size = block_size
        self.max_rows = max_rows
        self.pools = [BlockPool(group.num_blocks) for group in self.groups]
        self.freed = 0  # grows whenever blocks are given back: what did not fit may fit now

    # ---- room ---------------------------------------------------------------------------------------------------------
    @property
    def capacity_tokens(self) -> int:
        """Tokens of one sequence without a window of its own that fit when nothing else is held; sys.maxsize: no limit."""
        tokens = sys.maxsize
        for group in self.groups:
            bound = None if group.window is None else self._span_blocks(group.window)
            if bound is None or group.num_blocks < bound:
                tokens = min(tokens, group.num_blocks * self.block_size)
        return tokens

    def fits(self, held: BlockTables, tokens: int) -> bool:
        """Whether `tokens` tokens of this sequence fit when nothing else is held."""
        wanted = -(-tokens // self.block_size)
        return all(self._most(held, group, wanted) <= group.num_blocks for group in self.groups)

    def free_counts(self) -> list[int]:
        """Free blocks per group."""
        return [pool.free_count for pool in self.pools]

    def blocks_needed(self, held: BlockTables, tokens: int) -> list[int]:
        """Per group, the blocks that `reserve(held, tokens)` takes.

        Behind a window a sequence never holds more than the window and one step's rows, so it is not given more at once.
        """
        wanted = -(-tokens // self.block_size)
        needed = []
        for index, (group, table) in enumerate(zip(self.groups, held.tables, strict=True)):
            missing = wanted - len(table)
            if group.window is not None or held.window:
                missing = min(missing, self._most(held, group, wanted) - len(table) + held.gone_count(index))
            needed.append(max(0, missing) + (held.borrowed and self._must_copy(held, index)))
        return needed

    def reserve(self, held: BlockTables, tokens: int) -> bool:
        """Blocks for `tokens` tokens in all groups; False, and none taken, when too few are free.

        Behind a window: for the next max_rows tokens at least. A block that is not this sequence's alone and that the next token
        goes into is replaced by a fresh one; `copies` says what to copy.
        """
        if tokens <= held.room and not held.borrowed:
            return True
        self.trim_windows(held)
        needed = self.blocks_needed(held, tokens)
        if not self._free(needed):
            if not (held.borrowed and self._unpublish(held)):
                return False
            needed = self.blocks_needed(held, tokens)
            if not self._free(needed):
                return False
        if held.borrowed:
            self._copy_on_write(held, needed)
        for pool, table, count in zip(self.pools, held.tables, needed, strict=True):
            if count:
                table.extend(pool.allocate(count) or [])
        self._measure(held, held.computed)
        return True

    def open(self, held: BlockTables) -> None:
        """Give it empty tables."""
        count = len(self.groups)
        held.heads = [0] * count
        held.tails = [0] * count
        held.tables = [[] for _ in range(count)]  # after what describes it: see rebuild
        held.keep_blocks = -(-held.keep // self.block_size) if held.window else 0
        held.copies = []
        held.borrowed = False
        held.room = 0
        held.changed = True
        if isinstance(held, Sequence):
            held.published = 0
            held.boundary = (held.computed // self.block_size + 1) * self.block_size

    def release(self, held: BlockTables) -> None:
        """Give everything back and set computed to 0. Published blocks stay findable."""
        for index, pool in enumerate(self.pools):
            if held.tables:
                pool.release(held.held(index))
        held.computed = 0
        self.open(held)
        self.freed += 1

    # ---- the prefix cache -----------------------------------------------------------------------------------------------
    def attach_prefix(self, sequence: Sequence) -> int:
        """Give an empty sequence the longest cached prefix of its tokens, in whole blocks and short of its last token.

        Sets computed to the tokens found, and returns them. Behind a window only the blocks that later rows see need to be cached.
        """
        limit = (len(sequence.tokens) - 1) // self.block_size
        if not sequence.cacheable or limit < 1:
            return 0
        digests = chain_digests(sequence, limit, self.block_size)
        count = self._longest_prefix(sequence, digests)
        if count:
            self._lay_out(sequence, count * self.block_size)
            for index, pool in enumerate(self.pools):
                table = sequence.tables[index]
                for i in sequence.live_indices(index):
                    block = pool.find(digests[i])
                    assert block is not None
                    pool.share(block)
                    table[i] = block
            sequence.published = count
            self._measure(sequence, count * self.block_size)
        return sequence.computed

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks findable that became full."""
        full = sequence.computed // self.block_size
        first = sequence.published
        if sequence.cacheable and full > first:
            digests = chain_digests(sequence, full, self.block_size)
            for index, pool in enumerate(self.pools):
                table = sequence.tables[index]
                for i in range(first, full):
                    if not sequence.gone(index, i):
                        pool.publish(table[i], digests[i])
        sequence.published = full

    # ---- windows --------------------------------------------------------------------------------------------------------
    def trim_windows(self, held: BlockTables) -> None:
        """Give back the blocks that no row from `computed` on can see."""
        for index, group in enumerate(self.groups):
            if group.window is None and not held.window:
                continue
            head, tail = self._behind(held, group, held.computed)
            old_head, old_tail, keep = held.heads[index], held.tails[index], held.keep_blocks
            if head <= old_head and tail <= old_tail:
                continue
            head, tail = max(head, old_head), max(tail, old_tail)
            gone = [i for i in range(old_head, head) if not keep <= i < old_tail]
            gone += range(max(keep, old_tail, head), tail)
            table = held.tables[index]
            blocks = [table[i] for i in gone]
            held.heads[index], held.tails[index] = head, tail
            for i in gone:
                table[i] = 0
            if blocks:
                self.pools[index].release(blocks)
                held.changed = True
                self.freed += 1

    def settle(self, sequence: Sequence) -> None:
        """After a step that filled a block: publish what is full, give back what is out of sight."""
        self.publish(sequence)
        self.trim_windows(sequence)
        sequence.boundary = (sequence.computed // self.block_size + 1) * self.block_size

    # ---- prompt caches, snapshots ---------------------------------------------------------------------------------------
    def can_continue(self, source: BlockTables, target: BlockTables, tokens: int) -> bool:
        """Whether `source` still has every block that rows of `target` from position `tokens` on see."""
        if tokens > source.computed:
            return False
        wanted = self.layout(target, tokens)
        return not any(source.gone(g, i) for g in range(len(self.groups)) for i in wanted.live_indices(g))

    def layout(self, held: BlockTables, tokens: int) -> BlockTables:
        """The tables that `held`, with its window, has when it is restored at `tokens` computed tokens. Every block is 0, none is held."""
        layout = BlockTables(window=held.window, keep=held.keep)
        self.open(layout)
        self._lay_out(layout, tokens)
        layout.computed = tokens
        return layout

    def fork(self, source: BlockTables, target: BlockTables, tokens: int | None = None) -> None:
        """`target`, which holds nothing, starts with the first `tokens` tokens of `source` (None: all). They share blocks.

        To shorten a prompt cache, fork it, put the fork in its place and release the old one.
        Raises: ValueError when there are fewer tokens, or windows have given back what `target` would see.
        """
        tokens = source.computed if tokens is None else tokens
        if not 0 <= tokens <= source.computed:
            raise ValueError(f"the first {tokens} of {source.computed} cached tokens are asked for; ask for at most {source.computed}")
        if not self.can_continue(source, target, tokens):
            raise ValueError(
                f"a sequence cannot continue from token {tokens} of {source.computed} cached ones, because blocks behind "
                "an attention window are gone; start again without the prompt cache"
            )
        self.open(target)
        self._lay_out(target, tokens)
        for index, pool in enumerate(self.pools):
            for i in target.live_indices(index):
                pool.share(source.tables[index][i])
                target.tables[index][i] = source.tables[index][i]
        target.borrowed = tokens % self.block_size != 0
        self._measure(target, tokens)

    def filled(self, held: BlockTables, group: int) -> list[int]:
        """The blocks that hold computed tokens which later rows see, in order of position: what a snapshot saves."""
        blocks = -(-held.computed // self.block_size)
        return [held.tables[group][i] for i in held.live_indices(group) if i < blocks]

    def restore(self, sequence: Sequence) -> bool:
        """Fresh blocks for all computed tokens of a sequence that holds none; False, and none taken, when too few are free.

        `filled` gives as many as when the sequence was evicted, in the same order.
        """
        computed = sequence.computed
        self.open(sequence)
        self._lay_out(sequence, computed)
        indices = [sequence.live_indices(index) for index in range(len(self.groups))]
        if not self._free([len(i) for i in indices]):
            self.open(sequence)
            return False
        for index, pool in enumerate(self.pools):
            for i, block in zip(indices[index], pool.allocate(len(indices[index])) or [], strict=True):
                sequence.tables[index][i] = block
        sequence.published = computed // self.block_size
        self._measure(sequence, computed)
        return True

    def copied(self, held: BlockTables) -> None:
        """The copies in `held.copies` are done: their sources are no longer needed."""
        copies, held.copies = held.copies, []
        for copy in copies:
            self.pools[copy.group].release([copy.source])
        self.freed += 1

    def rebuild(self, held: Iterable[BlockTables]) -> None:
        """Exactly `held` holds blocks, whatever happened before. Nothing can be found in the prefix cache."""
        held = list(held)
        for index, pool in enumerate(self.pools):
            for tables in held:
                for i in range(len(tables.tables[index]) if tables.tables else 0):
                    if tables.gone(index, i):
                        tables.tables[index][i] = 0
            pool.rebuild(tables.held(index) for tables in held)
        self.freed += 1

    def check(self, held: Iterable[BlockTables]) -> None:
        """Raises: AssertionError unless `held` are all that hold blocks and each has what its later rows see."""
        held = list(held)
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            pool.check([tables.held(index) for tables in held])
            for tables in held:
                if not any(tables.tables):
                    continue
                head, tail = self._behind(tables, group, tables.computed)
                table = tables.tables[index]
                assert tables.heads[index] <= head and tables.tails[index] <= tail, "a block is gone that a later row sees"
                assert tables.room <= len(table) * self.block_size, f"room for {tables.room} tokens in {len(table)} blocks"
                assert tables.gone_count(index) + len(tables.live(index)) == len(table), "entries are neither gone nor live"
                assert all(not table[i] for i in range(len(table)) if tables.gone(index, i)), "an entry is gone but not 0"
                assert tables.computed <= tables.room, f"{tables.computed} tokens are computed in room for {tables.room}"

    # ---- inner workings -------------------------------------------------------------------------------------------------
    def _span_blocks(self, positions: int) -> int:
        """Blocks, wherever they start, for the last `positions` that a row sees, a step's rows and the token behind them."""
        return -(-(positions - 1 + self.max_rows) // self.block_size) + 1

    def _most(self, held: BlockTables, group: GroupSpec, wanted: int) -> int:
        """Blocks that `held` ever has at once in a table of `wanted` entries."""
        if group.window is not None:
            wanted = min(wanted, self._span_blocks(group.window))
        if held.window:
            wanted = min(wanted, -(-held.keep // self.block_size) + self._span_blocks(held.window - held.keep))
        return wanted

    def _behind(self, held: BlockTables, group: GroupSpec, position: int) -> tuple[int, int]:
        """heads and tails of a table when the next row is at `position`."""
        first = own = 0  # positions from which on the group's window shows all, and the sequence's but for what it keeps
        if group.window is not None:
            first = max(0, position - group.window + 1)
        if held.window:
            own = max(0, position - (held.window - held.keep) + 1)
        tail = own // self.block_size
        if first >= held.keep:  # nothing of what is kept is seen any more
            first = max(first, own)
        return first // self.block_size, tail if tail > held.keep_blocks else 0

    def _lay_out(self, held: BlockTables, computed: int) -> None:
        """Tables of zeros for `computed` tokens, with what is behind the windows marked as gone."""
        blocks = -(-computed // self.block_size)
        for index, group in enumerate(self.groups):
            held.tables[index] = [0] * blocks
            held.heads[index], held.tails[index] = self._behind(held, group, computed)

    def _measure(self, held: BlockTables, computed: int) -> None:
        """Its tables are filled for `computed` tokens. That is set last: an interrupt before leaves tables that nobody takes for whole."""
        held.room = min(map(len, held.tables)) * self.block_size
        held.changed = True
        if isinstance(held, Sequence):
            held.boundary = (computed // self.block_size + 1) * self.block_size
        held.computed = computed

    def _free(self, needed: list[int]) -> bool:
        return all(count <= pool.free_count for pool, count in zip(self.pools, needed, strict=True))

    def _must_copy(self, held: BlockTables, index: int) -> bool:
        block = held.tables[index][held.computed // self.block_size]
        return self.pools[index].references(block) > 1 or self.pools[index].published(block)

    def _unpublish(self, held: BlockTables) -> bool:
        """Where a block is held by `held` alone, take it out of the prefix cache instead of copying it."""
        done = False
        for index, pool in enumerate(self.pools):
            block = held.tables[index][held.computed // self.block_size]
            if pool.references(block) == 1 and pool.published(block):
                pool.forget(block)
                done = True
        return done

    def _copy_on_write(self, held: BlockTables, needed: list[int]) -> None:
        """Replace the blocks that the next token goes into where they are not `held`'s alone; `needed` counts down."""
        at = held.computed // self.block_size
        for index, pool in enumerate(self.pools):
            if self._must_copy(held, index):
                (target,) = pool.allocate(1) or []
                held.copies.append(BlockCopy(index, held.tables[index][at], target))
                held.tables[index][at] = target
                needed[index] -= 1
        held.borrowed = False

    def _longest_prefix(self, sequence: Sequence, digests: list[bytes]) -> int:
        """Full blocks of the longest prefix whose visible blocks are all cached in every group."""
        limit = len(digests)
        windowed = []
        for group, pool in zip(self.groups, self.pools, strict=True):
            if group.window is not None or sequence.window:
                windowed.append((group, pool))
                continue
            limit = next((i for i in range(limit) if pool.find(digests[i]) is None), limit)
        if not windowed:
            return limit
        tables = []
        for group, pool in windowed:
            cached = [pool.find(digest) is not None for digest in digests[:limit]]
            runs, run = [0], 0  # runs[n]: cached blocks in a row right before block n
            for hit in cached:
                run = run + 1 if hit else 0
                runs.append(run)
            tables.append((group, cached, runs))
        keep = sequence.keep_blocks
        for count in range(limit, 0, -1):
            for group, cached, runs in tables:
                head, tail = self._behind(sequence, group, count * self.block_size)
                first = max(head, tail) if head >= keep else max(tail, keep)
                if runs[count] < count - first or not all(cached[head : min(keep, count)]):
                    break
            else:
                return count
        return 0
