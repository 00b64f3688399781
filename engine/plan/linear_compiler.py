"""A fused linear of a graph as one launch: its prologue, its weights, and an epilogue per group of outputs."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Node, Value
from metalstep.capture.passes.kinds import row_size
from metalstep.kernels import elementwise, linear, params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Input, Norm, PackedWeight, Segment
from metalstep.kernels.program import Operand, Program, Register
from metalstep.plan.bindings import Placement, Slots, dtype_of
from metalstep.plan.layout import row_view
from metalstep.plan.row_compiler import RowCompiler, named_inputs

MATMULS = ("QuantizedMatmul", "Matmul")


@dataclass(frozen=True)
class Columns:
    """Columns [first, first + n) of the product that `node` makes."""

    node: Node
    first: int
    n: int


@dataclass
class Group:
    """Outputs that share products, and the products in the order of their registers."""

    outputs: list[Value]
    columns: list[Columns]


class LinearCompiler:
    """Takes one `linear` node of the graph apart and builds what kernels/linear.py launches.

    norm_inputs: the prologue is a norm that the launch does itself, not a program.
    """

    def __init__(self, node: Node, placement: Placement, angles: dict[tuple[Any, ...], Buffer], *, norm_inputs: bool = False):
        self.node = node
        self.norm_inputs = norm_inputs
        self.placement = placement
        self.angles = angles
        body = node.attrs["body"]
        first = next((i for i, n in enumerate(body) if n.op in MATMULS), None)
        if first is None:
            raise CaptureError(f"{body[0].op} has no kernel (in {body[0]})")
        self.matmuls = [n for n in body if n.op in MATMULS]
        self.prologue = [n for n in body[:first] if self._feeds_input(n, body)]
        self.made_by = {o: n for n in body if n not in self.prologue for o in n.outputs}

    def compile(self) -> tuple[Input, list[Segment], Slots]:
        """The launch's input, its segments, and the buffers behind the weights."""
        groups = self._groups()
        weights = [[self._weight(c) for c in group.columns] for group in groups]
        slots = Slots(linear.first_buffer_slot(weights))
        x = self._input(slots)
        segments = [Segment(w, self._epilogue(g, slots)) for g, w in zip(groups, weights, strict=True)]
        return x, segments, slots

    def _feeds_input(self, node: Node, body: Sequence[Node]) -> bool:
        """Whether `node` comes before the matmuls because their input needs it (an epilogue's operand may too)."""
        needed = {m.inputs[0] for m in body if m.op in MATMULS}
        for other in reversed(body):
            if any(o in needed for o in other.outputs):
                needed.update(other.inputs)
        return any(o in needed for o in node.outputs)

    def _input(self, slots: Slots) -> Input:
        value = self.matmuls[0].inputs[0]
        work = [n for n in self.prologue if n.op not in ("view", "take_rows")]
        norm = None
        if work and self.norm_inputs:
            norm, value = self._norm(work)
        elif work:
            program = Program()
            compiler = RowCompiler(program, slots, self.placement, self.angles)
            for node in work:
                compiler.add(node)
            return Input(None, prologue=program, result=compiler.register(value))
        view = row_view(value)
        if not view.contiguous:
            raise CaptureError(f"a linear whose input row is not contiguous: {value}")
        buffer = self.placement.buffer(view.root)
        slots.reads.append(buffer)
        rows = params.MS_ROW_SAMPLED if view.sampled else params.MS_ROW_SELF
        return Input(buffer, view.offset, view.row_stride, rows, norm=norm)

    def _norm(self, work: list[Node]) -> tuple[Norm, Value]:
        """The norm that is all of the prologue, and what it norms."""
        (node,) = work
        if node.op != "rms_norm" or row_size(node.out) != node.out.shape[-1]:
            raise CaptureError(f"a linear that begins with {node}")
        given = named_inputs(node)
        weight = self.placement.buffer(row_view(given["weight"]).root) if "weight" in given else None
        return Norm(weight, node.attrs["eps"]), given["x"]

    def _weight(self, columns: Columns) -> PackedWeight:
        node = columns.node
        weight, k = node.inputs[1], node.inputs[0].shape[-1]
        if weight.kind != "weight" or not node.attrs.get("transpose", True):
            raise CaptureError(f"a matmul that does not multiply by a transposed weight: {node}")
        if row_size(node.inputs[0]) != k:
            raise CaptureError(f"a matmul of several vectors per row: {node}")
        if node.op == "Matmul":
            return self.placement.weights.packed(weight.name, columns.n, k, 16, 0, columns.first)
        attrs = node.attrs
        return self.placement.weights.packed(
            weight.name, columns.n, k, attrs["bits"], attrs["group_size"], columns.first
        )

    def _columns(self, value: Value) -> Columns | None:
        """The columns of a product that `value` is, or None."""
        view = row_view(value)
        node = self.made_by.get(view.root)
        if node is None or node.op not in MATMULS:
            return None
        if not view.contiguous:
            raise CaptureError(f"an epilogue that reads a product out of order: {value}")
        return Columns(node, view.offset, view.size)

    def _products(self, value: Value) -> list[Columns]:
        """Products that the expression of `value` reads, each once, in order."""
        found: list[Columns] = []
        stack = [value]
        while stack:
            v = stack.pop()
            columns = self._columns(v)
            if columns is not None:
                if columns not in found:
                    found.append(columns)
            elif row_view(v).root in self.made_by:
                stack.extend(reversed(self.made_by[row_view(v).root].inputs))
        return found

    def _groups(self) -> list[Group]:
        """Outputs grouped so that products shared by several are computed once."""
        groups: list[Group] = []
        for value in self.node.outputs:
            columns = self._products(value)
            merged = [g for g in groups if any(c in g.columns for c in columns)]
            group = Group([value], columns)
            for other in merged:
                group.outputs = other.outputs + group.outputs
                group.columns = other.columns + [c for c in group.columns if c not in other.columns]
                groups.remove(other)
            if len({c.n for c in group.columns}) != 1:
                raise CaptureError(f"an epilogue over products of {[c.n for c in group.columns]} columns: {self.node}")
            groups.append(group)
        return groups

    def _epilogue(self, group: Group, slots: Slots) -> Program:
        program = Program(epilogue=True)
        width = group.columns[0].n
        registers: dict[Columns, Register] = {c: program.register(width) for c in group.columns}
        done: dict[Value, Operand] = {}

        def operand(value: Value) -> Operand:
            columns = self._columns(value)
            if columns is not None:
                return registers[columns]
            view = row_view(value)
            scalar = self.placement.scalar(view)
            if scalar is not None:
                return scalar
            key = value if view.root not in self.made_by else view.root
            if key not in done:
                done[key] = compute(view.root) if view.root in self.made_by else load(value)
            return done[key]

        def load(value: Value) -> Register:
            view = row_view(value)
            if not view.contiguous or view.size != width:
                raise CaptureError(f"an epilogue of {width} columns that reads {value}")
            rows = params.MS_ROW_SAME
            if view.row_stride:
                rows = params.MS_ROW_SAMPLED if view.sampled else params.MS_ROW_SELF
            slot = slots.read(self.placement.buffer(view.root))
            return program.load(slot, width, rows=rows, offset=view.offset, row_stride=view.row_stride)

        def compute(value: Value) -> Operand:
            node = self.made_by[value]
            if node.op == "copy":
                return operand(node.inputs[0])
            operands = [operand(v) for v in node.inputs]
            dtypes = [v.dtype for v in node.inputs]
            args = node.attrs.get("args", ())
            return elementwise.emit(program, node.op, args, operands, dtypes, value.dtype, width)

        for value in group.outputs:
            result = operand(value)
            if not isinstance(result, Register) or row_size(value) != width:
                raise CaptureError(f"an epilogue whose result {value} is not one product wide ({width} columns)")
            buffer = self.placement.values[value]
            program.store(result, slots.write(buffer), row_stride=width, dtype=dtype_of(buffer))
        return program
