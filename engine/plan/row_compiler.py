"""Row-local nodes of a graph as a row program: loads, one instruction per primitive, stores."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Node, Value
from metalstep.capture.passes.kinds import contiguous, row_size
from metalstep.kernels import elementwise, embedding, kv_write, layer_norm, params, rms_norm, rope
from metalstep.kernels.launch import Buffer
from metalstep.kernels.program import Operand, Program, Register
from metalstep.plan.bindings import Placement, Slots, dtype_of
from metalstep.plan.layout import RowView, row_view

REDUCE = {"sum": params.MS_SUM, "prod": params.MS_PROD, "max": params.MS_MAX, "min": params.MS_MIN}
REDUCE_CODES = (None, None, "sum", "prod", "min", "max")  # MLX's Reduce: and, or, sum, prod, min, max
UPDATE_CODES = (params.MS_MAX, params.MS_MIN, params.MS_SUM, params.MS_PROD, params.MS_ASSIGN)  # MLX's SliceUpdate


def rope_key(node: Node) -> tuple[Any, ...]:
    """What two rotations must share to share their angles."""
    return (node.attrs["dims"], node.attrs["base"], node.attrs["scale"], named_inputs(node).get("freqs"))


def named_inputs(node: Node) -> dict[str, Value]:
    """A marker node's inputs by argument name."""
    return dict(zip(node.attrs["in"], node.inputs, strict=True))


class RowCompiler:
    """Compiles nodes into `program`, binding what it loads and stores in `slots`.

    angles: buffers of rotation angles by `rope_key`, [tokens, dims].
    """

    def __init__(self, program: Program, slots: Slots, placement: Placement, angles: dict[tuple[Any, ...], Buffer]):
        self.program = program
        self.slots = slots
        self.placement = placement
        self.angles = angles
        self.registers: dict[Value, Register] = {}
        self._loaded: dict[tuple[Any, ...], Register] = {}

    def add(self, node: Node) -> None:
        """Append one primitive node.

        Raises: CaptureError naming a primitive that has no row-program form.
        """
        if node.op in ("view", "take_rows"):
            return  # read where it is used
        handler = HANDLERS.get(node.op)
        if handler is not None:
            handler(self, node)
        elif elementwise.is_elementwise(node.op):
            self._elementwise(node)
        else:
            raise CaptureError(f"{node.op} has no row-program form (in {node})")

    def store(self, value: Value) -> None:
        """Write a value that other launches read to its place."""
        buffer = self.placement.values[value]
        self.program.store(self.register(value), self.slots.write(buffer), row_stride=row_size(value), dtype=dtype_of(buffer))

    def register(self, value: Value) -> Register:
        """`value` in a register; a scalar is spread over one."""
        operand = self.operand(value)
        if isinstance(operand, Register):
            return operand
        out = self.program.register(row_size(value))
        self.program.emit(params.MS_OP_COPY, out, operand, n=out.size)
        return out

    def operand(self, value: Value) -> Operand:
        """`value` for an instruction: its register (loaded or gathered when needed), or the scalar it is."""
        if value in self.registers:
            return self.registers[value]
        view = row_view(value)
        scalar = self.placement.scalar(view)
        if scalar is not None:
            return scalar
        if view.root in self.registers:
            source, offset = self.registers[view.root], view.offset
        elif view.contiguous:
            return self._load(view, view.offset, view.size)
        else:
            source, offset = self._load(view, 0, row_size(view.root)), view.offset
        if view.contiguous:
            return source.part(offset, view.size)
        out = self.program.register(view.size)
        self.program.strided(params.MS_OP_GATHER, out, source, offset, view.dims, view.strides, params.MS_ASSIGN)
        return out

    def _load(self, view: RowView, offset: int, size: int) -> Register:
        key = (view.root, offset, size, view.sampled)
        if key not in self._loaded:
            planes, plane_stride = 1, 0
            if view.root.kind == "input":
                slot, dtype = self._input_slot(view.root), params.MS_INT32
            else:
                buffer = self.placement.buffer(view.root)
                slot, dtype = self.slots.read(buffer), params.MS_FLOAT32
                if len(buffer.shape) == 3 and view.root.rows:
                    planes, plane_stride = buffer.shape[0], buffer.shape[1] * buffer.shape[2]
            rows = params.MS_ROW_SAME
            if view.row_stride:
                rows = params.MS_ROW_SAMPLED if view.sampled else params.MS_ROW_SELF
            self._loaded[key] = self.program.load(
                slot,
                size,
                rows=rows,
                offset=offset,
                row_stride=view.row_stride,
                dtype=dtype,
                planes=planes,
                plane_stride=plane_stride,
            )
        return self._loaded[key]

    def _input_slot(self, value: Value) -> int:
        slots = {"ids": params.MS_SLOT_TOKENS, "positions": params.MS_SLOT_POSITIONS}
        if value.name not in slots:
            raise CaptureError(f"a row program reads the step input {value.name!r}")
        return slots[value.name]

    def _elementwise(self, node: Node) -> None:
        operands = [self.operand(v) for v in node.inputs]
        size = row_size(node.outputs[0])
        for value, operand in zip(node.inputs, operands, strict=True):
            if isinstance(operand, Register) and operand.size != size:
                raise CaptureError(f"{node.op} of rows of {operand.size} and {size} elements: {value} is not broadcast")
        dtypes = [v.dtype for v in node.inputs]
        args = node.attrs.get("args", ())
        result = elementwise.emit(self.program, node.op, args, operands, dtypes, node.outputs[0].dtype, size)
        self.registers[node.outputs[0]] = result

    def rms_norm(self, node: Node) -> None:
        given, out = named_inputs(node), node.outputs[0]
        weight = self.register(given["weight"]) if "weight" in given else None
        x = self.register(given["x"])
        self.registers[out] = rms_norm.emit(self.program, x, weight, node.attrs["eps"], out.shape[-1])

    def layer_norm(self, node: Node) -> None:
        given, out = named_inputs(node), node.outputs[0]
        weight = self.register(given["weight"]) if "weight" in given else None
        bias = self.register(given["bias"]) if "bias" in given else None
        x = self.register(given["x"])
        self.registers[out] = layer_norm.emit(self.program, x, weight, bias, node.attrs["eps"], out.shape[-1])

    def rope(self, node: Node) -> None:
        angles = self.angles[rope_key(node)]
        loaded = self._loaded.get((angles,))
        if loaded is None:
            loaded = self._loaded[(angles,)] = self.program.load(
                self.slots.read(angles), angles.shape[1], rows=params.MS_ROW_SELF, row_stride=angles.shape[1]
            )
        x = self.register(named_inputs(node)["x"])
        out = node.outputs[0]
        self.registers[out] = rope.emit(self.program, x, loaded, out.shape[-1], node.attrs["traditional"])

    def rope_angles(self, node: Node, buffer: Buffer) -> None:
        """Compute the angles of `node`'s configuration and store them in `buffer`."""
        freqs = named_inputs(node).get("freqs")
        table = None if freqs is None else self.register(freqs)
        attrs = node.attrs
        register = rope.emit_angles(self.program, attrs["dims"], attrs["base"], attrs["scale"], table)
        self.program.store(register, self.slots.write(buffer), row_stride=attrs["dims"])

    def embedding(self, node: Node) -> None:
        table, out = node.inputs[1], node.outputs[0]
        width, vocab = row_size(out), table.shape[0]
        packed = self.placement.weights.packed(
            table.name, vocab, width, node.attrs.get("bits", 16), node.attrs.get("group_size", 0)
        )
        slot, own_slot = self.slots.read(packed.buffer), self.slots.read(self.placement.embeddings)
        affine = [self.slots.read(plane) for plane in (packed.scales, packed.biases) if plane is not None]
        self.registers[out] = embedding.emit(
            self.program, slot, width, vocab, packed.bits, packed.group_size, packed.dtype, own_slot, *affine
        )

    def kv_write(self, node: Node) -> None:
        planes = self.placement.planes[node.attrs["layer"]]
        keys, values = (self.register(v) for v in node.inputs[:2])
        if planes.key_mean is not None:  # softmax does not see what all keys have in common, and codes need not hold it
            mean = self.program.load(
                self.slots.read(self.placement.weights.constant(planes.key_mean)), keys.size, rows=params.MS_ROW_SAME
            )
            centred = self.program.register(keys.size)
            self.program.emit(params.MS_OP_SUB, centred, keys, mean, n=keys.size)
            keys = centred
        if planes.rounding is not None:
            keys, values = (planes.rounding(self.program, x, x.size // planes.heads) for x in (keys, values))
        k_slot, v_slot = self.slots.write(planes.k), self.slots.write(planes.v)
        kv_write.emit(
            self.program,
            keys,
            values,
            k_slot,
            v_slot,
            planes.heads,
            planes.block_size,
            planes.k_codec,
            planes.v_codec,
            planes.k_codec.scales_at(planes.k.nbytes, keys.size // planes.heads),
            planes.v_codec.scales_at(planes.v.nbytes, values.size // planes.heads),
        )

    def slice_update(self, node: Node) -> None:
        kind, start, stop, step = node.attrs["args"]
        base, update = node.inputs
        dims, strides = base.shape[1:], contiguous(base.shape[1:])
        lengths = [-(-(b - a) // s) for a, b, s in zip(start[1:], stop[1:], step[1:], strict=True)]
        out = self.program.register(row_size(base))
        self.program.emit(params.MS_OP_COPY, out, self.operand(base), n=out.size)
        count = 1
        for length in lengths:
            count *= length
        source = self.operand(update)
        if not isinstance(source, Register):
            spread = self.program.register(count)
            self.program.emit(params.MS_OP_COPY, spread, source, n=count)
            source = spread
        offset = sum(a * s for a, s in zip(start[1:], strides, strict=True))
        steps = [a * s for a, s in zip(step[1:], strides, strict=True)]
        assert len(dims) == len(lengths)
        self.program.strided(params.MS_OP_SCATTER, out, source, offset, lengths, steps, UPDATE_CODES[kind])
        self.registers[node.outputs[0]] = out

    def concatenate(self, node: Node) -> None:
        axis, out = node.attrs["args"][0], node.outputs[0]
        axis = axis + len(out.shape) if axis < 0 else axis
        if axis == 0:
            raise CaptureError(f"a concatenation of rows: {node}")
        result, strides, at = self.program.register(row_size(out)), contiguous(out.shape[1:]), 0
        for value in node.inputs:
            dims = value.shape[1:]
            offset = at * strides[axis - 1]
            self.program.strided(
                params.MS_OP_SCATTER, result, self.register(value), offset, dims, strides, params.MS_ASSIGN
            )
            at += value.shape[axis]
        self.registers[out] = result

    def copy(self, node: Node) -> None:
        self.registers[node.outputs[0]] = self.register(node.inputs[0])

    def softmax(self, node: Node) -> None:
        x, out = self.register(node.inputs[0]), node.outputs[0]
        result = self.program.register(x.size)
        self.program.emit(params.MS_OP_SOFTMAX, result, x, n=x.size, inner=out.shape[-1])
        self.registers[out] = result

    def reduce(self, node: Node) -> None:
        code, axes = node.attrs["args"][:2]
        value = node.inputs[0]
        rank = len(value.shape)
        axes = sorted(a % rank for a in axes)
        kind = REDUCE_CODES[code]
        if kind is None or axes != list(range(rank - len(axes), rank)) or 0 in axes:
            raise CaptureError(f"a reduction that is not a sum, product, minimum or maximum over the last axes: {node}")
        inner = row_size(value) // row_size(node.outputs[0])
        out = self.program.register(row_size(node.outputs[0]))
        self.program.emit(
            params.MS_OP_REDUCE, out, self.register(value), n=out.size, inner=inner, dims=[REDUCE[kind], 0, 0, 0]
        )
        self.registers[node.outputs[0]] = out


HANDLERS: dict[str, Callable[[RowCompiler, Node], None]] = {
    "rms_norm": RowCompiler.rms_norm,
    "layer_norm": RowCompiler.layer_norm,
    "rope": RowCompiler.rope,
    "embedding": RowCompiler.embedding,
    "kv_write": RowCompiler.kv_write,
    "SliceUpdate": RowCompiler.slice_update,
    "Concatenate": RowCompiler.concatenate,
    "copy": RowCompiler.copy,
    "Softmax": RowCompiler.softmax,
    "Reduce": RowCompiler.reduce,
}


def compile_rows(compiler: RowCompiler, body: Sequence[Node], outputs: Sequence[Value]) -> None:
    """All nodes of a launch's body, then its stores."""
    for node in body:
        compiler.add(node)
    for value in outputs:
        if row_view(value).root is value and not (value.node and is_handle(value, body)):
            compiler.store(value)


def is_handle(value: Value, body: Sequence[Node]) -> bool:
    """Whether `value` is a cache handle (a kv_write's output): it orders launches and has no elements of its own."""
    return any(node.op == "kv_write" and value in node.outputs for node in body)
