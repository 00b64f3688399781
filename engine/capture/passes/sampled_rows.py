"""Sampled rows: behind the last operation that another row or a later step can see, only the sampled rows are computed."""
from __future__ import annotations

import math

import mlx.core as mx

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Graph, Node, Uses, Value
from metalstep.capture.passes.kinds import (
    EXPERT_MATMULS,
    HEAVY,
    MATMULS,
    is_stored_outside,
    root,
    row_size,
    stays_in_row,
)

SEEN_LATER = HEAVY - MATMULS | {"kv_write"}


def sampled_rows(graph: Graph) -> Graph:
    """Saves the output head, the last MLP and the last attention's output projection for every row that is not sampled.

    Adds the input `rows` [sampled] int32 and `take_rows` nodes where token rows become sampled rows.
    """
    inside = _inside(graph)
    rows = graph.inputs["rows"] = Value((graph.sampled,), mx.int32, kind="input", name="rows", rows="sampled")
    taken: dict[Value, Value] = {}

    def sampled(value: Value) -> Value:
        """`value` as a node inside reads it."""
        if value.rows != "tokens" or value.node in inside:
            return value
        if value not in taken:
            out = Value((graph.sampled, *value.shape[1:]), value.dtype, rows="sampled")
            if value.node and value.node.op == "view" and is_stored_outside(value):  # a weight spread over the rows
                taken[value] = Node("view", list(value.node.inputs), [out], dict(value.node.attrs)).out
            else:
                taken[value] = Node("take_rows", [value, rows], [out]).out
        return taken[value]

    for node in [n for n in graph.nodes if n in inside]:
        if node.op in EXPERT_MATMULS:
            node.inputs[-2] = _renumbered(node, graph.sampled)
        node.inputs = [sampled(v) for v in node.inputs]
        for value in node.outputs:
            value.shape, value.rows = (graph.sampled, *value.shape[1:]), "sampled"
    return graph.sweep()


def _renumbered(node: Node, sampled: int) -> Value:
    """The numbers of x's rows that an expert matmul reads, counted in sampled rows.

    Raises: CaptureError when the model chooses the rows itself.
    """
    numbers, x = node.inputs[-2], node.inputs[0]
    data = root(numbers).data
    if data is None or numbers.rows != "tokens" or root(numbers) is not numbers:
        raise CaptureError(f"an expert matmul whose rows are not numbered in order: {node}")
    per_row = math.prod(x.shape[1:-2])
    expected = mx.arange(numbers.shape[0]).reshape(-1, *[1] * (data.ndim - 1))
    if not mx.all(data // per_row == expected):
        raise CaptureError(f"an expert matmul whose rows are not numbered in order: {node}")
    return Value((sampled, *numbers.shape[1:]), numbers.dtype, kind="const", data=data[:sampled], rows="sampled")


def _inside(graph: Graph) -> set[Node]:
    """Nodes that can run on the sampled rows alone."""
    uses = graph.uses()
    inside: set[Node] = set()
    for node in reversed(graph.nodes):
        if _could_run_on_sampled(node) and _read_inside(node, inside, uses):
            inside.add(node)
    while True:
        odd = [n for n in inside if not _read_inside(n, inside, uses) or not all(_enters(v, inside) for v in n.inputs)]
        if not odd:
            return inside
        inside -= set(odd)


def _could_run_on_sampled(node: Node) -> bool:
    if node.op in SEEN_LATER or not all(v.rows == "tokens" for v in node.outputs) or not stays_in_row(node):
        return False
    if node.op != "view":
        return True
    if is_stored_outside(node.out):
        return False  # made anew where it is needed
    source = node.inputs[0]
    return source.rows == "tokens" and (node.out.shape[0] == 1 or node.attrs["strides"][0] == row_size(source))


def _read_inside(node: Node, inside: set[Node], uses: Uses) -> bool:
    return all(reader is None or reader in inside for v in node.outputs for reader, _ in uses[v])


def _enters(value: Value, inside: set[Node]) -> bool:
    """Whether a value that nodes inside read is theirs, or can be taken row by row, or has no rows."""
    if value.node in inside or value.rows == "tokens":
        return True
    return root(value).kind in ("weight", "const")
