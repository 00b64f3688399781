"""A row program's registers as values: each written once, read by name, so that nothing else depends on where a register lies."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.gpu.expressions import EXPRESSIONS, arity
from metalstep.kernels.linear import FLOATS

ELEMENTWISE = frozenset(EXPRESSIONS)
NORMS = (params.MS_OP_RMS_NORM, params.MS_OP_LAYER_NORM)
NAMES = {
    getattr(params, name): name.removeprefix("MS_OP_").lower()
    for name in params._constants
    if name.startswith("MS_OP_")
}  # fmt: skip


@dataclass(eq=False)
class Value:
    """What an op computes: `size` elements of float32.

    load: the LOAD that it is; it is then read from its buffer wherever it is needed, unless `eager`. root: the value whose memory
    holds it: its own, or for the result of a scatter that of what it was scattered into.
    """

    number: int
    size: int
    load: Any = None
    eager: bool = False
    root: Value = field(init=False)

    def __post_init__(self) -> None:
        self.root = self

    @property
    def lazy(self) -> bool:
        return self.load is not None and not self.eager


@dataclass(frozen=True)
class Read:
    """An operand: `value` from element `offset` on, or (value None) the scalar `number`."""

    value: Value | None
    offset: int = 0
    number: float = 0.0


@dataclass(eq=False)
class Op:
    """One step over `n` elements.

    kind: the instruction's name; a KV_WRITE becomes write_keys and write_values, or encode_keys and encode_values where the plane is not
    of floats, and `join` makes one value of pieces, (start, size,
    Read or None) each. operands: a, b, c as far as the instruction has them. into: what a scatter writes into, None if nothing was
    there; shift: where in it the scatter's own places count from. width: of the spans whose elements it sums up or encodes, 0 for none.
    temporary: a softmax's exponentials.
    """

    number: int
    kind: str
    instr: Any
    n: int
    operands: list[Read | None] = field(default_factory=list)
    result: Value | None = None
    into: Read | None = None
    pieces: list[tuple[int, int, Read | None]] = field(default_factory=list)
    width: int = 0
    temporary: Value | None = None
    shift: int = 0

    def reads(self) -> Iterator[Read]:
        """Every operand that is a value."""
        for read in (*self.operands, self.into, *(piece[2] for piece in self.pieces)):
            if read is not None and read.value is not None:
                yield read


class Registers:
    """Which value each element of the scratch row holds at one point of the program."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int, Value, int]] = []  # start, size, value, its element at start; sorted, disjoint

    def write(self, start: int, value: Value, size: int) -> None:
        end, kept = start + size, []
        for at, count, old, first in self._held:
            if at < start:
                kept.append((at, min(count, start - at), old, first))
            if at + count > end:
                cut = max(at, end)
                kept.append((cut, at + count - cut, old, first + cut - at))
        self._held = sorted([*kept, (start, size, value, 0)], key=lambda piece: piece[0])

    def read(self, start: int, size: int) -> list[tuple[int, int, Read | None]]:
        """The pieces of [start, start + size): places counted from its start, sizes, and what is there (None: nothing yet)."""
        pieces: list[tuple[int, int, Read | None]] = []
        at, end = start, start + size
        for first, count, value, offset in self._held:
            if first + count <= at or first >= end:
                continue
            if first > at:
                pieces.append((at - start, first - at, None))
                at = first
            take = min(first + count, end) - at
            pieces.append((at - start, take, Read(value, offset + at - first)))
            at += take
        if at < end:
            pieces.append((at - start, end - at, None))
        return pieces


def extent(offset: int, dims: list[int], strides: list[int]) -> tuple[int, int]:
    """The least and greatest element that a strided copy names."""
    reaches = [(d - 1) * s for d, s in zip(dims, strides, strict=True)]
    return offset + sum(min(r, 0) for r in reaches), offset + sum(max(r, 0) for r in reaches)


def places(instr: Any) -> np.ndarray:
    """The element that each index of a strided copy names, in the order of the indices."""
    index: np.ndarray = np.array(instr.offset, np.int64)
    for length, stride in zip(instr.dims, instr.strides, strict=True):
        index = index[..., None] + np.arange(length, dtype=np.int64) * stride
    return index.ravel()


def planes_of(instr: Any) -> int:
    """How many planes of a buffer a LOAD adds up."""
    return max(instr.dims[0], 1) if instr.op == params.MS_OP_LOAD else 1


def layout_of(instr: Any) -> tuple[int, ...]:
    """What the elements of a LOAD's or STORE's buffer are: those of two are the same only where this is."""
    planes = planes_of(instr)
    return (instr.dtype, planes, instr.dims[1]) if planes > 1 else (instr.dtype,)


def embedding_slots(instr: Any) -> list[int]:
    """The buffers that an EMBEDDING reads: the caller's own rows, the table, and scales and biases if that is packed."""
    planes = 0 if instr.dims[0] >= 16 else 1 if tuple(instr.dims)[:3] in FLOATS.values() else 2
    return [instr.slot2, instr.slot, *list(instr.strides)[:planes]]


def operand_ranges(instr: Any) -> list[tuple[str, int, int]]:
    """(field, start, size) of each register operand that `instr` reads."""
    n, op = instr.n, instr.op
    if op in ELEMENTWISE:
        return [(name, getattr(instr, name), n) for i, name in enumerate("abc"[: arity(op)]) if not instr.imm >> i & 1]
    if op in (params.MS_OP_STORE, params.MS_OP_SCATTER, params.MS_OP_SOFTMAX):
        return [("a", instr.a, n)]
    if op == params.MS_OP_GATHER:
        least, most = extent(instr.offset, list(instr.dims), list(instr.strides))
        return [("a", instr.a + least, most - least + 1)]
    if op == params.MS_OP_ROPE_ANGLES:
        return [] if instr.b == params.MS_NONE else [("b", instr.b, n)]
    if op == params.MS_OP_ROPE:
        return [("a", instr.a, n), ("b", instr.b, 2 * instr.dims[0])]
    if op in NORMS:
        last = "abc" if op == params.MS_OP_LAYER_NORM else "ab"
        weights = [(name, getattr(instr, name), instr.inner) for name in last[1:]]
        return [("a", instr.a, n), *(w for w in weights if w[1] != params.MS_NONE)]
    if op == params.MS_OP_REDUCE:
        return [("a", instr.a, n * instr.inner)]
    if op == params.MS_OP_KV_WRITE:
        return [("a", instr.a, n), ("b", instr.b, instr.dims[0] * instr.dims[2])]
    return []


def result_range(instr: Any) -> tuple[int, int] | None:
    """(start, size) of the registers that `instr` writes; a scatter's reach from its first place to its last."""
    if instr.op in (params.MS_OP_STORE, params.MS_OP_KV_WRITE):
        return None
    if instr.op == params.MS_OP_SCATTER:
        least, most = extent(instr.offset, list(instr.dims), list(instr.strides))
        return instr.dst + least, most - least + 1
    return instr.dst, 2 * instr.n if instr.op == params.MS_OP_ROPE_ANGLES else instr.n


def regions(instrs: Any) -> list[tuple[int, int]]:
    """(start, end) of the parts of the scratch row that no instruction connects: the registers, if none was cut in pieces."""
    ranges = []
    for instr in instrs:
        ranges += [(start, start + size) for _, start, size in operand_ranges(instr)]
        result = result_range(instr)
        if result is not None:
            ranges.append((result[0], sum(result)))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class Reader:
    """Translates instructions, in order, to ops on values."""

    def __init__(self, instrs: Any):
        self.ops: list[Op] = []
        self._registers = Registers()
        self._regions = regions(instrs)
        self._values = 0
        for number, instr in enumerate(instrs):
            self._add(number, instr)

    def value(self, size: int) -> Value:
        self._values += 1
        return Value(self._values - 1, size)

    def _read(self, number: int, instr: Any, start: int, size: int) -> Read:
        """[start, start + size) as one value: pieces of several are joined."""
        pieces = self._registers.read(start, size)
        if len(pieces) == 1 and pieces[0][2] is not None:
            return pieces[0][2]
        joined = self.value(size)
        self.ops.append(Op(number, "join", instr, size, result=joined, pieces=pieces))
        self._registers.write(start, joined, size)
        return Read(joined)

    def _add(self, number: int, instr: Any) -> None:
        kind = NAMES[instr.op]
        reads = {name: self._read(number, instr, start, size) for name, start, size in operand_ranges(instr)}
        if instr.op in ELEMENTWISE:
            for i, name in enumerate("abc"[: arity(instr.op)]):
                if instr.imm >> i & 1:
                    reads[name] = Read(None, 0, getattr(instr, f"imm{i}"))
        operands = [reads.get(name) for name in "abc"]
        if kind == "kv_write":
            heads, key_dim, value_dim, _ = instr.dims
            for what, codec, dim, operand in (
                ("keys", instr.dtype, key_dim, operands[0]), ("values", instr.inner, value_dim, operands[1])
            ):  # fmt: skip
                packed = codec > params.MS_KV_BFLOAT16
                self.ops.append(
                    Op(number, f"{'encode' if packed else 'write'}_{what}", instr, heads * dim, [operand], width=dim if packed else 0)
                )
            return
        op = Op(number, kind, instr, instr.n, operands)
        if kind == "scatter":
            self._scatter(op)
            return
        if kind == "rope_angles":
            op.n = 2 * instr.n
        if kind == "reduce":
            op.n = instr.n * instr.inner
        if kind in ("rms_norm", "layer_norm", "softmax", "reduce"):
            op.width = instr.inner
        result = result_range(instr)
        if result is not None:
            op.result = self.value(result[1])
            self._registers.write(result[0], op.result, result[1])
            if kind == "load":
                op.result.load = instr
        if kind == "softmax":
            op.temporary = self.value(op.n)
        self.ops.append(op)

    def _scatter(self, op: Op) -> None:
        """The result takes the memory of the whole region that it is scattered into; what was there before is overwritten."""
        least, most = extent(op.instr.offset, list(op.instr.dims), list(op.instr.strides))
        start, end = next(r for r in self._regions if r[0] <= op.instr.dst + least and op.instr.dst + most < r[1])
        op.result = self.value(end - start)
        before = self._registers.read(start, end - start)
        if len(before) > 1 or before[0][2] is not None:
            into = self._own(op, start, end - start)
            source = op.operands[0]
            if source is not None and source.value is not None and into.value is not None and source.value.root is into.value.root:
                into = self._copy(op, start, end - start)  # other threads' elements change while they are read
            op.into = into
            assert into.value is not None
            op.result.root = into.value.root
        self._registers.write(start, op.result, end - start)
        op.shift = op.instr.dst - start
        self.ops.append(op)

    def _own(self, op: Op, start: int, size: int) -> Read:
        """What is in the region as a value that fills it and that no buffer holds: it will be written to."""
        pieces = self._registers.read(start, size)
        if len(pieces) == 1 and pieces[0][2] is not None:
            value = pieces[0][2].value
            assert value is not None
            if value.size == size and pieces[0][2].offset == 0 and value.load is None:
                return pieces[0][2]
        return self._copy(op, start, size)

    def _copy(self, op: Op, start: int, size: int) -> Read:
        copy = self.value(size)
        self.ops.append(Op(op.number, "join", op.instr, size, result=copy, pieces=self._registers.read(start, size)))
        return Read(copy)


def needed(ops: list[Op]) -> list[Op]:
    """Without those whose results nobody reads."""
    live: set[Value] = set()
    kept = []
    for op in reversed(ops):
        if op.result is None or op.result in live:
            kept.append(op)
            live.update(read.value for read in op.reads() if read.value is not None)
    return kept[::-1]
