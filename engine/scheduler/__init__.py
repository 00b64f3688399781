"""Continuous batching without a device: block pools, the prefix cache, and who is in the next step."""
from metalstep.scheduler.block_pool import BlockPool
from metalstep.scheduler.block_tables import BlockCopy, BlockTables
from metalstep.scheduler.kv_blocks import GroupSpec, KVBlocks
from metalstep.scheduler.schedule import Entry, Schedule
from metalstep.scheduler.scheduler import Scheduler
from metalstep.scheduler.sequence import Sequence, State

__all__ = [
    "BlockCopy", "BlockPool", "BlockTables", "Entry", "GroupSpec", "KVBlocks", "Schedule", "Scheduler", "Sequence", "State",
]  # fmt: skip
