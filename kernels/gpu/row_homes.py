"""Where a row program keeps its values between loops: threads' own registers, threadgroup memory, or a scratch row of the device."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from metalstep.kernels import params
from metalstep.kernels.gpu.row_nests import LANES, STAGES, Aliases, Domain, Nest, aligned_operands
from metalstep.kernels.gpu.row_values import Op, Read, Value, planes_of

SHARED_BYTES = 32768  # threadgroup memory of every Metal device
HELD = 8  # elements of a value that a thread keeps in registers
FIRST = 32  # elements of all values that a thread reads before it does anything
EARLY = 4  # elements of a LOAD that a thread reads before the barrier behind which it needs them: the wait hides the read


def per_thread(d: Domain) -> int:
    """Elements of a span that each of its threads has."""
    return d.run * -(-d.width // (d.run * d.unit))


def rounds(d: Domain, threads: int) -> int:
    """Spans, one after the other, of the same threads."""
    return -(-d.spans // d.groups) if d.groups else -(-d.spans * d.unit // threads)


def step_reads(op: Op, stage: int) -> Iterator[tuple[Read, bool]]:
    """The values that a stage of op reads, and whether each index reads its own element."""
    last = STAGES.get(op.kind, 0)
    if stage == last and op.temporary is not None:
        yield Read(op.temporary), True
        return
    for i, (read, aligned) in enumerate(zip(op.operands, aligned_operands(op), strict=False)):
        if read is not None and read.value is not None and (i == 0 or stage == last):
            yield read, aligned
    for _, _, read in op.pieces:
        if read is not None:
            yield read, False


def step_result(op: Op, stage: int) -> Value | None:
    """The value that a stage of op computes."""
    last = STAGES.get(op.kind, 0)
    if op.temporary is not None and stage == last - 1:
        return op.temporary
    return op.result if stage == last or (op.kind == "reduce" and stage == 0) else None


@dataclass(frozen=True)
class Place:
    """Elements from `start` on in the threadgroup's memory, or (scratch) in the row's scratch memory."""

    scratch: bool
    start: int


@dataclass
class Homes:
    """held: (value, offset, nest) of which each thread keeps its elements; nest None: in all. early: those of them that the nest's first
    pass reads for the later ones. weights, first: those that the kernel reads before anything else, before and after it waits for the
    launch in front of it, with the domain that divides them. memory: by root."""

    early: dict[Nest, list[Read]] = field(default_factory=dict)
    weights: dict[tuple[Value, int], Domain] = field(default_factory=dict)
    first: dict[tuple[Value, int], Domain] = field(default_factory=dict)
    held: set[tuple[Value, int, Nest | None]] = field(default_factory=set)
    memory: dict[Value, Place] = field(default_factory=dict)
    shared: int = 0  # elements
    scratch: int = 0  # elements of a row


@dataclass
class _Life:
    nest: int  # where it is computed
    step: int
    uses: list[tuple[int, int, bool, int]] = field(default_factory=list)  # nest, pass, aligned, offset


def homes(nests: list[Nest], threads: int, reserved: int, aliases: Aliases, reads_first: bool = False) -> Homes:
    """reserved: elements of the threadgroup's memory that totals take. reads_first: LOADs are read together as far as registers go; what is
    the same for every row is no launch's result and is read even before the kernel waits for one."""
    result = Homes()
    lives: dict[Value, _Life] = {}
    lazy: dict[tuple[Value, int, int], set[int]] = {}
    in_memory: set[Value] = set()
    for at, nest in enumerate(nests):
        for step, each in enumerate(nest.passes):
            for op, stage in each.steps:
                for read, aligned in step_reads(op, stage):
                    assert read.value is not None
                    if read.value.lazy:
                        if aligned:
                            lazy.setdefault((read.value, read.offset, at), set()).add(step)
                    else:
                        lives[read.value].uses.append((at, step, aligned, read.offset))
                value = step_result(op, stage)
                if value is not None and value not in lives:
                    lives[value] = _Life(at, step)
                    if op.kind in ("scatter", "reduce"):
                        in_memory.add(value.root)
                if op.into is not None and op.into.value is not None:
                    in_memory.add(op.into.value.root)
    for (value, offset, at), steps in lazy.items():
        d = nests[at].domain
        assert d is not None
        nest = nests[at]
        is_weight = d.unit > LANES and d.spans == 1 and per_thread(d) <= HELD and _is_weight(value, nests, aliases)
        is_row = d.unit >= LANES and not d.groups and not d.first and per_thread(d) <= EARLY and rounds(d, threads) == 1
        is_row = is_row and sum(map(per_thread, result.first.values())) + per_thread(d) <= FIRST and _is_only_read(value, nests, aliases)
        group = result.weights if is_weight else result.first if is_row else None
        if reads_first and group is not None and group.setdefault((value, offset), d) == d:
            result.held.add((value, offset, None))
            continue
        if len(steps) > 1 and per_thread(d) <= HELD:
            result.held.add((value, offset, nest))
        elif d.unit > LANES and min(steps) > 0 and per_thread(d) <= min(EARLY, HELD) and not _is_written(value.load.slot, nest, aliases):
            result.held.add((value, offset, nest))
            result.early.setdefault(nest, []).append(Read(value, offset))
    for value, life in lives.items():
        if value.root in in_memory or not life.uses:
            continue
        nest = nests[life.nest]
        d = nest.domain
        assert d is not None
        if any(not aligned or offset for _, _, aligned, offset in life.uses) or any(nests[u[0]].domain != d for u in life.uses):
            in_memory.add(value)
        elif all(use[0] == life.nest for use in life.uses):
            if all(use[1] == life.step for use in life.uses):
                continue
            if per_thread(d) <= HELD:
                result.held.add((value, 0, nest))
            else:
                in_memory.add(value)
        elif per_thread(d) <= HELD and rounds(d, threads) == 1:
            result.held.add((value, 0, None))
        else:
            in_memory.add(value)
    _allocate(result, lives, in_memory, reserved)
    return result


def _is_weight(value: Value, nests: list[Nest], aliases: Aliases) -> bool:
    """Whether a LOAD's elements are the same for every row, and nothing in the program changes them."""
    same = value.load.rows == params.MS_ROW_SAME and planes_of(value.load) == 1
    return same and _is_only_read(value, nests, aliases)


def _is_only_read(value: Value, nests: list[Nest], aliases: Aliases) -> bool:
    return not any(_is_written(value.load.slot, nest, aliases) for nest in nests)


def _is_written(slot: int, nest: Nest, aliases: Aliases) -> bool:
    """Whether the nest writes a slot's memory: a read of it then stays where it is."""
    return any(a.write and isinstance(a.target, int) and aliases.same(a.target, slot) for a in nest.accesses)


def _allocate(result: Homes, lives: dict[Value, _Life], in_memory: set[Value], reserved: int) -> None:
    """Each value its own memory, or, while that does not fit, values whose nests do not overlap share some; then the largest leave
    for the scratch row. (Who shares memory waits: a barrier more.)"""
    spans: dict[Value, tuple[int, int]] = {}
    for value, life in lives.items():
        if value.root in in_memory:
            ends = [life.nest, *(use[0] for use in life.uses)]
            first, last = spans.get(value.root, (life.nest, life.nest))
            spans[value.root] = min(first, *ends), max(last, *ends)
    shared, scratch = list(spans), []
    for value in shared:
        result.memory[value] = Place(False, result.shared)
        result.shared += -(-value.size // 4) * 4
    if result.shared + reserved <= SHARED_BYTES // 4:
        return
    while True:
        places, size = _first_fit(shared, spans)
        if size + reserved <= SHARED_BYTES // 4:
            break
        largest = max(shared, key=lambda value: value.size)
        shared.remove(largest)
        scratch.append(largest)
    result.memory = {value: Place(False, start) for value, start in places.items()}
    result.shared = size
    places, result.scratch = _first_fit(scratch, spans)
    result.memory |= {value: Place(True, start) for value, start in places.items()}


def _first_fit(values: list[Value], spans: dict[Value, tuple[int, int]]) -> tuple[dict[Value, int], int]:
    """Starts (multiples of 4 elements), and the elements that they take in all."""
    placed: dict[Value, int] = {}
    for value in sorted(values, key=lambda v: (spans[v][0], v.number)):
        first, last = spans[value]
        taken = sorted(
            (start, start + other.size) for other, start in placed.items() if spans[other][0] <= last and first <= spans[other][1]
        )
        at = 0
        for start, end in taken:
            if at + value.size <= start:
                break
            at = max(at, -(-end // 4) * 4)
        placed[value] = at
    return placed, max((start + value.size for value, start in placed.items()), default=0)


