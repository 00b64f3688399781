"""The text of a row program: how a step names its operands and its result, in registers and in memory, and what it touches."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.gpu.expressions import literal
from metalstep.kernels.gpu.row_homes import Homes, Place
from metalstep.kernels.gpu.row_nests import Nest
from metalstep.kernels.gpu.row_values import Read, Value, layout_of, planes_of

TYPES = {params.MS_FLOAT32: "float", params.MS_FLOAT16: "half", params.MS_BFLOAT16: "bfloat", params.MS_INT32: "int"}
STEP_SLOTS = {
    params.MS_SLOT_TOKENS: "tokens",
    params.MS_SLOT_POSITIONS: "positions",
    params.MS_SLOT_SLOT_MAPPING: "slot_mapping",
    params.MS_SLOT_SAMPLED_ROWS: "sampled_rows",
}


@dataclass
class Touch:
    """One access to memory that threads share: elements [start, end) of it, or of a slot any. key: as in row_nests.Access."""

    memory: str | int
    start: int
    end: int
    write: bool
    key: tuple[Any, ...] | None
    places: np.ndarray | None = None

    @property
    def flag(self) -> str:
        return "shared" if self.memory == "shared" else "device"


class RowText:
    """Writes lines for the nest at hand; keeps what the kernel has to declare and what was touched."""

    _nest: Nest  # at hand, its sort (see row_nests.Domain) and the elements of a span that each thread has
    _wide: bool
    _count: int
    _filled: set[tuple[Value, int]]  # LOADs that the nest's threads hold by now
    _unrolled: bool  # whether the pass at hand uses elements that threads hold

    def __init__(self, homes: Homes, aligned: frozenset[int]):
        """aligned: slots whose first element may be that of a vector."""
        self._homes = homes
        self._aligned = aligned
        self._run = 1  # see Domain: of the pass at hand; 1 too where its elements are no vectors
        self._wide_loads: dict[tuple[Any, ...], tuple[str, str]] = {}  # of the run at hand: name, text
        self._wide_stores: list[str] = []
        self._mixed: set[int] = set()  # slots that the pass at hand accesses in an order that vectors would change
        self._lines: list[str] = []
        self._depth = 1
        self._slots: dict[int, tuple[str, bool]] = {}  # elements, and whether they are written
        self._pointers: dict[tuple[Any, ...], tuple[str, str]] = {}  # by what they point at: name, declaration
        self._tables: list[str] = []
        self._names: set[str] = set()
        self._needed: set[str] = set()
        self._touched: list[Touch] = []  # since the last barrier was thought of
        self._locals: dict[tuple[Value, int], str] = {}  # values of the pass at hand

    @property
    def _at_k(self) -> str:
        return "[k]" if self._count > 1 else ""

    # ---- operands and results -----------------------------------------------------------------------------------------
    def _element(self, read: Read | None) -> str:
        """The operand's element of this index: a name or a literal."""
        assert read is not None
        if read.value is None:
            return literal(read.number)
        key = read.value, read.offset
        if key in self._locals:
            return self._locals[key]
        d, value, offset = self._nest.domain, *key
        nest = next((n for n in (self._nest, None) if (*key, n) in self._homes.held), False)
        there = key in self._filled or d in (self._homes.weights.get(key), self._homes.first.get(key))
        if value.lazy and nest is None and not there:
            nest = False  # held as another nest divides it
        index = f"{offset} + i" if offset else "i"
        if nest is not False and (not value.lazy or there):
            self._unrolled = True
            name = f"{self._held(*key)}{self._at_k}"
        else:
            if value.lazy and self._is_wide_access(value.load, offset):
                text = self._wide_loaded(value.load, offset)
            else:
                text = self._loaded(value.load, index) if value.lazy else self._memory(value, index, None, 0)
            if value.lazy:
                at = value.load.offset + offset
                self._touch(value.load.slot, at, at + self._nest.n, False, (d, *self._address(value.load, offset)))
            name = f"v{value.number}" + (f"_{offset}" if offset else "")
            self._line(f"const float {name} = {text};")
            if nest is not False:
                self._unrolled = True
                self._filled.add(key)
                self._line(f"{self._held(*key)}{self._at_k} = {name};")
        self._locals[key] = name
        return name

    def _at(self, read: Read | None, index: str) -> str:
        """The operand's element at `index`, of any thread."""
        assert read is not None
        value, offset = read.value, read.offset
        assert value is not None
        whole = f"{offset} + {index}" if offset else index
        if value.lazy:
            self._touch(value.load.slot, value.load.offset, value.load.offset + value.load.n, False, None)
            return self._loaded(value.load, whole)
        return self._memory(value, whole, 0, value.size)

    def _memory(
        self, value: Value, index: str, first: int | None, size: int, write: bool = False, places: np.ndarray | None = None
    ) -> str:
        """An element of a value in memory. first: of the `size` elements that any thread may mean; None: each index its own."""
        home: Place = self._homes.memory[value.root]
        memory = "scratch" if home.scratch else "shared"
        if first is None:
            offset = 0 if index == "i" else int(index.split(" ")[0])
            start, size, key = home.start + offset, self._nest.n, (self._nest.domain, memory, home.start + offset)
        else:
            start, key = home.start + first, None
        at = None if places is None else places + home.start
        self._touch(memory, start, start + size, write, key, at)
        return f"{memory}[{home.start} + {index}]" if home.start else f"{memory}[{index}]"

    def _produce(self, value: Value | None, text: str) -> None:
        """A step's result: kept where its readers find it."""
        assert value is not None
        name = f"v{value.number}"
        self._line(f"const float {name} = {text};")
        self._locals[value, 0] = name
        if any((value, 0, nest) in self._homes.held for nest in (self._nest, None)):
            self._unrolled = True
            self._line(f"{self._held(value, 0)}{self._at_k} = {name};")
        if value.root in self._homes.memory:
            self._line(f"{self._memory(value, 'i', None, 0, write=True)} = {name};")

    @staticmethod
    def _held(value: Value, offset: int) -> str:
        return f"h{value.number}" + (f"_{offset}" if offset else "")

    @staticmethod
    def _address(instr: Any, offset: int = 0) -> tuple[Any, ...]:
        return instr.slot, instr.rows, instr.row_stride, layout_of(instr), instr.offset + offset

    def _is_wide_access(self, instr: Any, offset: int) -> bool:
        """Whether the elements of a run are a vector of the buffer that a LOAD or STORE names."""
        strides = [0 if instr.rows == params.MS_ROW_SAME else instr.row_stride, instr.offset + offset]
        strides += [instr.dims[1]] if planes_of(instr) > 1 else []
        floats = instr.dtype in (params.MS_FLOAT32, params.MS_FLOAT16)
        there = instr.slot in self._aligned and instr.slot not in self._mixed
        return self._run > 1 and floats and there and all(stride % self._run == 0 for stride in strides)

    def _wide_loaded(self, instr: Any, offset: int) -> str:
        """This index's element of a LOAD whose run is read at once."""
        key = (*self._address(instr), offset)
        if key not in self._wide_loads:
            kind, first = f"{TYPES[instr.dtype]}{self._run}", f"{offset} + start" if offset else "start"
            pointer = self._pointer(instr, False)
            places = [first, *(f"{at * instr.dims[1]} + {first}" for at in range(1, planes_of(instr)))]
            vectors = [f"*(device const {kind}*)({pointer} + {place})" for place in places]
            vectors = vectors if instr.dtype == params.MS_FLOAT32 else [f"float{self._run}({vector})" for vector in vectors]
            name = self._new("run")
            self._wide_loads[key] = name, f"const float{self._run} {name} = {' + '.join(vectors)};"
        return f"{self._wide_loads[key][0]}[e]"

    # ---- buffers ------------------------------------------------------------------------------------------------------
    def _slot(self, slot: int, kind: str, written: bool) -> str:
        """The name of a binding as elements of `kind`."""
        known, was_written = self._slots.get(slot, (kind, False))
        self._slots[slot] = known, was_written or written
        name = self._slot_name(slot)
        return name if known == kind else f"(device {'' if written else 'const '}{kind}*){name}"

    @staticmethod
    def _slot_name(slot: int) -> str:
        return STEP_SLOTS.get(slot, f"buffer{slot}")

    def _pointer(self, instr: Any, written: bool) -> str:
        """This row's elements of a LOAD or STORE."""
        row = {params.MS_ROW_SAME: "", params.MS_ROW_SELF: "row", params.MS_ROW_SAMPLED: "sampled_row"}[instr.rows]
        if row == "sampled_row":
            self._slot(params.MS_SLOT_SAMPLED_ROWS, "int", False)
            self._needed.add("sampled")
        terms = [f"ulong({row}) * {instr.row_stride}"] if row and instr.row_stride else []
        terms += [str(instr.offset)] if instr.offset else []
        return self._base(instr.slot, TYPES[instr.dtype], " + ".join(terms), "", written)

    def _loaded(self, instr: Any, index: str) -> str:
        pointer = self._pointer(instr, False)
        places = [index, *(f"{at * instr.dims[1]} + {index}" for at in range(1, planes_of(instr)))]
        elements = [f"{pointer}[{place}]" if instr.dtype == params.MS_FLOAT32 else f"float({pointer}[{place}])" for place in places]
        return elements[0] if len(elements) == 1 else f"({' + '.join(elements)})"

    def _base(self, slot: int, kind: str, offset: str, name: str, written: bool = False) -> str:
        """A pointer of the kernel's, declared once."""
        source = self._slot(slot, kind, written)
        key = slot, kind, offset, written
        if key not in self._pointers:
            name = name or f"{'out' if written else 'in'}{len(self._pointers)}"
            const = "" if written else "const "
            total = f" + ({offset})" if " + " in offset else f" + {offset}" if offset else ""
            self._pointers[key] = name, f"device {const}{kind}* {name} = {source}{total};"
        return self._pointers[key][0]

    def _once(self, name: str, declaration: str) -> str:
        """Something else that the kernel declares at its start."""
        self._pointers.setdefault((name,), (name, declaration))
        return name

    # ---- text, and what it touches ------------------------------------------------------------------------------------
    def _touch(
        self, memory: str | int, start: int, end: int, write: bool, key: tuple[Any, ...] | None, places: np.ndarray | None = None
    ) -> None:
        self._touched.append(Touch(memory, start, end, write, key, places))

    def _line(self, text: str) -> None:
        self._lines.append("  " * self._depth + text)

    def _new(self, name: str) -> str:
        """`name`, with a number if it is taken."""
        number = 0
        while f"{name}{number or ''}" in self._names:
            number += 1
        self._names.add(f"{name}{number or ''}")
        return f"{name}{number or ''}"

    @contextmanager
    def _indented(self) -> Iterator[None]:
        self._depth += 1
        yield
        self._depth -= 1
