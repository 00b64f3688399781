"""Graph -> launches: every value gets its place, every fused node its kernel, every true dependency its barrier."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.passes.attention_insides import Inside, Path, find_inside
from metalstep.capture.passes.kinds import row_size
from metalstep.kernels import params
from metalstep.kernels.gpu import attention
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.linear import Norm
from metalstep.kernels.program import Program
from metalstep.plan.bindings import KVPlanes, Placement, Slots
from metalstep.plan.halves import half_values
from metalstep.plan.hazards import Access, barriers
from metalstep.plan.layout import row_view
from metalstep.plan.linear_compiler import LinearCompiler
from metalstep.plan.memory import Lifetime, arena_layout
from metalstep.plan.row_compiler import RowCompiler, compile_rows, is_handle, named_inputs, rope_key
from metalstep.plan.step_arrays import StepArrays
from metalstep.plan.step_memory import StepMemory
from metalstep.plan.target import PlanShape, Target
from metalstep.plan.weights import WeightStore


@dataclass
class LoweredLaunch:
    """A launch, what it touches, and what `explain` and `bench launches` say of it.

    ops: the primitives it replaces. Of a linear, rows: those of the step that it runs on, "tokens" or "sampled"; weight_elements: of
    the weights that it multiplies each row by, without padding. Of attention, position_macs: products per row and position that it
    sees; window: positions that a row sees at most, 0: all.
    """

    launch: Launch
    access: Access
    ops: list[str]
    rows: str = "tokens"
    weight_bytes: int = 0
    weight_elements: int = 0
    position_macs: int = 0
    window: int = 0


@dataclass
class Lowered:
    """A plan's launches in order; the arena they share; where the logits are ([max_sampled, vocab] float32); what the arena is part of."""

    launches: list[LoweredLaunch]
    arena: Buffer
    logits: Buffer
    memory: StepMemory


def lower(
    graph: Graph,
    memory: StepMemory,
    weights: WeightStore,
    planes: dict[object, KVPlanes],
    arrays: StepArrays,
    shape: PlanShape,
    target: Target,
) -> Lowered:
    """Lower a captured graph (after the target's passes) to launches for steps of `shape`, on the step of `arrays`.

    memory: for the plan's values and what its launches need while they run; other plans' may lie in the same.
    Raises: CaptureError naming the operation that has no kernel.
    """
    try:
        return _Lowering(graph, memory, weights, planes, arrays, shape, target).run()
    except NotImplementedError as error:
        raise error if isinstance(error, CaptureError) else CaptureError(str(error)) from error


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        memory: StepMemory,
        weights: WeightStore,
        planes: dict[object, KVPlanes],
        arrays: StepArrays,
        shape: PlanShape,
        target: Target,
    ):
        self.graph, self.memory, self.shape, self.target = graph, memory, shape, target
        self._taken: list[int] = []  # handles: the arena's, and those of scratch memory
        self._scratches: list[Buffer] = []
        self.step, self.step_sizes = arrays.buffers, arrays.sizes
        self.placement = Placement(weights, planes, self.step.embeddings)
        self.nodes = [n for n in graph.nodes if n.op not in ("view", "take_rows")]
        self.angles: dict[tuple[Any, ...], Buffer] = {}
        self.rope_nodes: dict[tuple[Any, ...], Node] = {}
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
                lowered += self._row_program(None, pending)
            pending = {}
            lowered += self._lower(node, angles)
        logits = row_view(self.graph.outputs[0])
        if not logits.contiguous or logits.offset or logits.sampled:
            raise CaptureError(f"the model's logits are a view that is not contiguous: {self.graph.outputs[0]}")
        buffer = self.placement.buffer(logits.root)
        lowered += self._sample(buffer, row_size(logits.root))
        for entry, barrier in zip(lowered, barriers([entry.access for entry in lowered]), strict=True):
            entry.launch.barrier = barrier
        return Lowered(lowered, arena, buffer, self.memory)

    def _scratch(self, nbytes: int) -> Buffer:
        """Memory of one op's launches while they run; other ops' may be the same."""
        for buffer in self._scratches:
            if buffer.nbytes >= nbytes:
                return buffer
        self._scratches.append(self._take(nbytes))
        return self._scratches[-1]

    def _take(self, nbytes: int) -> Buffer:
        """Memory of this plan's own while it runs."""
        owner = self.memory.take(nbytes, self._taken)
        self._taken.append(owner.handle)
        return Buffer(owner.handle, 0, (nbytes,), "uint8")

    def _entries(
        self, launches: list[Launch], reads: list[Buffer], writes: list[Buffer], ops: list[str], **facts: Any
    ) -> list[LoweredLaunch]:
        """One op's launches. Those that use scratch memory follow one another."""
        entries = []
        for i, launch in enumerate(launches):
            bound = {buffer.handle for buffer in launch.bindings}
            used = [buffer for buffer in self._scratches if buffer.handle in bound]
            entries.append(LoweredLaunch(launch, Access(reads, [*writes, *used]), ops, **(facts if i == 0 else {})))
        return entries

    def _sample(self, logits: Buffer, vocab_size: int) -> list[LoweredLaunch]:
        """The sampler, and what makes the next step's inputs of its results."""
        step, sizes = self.step, self.step_sizes
        samplers = self.target.sample(
            logits,
            step,
            self.shape.sampled,
            self._scratch,
            vocab_size=vocab_size,
            max_rows=sizes.results,
            max_top=sizes.top,
            history_stride=sizes.history_stride,
        )
        advances = self.target.step_advance(step, block_size=sizes.block_size, max_rows=sizes.results)
        results = [step.sampled, step.top, step.history, step.counts, logits]
        inputs = [step.step, step.tokens, step.positions, step.sampling, *step.slot_mappings]
        return [
            *self._entries(samplers, [logits, step.sampling, step.masks, step.biases], results, ["sample"]),
            *self._entries(advances, [step.sampled, *step.block_tables], inputs, ["step_advance"]),
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
        places: dict[Any, Buffer] = {}
        halves = half_values(self.graph, self.nodes) if self.target.halves else set()
        for node in self.nodes:
            for value in node.outputs:
                if is_handle(value, node.attrs.get("body", [node])):
                    continue
                if value.rows is None:
                    raise CaptureError(f"a result that does not have one row per token: {node}")
                shape: tuple[int, ...] = (self.shape.rows(value.rows), row_size(value))
                if self._planes(node) > 1:
                    shape = (self._planes(node), *shape)
                places[value] = Buffer(0, 0, shape, "float16" if value in halves else "float32")
                lifetimes.append(Lifetime(value, places[value].nbytes, index[node], last.get(value, index[node])))
        for key, node in self.rope_nodes.items():
            places[key] = Buffer(0, 0, (self.shape.tokens, node.attrs["dims"]), "float32")
            lifetimes.append(Lifetime(key, places[key].nbytes, 0, end))
        offsets, size = arena_layout(lifetimes)
        arena = self._take(max(size, 1))
        for key, place in places.items():
            region = replace(place, handle=arena.handle, offset=offsets[key])
            if isinstance(key, tuple):
                self.angles[key] = region
            else:
                self.placement.values[key] = region
        return arena

    @staticmethod
    def _planes(node: Node) -> int:
        """In how many planes a linear leaves each of its results; see the pass."""
        return int(node.attrs.get("planes", 1))

    def _lower(self, node: Node, angles: dict[tuple[Any, ...], Node]) -> list[LoweredLaunch]:
        if node.op == "row_program":
            return self._row_program(node, angles)
        if node.op == "linear":
            return self._linear(node)
        if node.op == "attention":
            return self._attention(node)
        raise CaptureError(f"{node.op} has no kernel (in {node})")

    def _row_program(self, node: Node | None, angles: dict[tuple[Any, ...], Node]) -> list[LoweredLaunch]:
        program, slots = Program(), Slots(int(params.MS_SLOT_FIRST))
        compiler = RowCompiler(program, slots, self.placement, self.angles)
        for key, rope in angles.items():
            compiler.rope_angles(rope, self.angles[key])
        rows, body = "tokens", []
        if node is not None:
            rows, body = self._rows(node), node.attrs["body"]
            compile_rows(compiler, body, node.outputs)
        launches = self.target.row_program(
            program, self.step, slots.buffers, self._rows_code(rows), self.shape.rows(rows), self._cache_group(body), self._scratch
        )
        return self._entries(launches, slots.reads, slots.writes, ["rope_angles"] * len(angles) + _names(body), rows=rows)

    def _cache_group(self, body: Sequence[Node]) -> int:
        """Of the layers whose cache a launch writes."""
        groups = {self.placement.planes[node.attrs["layer"]].group for node in body if node.op == "kv_write"}
        if len(groups) > 1:
            raise CaptureError("one launch writes the caches of layers with different windows")
        return groups.pop() if groups else 0

    def _rows_code(self, rows: str) -> int:
        return int(params.MS_ROWS_SAMPLED if rows == "sampled" else params.MS_ROWS_TOKENS)

    def _linear(self, node: Node) -> list[LoweredLaunch]:
        compiler = LinearCompiler(node, self.placement, self.angles, norm_inputs=self.target.norm_inputs)
        x, segments, slots = compiler.compile()
        rows = self._rows(node)
        launches = self.target.linear(
            x, segments, self.step, slots.buffers, self._rows_code(rows), self.shape.rows(rows), self._planes(node), self._scratch
        )
        multiplied = [weight for segment in segments for weight in segment.weights]
        return self._entries(
            launches,
            slots.reads,
            slots.writes,
            _names(node.attrs["body"]),
            rows=rows,
            weight_bytes=sum(weight.nbytes for weight in multiplied),
            weight_elements=sum(weight.n * weight.k for weight in multiplied),
        )

    def _attention(self, node: Node) -> list[LoweredLaunch]:
        body = node.attrs.get("body", [node])
        given, attrs, out = named_inputs(body[-1]), node.attrs, node.outputs[0]
        if attrs.get("chunk") or attrs.get("mla"):
            raise CaptureError(f"chunked or latent attention has no kernel (layer {attrs['layer']})")
        planes = self.placement.planes[attrs["layer"]]
        found = find_inside(body) if len(body) > 1 else None
        inside = None if found is None else self._inside(found)
        q = self._row(given["q"]) if found is None else self._row(found.q.source)
        target = self.placement.values[out]
        sinks = self.placement.weights.vector(row_view(given["sinks"]).root.name) if "sinks" in given else None
        heads, dim = given["q"].shape[1], given["q"].shape[3]
        launches = self.target.attention(
            self.shape,
            inside,
            self._scratch,
            q.buffer,
            q.offset,
            q.row_stride,
            planes.k,
            planes.v,
            target,
            self.step,
            num_q_heads=heads,
            num_kv_heads=planes.heads,
            head_dim=dim,
            value_dim=out.shape[3],
            block_size=planes.block_size,
            k_codec=planes.k_codec,
            v_codec=planes.v_codec,
            scale=attrs["scale"],
            window=attrs.get("window") or 0,
            softcap=attrs.get("softcap") or 0.0,
            sinks=sinks,
            group=planes.group,
        )
        reads, writes = [q.buffer, planes.k, planes.v], [target]
        if inside is not None:
            reads += [inside.k.buffer, inside.v.buffer, *([inside.angles] if inside.angles else [])]
            writes += [planes.k, planes.v]
        macs = heads * (dim + out.shape[3])
        return self._entries(launches, reads, writes, _names(body), position_macs=macs, window=attrs.get("window") or 0)

    def _row(self, value: Value) -> attention.Rows:
        """Where the rows of a value lie."""
        view = row_view(value)
        if not view.contiguous:
            raise CaptureError(f"attention whose row is not contiguous: {value}")
        return attention.Rows(self.placement.buffer(view.root), view.offset, view.row_stride)

    def _inside(self, found: Inside) -> attention.Inside:
        rope = found.q.rope
        return attention.Inside(
            k=self._row(found.k.source),
            v=self._row(found.v.source),
            q_norm=self._norm(found.q),
            k_norm=self._norm(found.k),
            angles=None if rope is None else self.angles[rope_key(rope)],
            rope_dims=0 if rope is None else rope.attrs["dims"],
            traditional=rope is not None and rope.attrs["traditional"],
        )

    def _norm(self, path: Path) -> Norm | None:
        if path.norm is None:
            return None
        given = named_inputs(path.norm)
        weight = self.placement.buffer(row_view(given["weight"]).root) if "weight" in given else None
        return Norm(weight, path.norm.attrs["eps"])


def _names(body: Sequence[Node]) -> list[str]:
    return [node.op for node in body if node.op not in ("view", "take_rows")]
