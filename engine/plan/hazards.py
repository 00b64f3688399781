"""Barriers: a launch waits only where it reads or overwrites what an earlier launch since the last barrier touches."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metalstep.kernels.launch import Buffer


@dataclass(frozen=True)
class Access:
    """What one launch reads and writes."""

    reads: Sequence[Buffer]
    writes: Sequence[Buffer]


def overlap(a: Buffer, b: Buffer) -> bool:
    """Whether two regions share a byte."""
    return a.handle == b.handle and a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def barriers(accesses: Sequence[Access]) -> list[bool]:
    """For each launch, whether a barrier must come before it: read after write, write after read, write after write."""
    needed: list[bool] = []
    reads: list[Buffer] = []
    writes: list[Buffer] = []
    for access in accesses:
        wait = any(overlap(r, w) for r in access.reads for w in writes) or any(
            overlap(w, other) for w in access.writes for other in (*reads, *writes)
        )
        if wait:
            reads, writes = [], []
        needed.append(wait)
        reads.extend(access.reads)
        writes.extend(access.writes)
    return needed
