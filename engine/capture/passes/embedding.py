"""Embedding: the gather of a token's table row, and of its scales and biases, becomes one operation that dequantises one row."""
from __future__ import annotations

from metalstep.capture.bind import seen_through
from metalstep.capture.graph import Graph, Node, Value


def embedding(graph: Graph) -> Graph:
    """Saves three gathers and their stored rows per step. inputs: ids, table[, scales, biases]; attrs: bits, group_size, mode."""
    ids = graph.inputs["ids"]

    def table(value: Value) -> Value | None:
        """The weight of which `value` holds the tokens' rows."""
        node = seen_through(value).node
        if node is None or node.op != "Gather" or len(node.inputs) != 2 or node.attrs["args"][0] not in ([0], (0,)):
            return None
        weight, indices = node.inputs
        return weight if weight.kind == "weight" and seen_through(indices) is ids else None

    uses = graph.uses()
    for node in [n for n in graph.nodes if n.op == "dequantize"]:
        tables = [table(v) for v in node.inputs]
        found = [t for t in tables if t is not None]
        if len(found) == len(tables):
            attrs = {k: node.attrs[k] for k in ("bits", "group_size", "mode")}
            graph.replace(node.out, Node("embedding", [ids, *found], [node.out.like()], attrs).out, uses)
    graph.sweep()
    uses = graph.uses()
    for node in [n for n in graph.nodes if n.op == "Gather"]:
        weight = table(node.out)
        if weight is not None:
            graph.replace(node.out, Node("embedding", [ids, weight], [node.out.like()]).out, uses)
    return graph.sweep()
