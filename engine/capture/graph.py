"""Graph of a captured step: values in, nodes in topological order, values out.

A graph can always be interpreted with MLX (`Graph.evaluate`), after every pass: a fused node keeps the nodes it replaces as
attrs["body"].
"""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


@dataclass(eq=False, slots=True)
class Value:
    """One array of the step.

    node: what makes it, None for inputs, weights and constants. kind: "input", "weight", "const" or "temp". name: of an input or
    weight, else empty. data: of a constant. rows: what the first axis counts, "tokens", "sampled" or None (set where the rows are solved,
    rows.py, and by the passes that make values).
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    node: Node | None = None
    kind: str = "temp"
    name: str = ""
    data: mx.array | None = None
    rows: str | None = None

    def __repr__(self) -> str:
        return f"{self.name or self.kind}{list(self.shape)}"

    def like(self) -> Value:
        """A new value of the same shape, dtype and rows, made by nothing yet."""
        return Value(self.shape, self.dtype, rows=self.rows)


@dataclass(eq=False, slots=True)
class Node:
    """One operation. `outputs` are told here who makes them.

    attrs: "args" (a primitive's arguments), "in" (names of a marker's inputs), "body" (what a fused node replaces), and the
    operation's own (step_ops.py).
    """

    op: str
    inputs: list[Value]
    outputs: list[Value]
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in self.outputs:
            value.node = self

    @property
    def out(self) -> Value:
        return self.outputs[0]

    @property
    def parts(self) -> list[Node]:
        """The primitive nodes of a fused node, or the node itself."""
        return self.attrs.get("body") or [self]

    def __repr__(self) -> str:
        attrs = {k: v for k, v in self.attrs.items() if k != "body"}
        return f"{self.op}({', '.join(map(repr, self.inputs))}; {attrs}) -> {self.outputs}"


Uses = dict[Value, list[tuple[Node | None, int]]]


@dataclass
class Graph:
    """A step of `tokens` rows of which `sampled` give logits.

    inputs and weights: by name. outputs: the logits, then recurrent states that no operation owns. prepare: nodes that depend on
    weights alone, run once when the model is loaded. state_keys: recurrent states that the step writes, in the order of the trace's
    outputs. one_row_per_sequence: steps with two rows of a sequence would be wrong.
    """

    inputs: dict[str, Value]
    weights: dict[str, Value]
    nodes: list[Node]
    outputs: list[Value]
    tokens: int
    sampled: int
    prepare: list[Node] = field(default_factory=list)
    state_keys: list[tuple[Any, ...]] = field(default_factory=list[Any])
    one_row_per_sequence: bool = False

    def uses(self) -> Uses:
        """Who reads each value: (node, index of the input); outputs of the graph count as (None, index)."""
        found: Uses = defaultdict(list)
        for node in self.nodes:
            for i, value in enumerate(node.inputs):
                found[value].append((node, i))
        for i, value in enumerate(self.outputs):
            found[value].append((None, i))
        return found

    def replace(self, old: Value, new: Value, uses: Uses) -> None:
        """Everything that reads `old` reads `new` instead; `uses` is kept up to date."""
        readers = uses.pop(old, [])
        for node, i in readers:
            if node is None:
                self.outputs[i] = new
            else:
                node.inputs[i] = new
        uses[new] = uses[new] + readers

    def sweep(self) -> Graph:
        """Drop nodes whose outputs nobody needs and put the rest in topological order."""
        done: set[Node] = set()
        order: list[Node] = []
        stack = [(v.node, False) for v in reversed(self.outputs) if v.node]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
            elif node not in done:
                done.add(node)
                stack.append((node, True))
                stack += [(v.node, False) for v in reversed(node.inputs) if v.node and v.node not in done]
        self.nodes = order
        return self

    def count(self) -> Counter[str]:
        """Nodes by operation."""
        return Counter(node.op for node in self.nodes)

    @property
    def launches(self) -> list[Node]:
        """Nodes that cost a launch: views, and row selections that their readers do themselves, do not."""
        return [n for n in self.nodes if n.op != "view" and not n.attrs.get("folded")]

    def evaluate(self, inputs: Mapping[str, mx.array], cache: Any) -> list[mx.array]:
        """Interpret the graph with MLX.

        inputs: ids [tokens, 1], positions [tokens], rows [sampled] (after the sampled_rows pass), and the weights by name; prepared
        weights that are missing are computed. cache: step_ops.StepCache, updated in place. Returns the outputs, lazy.
        """
        values: dict[Value, Any] = {}
        for name, value in {**self.inputs, **self.weights}.items():
            if name in inputs:
                values[value] = inputs[name]
        for node in self.prepare:
            if node.out.name and node.out.name in inputs:
                values[node.out] = inputs[node.out.name]
            else:
                interpret([node], values, cache)
        interpret(self.nodes, values, cache)
        return [operand(v, values) for v in self.outputs]


def operand(value: Value, values: Mapping[Value, Any]) -> Any:
    """The array behind `value`: computed or given, or a constant's data. None for a cache handle."""
    if value in values:
        return values[value]
    if value.data is None:
        raise ValueError(f"{value} is read before it is computed, or was not given")
    return value.data


def interpret(nodes: Sequence[Node], values: dict[Value, Any], cache: Any, any_float: bool = False) -> None:
    """Run nodes in order, adding their outputs to `values`.

    any_float: inputs may be floats of another size than in the trace, and so may results.
    Raises: NotImplementedError for an operation without an interpretation; ValueError where a result differs from the trace's shape.
    """
    from metalstep.capture.step_ops import INTERPRETATIONS  # step_ops needs Node, so it is imported late

    for node in nodes:
        if "body" in node.attrs:
            interpret(node.attrs["body"], values, cache, any_float)
            continue
        function = INTERPRETATIONS.get(node.op)
        if function is None:
            raise NotImplementedError(f"no interpretation of {node}")
        result = function(node, cache, *[operand(v, values) for v in node.inputs])
        for value, array in zip(node.outputs, result if isinstance(result, list | tuple) else [result], strict=True):
            if array is not None and not _as_traced(array, value, any_float):
                raise ValueError(f"{node}: got {array.dtype}{list(array.shape)}, the trace says {value.dtype}{list(value.shape)}")
            values[value] = array


def _as_traced(array: mx.array, value: Value, any_float: bool) -> bool:
    same = array.dtype == value.dtype or (any_float and all(mx.issubdtype(d, mx.floating) for d in (array.dtype, value.dtype)))
    return same and tuple(array.shape) == value.shape
