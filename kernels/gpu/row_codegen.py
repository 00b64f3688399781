"""The Metal text of a row program's kernel: one threadgroup per row, its loop nests in order, barriers where values cross threads."""
from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metalstep.kernels import params
from metalstep.kernels.gpu.expressions import literal
from metalstep.kernels.gpu.row_homes import homes, per_thread
from metalstep.kernels.gpu.row_nests import LANES, Aliases, Domain, Nest, Pass, longest_vector
from metalstep.kernels.gpu.row_steps import RowSteps
from metalstep.kernels.gpu.row_text import TYPES, Touch
from metalstep.kernels.gpu.row_values import Op, Value

BARRIERS = {
    frozenset({"shared"}): "mem_flags::mem_threadgroup",
    frozenset({"device"}): "mem_flags::mem_device",
    frozenset({"shared", "device"}): "mem_flags::mem_device | mem_flags::mem_threadgroup",
}


@dataclass(frozen=True)
class Kernel:
    """A generated kernel. threads: of a row. scratch: float32 elements of each row's scratch memory, bound behind the buffers.
    constants: of its launches, uint32 words before the scales of each plane that is encoded into: the text is the same for every size of
    the cache."""

    name: str
    text: str
    threads: int
    scratch: int
    constants: bytes = b""


def clash(a: Touch, b: Touch, aliases: Aliases) -> bool:
    """Whether b has to wait for a, of another nest or pass."""
    if not (a.write or b.write) or (a.key is not None and a.key == b.key):
        return False
    if isinstance(a.memory, int) and isinstance(b.memory, int):
        alike = a.memory == b.memory and a.key is not None and b.key is not None and a.key[2:5] == b.key[2:5]
        if not alike:
            return aliases.same(a.memory, b.memory)
    elif a.memory != b.memory:
        return False
    if a.end <= b.start or b.end <= a.start:
        return False
    if a.places is not None and b.places is not None:
        return bool(np.intersect1d(a.places, b.places).size)
    return True


class RowKernel(RowSteps):
    """Writes the kernel of `nests` for threadgroups of `threads`."""

    def __init__(
        self,
        nests: list[Nest],
        threads: int,
        rows: int,
        bindings: int,
        aliases: Aliases,
        aligned: frozenset[int] = frozenset(),
        nvidia: bool = False,
    ):
        """aligned: slots whose buffers begin at a multiple of 16 bytes. nvidia: the kernel begins before the launch in front of it has
        ended, and reads its weights meanwhile; STOREs of float16 saturate."""
        totals = sum(1 for nest in nests for each in nest.passes if each.total and self._is_wide(nest))
        self._groups = 1  # simdgroups, and their places for a total, of which the last ones may be nobody's
        while self._groups * LANES < threads:
            self._groups *= 2
        self._partials = totals * self._groups
        encodes = [(each.encode, nest.domain) for nest in nests for each in nest.passes if each.encode is not None]
        vector = longest_vector([op for op, _ in encodes])
        simdgroups = [min(d.first + d.spans, d.groups or threads // LANES) for _, d in encodes if d is not None]
        self._vectors = max(simdgroups, default=0) * vector
        super().__init__(homes(nests, threads, self._partials + self._vectors, aliases, nvidia), vector, aligned, nvidia)
        self._threads, self._rows, self._scratch_slot, self._aliases = threads, rows, bindings, aliases
        self._pending: list[Touch] = []  # what nobody has waited for yet
        self._total = 0
        for nest in nests:
            self._write_nest(nest)

    @staticmethod
    def _is_wide(nest: Nest) -> bool:
        return nest.domain is not None and nest.domain.unit > LANES

    def kernel(self) -> Kernel:
        """The whole text; the kernel's name holds the hash of all else."""
        body = "\n".join(self._lines)
        count = {params.MS_ROWS_TOKENS: "num_tokens", params.MS_ROWS_SAMPLED: "num_sampled"}[self._rows]
        weights, first = self._weights_first(), self._rows_first()
        arguments = ["constant MSStep& step [[buffer(0)]]"]
        for slot in sorted(self._slots):
            kind, written = self._slots[slot]
            const = "" if written else "const "
            arguments.append(f"device {const}{kind}* {self._slot_name(slot)} [[buffer({slot})]]")
        if self._homes.scratch:
            arguments.append(f"device float* scratch_rows [[buffer({self._scratch_slot})]]")
        if self._scales:
            slot = self._scratch_slot + (1 if self._homes.scratch else 0)
            arguments.append(f"constant uint* cache_scales [[buffer({slot})]]")
        arguments += [
            "uint row [[threadgroup_position_in_grid]]",
            "uint tid [[thread_index_in_threadgroup]]",
            "uint sg [[simdgroup_index_in_threadgroup]]",
            "uint lane [[thread_index_in_simdgroup]]",
        ]
        head = []
        if self._homes.shared:
            head.append(f"  threadgroup float shared[{self._homes.shared}];")
        if self._partials:
            head.append(f"  threadgroup float partial[{self._partials}];")
        if self._vectors:
            head.append(f"  threadgroup float vectors[{self._vectors}];")
        step = "step"
        if weights:
            names = [self._slot_name(slot) for slot in sorted(self._slots)] + (["scratch_rows"] if self._homes.scratch else [])
            head += [*weights, f"  MS_WAIT_PREVIOUS({names[0]});", *(f"  {name} = ms_waited({name});" for name in names[1:])]
            head += ["  constant MSStep& now = ms_waited(step);", "  MS_LAUNCH_NEXT;"]
            step = "now"
        head.append(f"  if (row >= {step}.{count}) return;")
        if self._homes.scratch:
            head.append(f"  device float* scratch = scratch_rows + ulong(row) * {self._homes.scratch};")
        if "sampled" in self._needed:
            head.append("  const uint sampled_row = uint(sampled_rows[row]);")
        head += [*(f"  {declaration}" for _, declaration in self._pointers.values()), *first]
        text = "\n".join(
            [
                *self._tables,
                f"[[kernel, max_total_threads_per_threadgroup({self._threads})]] void @(",
                ",\n".join(f"    {argument}" for argument in arguments) + ") {",
                *head,
                body,
                "}",
                "",
            ]
        )
        name = "row_program_" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        return Kernel(name, text.replace("@", name), self._threads, self._homes.scratch, np.array(self._scales, np.uint32).tobytes())

    def _weights_first(self) -> list[str]:
        """Reads of what no other launch writes."""
        lines = []
        for (value, offset), d in sorted(self._homes.weights.items(), key=lambda item: (item[0][0].number, item[0][1])):
            instr, count = value.load, per_thread(d)
            name, at = self._held(value, offset), instr.offset + offset
            kind, pointer = TYPES[instr.dtype], self._slot(instr.slot, TYPES[instr.dtype], False) + (f" + {at}" if at else "")
            wide = d.run > 1 and instr.slot in self._aligned and at % d.run == 0 and instr.dtype != params.MS_INT32
            lines.append(f"  float {name}{f'[{count}]' if count > 1 else ''};")
            for k in range(0, count, d.run):
                start = f"{k // d.run * d.unit} + tid" if k else "tid"
                start = f"({start}) * {d.run}" if d.run > 1 else start
                if wide:  # threads behind the last element read that again
                    vector = f"{name}_{k}"
                    place = f"min({start}, {d.width - d.run}u)"
                    lines.append(f"  const {kind}{d.run} {vector} = *(device const {kind}{d.run}*)({pointer} + {place});")
                for e in range(d.run):
                    read = f"{vector}[{e}]" if wide else f"({pointer})[min({start}{f' + {e}' if e else ''}, {d.width - 1}u)]"
                    lines.append(f"  {name}{f'[{k + e}]' if count > 1 else ''} = float({read});")
        return lines

    def _rows_first(self) -> list[str]:
        """Reads of rows, all before the first wait for one of them."""
        lines = []
        for (value, offset), d in sorted(self._homes.first.items(), key=lambda item: (item[0][0].number, item[0][1])):
            instr, count, name = value.load, per_thread(d), self._held(value, offset)
            span, first = ("sg", "lane") if d.unit == LANES else (f"tid / {d.unit}", f"tid % {d.unit}") if d.spans > 1 else ("0", "tid")
            lines.append(f"  float {name}{f'[{count}]' if count > 1 else ''};")
            self._run = d.run
            if self._is_wide_access(instr, offset):
                self._wide_loads = {}
                self._wide_loaded(instr, offset)
                ((vector, text),) = self._wide_loads.values()
                for k in range(0, count, d.run):
                    start = f"({k // d.run * d.unit} + tid) * {d.run}" if k else f"tid * {d.run}"
                    lines += ["  {", f"    const uint start = min({start}, {d.width - d.run}u);", f"    {text}"]
                    lines += [f"    {name}[{k + e}] = {vector}[{e}];" for e in range(d.run)] + ["  }"]
                continue
            for k in range(count):
                j = f"({k // d.run * d.unit} + {first}) * {d.run} + {k % d.run}" if d.run > 1 else f"{k * d.unit} + {first}" if k else first
                beyond = count * d.unit > d.width or (first == "tid" and d.unit < self._threads)
                index = f"min({j}, {d.width - 1}u)" if beyond else j
                if d.spans > 1:
                    span_of = f"min({span}, {d.spans - 1}u)" if d.spans * d.unit < self._threads else span
                    index = f"{span_of} * {d.width} + {index}"
                index = f"{offset} + {index}" if offset else index
                lines.append(f"  {name}{f'[{k}]' if count > 1 else ''} = {self._loaded(instr, index)};")
        return lines

    # ---- nests --------------------------------------------------------------------------------------------------------
    def _write_nest(self, nest: Nest) -> None:
        d = nest.domain
        assert d is not None
        self._nest = nest
        self._wide = self._is_wide(nest)
        self._count = per_thread(d)
        for value, _, where in sorted(self._homes.held, key=lambda h: (h[0].number, h[1])):
            if where is None and any(value in (op.result, op.temporary) for each in nest.passes for op, _ in each.steps):
                self._line(f"float h{value.number}{self._array};")
        start = len(self._lines)
        if d.unit == 1:
            self._line("if (tid == 0) {  // places are named twice: in order")
            self._write_passes(nest, lambda: self._block(f"for (uint i = 0; i < {d.width}; i++) {{", lambda: self._steps(nest.passes[0])))
            self._line("}")
        elif not self._wide:
            groups = d.groups or self._threads // LANES
            if d.spans == 1:
                self._line(f"if (sg == {d.first}) {{")
            else:
                first = f"sg < {groups} ? sg : {d.spans}" if d.groups else f"sg - {d.first}" if d.first else "sg"
                self._line(f"for (uint span = {first}; span < {d.spans}; span += {groups}) {{")
            self._write_passes(nest)
            self._line("}")
        else:
            self._line("{")
            self._write_passes(nest)
            self._line("}")
        if not self._wide:
            self._barrier(start)
        self._retire()

    @property
    def _array(self) -> str:
        return f"[{self._count}]" if self._count > 1 else ""

    def _write_passes(self, nest: Nest, alone: Callable[[], None] | None = None) -> None:
        d = nest.domain
        assert d is not None
        with self._indented():
            for value, offset, where in sorted(self._homes.held, key=lambda h: (h[0].number, h[1])):
                if where is nest:
                    self._line(f"float {self._held(value, offset)}{self._array};")
            if self._wide and d.spans > 1:
                self._line(f"const uint span = tid / {d.unit};")
                self._line(f"const uint first = tid % {d.unit};")
            self._filled: set[tuple[Value, int]] = set()
            for each in nest.passes:
                start = len(self._lines)
                self._locals = {}
                self._run, self._wide_loads, self._wide_stores = d.run, {}, []
                if alone is not None:
                    alone()
                else:
                    self._write_pass(each)
                if self._wide:
                    self._barrier(start)
                    self._retire()
                if each.total is not None:
                    self._write_total(*each.total)

    def _write_pass(self, each: Pass) -> None:
        d = self._nest.domain
        assert d is not None
        if each.wait:
            self._line("@wait")
            wait = len(self._lines) - 1
        if each.total is not None:
            op, stage = each.total
            operation = self._operation(op, stage)
            self._line(f"{operation}::number {self._accumulator(op, stage)} = {operation}::none();")
        self._mixed = self._out_of_order(each)
        first = "lane" if not self._wide else "tid" if d.spans == 1 else "first"
        spans = d.spans > 1
        place = "j" if spans else "i"
        guard = f"span < {d.spans}" if self._wide and d.spans * d.unit < self._threads and spans else ""
        opened = 0
        if guard:
            self._line(f"if ({guard}) {{")
            self._depth += 1
            opened += 1
        head = len(self._lines)
        self._line("@loop")
        self._depth += 1
        self._line("@place")
        if spans:
            self._line(f"const uint i = span * {d.width} + j;")
            element = len(self._lines)
        self._unrolled = False
        self._steps(each)
        if each is self._nest.passes[0]:
            for read in self._homes.early.get(self._nest, []):
                self._element(read)
        if spans and not any(re.search(r"\bi\b", line) for line in self._lines[element:]):
            del self._lines[element - 1]
        if d.run > 1:
            self._write_runs(head, d)
        elif self._unrolled and self._count > 1:
            self._lines[head] = self._lines[head].replace("@loop", f"MS_UNROLL for (uint k = 0; k < {self._count}; k++) {{")
            whole = self._count * d.unit == d.width
            indent = self._lines[head + 1][: -len("@place")]
            text = f"{indent}const uint {place} = k * {d.unit} + {first};"
            self._lines[head + 1] = text if whole else f"{text}\n{indent}if ({place} >= {d.width}) continue;"
        elif self._count > 1:
            self._lines[head] = self._lines[head].replace(
                "@loop", f"for (uint {place} = {first}; {place} < {d.width}; {place} += {d.unit}) {{"
            )
            del self._lines[head + 1]
        else:
            self._lines[head] = self._lines[head].replace("@loop", f"if ({first} < {d.width}) {{")
            self._lines[head + 1] = self._lines[head + 1].replace("@place", f"const uint {place} = {first};")
        self._depth -= 1
        self._line("}")
        for _ in range(opened):
            self._depth -= 1
            self._line("}")
        if each.encode is not None:
            self._encode(each.encode)
        if each.wait:
            touched = frozenset(t.flag for t in self._touched if not isinstance(t.memory, int))
            flags = BARRIERS[touched or frozenset({"shared"})]
            self._lines[wait] = self._lines[wait].replace("@wait", f"simdgroup_barrier({flags});")

    def _write_runs(self, head: int, d: Domain) -> None:
        """The loop of the pass at hand, whose body is what follows line `head`: over runs, then over the elements of one."""
        body = [f"  {line}" for line in self._lines[head + 2 :]]
        indent = "  " * (self._depth - 1)
        text = "\n".join(body)
        runs = self._count // d.run
        start = f"(c * {d.unit} + tid) * {d.run}" if runs > 1 else f"tid * {d.run}"
        lines = [f"MS_UNROLL for (uint c = 0; c < {runs}; c++) {{"] if runs > 1 else [f"if (tid * {d.run} < {d.width}) {{"]
        lines += [f"  const uint start = {start};"]
        if runs > 1 and self._count * d.unit != d.width:
            lines += [f"  if (start >= {d.width}) continue;"]
        lines += [f"  {line}" for _, line in self._wide_loads.values()] + [f"  {line}" for line in self._wide_stores[::2]]
        lines += [f"  MS_UNROLL for (uint e = 0; e < {d.run}; e++) {{"]
        if re.search(r"\bk\b", text):
            lines += [f"    const uint k = {f'c * {d.run} + ' if runs > 1 else ''}e;"]
        if re.search(r"\bi\b", text):
            lines += ["    const uint i = start + e;"]
        self._lines[head:] = [indent + line for line in lines] + body + [f"{indent}  }}"]
        self._lines += [f"{indent}  {line}" for line in self._wide_stores[1::2]]

    def _out_of_order(self, each: Pass) -> set[int]:
        """Slots of which a thread reads or writes elements that it has written before in this pass."""
        accessed: list[tuple[int, bool]] = []
        for op, _ in each.steps:
            accessed += [(read.value.load.slot, False) for read in op.reads() if read.value is not None and read.value.lazy]
            if op.kind in ("store", "load"):
                accessed.append((op.instr.slot, op.kind == "store"))
        accessed += [(read.value.load.slot, False) for read in self._homes.early.get(self._nest, []) if read.value is not None]
        return {
            slot
            for at, (written, writes) in enumerate(accessed)
            for other, _ in accessed[at + 1 :]
            if writes and self._aliases.same(written, other)
            for slot in (written, other)
        }

    def _write_total(self, op: Op, stage: int) -> None:
        d = self._nest.domain
        assert d is not None
        name, operation = self._accumulator(op, stage), self._operation(op, stage)
        if self._wide:
            groups = d.unit // LANES
            first = "0" if d.spans == 1 else f"sg / {groups} * {groups}"
            at = self._total * self._groups
            partial = f"partial + {at}" if at else "partial"
            self._line(f"{name} = ms_span_total<{operation}>({name}, {partial}, {first}, {groups}, sg, lane);")
            self._total += 1
            self._pending = [touch for touch in self._pending if touch.flag != "shared"]
        else:
            self._line(f"{name} = {operation}::lanes({name});")
        n, eps = literal(op.width), literal(op.instr.imm0)
        if op.kind == "rms_norm":
            self._line(f"const float scale{op.number} = precise::rsqrt({name} / {n} + {eps});")
        elif op.kind == "layer_norm" and stage == 0:
            self._line(f"const float mean{op.number} = {name} / {n};")
        elif op.kind == "layer_norm":
            self._line(f"const float scale{op.number} = precise::rsqrt({name} / {n} + {eps});")
        elif op.kind == "softmax" and stage == 1:
            self._line(f"const float scale{op.number} = 1.0f / {name};")
        elif op.kind == "reduce":
            assert op.result is not None
            if op.result.root in self._homes.memory:
                first = "lane" if not self._wide else "tid" if d.spans == 1 else "first"
                guard = f" && span < {d.spans}" if self._wide and d.spans > 1 and d.spans * d.unit < self._threads else ""
                target = self._memory(op.result, "span" if d.spans > 1 else "0", 0, op.result.size, write=True)
                self._line(f"if ({first} == 0{guard}) {target} = {operation}::value({name});")

    # ---- waiting ------------------------------------------------------------------------------------------------------
    def _barrier(self, at: int) -> None:
        """A barrier before line `at`, if what has been written since needs one."""
        flags = {
            flag
            for old in self._pending
            for new in self._touched
            if clash(old, new, self._aliases)
            for flag in (old.flag, new.flag)
        }
        if flags:
            self._lines.insert(at, f"{'  ' * self._depth}threadgroup_barrier({BARRIERS[frozenset(flags)]});")
            self._pending = [touch for touch in self._pending if touch.flag not in flags]

    def _retire(self) -> None:
        self._pending += self._touched
        self._touched = []

    def _block(self, head: str, body: Callable[[], None]) -> None:
        self._line(head)
        with self._indented():
            self._unrolled = False
            body()
        self._line("}")
