"""Linears: products that read the same row at the same time become one launch with several weights, without copying weights."""
from __future__ import annotations

from typing import Any

from metalstep.capture.graph import Graph, Node
from metalstep.capture.passes.fuse import fuse
from metalstep.capture.passes.kinds import EXPERT_MATMULS, MATMULS, depths, root


def linears(graph: Graph) -> Graph:
    """Saves a launch per joined weight: q, k and v; gate and up; in a parallel block all five.

    attrs of `linear`: experts (whether weights are chosen by expert), body.
    """
    depth, uses = depths(graph), graph.uses()
    groups: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.op in MATMULS:
            groups.setdefault((*_format(node), depth[node]), []).append(node)
    for nodes in groups.values():
        fuse(nodes, "linear", uses, experts=nodes[0].op in EXPERT_MATMULS)
    return graph.sweep()


def _format(node: Node) -> tuple[Any, ...]:
    """What products of one launch must share: where x is, and how the weights are stored."""
    x = node.inputs[0]
    look = (x.node.attrs["offset"], x.shape, x.node.attrs["strides"]) if root(x) is not x and x.node else (0, x.shape[-1])
    experts = tuple(node.inputs[-1:]) if node.op in EXPERT_MATMULS else ()
    stored = (node.attrs.get("group_size"), node.attrs.get("mode"), node.attrs.get("transpose"))
    return (node.op, root(x), look, experts, stored)
