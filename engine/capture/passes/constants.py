"""Constant folding: rope frequencies, ranges and masks that depend on nothing are computed once, not in every step."""
from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.step_ops import INTERPRETATIONS


def constants(graph: Graph) -> Graph:
    """Saves the work of nodes that see only constants, and makes equal constants one.

    A scalar that is only spread stays a scalar where the step reads it. Layers that each compute the same rope frequencies share
    them afterwards.
    """
    known = {v: v.data for node in graph.nodes for v in node.inputs if v.data is not None}
    folded: list[Value] = []
    for node in graph.nodes:
        if node.op == "state_read" or any(v not in known for v in node.inputs):
            continue
        results = INTERPRETATIONS[node.op](node, None, *[known[v] for v in node.inputs])
        outputs = dict(zip(node.outputs, results if isinstance(results, list | tuple) else [results], strict=True))
        known |= outputs
        if node.op in ("Broadcast", "Full") and node.inputs[0].data is not None and node.inputs[0].data.size == 1:
            continue
        for value, data in outputs.items():
            value.kind, value.data, value.node = "const", data, None
            folded.append(value)
    mx.eval([value.data for value in folded])
    graph.sweep()
    _share_equal(graph)
    _drop_equal_rows(graph)
    return graph.sweep()


def _constants(graph: Graph) -> list[Value]:
    return list(dict.fromkeys(v for node in graph.nodes for v in node.inputs if v.kind == "const"))


def _share_equal(graph: Graph) -> None:
    first: dict[tuple[Any, ...], Value] = {}
    same: dict[Value, Value] = {}
    for value in _constants(graph):
        assert value.data is not None
        content = np.array(value.data.reshape(-1).view(mx.uint8)).tobytes()
        same[value] = first.setdefault((value.shape, value.dtype, value.rows, content), value)
    for node in graph.nodes:
        node.inputs = [same.get(v, v) for v in node.inputs]
    graph.outputs = [same.get(v, v) for v in graph.outputs]


def _drop_equal_rows(graph: Graph) -> None:
    """A constant whose rows are all the same is one row, spread: then it does not depend on the number of rows."""
    if graph.tokens == 1:
        return  # one row does not tell
    spread = {value: _spread(value) for value in _constants(graph) if value.rows}
    for node in graph.nodes:
        node.inputs = [spread.get(v, v) for v in node.inputs]


def _spread(value: Value) -> Value:
    data = value.data
    assert data is not None
    if not mx.array_equal(data, mx.broadcast_to(data[:1], data.shape), equal_nan=True):
        return value
    row = Value((1, *value.shape[1:]), value.dtype, kind="const", data=mx.contiguous(data[:1]))
    return Node("Broadcast", [row], [value.like()]).out
