"""A row program's ops as loop nests: what one loop over elements can do, between which threads have to wait for each other.

Element i of a nest is always the same thread's: it belongs to span i / width, a span to `unit` threads of one or more simdgroups, and in
it the unit's threads take turns. So ops on the same elements need no barrier between them, and neither do two nests of equal domains.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from metalstep.kernels.gpu.row_values import Op, Read, Value, embedding_slots, layout_of, places

LANES = 32  # of a simdgroup


VECTORS = 4096  # elements of the threadgroup's memory for vectors that are encoded: a simdgroup has one at a time
CACHE_WRITES = ("write_keys", "write_values", "encode_keys", "encode_values")
ENCODES = CACHE_WRITES[2:]


class Domain(NamedTuple):
    """`spans` spans of `width` elements, each for `unit` threads. unit 1: one thread alone, in order. groups: how many simdgroups have
    spans, 0: all of them; first: the one with the first span. run: elements side by side that a thread has at a time."""

    width: int
    spans: int
    unit: int
    groups: int = 0
    first: int = 0
    run: int = 1


def domain(n: int, width: int, threads: int, run: int = 1) -> Domain:
    """Spans for whole simdgroups: one each, or a power of two when there are more simdgroups than spans and elements enough. A single span
    is for all threads where these have runs of elements, of which each then has at least one."""
    spans, unit = n // width, LANES
    if run > 1 and spans == 1 and threads > LANES and width > threads and width % run == 0:
        return Domain(width, 1, threads, run=run)
    while spans * unit * 2 <= threads and unit < width:
        unit *= 2
    if spans == 1 and unit < width:
        unit = threads  # which may be no power of two
    return Domain(width, spans, unit)


# What an access touches: an element per index of the nest (a key: equal keys are equal elements), or any of its elements (no key).
@dataclass
class Access:
    """target: the root of a value, or a slot. places: exactly which elements, when that is known and worth it."""

    target: Value | int
    write: bool
    key: tuple[Any, ...] | None = None
    places: np.ndarray | None = None


@dataclass
class Pass:
    """One loop over the elements: ops with the stage of each that happens here, then at most one op's sum over each span.

    wait: lanes of a simdgroup have to see each other's elements of the passes before. encode: the op whose span is encoded behind it.
    """

    steps: list[tuple[Op, int]] = field(default_factory=list)
    total: tuple[Op, int] | None = None
    wait: bool = False
    encode: Op | None = None


@dataclass(eq=False)
class Nest:
    """Passes over the same n elements. domain: None while every op may use any."""

    n: int
    domain: Domain | None = None
    passes: list[Pass] = field(default_factory=lambda: [Pass()])
    accesses: list[Access] = field(default_factory=list)


STAGES = {"rms_norm": 1, "layer_norm": 2, "softmax": 2, "reduce": 1}  # sums over a span before the last stage


class Aliases:
    """Which slots may be the same memory. slots: pairs of different ones that are; None: any two."""

    def __init__(self, slots: frozenset[tuple[int, int]] | None):
        self._slots = slots

    def same(self, a: int, b: int) -> bool:
        return a == b or self._slots is None or (a, b) in self._slots or (b, a) in self._slots


def buffer_key(instr: Any, offset: int = 0) -> tuple[Any, ...]:
    """Which element of the buffer an index of a LOAD or STORE is."""
    return instr.rows, instr.row_stride, layout_of(instr), instr.offset + offset, instr.n


def conflict(a: Access, b: Access, aliases: Aliases, ordered: bool = False) -> bool:
    """Whether one changes what the other touches, in a way that threads have to wait for; or, `ordered`, in any way."""
    if not (a.write or b.write):
        return False
    if isinstance(a.target, int) != isinstance(b.target, int):
        return False
    if isinstance(a.target, int):
        assert isinstance(b.target, int)
        if not aliases.same(a.target, b.target):
            return False
        if a.target == b.target and a.key is not None and b.key is not None:
            if a.key[:4] == b.key[:4]:
                return ordered
            if a.key[:3] == b.key[:3] and (a.key[3] + a.key[4] <= b.key[3] or b.key[3] + b.key[4] <= a.key[3]):
                return False  # other elements of the same row
        return True
    if a.target is not b.target or (a.key is not None and a.key == b.key and not ordered):
        return False
    if a.places is not None and b.places is not None:
        return bool(np.intersect1d(a.places, b.places).size)
    return True


def read_access(read: Read, aligned: bool) -> Access:
    value = read.value
    assert value is not None
    if value.lazy:
        instr = value.load
        return Access(instr.slot, False, buffer_key(instr, read.offset) if aligned else None)
    return Access(value.root, False, ("value", read.offset) if aligned else None)


def aligned_operands(op: Op) -> list[bool]:
    """For each operand whether op reads, for each index, the element of that index."""
    if op.kind in ("gather", "rope", "rope_angles"):
        return [False] * len(op.operands)
    if op.width:
        return [True, op.width == op.n, op.width == op.n]
    return [True] * len(op.operands)


def scatter_places(op: Op) -> np.ndarray:
    return op.shift + places(op.instr)


def accesses(op: Op) -> list[Access]:
    """All that op reads and writes, but its own temporary."""
    result = [
        read_access(read, aligned)
        for read, aligned in zip(op.operands, aligned_operands(op), strict=False)
        if read is not None and read.value is not None
    ]
    result += [read_access(read, False) for _, _, read in op.pieces if read is not None]
    if op.kind == "store":
        result.append(Access(op.instr.slot, True, buffer_key(op.instr)))
    elif op.kind in CACHE_WRITES:
        result.append(Access(op.instr.slot if op.kind.endswith("keys") else op.instr.slot2, True))
    elif op.kind == "embedding":
        result += [Access(slot, False) for slot in embedding_slots(op.instr)]
    elif op.kind == "load":
        result.append(Access(op.instr.slot, False, buffer_key(op.instr)))
    elif op.kind == "scatter":
        assert op.result is not None
        result.append(Access(op.result.root, True, None, scatter_places(op)))
    if op.result is not None and op.kind != "scatter":
        result.append(Access(op.result.root, True, None if op.kind == "reduce" else ("value", 0)))
    return result


def in_order(op: Op) -> bool:
    """Whether a scatter names a place twice, so that one thread has to do it."""
    return op.kind == "scatter" and len(np.unique(scatter_places(op))) != op.n


def hold_early(ops: list[Op], aliases: Aliases) -> None:
    """Marks the LOADs whose buffer a later op changes before they are last read."""
    uses: dict[Value, list[tuple[int, Op]]] = {}
    for at, op in enumerate(ops):
        for read in op.reads():
            assert read.value is not None
            uses.setdefault(read.value, []).append((at, op))
    for at, op in enumerate(ops):
        value = op.result
        if value is None or value.load is None:
            continue
        for later, writer in enumerate(ops[at + 1 :], at + 1):
            written = [a for a in accesses(writer) if a.write and isinstance(a.target, int) and aliases.same(a.target, op.instr.slot)]
            if not written:
                continue
            own = [read_access(r, writer.kind in ("store", *CACHE_WRITES)) for r in writer.reads() if r.value is value]
            clash = any(conflict(r, w, aliases) for r in own for w in written)
            if clash or any(use > later for use, _ in uses.get(value, [])):
                value.eager = True


class Fuser:
    """Puts ops, in order, into as few nests as their barriers allow."""

    def __init__(self, threads: int, aliases: Aliases, vector: int = 0, run: int = 1):
        """vector: elements of the longest one that is encoded. run: see Domain."""
        self.nests: list[Nest] = []
        self._threads = threads
        self._run = run
        self._vector = vector
        self._aliases = aliases
        self._nest_of: dict[Value, Nest] = {}

    def add(self, op: Op) -> None:
        if op.result is not None and op.result.lazy:
            return  # read where it is used
        nest = self._place(op)
        if op.width and nest.domain is None:
            nest.domain = self._spans(op)
        if op.kind in ENCODES:
            if nest.passes[-1].encode is not None:
                nest.passes.append(Pass())
            nest.passes[-1].encode = op
        stages = STAGES.get(op.kind, 0)
        for stage in range(stages):
            nest.passes[-1].steps.append((op, stage))
            nest.passes[-1].total = (op, stage)
            nest.passes.append(Pass())
        if op.kind != "reduce":
            nest.passes[-1].steps.append((op, stages))
        nest.accesses += accesses(op)
        if op.result is not None:
            self._nest_of[op.result] = nest

    def finish(self) -> list[Nest]:
        for nest in self.nests:
            nest.domain = nest.domain or domain(nest.n, nest.n, self._threads, self._run)
            while nest.passes and not nest.passes[-1].steps:
                nest.passes.pop()
        return self.nests

    def _spans(self, op: Op) -> Domain:
        """Where op sums up or encodes spans of its elements."""
        if op.kind not in ENCODES:
            return domain(op.n, op.width, self._threads, self._run)
        spans, there, groups = op.n // op.width, self._threads // LANES, VECTORS // self._vector
        x = op.operands[0]
        if op.kind == "encode_values" and 2 * spans <= min(there, groups) and x is not None and x.value is not None and x.value.lazy:
            return Domain(op.width, spans, LANES, 0, spans)  # at the same time as the keys
        return Domain(op.width, spans, LANES, groups if groups < min(spans, there) else 0)

    def _place(self, op: Op) -> Nest:
        """The last nest that can take op, or a new one as early as can be, so that a barrier serves many: behind what it depends on."""
        if op.kind in ENCODES and self._spans(op).first:
            return self._open(op, len(self.nests))  # beside the keys, not before something that has to wait for it
        mine, at = accesses(op), len(self.nests)
        for nest in reversed(self.nests):
            if self._joins(nest, op):
                return nest
            if any(conflict(a, b, self._aliases, ordered=True) for a in mine for b in nest.accesses):
                break
            at -= 1
        return self._open(op, at)

    def _open(self, op: Op, at: int) -> Nest:
        nest = Nest(op.n)
        if in_order(op):
            nest.domain = Domain(op.n, 1, 1)
        elif op.kind == "rope" and op.operands[0] is not None and op.operands[0].value is not None:
            before = self._nest_of.get(op.operands[0].value)
            if before is not None and before.n == op.n and before.domain is not None and before.domain.width == op.instr.inner:
                nest.domain = before.domain  # lanes then wait for lanes of their own simdgroup alone
        self.nests.insert(at, nest)
        return nest

    def _joins(self, nest: Nest, op: Op) -> bool:
        if nest.n != op.n or in_order(op) or (nest.domain is not None and nest.domain.unit == 1):
            return False
        if op.width and nest.domain is not None and nest.domain.width != op.width:
            return False
        if op.kind in ENCODES and nest.domain is not None and nest.domain != self._spans(op):
            return False
        clashes = [
            mine for mine in accesses(op) if any(conflict(mine, theirs, self._aliases) for theirs in nest.accesses)
        ]
        if not clashes:
            return True
        # A rotation reads elements of its own head: those of its own simdgroup, where that has the whole head.
        spans = domain(op.n, op.instr.inner, self._threads, self._run) if op.kind == "rope" else None
        if spans is None or spans.unit != LANES or (nest.domain is not None and nest.domain != spans):
            return False
        operand = op.operands[0]
        assert operand is not None
        for mine in clashes:
            own_head = operand.value is not None and not operand.value.lazy and operand.offset == 0 and mine.target is operand.value.root
            if not own_head or any(
                conflict(mine, theirs, self._aliases) and theirs.key is None for theirs in nest.accesses
            ):
                return False
        nest.domain = spans
        if any(step for step in nest.passes[-1].steps):
            nest.passes.append(Pass())
        nest.passes[-1].wait = True
        return True


def fused(ops: list[Op], threads: int, aliases: Aliases, run: int = 1) -> list[Nest]:
    """The nests of `ops`. run: see Domain."""
    hold_early(ops, aliases)
    fuser = Fuser(threads, aliases, longest_vector(ops), run)
    for op in ops:
        fuser.add(op)
    return fuser.finish()


def longest_vector(ops: list[Op]) -> int:
    """Elements of the longest vector that is encoded, 0 if none is."""
    return max((op.width for op in ops if op.kind in ENCODES), default=0)


def widest(ops: list[Op]) -> int:
    """Elements of the largest op."""
    return max((op.n for op in ops if not (op.result is not None and op.result.lazy)), default=1)


