"""Row programs: the instruction list that a `row_program` launch or a linear's epilogue runs on each row (metal/params.h).

A register is a span of float32 in a scratch row. Spans are never reused inside one program: programs are short, a scratch row
of a few times the hidden size stays in the first-level cache, and a value can then be read at any later point.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from metalstep.kernels import params

ALIGN = 16  # elements: one AVX-512 vector, so that every register starts on a vector boundary


@dataclass(frozen=True)
class Register:
    """`size` float32 elements of the scratch row from element `start`; in an epilogue, register number `start`."""

    start: int
    size: int

    def part(self, offset: int, size: int) -> Register:
        """The elements [offset, offset + size) of this register."""
        if offset < 0 or offset + size > self.size:
            raise ValueError(f"elements {offset}..{offset + size} of a register of {self.size}")
        return Register(self.start + offset, size)


Operand = Register | float


@dataclass
class Program:
    """Instructions in order, and the scratch elements they need. `epilogue` counts registers instead of elements."""

    epilogue: bool = False
    registers: int = 0
    instructions: list[dict[str, Any]] = field(default_factory=list)

    def register(self, size: int) -> Register:
        """A new register of `size` elements (of the column block at hand in an epilogue)."""
        register = Register(self.registers, size)
        self.registers += 1 if self.epilogue else -(-size // ALIGN) * ALIGN
        return register

    def emit(self, op: int, dst: Register | None, *operands: Operand | None, n: int, **fields: Any) -> Register | None:
        """Append `op`. Operands are registers, scalars (carried in the instruction) or None (absent)."""
        instruction: dict[str, Any] = {"op": op, "n": 0 if self.epilogue else n, **fields}
        if dst is not None:
            instruction["dst"] = dst.start
        names = ("a", "b", "c")
        for name in names:
            instruction[name] = params.MS_NONE
        for i, (name, operand) in enumerate(zip(names, operands, strict=False)):
            if isinstance(operand, Register):
                instruction[name] = operand.start
            elif operand is not None:
                instruction[f"imm{i}"] = float(operand)
                instruction["imm"] = instruction.get("imm", 0) | 1 << i
        self.instructions.append(instruction)
        return dst

    def load(
        self,
        slot: int,
        size: int,
        *,
        rows: int,
        offset: int = 0,
        row_stride: int = 0,
        dtype: int = 0,
        planes: int = 1,
        plane_stride: int = 0,
    ) -> Register:
        """A register with `size` elements of buffer `slot` from `offset`, of the row that `rows` (ms_row_address) names.

        planes: added up, in order, each `plane_stride` elements behind the one before (a GPU's linears leave them).
        """
        register = self.register(size)
        fields: dict[str, Any] = dict(slot=slot, rows=rows, offset=offset, row_stride=row_stride, dtype=dtype)
        if planes > 1:
            fields["dims"] = [planes, plane_stride, 0, 0]
        self.emit(params.MS_OP_LOAD, register, n=size, **fields)
        return register

    def store(self, register: Register, slot: int, *, offset: int = 0, row_stride: int, dtype: int = 0) -> None:
        """Write `register` to this row of buffer `slot`."""
        self.emit(
            params.MS_OP_STORE,
            None,
            register,
            n=register.size,
            slot=slot,
            rows=params.MS_ROW_SELF,
            offset=offset,
            row_stride=row_stride,
            dtype=dtype,
        )

    def strided(
        self, op: int, dst: Register, source: Operand, offset: int, dims: Sequence[int], strides: Sequence[int], combine: int
    ) -> None:
        """GATHER or SCATTER over up to four axes (slowest first); axes of length 1 are dropped."""
        axes = merge_axes(dims, strides)
        if len(axes) > 4:
            raise NotImplementedError(f"a strided copy over {len(axes)} axes {axes}; at most 4 are supported")
        axes = [(1, 0)] * (4 - len(axes)) + axes
        count = 1
        for length, _ in axes:
            count *= length
        self.emit(
            op,
            dst,
            source,
            n=count,
            inner=combine,
            offset=offset,
            dims=[length for length, _ in axes],
            strides=[stride for _, stride in axes],
        )

    def constants(self) -> bytes:
        """The instructions as bytes of MSInstr."""
        return b"".join(params.pack("MSInstr", **instruction) for instruction in self.instructions)


def merge_axes(dims: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(length, stride) per axis, slowest first, without axes of length 1 and with contiguous neighbours merged."""
    axes: list[tuple[int, int]] = []
    for length, stride in zip(dims, strides, strict=True):
        if length == 1:
            continue
        if axes and axes[-1][1] == length * stride:
            axes[-1] = (axes[-1][0] * length, stride)
        else:
            axes.append((length, stride))
    return axes
