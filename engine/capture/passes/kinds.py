"""Which operations are what: the sets that several passes ask for."""
from __future__ import annotations

import math
from collections.abc import Sequence

from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.ops import RESHAPES

VIEWS = frozenset({*RESHAPES, "StopGradient", "Transpose", "Broadcast", "BroadcastAxes", "Full", "Slice", "Split"})
EXPERT_MATMULS = frozenset({"GatherQMM", "GatherMM"})
MATMULS = frozenset({"QuantizedMatmul", "Matmul", "AddMM", *EXPERT_MATMULS})
# What a row program cannot hold: work that is spread over many threads, and what looks at other rows.
HEAVY = MATMULS | {
    "Convolution",
    "attention",
    "gated_delta",
    "linear",
    "short_conv",
    "ssm_update",
    "state_read",
    "state_write",
    "take_rows",
}
AXIS_ARGUMENT = {  # where the axis is among a primitive's arguments
    "ArgPartition": 1,
    "ArgReduce": 1,
    "ArgSort": 0,
    "Concatenate": 0,
    "GatherAxis": 0,
    "Partition": 1,
    "Scan": 1,
    "ScatterAxis": 1,
    "Sort": 0,
}


def contiguous(shape: Sequence[int]) -> list[int]:
    """Row-major strides, in elements."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides are row-major where they matter."""
    expected = contiguous(shape)
    return all(a == b for a, b, length in zip(strides, expected, shape, strict=True) if length != 1)


def root(value: Value) -> Value:
    """The stored value that `value` looks into."""
    return value.node.inputs[0] if value.node and value.node.op == "view" else value


def is_stored_outside(value: Value) -> bool:
    """Whether `value` is, or looks into, a weight or a constant."""
    return root(value).kind in ("weight", "const")


def is_row_node(node: Node) -> bool:
    """Whether `node` may be part of a row program."""
    return node.op not in HEAVY and node.op != "view"


def stays_in_row(node: Node) -> bool:
    """Whether each row of the node's results depends on the same row of its inputs only, as far as its arguments tell."""
    rank = len(node.inputs[0].shape) if node.inputs else 1
    if node.op in AXIS_ARGUMENT:
        return bool(node.attrs["args"][AXIS_ARGUMENT[node.op]] % rank != 0)
    if node.op == "Reduce":
        return all(axis % rank != 0 for axis in node.attrs["args"][1])
    if node.op == "Gather":
        return is_stored_outside(node.inputs[0])
    if node.op == "SliceUpdate":
        start, stop = node.attrs["args"][1:3]
        return bool(start[0] == 0 and stop[0] == node.out.shape[0])
    return True


def depths(graph: Graph) -> dict[Node, int]:
    """The most heavy nodes on a way to a node's result, itself included. Row nodes of one depth fit one launch without cycles."""
    found: dict[Node, int] = {}
    for node in graph.nodes:
        found[node] = max((found[v.node] for v in node.inputs if v.node), default=0) + (node.op in HEAVY)
    return found


def row_shape(value: Value) -> tuple[int, ...]:
    """The axes of one row; of the whole value where it has no rows."""
    return value.shape[1:] if value.rows else value.shape


def row_size(value: Value) -> int:
    """Elements of one row."""
    return math.prod(row_shape(value))


def row_strides(value: Value) -> Sequence[int]:
    """Strides of the axes of one row, in elements of the stored value."""
    if root(value) is value:
        return contiguous(row_shape(value))
    assert value.node is not None
    strides: Sequence[int] = value.node.attrs["strides"]
    return strides[1:] if value.rows else strides


def row_part(value: Value) -> tuple[Value, int] | None:
    """(stored value, offset) when the elements of a row of `value` lie one after the other, else None. Unit: elements."""
    if not is_contiguous(row_shape(value), row_strides(value)):
        return None
    stored = root(value)
    if stored is value:
        return value, 0
    assert value.node is not None
    if value.rows and value.shape[0] != 1:
        expected = row_size(stored) if stored.rows else 0
        if value.node.attrs["strides"][0] != expected:
            return None
    return stored, value.node.attrs["offset"]


def is_scalar(value: Value) -> bool:
    """Whether every element of `value` is the same element of a weight or constant."""
    if not is_stored_outside(value) or root(value).rows:
        return False
    if root(value) is value:
        return math.prod(value.shape) == 1
    assert value.node is not None
    return all(stride == 0 or length == 1 for stride, length in zip(value.node.attrs["strides"], value.shape, strict=True))
