"""What one run of the model computes: the scheduler's answer to "what now"."""
from __future__ import annotations

from dataclasses import dataclass, field

from metalstep.scheduler.block_tables import BlockCopy
from metalstep.scheduler.sequence import Sequence


@dataclass(slots=True, eq=False)
class Entry:
    """`count` rows of one sequence, from position `first`. Its last `wanted` rows give results."""

    sequence: Sequence
    first: int
    count: int
    wanted: int
    samples: bool  # the last row is that of the last known token: the token behind it is picked
    limit: int  # the sequence may write to positions below this one


@dataclass(slots=True, eq=False)
class Schedule:
    """Entries: decodes by arrival, then prefills by arrival. Valid until the next call of `schedule`.

    Before the step the engine does, in this order: deliver `failed`; make the slots of `admitted`; put back the snapshots of
    `restored`; copy `copies`; write the tables of `grown`.
    """

    entries: list[Entry] = field(default_factory=list)
    steps: int = 1  # decode steps of this run; more than 1 only if every entry is a plain decode
    rows: int = 0  # of all entries
    results: int = 0  # result rows of all entries
    decode: bool = False  # every entry is one row that is sampled
    same: bool = False  # entries are those of the last schedule, object for object, each at its next position
    grown: list[Sequence] = field(default_factory=list)  # in entries, and their tables are not what the last schedule had
    admitted: list[Sequence] = field(default_factory=list)  # got a slot now, for the first time or again
    restored: list[Sequence] = field(default_factory=list)  # of those, the ones whose snapshot goes into their new blocks
    copies: list[BlockCopy] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)  # lost slot and blocks; they wait
    failed: list[Sequence] = field(default_factory=list)  # cannot get blocks though nothing else runs; `finish` them
