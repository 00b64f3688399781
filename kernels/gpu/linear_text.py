"""The text of the GPU linear's kernels: what metal/linear_matvec.metal and metal/linear_matmul.metal have, put together for the formats,
segments and epilogues of a launch."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from metalstep.kernels import params
from metalstep.kernels.gpu.expressions import arity, expression, literal
from metalstep.kernels.gpu.linear_tuning import Matvec, Tiles
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Input, Segment, first_buffer_slot
from metalstep.kernels.step import StepBuffers

SIMD_WIDTH = 32
MAX_SLOTS = 31  # buffers of one Metal kernel, its constants included
THREADGROUP_BYTES = 32768
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


class _Bindings:
    """The buffers of a kernel in the order of their first use, each with the type that it is read as."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._index: dict[tuple[int, int, str], int] = {}
        self._types: list[str] = []
        self._written: set[int] = set()

    def name(self, buffer: Buffer, type_name: str, *, written: bool = False) -> str:
        """The kernel's parameter for `buffer`."""
        key = (buffer.handle, buffer.offset, type_name)
        if key not in self._index:
            self._index[key] = len(self.buffers)
            self.buffers.append(buffer)
            self._types.append(type_name)
        if written:
            self._written.add(self._index[key])
        return f"b{self._index[key]}"

    def parameters(self) -> str:
        """Their declarations, and that of the constants behind them."""
        if len(self.buffers) >= MAX_SLOTS:
            raise NotImplementedError(
                f"linear: {len(self.buffers)} buffers and the constants are more than the {MAX_SLOTS} that a Metal kernel takes;"
                " put some of the segments into a launch of their own"
            )
        lines = [
            f"    device {'' if i in self._written else 'const '}{name}* b{i} [[buffer({i})]],"
            for i, name in enumerate(self._types)
        ]
        return "\n".join([*lines, f"    constant MSGpuLinearParams* p [[buffer({len(lines)})]],"])


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


class Kernel:
    """The text of one kernel, and how it is launched."""

    def __init__(
        self,
        x: Input,
        segments: Sequence[Segment],
        step: StepBuffers,
        buffers: Sequence[Buffer],
        rows: int,
        shape: Matvec | Tiles,
        batch: int,
        paths: Sequence[Path],
    ):
        self.x, self.segments, self.step, self.buffers = x, segments, step, buffers
        self.rows, self.shape, self.paths = rows, shape, paths
        self.first_slot = first_buffer_slot([segment.weights for segment in segments])
        self.bindings = _Bindings()
        self.is_matvec = isinstance(shape, Matvec)
        self.family = "linear_matvec" if self.is_matvec else "linear_matmul"
        self.tile_rows = batch if isinstance(shape, Matvec) else shape.rows
        self.threads = SIMD_WIDTH * (shape.simdgroups if isinstance(shape, Matvec) else shape.columns * shape.splits)
        planes = [x.buffer, x.norm.weight if x.norm else None]
        aligned = all(b is None or b.offset % 16 == 0 for b in planes) and x.offset % 4 == 0
        self.x_align = 4 if aligned and (x.row_stride % 4 == 0 or x.rows == params.MS_ROW_SAME) else 1

    def part_rows(self, path: Path) -> int:
        """Rows of each part of a segment that a simdgroup has (in strips of 8 for tiles)."""
        rows = self.shape.rows if isinstance(self.shape, Matvec) else self.shape.strips
        return max(1, rows // len(path.formats))

    def tile_columns(self, path: Path) -> int:
        """Outputs of a threadgroup per row of x."""
        if isinstance(self.shape, Matvec):
            return self.shape.simdgroups // self.shape.splits * self.part_rows(path)
        return self.shape.columns * self.part_rows(path) * 8

    def shared_floats(self) -> int:
        """float32 elements of threadgroup memory that all paths share, by turns."""
        if isinstance(self.shape, Matvec):
            return self.shape.simdgroups * self._slot()
        shape = self.shape
        staged = shape.rows * (32 * shape.splits + 4)
        sums = [shape.splits * len(p.formats) * self.tile_columns(p) * (shape.rows + 1) for p in self.paths]
        return max(staged, *sums)

    def _slot(self) -> int:
        """float32 elements of a simdgroup's sums in a matvec: of products, then of squares."""
        return self.tile_rows * (1 + max(len(p.formats) * self.part_rows(p) for p in self.paths))

    def text(self) -> str:
        """The kernel under the name KERNEL_NAME. Raises: NotImplementedError for more parts than threadgroup memory holds."""
        norms = self.x.norm is not None and not self.is_matvec
        nbytes = 4 * (self.shared_floats() + (self.tile_rows if norms else 0))
        if nbytes > THREADGROUP_BYTES:
            raise NotImplementedError(
                f"linear: a segment of {max(len(p.formats) for p in self.paths)} weights takes {nbytes} bytes of threadgroup memory,"
                f" at most {THREADGROUP_BYTES} are there; put its weights into segments of their own"
            )
        step = self.bindings.name(self.step.step, "MSStep")
        count = "num_sampled" if self.rows == params.MS_ROWS_SAMPLED else "num_tokens"
        body = [
            f"  threadgroup float shared[{self.shared_floats()}];",
            *([f"  threadgroup float scales[{self.tile_rows}];"] if norms else []),
            "  constant MSGpuLinearSegment* segments = (constant MSGpuLinearSegment*)(p + 1);",
            f"  constant MSGpuLinearAccess* accesses = (constant MSGpuLinearAccess*)(segments + {len(self.segments)});",
            f"  const uint rows = {step}->{count};",
            f"  const uint row0 = tg.y * {self.tile_rows};",
            "  if (row0 >= rows) return;",
            "  uint segment = 0;",
            *(f"  if (tg.x >= segments[{i}].first_tile) segment = {i};" for i in range(1, len(self.segments))),
            "  const uint n = segments[segment].n;",
            "  const uint tile = tg.x - segments[segment].first_tile;",
            "  constant MSGpuLinearAccess* access = accesses + segments[segment].first_access;",
            *self._input(),
        ]
        first = 0
        for number, path in enumerate(self.paths):
            if len(self.paths) > 1:
                last = number == len(self.paths) - 1
                condition = "" if last else f"if (segment < {first + len(path.segments)}) "
                body.append(f"  {'} else ' if number else ''}{condition}{{")
            body += self._matvec(path, first) if self.is_matvec else self._matmul(path, first)
            first += len(path.segments)
        if len(self.paths) > 1:
            body.append("  }")
        head = [
            f"[[kernel, max_total_threads_per_threadgroup({self.threads})]] void KERNEL_NAME(",
            self.bindings.parameters(),
            "    uint3 tg [[threadgroup_position_in_grid]],",
            "    uint tid [[thread_index_in_threadgroup]],",
            "    uint sg [[simdgroup_index_in_threadgroup]],",
            "    uint lane [[thread_index_in_simdgroup]]) {",
        ]
        return "\n".join([*head, *body, "}"])

    def _sampled(self) -> str:
        return self.bindings.name(self.step.sampled_rows, "int")

    def _input(self) -> list[str]:
        assert self.x.buffer is not None
        x = self.bindings.name(self.x.buffer, "float")
        sampled = self.x.rows == params.MS_ROW_SAMPLED
        norm = [f"  x.norm = {self.bindings.name(self.x.norm.weight, 'float')};"] if self.x.norm and self.x.norm.weight else []
        if self.is_matvec:
            row = f"uint({self._sampled()}[row])" if sampled else "row"
            return [
                f"  ms_matvec_x<{self.tile_rows}> x;",
                f"  MS_UNROLL for (int b = 0; b < {self.tile_rows}; b++) {{",
                "    const uint row = min(row0 + uint(b), rows - 1);",
                f"    x.row[b] = {x} + p->x_offset + ulong({row}) * p->x_row_stride;",
                "  }",
                *(norm or ["  x.norm = x.row[0];"]),
            ]
        lines = [
            "  ms_matmul_x x;",
            f"  x.x = {x} + p->x_offset;",
            *([f"  x.sampled = {self._sampled()};"] if sampled else []),
            *norm,
            "  x.stride = p->x_row_stride;",
            "  x.first = row0;",
            "  x.last = rows - 1;",
        ]
        if self.x.norm is not None:
            arguments = f"{self.tile_rows}, {self.threads // SIMD_WIDTH}, {self.x_align}, {_bool(sampled)}"
            lines.append(f"  ms_row_scales<{arguments}>(scales, x, p->k, p->eps, sg, lane);")
        return lines

    def _weights(self, path: Path, first: int, fmt: Format, parts: list[int]) -> list[str]:
        """Declares `w` with the parts' weights of the segment at hand."""
        fields = ("words", "scales", "biases")[: len(fmt.members)] if len(fmt.members) > 1 else ("elements",)
        lines = [f"      ms_parts<{fmt.text}, {len(parts)}> w;"]
        for place, part in enumerate(parts):
            weights = [self.segments[index].weights[part] for index in path.segments]
            for field, member in zip(fields, fmt.members, strict=True):
                planes = [getattr(weight, "buffer" if field in ("words", "elements") else field) for weight in weights]
                names = [self.bindings.name(plane, member) for plane in planes]
                lines.append(f"      w.part[{place}].{field} = {_choose(names, first)};")
        return lines

    def _place(self, path: Path, first: int, access: Access) -> str:
        """The element that an access reads or writes, of `row` and `column`."""
        names = []
        for index in path.segments:
            instruction = list(accesses_of(self.segments[index]))[access.index]
            names.append(self.bindings.name(self._buffer(instruction["slot"]), access.type, written=access.store))
        pointer = _choose(names, first)
        row = f"uint({self._sampled()}[row])" if access.rows == params.MS_ROW_SAMPLED else "row"
        term = "" if access.rows == params.MS_ROW_SAME else f" + ulong({row}) * access[{access.index}].row_stride"
        pointer = f"({pointer})" if " " in pointer else pointer
        return f"{pointer}[access[{access.index}].offset{term} + column]"

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
        return f"{place} = {step.type}({step.register});" if step.store else f"{step.register} = float({place});"

    def _matvec(self, path: Path, first: int) -> list[str]:
        assert isinstance(self.shape, Matvec)
        batch, splits, r, slot = self.tile_rows, self.shape.splits, self.part_rows(path), self._slot()
        has_weight = self.x.norm is not None and self.x.norm.weight is not None
        lines = [
            f"    const uint column0 = tile * {self.tile_columns(path)} + sg / {splits} * {r};",
            f"    const uint column = column0 + lane / {batch};",
            f"    const uint row = row0 + lane % {batch};",
            f"    const bool stores = sg % {splits} == 0 && lane < {r * batch} && column < n && row < rows;",
            f"    threadgroup float* mine = shared + sg * {slot};",
        ]
        for access in path.epilogue.early:  # on their way while the products are computed
            lines += [f"    float {access.register} = 0.0f;", f"    if (stores) {self._statement(path, first, access)}"]
        places: dict[int, int] = {}
        for number, (fmt, parts) in enumerate(path.groups()):
            squares = self.x.norm is not None and number == 0
            begin = len(places)
            places |= {part: begin + i for i, part in enumerate(parts)}
            arguments = f"{fmt.values}, {self.x_align}, {_bool(fmt.whole)}, {_bool(squares)}, {_bool(has_weight)}"
            lines += [
                "    {",
                *self._weights(path, first, fmt, parts),
                f"      ms_matvec_sums<{len(parts)}, {r}, {batch}> sums;",
                f"      ms_matvec<{arguments}>(",
                f"          sums, x, w, column0, n, p->k, (sg % {splits} * 32 + lane) * {fmt.values}, {splits * 32 * fmt.values});",
                f"      ms_share<{_bool(squares)}>(mine + {begin * r * batch}, mine + {slot - batch}, sums, lane);",
                "    }",
            ]
        lines += [
            f"    {'threadgroup' if splits > 1 else 'simdgroup'}_barrier(mem_flags::mem_threadgroup);",
            "    if (stores) {",
        ]
        scale = ""
        if self.x.norm is not None:
            squares_sum = f"ms_collect<{splits}>(mine + {slot - batch} + lane % {batch}, {slot})"
            lines.append(f"      const float scale = precise::rsqrt({squares_sum} / float(p->k) + p->eps);")
            scale = " * scale"
        for part in range(len(path.formats)):
            lines.append(f"      float r{part} = ms_collect<{splits}>(mine + {places[part] * r * batch} + lane, {slot}){scale};")
        return [*lines, *(f"      {self._statement(path, first, step)}" for step in path.epilogue.steps), "    }"]

    def _matmul(self, path: Path, first: int) -> list[str]:
        assert isinstance(self.shape, Tiles)
        shape, strips, columns = self.shape, self.part_rows(path), self.tile_columns(path)
        tiles, ld = shape.rows // 8, shape.rows + 1
        sampled, has_weight = self.x.rows == params.MS_ROW_SAMPLED, self.x.norm is not None and self.x.norm.weight is not None
        lines = [f"    const uint column0 = tile * {columns};"]
        shares: list[str] = []
        places: dict[int, int] = {}
        for number, (fmt, parts) in enumerate(path.groups()):
            begin = len(places)
            places |= {part: begin + i for i, part in enumerate(parts)}
            arguments = (
                f"{fmt.values}, {shape.splits}, {self.threads}, {self.x_align}, {_bool(sampled)}, {_bool(has_weight)},"
                f" {len(parts)}, {strips}, {tiles}"
            )
            lines += [
                f"    ms_sums<{len(parts) * strips}, {tiles}> sums{number};",
                f"    ms_clear(sums{number});",
                "    {",
                *self._weights(path, first, fmt, parts),
                f"      ms_matmul<{arguments}>(",
                f"          sums{number}, shared, x, w, column0 + sg % {shape.columns} * {strips * 8}, n, p->k,"
                f" sg / {shape.columns}, tid, lane);",
                "    }",
            ]
            at = f"(sg / {shape.columns} * {len(path.formats)} + {begin}) * {columns * ld} + sg % {shape.columns} * {strips * 8 * ld}"
            shares.append(f"    ms_share<{len(parts)}, {strips}, {tiles}>(shared + {at}, {columns * ld}, sums{number}, lane);")
        barrier = "    threadgroup_barrier(mem_flags::mem_threadgroup);"
        lines += [
            barrier,
            *shares,
            barrier,
            f"    for (uint i = tid; i < {shape.rows * columns}; i += {self.threads}) {{",
            f"      const uint column = column0 + i % {columns};",
            f"      const uint row = row0 + i / {columns};",
            "      if (column >= n || row >= rows) continue;",
            f"      const threadgroup float* from = shared + i % {columns} * {ld} + i / {columns};",
        ]
        scale = f" * scales[i / {columns}]" if self.x.norm is not None else ""
        for part in range(len(path.formats)):
            stride = len(path.formats) * columns * ld
            lines.append(f"      float r{part} = ms_collect<{shape.splits}>(from + {places[part] * columns * ld}, {stride}){scale};")
        for access in path.epilogue.early:
            lines.append(f"      float {self._statement(path, first, access)}")
        return [*lines, *(f"      {self._statement(path, first, step)}" for step in path.epilogue.steps), "    }"]


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _choose(names: Sequence[str], first: int) -> str:
    """The name of the segment at hand, of segments `first`, first + 1, … in the launch's order."""
    if len(set(names)) == 1:
        return names[0]
    return "".join(f"segment == {first + i} ? {name} : " for i, name in enumerate(names[:-1])) + names[-1]
