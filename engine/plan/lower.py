"""Graph -> launches: every value gets its place, every fused node its kernel, every true dependency its barrier."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.passes.kinds import row_size
from metalstep.kernels import attention, linear, params, row_program, sample, step_advance
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice
from metalstep.kernels.program import Program
from metalstep.plan.bindings import KVPlanes, Placement, Slots
from metalstep.plan.hazards import Access, barriers
from metalstep.plan.layout import row_view
from metalstep.plan.linear_compiler import LinearCompiler
from metalstep.plan.memory import Lifetime, arena_layout
from metalstep.plan.row_compiler import RowCompiler, compile_rows, is_handle, named_inputs, rope_key
from metalstep.plan.step_arrays import StepArrays
from metalstep.plan.weights import WeightStore

FLOAT = 4  # bytes of an arena element


@dataclass
class LoweredLaunch:
    """A launch, what it touches, and what `explain` and `bench launches` say of it.

    ops: the primitives it replaces. Of a linear, rows: those of the step that it runs on, "tokens" or "sampled"; weight_elements: of
    the weights that it multiplies each row by, without padding.
    """

    launch: Launch
    access: Access
    ops: list[str]
    rows: str = "tokens"
    weight_bytes: int = 0
    weight_elements: int = 0


@dataclass
class Lowered:
    """A plan's launches in order; the arena they share; where the logits are ([max_sampled, vocab] float32)."""

    launches: list[LoweredLaunch]
    arena: Buffer
    logits: Buffer


@dataclass(frozen=True)
class Sizes:
    """The most rows of a step, by kind."""

    tokens: int
    sampled: int

    def of(self, rows: str | None) -> int:
        return self.sampled if rows == "sampled" else self.tokens


def lower(
    graph: Graph,
    device: NativeDevice,
    weights: WeightStore,
    planes: dict[object, KVPlanes],
    arrays: StepArrays,
    sizes: Sizes,
    arithmetic: str,
) -> Lowered:
    """Lower a captured graph (after the passes) to launches for steps of up to `sizes` rows, on the step of `arrays`.

    Raises: CaptureError naming the operation that has no kernel.
    """
    try:
        return _Lowering(graph, device, weights, planes, arrays, sizes, arithmetic).run()
    except NotImplementedError as error:
        raise error if isinstance(error, CaptureError) else CaptureError(str(error)) from error


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        device: NativeDevice,
        weights: WeightStore,
        planes: dict[object, KVPlanes],
        arrays: StepArrays,
        sizes: Sizes,
        arithmetic: str,
    ):
        self.graph, self.device, self.sizes, self.arithmetic = graph, device, sizes, arithmetic
        self.step, self.step_sizes = arrays.buffers, arrays.sizes
        self.placement = Placement(weights, planes, self.step.embeddings)
        self.nodes = [n for n in graph.nodes if n.op not in ("view", "take_rows")]
        self.angles: dict[tuple, Buffer] = {}
        self.rope_nodes: dict[tuple, Node] = {}
        for node in self.nodes:
            for part in node.attrs.get("body", [node]):
                if part.op == "rope":
                    self._check_rope(part)
                    self.rope_nodes.setdefault(rope_key(part), part)

    def run(self) -> Lowered:
        arena = self._place()
        lowered: list[LoweredLaunch] = []
        pending = dict(self.rope_nodes)
        for i, node in enumerate(self.nodes):
            angles = pending if i == 0 and self._takes_angles(node) else {}
            if i == 0 and pending and not angles:
                lowered.append(self._row_program(None, pending))
            pending = {}
            lowered.append(self._lower(node, angles))
        logits = row_view(self.graph.outputs[0])
        if not logits.contiguous or logits.offset or logits.sampled:
            raise CaptureError(f"the model's logits are a view that is not contiguous: {self.graph.outputs[0]}")
        buffer = self.placement.buffer(logits.root)
        lowered += self._sample(buffer, row_size(logits.root))
        for entry, barrier in zip(lowered, barriers([entry.access for entry in lowered]), strict=True):
            entry.launch.barrier = barrier
        return Lowered(lowered, arena, buffer)

    def _sample(self, logits: Buffer, vocab_size: int) -> list[LoweredLaunch]:
        """The sampler, and what makes the next step's inputs of its results."""
        step, sizes = self.step, self.step_sizes
        (sampler,) = sample.launches(
            logits,
            step,
            vocab_size=vocab_size,
            max_rows=sizes.results,
            max_top=sizes.top,
            history_stride=sizes.history_stride,
        )
        (advance,) = step_advance.launches(step, block_size=sizes.block_size, max_rows=sizes.results)
        results = [step.sampled, step.top, step.history, step.counts, logits]
        inputs = [step.step, step.tokens, step.positions, step.sampling, *step.slot_mappings]
        return [
            LoweredLaunch(sampler, Access([logits, step.sampling, step.masks, step.biases], results), ["sample"]),
            LoweredLaunch(advance, Access([step.sampled, *step.block_tables], inputs), ["step_advance"]),
        ]

    def _check_rope(self, node: Node) -> None:
        positions = row_view(named_inputs(node)["offset"]).root
        if positions.name != "positions":
            raise CaptureError(f"rope whose offsets are not the rows' positions: {node}")

    def _takes_angles(self, node: Node) -> bool:
        """Whether the first launch can also compute the angles: a row program over the tokens that does not rotate itself."""
        return (
            node.op == "row_program"
            and self._rows(node) == "tokens"
            and not any(part.op == "rope" for part in node.attrs["body"])
        )

    def _rows(self, node: Node) -> str:
        kinds = {v.rows for v in node.outputs if v.rows} or {v.rows for v in node.inputs if v.rows}
        return "sampled" if "sampled" in kinds else "tokens"

    def _place(self) -> Buffer:
        """Give every value that a launch writes, and every table of angles, its region of a new arena."""
        index = {node: i for i, node in enumerate(self.nodes)}
        end = len(self.nodes)
        last: dict[Value, int] = {}
        for node in self.nodes:
            for value in node.inputs:
                last[row_view(value).root] = index[node]
        for value in self.graph.outputs:
            last[row_view(value).root] = end
        lifetimes: list[Lifetime] = []
        shapes: dict[Any, tuple[int, int]] = {}
        for node in self.nodes:
            for value in node.outputs:
                if is_handle(value, node.attrs.get("body", [node])):
                    continue
                if value.rows is None:
                    raise CaptureError(f"a result that does not have one row per token: {node}")
                shapes[value] = (self.sizes.of(value.rows), row_size(value))
                lifetimes.append(self._lifetime(value, shapes[value], index[node], last.get(value, index[node])))
        for key, node in self.rope_nodes.items():
            shapes[key] = (self.sizes.tokens, node.attrs["dims"])
            lifetimes.append(self._lifetime(key, shapes[key], 0, end))
        offsets, size = arena_layout(lifetimes)
        owner = self.device.create_buffer(max(size, 1))
        for key, shape in shapes.items():
            region = Buffer(owner.handle, offsets[key], shape, "float32")
            if isinstance(key, tuple):
                self.angles[key] = region
            else:
                self.placement.values[key] = region
        return Buffer(owner.handle, 0, (owner.nbytes,), "uint8")

    def _lifetime(self, key: object, shape: tuple[int, int], first: int, last: int) -> Lifetime:
        return Lifetime(key, shape[0] * shape[1] * FLOAT, first, last)

    def _lower(self, node: Node, angles: dict[tuple, Node]) -> LoweredLaunch:
        if node.op == "row_program":
            return self._row_program(node, angles)
        if node.op == "linear":
            return self._linear(node)
        if node.op == "attention":
            return self._attention(node)
        raise CaptureError(f"{node.op} has no kernel on the host device (in {node})")

    def _row_program(self, node: Node | None, angles: dict[tuple, Node]) -> LoweredLaunch:
        program, slots = Program(), Slots(int(params.MS_SLOT_FIRST))
        compiler = RowCompiler(program, slots, self.placement, self.angles)
        for key, rope in angles.items():
            compiler.rope_angles(rope, self.angles[key])
        rows, body = "tokens", []
        if node is not None:
            rows, body = self._rows(node), node.attrs["body"]
            compile_rows(compiler, body, node.outputs)
        (launch,) = row_program.launches(
            program, self.step, slots.buffers, self._rows_code(rows), self.sizes.of(rows), self._cache_group(body)
        )
        ops = ["rope_angles"] * len(angles) + _names(body)
        return LoweredLaunch(launch, Access(slots.reads, slots.writes), ops)

    def _cache_group(self, body: Sequence[Node]) -> int:
        """Of the layers whose cache a launch writes."""
        groups = {self.placement.planes[node.attrs["layer"]].group for node in body if node.op == "kv_write"}
        if len(groups) > 1:
            raise CaptureError("one launch writes the caches of layers with different windows")
        return groups.pop() if groups else 0

    def _rows_code(self, rows: str) -> int:
        return int(params.MS_ROWS_SAMPLED if rows == "sampled" else params.MS_ROWS_TOKENS)

    def _linear(self, node: Node) -> LoweredLaunch:
        x, segments, slots = LinearCompiler(node, self.placement, self.angles).compile()
        rows = self._rows(node)
        (launch,) = linear.launches(
            x, segments, self.step, slots.buffers, self._rows_code(rows), self.sizes.of(rows), self.arithmetic
        )
        multiplied = [weight for segment in segments for weight in segment.weights]
        return LoweredLaunch(
            launch,
            Access(slots.reads, slots.writes),
            _names(node.attrs["body"]),
            rows,
            weight_bytes=sum(weight.buffer.nbytes for weight in multiplied),
            weight_elements=sum(weight.n * weight.k for weight in multiplied),
        )

    def _attention(self, node: Node) -> LoweredLaunch:
        given, attrs, out = named_inputs(node), node.attrs, node.outputs[0]
        if attrs.get("chunk") or attrs.get("mla"):
            raise CaptureError(f"chunked or latent attention has no kernel on the host device (layer {attrs['layer']})")
        planes = self.placement.planes[attrs["layer"]]
        q = row_view(given["q"])
        if not q.contiguous:
            raise CaptureError(f"attention whose query row is not contiguous: {given['q']}")
        buffer, target = self.placement.buffer(q.root), self.placement.values[out]
        sinks = self.placement.weights.vector(row_view(given["sinks"]).root.name) if "sinks" in given else None
        heads, dim = given["q"].shape[1], given["q"].shape[3]
        (launch,) = attention.launches(
            buffer,
            q.offset,
            q.row_stride,
            planes.k,
            planes.v,
            target,
            self.step,
            num_q_heads=heads,
            num_kv_heads=planes.k.shape[1],
            head_dim=dim,
            value_dim=out.shape[3],
            block_size=planes.block_size,
            kv_dtype=planes.dtype,
            scale=attrs["scale"],
            window=attrs.get("window") or 0,
            softcap=attrs.get("softcap") or 0.0,
            sinks=sinks,
            max_rows=self.sizes.tokens,
            group=planes.group,
        )
        return LoweredLaunch(launch, Access([buffer, planes.k, planes.v], [target]), ["attention"])


def _names(body: Sequence[Node]) -> list[str]:
    return [node.op for node in body if node.op not in ("view", "take_rows")]
