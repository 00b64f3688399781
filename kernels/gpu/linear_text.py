"""The text of the GPU linear's kernels: what metal/linear_*.metal have, put together for the formats, segments and epilogues of a launch.

Here is what all of them share; linear_matvec_text.py, linear_tiles_text.py and linear_half_text.py have a kind of kernel each.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from metalstep.kernels import params
from metalstep.kernels.gpu.expressions import arity, expression, literal
from metalstep.kernels.gpu.linear_tuning import THREADGROUP_BYTES
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Input, Segment, first_buffer_slot
from metalstep.kernels.step import StepBuffers

MAX_SLOTS = 31  # buffers of one Metal kernel, its constants included
TYPES = {params.MS_FLOAT32: "float", params.MS_FLOAT16: "half", params.MS_BFLOAT16: "bfloat", params.MS_INT32: "int"}


@dataclass(frozen=True)
class Format:
    """A weight's type in MSL, what a lane reads of it at once, and whether k is a multiple of that."""

    text: str
    members: tuple[str, ...]  # element types of its buffers
    values: int
    whole: bool


@dataclass(frozen=True)
class Access:
    """A LOAD or STORE of an epilogue: register, element type, ms_row_address."""

    store: bool
    register: str
    type: str
    rows: int
    index: int  # among the accesses of its segment


@dataclass(frozen=True)
class Epilogue:
    """early: loads that nothing stored before them can change, in order; steps: all else, statements or accesses, in order."""

    early: tuple[Access, ...]
    steps: tuple[str | Access, ...]


@dataclass
class Path:
    """Segments that run the same code, on other weights and buffers: side by side in the launch's order."""

    formats: tuple[Format, ...]
    epilogue: Epilogue
    segments: list[int]  # indices into the caller's

    def groups(self) -> list[tuple[Format, list[int]]]:
        """Parts of one format, which are multiplied together."""
        groups: dict[Format, list[int]] = {}
        for part, fmt in enumerate(self.formats):
            groups.setdefault(fmt, []).append(part)
        return list(groups.items())


class Bindings:
    """The buffers of a kernel in the order of their first use, each with the type that it is read as."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._index: dict[tuple[int, int, str], int] = {}
        self._types: list[str] = []
        self._written: set[int] = set()
        self._changing: set[int] = set()

    def name(self, buffer: Buffer, type_name: str, *, written: bool = False, weight: bool = False) -> str:
        """The kernel's parameter for `buffer`. weight: no launch writes it."""
        key = (buffer.handle, buffer.offset, type_name)
        if key not in self._index:
            self._index[key] = len(self.buffers)
            self.buffers.append(buffer)
            self._types.append(type_name)
        if written:
            self._written.add(self._index[key])
        if not weight:
            self._changing.add(self._index[key])
        return f"b{self._index[key]}"

    def wait(self) -> list[str]:
        """Statements that let the launch in front end, before anything but weights is read."""
        first, *others = sorted(self._changing)
        return [f"    MS_WAIT_PREVIOUS(b{first});", *(f"    b{i} = ms_waited(b{i});" for i in others), "    MS_LAUNCH_NEXT;"]

    def parameters(self) -> str:
        """Their declarations, and that of the constants behind them."""
        if len(self.buffers) >= MAX_SLOTS:
            raise NotImplementedError(
                f"linear: {len(self.buffers)} buffers and the constants are more than the {MAX_SLOTS} that a Metal kernel takes;"
                " put some of the segments into a launch of their own"
            )
        return "\n".join([*self.declared(), f"    constant MSGpuLinearParams* p [[buffer({len(self.buffers)})]],"])

    def declared(self) -> list[str]:
        """The buffers' declarations."""
        return [
            f"    device {'' if i in self._written else 'const '}{name}* b{i} [[buffer({i})]],"
            for i, name in enumerate(self._types)
        ]


def accesses_of(segment: Segment) -> Iterable[dict[str, Any]]:
    """The LOADs and STOREs of its epilogue."""
    return (i for i in segment.epilogue.instructions if i["op"] in (params.MS_OP_LOAD, params.MS_OP_STORE))


def row_stride(access: dict[str, Any]) -> int:
    """Elements from one row's place to the next one's."""
    return 0 if access.get("rows", params.MS_ROW_SAME) == params.MS_ROW_SAME else access.get("row_stride", 0)


def epilogue_of(segment: Segment) -> Epilogue:
    """The epilogue as statements on floats r0, r1, …, one per register; the products are in the first of them already."""
    declared = set(range(len(segment.weights)))
    early: list[Access] = []
    steps: list[str | Access] = []
    stored = False
    index = 0
    for i in segment.epilogue.instructions:
        op = i["op"]
        if op in (params.MS_OP_LOAD, params.MS_OP_STORE):
            store = op == params.MS_OP_STORE
            register = i["a"] if store else i["dst"]
            access = Access(store, f"r{register}", TYPES[i.get("dtype", 0)], i.get("rows", params.MS_ROW_SAME), index)
            index += 1
            if store and access.rows == params.MS_ROW_SAME:
                raise ValueError("linear: an epilogue stores to a place that is the same for every row; give it a row_stride")
            if store or stored or register in declared:
                stored |= store
                if not store and register not in declared:
                    steps.append(f"float r{register};")
                steps.append(access)
            else:
                early.append(access)
            declared.add(register)
            continue
        try:
            count = arity(op)
        except (KeyError, ValueError, NotImplementedError):
            raise NotImplementedError(
                f"linear: instruction {op} in an epilogue; only LOAD, STORE and elementwise ones run on a column"
            ) from None
        operands = [
            literal(i[f"imm{n}"]) if i.get("imm", 0) >> n & 1 else f"r{i[name]}" for n, name in enumerate("abc"[:count])
        ]
        kind = "" if i["dst"] in declared else "float "
        declared.add(i["dst"])
        steps.append(f"{kind}r{i['dst']} = {expression(op, operands)};")
    return Epilogue(tuple(early), tuple(steps))


class Kernel(ABC):
    """The text of one kernel, and how it is launched. tile_rows: rows of x per threadgroup; threads: of one."""

    family: str
    tile_rows: int
    threads: int

    def __init__(
        self,
        x: Input,
        segments: Sequence[Segment],
        step: StepBuffers,
        buffers: Sequence[Buffer],
        rows: int,
        max_rows: int,
        paths: Sequence[Path],
        *,
        planes: int = 1,
        saturate: bool = False,
    ):
        """saturate: what is finite stays finite when it is stored as float16."""
        self.x, self.segments, self.step, self.buffers = x, segments, step, buffers
        self.rows, self.max_rows, self.paths, self.planes, self.saturate = rows, max_rows, paths, planes, saturate
        self.first_slot = first_buffer_slot([segment.weights for segment in segments])
        self.bindings = Bindings()
        self.x_align = self._x_align()

    @property
    def grid_rows(self) -> int:
        """Threadgroups along the rows."""
        return -(-self.max_rows // self.tile_rows)

    @abstractmethod
    def part_rows(self, path: Path) -> int:
        """Rows of each part of a segment that a simdgroup has (in strips of 8 for tiles)."""

    @abstractmethod
    def tile_columns(self, path: Path) -> int:
        """Outputs of a threadgroup per row of x."""

    @abstractmethod
    def shared_bytes(self) -> int:
        """Threadgroup memory."""

    @abstractmethod
    def _body(self) -> list[str]:
        """Statements behind the choice of segment and tile."""

    def text(self) -> str:
        """The kernel under the name KERNEL_NAME. Raises: NotImplementedError for more parts than threadgroup memory holds."""
        if self.shared_bytes() > THREADGROUP_BYTES:
            raise NotImplementedError(
                f"linear: a segment of {max(len(p.formats) for p in self.paths)} weights takes {self.shared_bytes()} bytes of threadgroup"
                f" memory, at most {THREADGROUP_BYTES} are there; put its weights into segments of their own"
            )
        body = [
            "  constant MSGpuLinearSegment* segments = (constant MSGpuLinearSegment*)(p + 1);",
            f"  constant MSGpuLinearAccess* accesses = (constant MSGpuLinearAccess*)(segments + {len(self.segments)});",
            f"  const uint row0 = tg.y * {self.tile_rows};",
            "  uint segment = 0;",
            *(f"  if (tg.x >= segments[{i}].first_tile) segment = {i};" for i in range(1, len(self.segments))),
            "  const uint n = segments[segment].n;",
            "  const uint tile = tg.x - segments[segment].first_tile;",
            "  constant MSGpuLinearAccess* access = accesses + segments[segment].first_access;",
            *self._body(),
        ]
        head = [
            f"[[kernel, max_total_threads_per_threadgroup({self.threads})]] void KERNEL_NAME(",
            self.bindings.parameters(),
            "    uint3 tg [[threadgroup_position_in_grid]],",
            "    uint tid [[thread_index_in_threadgroup]],",
            "    uint sg [[simdgroup_index_in_threadgroup]],",
            "    uint lane [[thread_index_in_simdgroup]]) {",
        ]
        return "\n".join([*head, *body, "}"])

    def _rows(self) -> list[str]:
        """Declares `rows`; leaves where the tile has none."""
        step = self.bindings.name(self.step.step, "MSStep")
        count = "num_sampled" if self.rows == params.MS_ROWS_SAMPLED else "num_tokens"
        return [f"  const uint rows = {step}->{count};", "  if (row0 >= rows) return;"]

    def _x_align(self) -> int:
        """Elements at a multiple of which every row of x and the norm's weight start: as many as 16 bytes hold, fewer, or 1."""
        assert self.x.buffer is not None
        size = 2 if self.x.buffer.dtype == "float16" else 4
        places = [(self.x.buffer.offset, size), (self.x.offset * size, size)]
        if self.x.rows != params.MS_ROW_SAME:
            places.append((self.x.row_stride * size, size))
        if self.x.norm and self.x.norm.weight:
            places.append((self.x.norm.weight.offset, 4))
        choices = (8, 4) if size == 2 else (4,)
        return next((align for align in choices if all(at % (align * size) == 0 for at, size in places)), 1)

    def _sampled(self) -> str:
        return self.bindings.name(self.step.sampled_rows, "int")

    def _norm_weight(self) -> str | None:
        weight = self.x.norm.weight if self.x.norm else None
        return self.bindings.name(weight, "float", weight=True) if weight else None

    def _x(self) -> str:
        assert self.x.buffer is not None
        return self.bindings.name(self.x.buffer, self._x_type())

    def _x_type(self) -> str:
        assert self.x.buffer is not None
        return "half" if self.x.buffer.dtype == "float16" else "float"

    def _by_path(self) -> list[str]:
        """The code of each path, for its segments."""
        body: list[str] = []
        first = 0
        for number, path in enumerate(self.paths):
            if len(self.paths) > 1:
                last = number == len(self.paths) - 1
                condition = "" if last else f"if (segment < {first + len(path.segments)}) "
                body.append(f"  {'} else ' if number else ''}{condition}{{")
            body += self._path(path, first)
            first += len(path.segments)
        return [*body, "  }"] if len(self.paths) > 1 else body

    @abstractmethod
    def _path(self, path: Path, first: int) -> list[str]:
        """The code for segments of `path`, of which the first is the launch's `first`th."""

    def _weights(self, path: Path, first: int, fmt: Format, parts: list[int], name: str = "w") -> list[str]:
        """Declares `name` with the parts' weights of the segment at hand."""
        fields = ("words", "scales", "biases")[: len(fmt.members)] if len(fmt.members) > 1 else ("elements",)
        lines = [f"      ms_parts<{fmt.text}, {len(parts)}> {name};"]
        for place, part in enumerate(parts):
            weights = [self.segments[index].weights[part] for index in path.segments]
            for field, member in zip(fields, fmt.members, strict=True):
                planes = [getattr(weight, "buffer" if field in ("words", "elements") else field) for weight in weights]
                names = [self.bindings.name(plane, member, weight=True) for plane in planes]
                lines.append(f"      {name}.part[{place}].{field} = {choose(names, first)};")
        return lines

    def _place(self, path: Path, first: int, access: Access) -> str:
        """The element that an access reads or writes, of `row` and `column`."""
        names = []
        for index in path.segments:
            instruction = list(accesses_of(self.segments[index]))[access.index]
            names.append(self.bindings.name(self._buffer(instruction["slot"]), access.type, written=access.store))
        pointer = choose(names, first)
        row = f"uint({self._sampled()}[row])" if access.rows == params.MS_ROW_SAMPLED else "row"
        if self.planes > 1:
            row = f"(tg.z * {self.max_rows} + {row})"
        term = "" if access.rows == params.MS_ROW_SAME else f" + ulong({row}) * stride{access.index}"
        pointer = f"({pointer})" if " " in pointer else pointer
        return f"{pointer}[offset{access.index}{term} + column]"

    def _accesses(self, path: Path) -> list[str]:
        """Declares where the path's accesses begin and how far their rows are apart: read once, whatever is stored between."""
        lines = []
        for access in [*path.epilogue.early, *(step for step in path.epilogue.steps if isinstance(step, Access))]:
            lines.append(f"    const uint offset{access.index} = access[{access.index}].offset;")
            if access.rows != params.MS_ROW_SAME:
                lines.append(f"    const uint stride{access.index} = access[{access.index}].row_stride;")
        return lines

    def _buffer(self, slot: int) -> Buffer:
        if slot < params.MS_SLOT_FIRST:
            return self.step.program_slots()[slot]
        if not 0 <= slot - self.first_slot < len(self.buffers):
            raise ValueError(
                f"linear: an epilogue names slot {slot}; its buffers have {self.first_slot} to {self.first_slot + len(self.buffers) - 1}"
            )
        return self.buffers[slot - self.first_slot]

    def _statement(self, path: Path, first: int, step: str | Access) -> str:
        if isinstance(step, str):
            return step
        place = self._place(path, first, step)
        if not step.store:
            return f"{step.register} = float({place});"
        value = f"ms_within_half({step.register})" if self.saturate and step.type == "half" else step.register
        return f"{place} = {step.type}({value});"


def boolean(value: bool) -> str:
    return "true" if value else "false"


def choose(names: Sequence[str], first: int) -> str:
    """The name of the segment at hand, of segments `first`, first + 1, … in the launch's order."""
    if len(set(names)) == 1:
        return names[0]
    return "".join(f"segment == {first + i} ? {name} : " for i, name in enumerate(names[:-1])) + names[-1]
