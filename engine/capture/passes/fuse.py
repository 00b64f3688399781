"""Fusing nodes into one: the fused node keeps them as its body."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metalstep.capture.graph import Node, Uses, Value
from metalstep.capture.passes.kinds import root


def fuse(nodes: Sequence[Node], op: str, uses: Uses, **attrs: Any) -> Node:
    """One node `op` for `nodes`, which are in topological order and hold no views. Outputs are what other nodes read.

    uses: of the graph before any fusion of the pass at hand. Views of what is made inside are repeated in the body, so that no view
    is an output: a view is read where it is used. The caller sweeps the graph afterwards.
    """
    made = {v for n in nodes for v in n.outputs}
    inside = set(nodes)
    body: list[Node] = []
    views: dict[Value, Value] = {}

    def own(value: Value) -> Value:
        """`value` as the body reads it."""
        if root(value) is value or root(value) not in made:
            return value
        if value not in views:
            assert value.node is not None
            view = Node("view", list(value.node.inputs), [value.like()], dict(value.node.attrs))
            body.append(view)
            views[value] = view.out
        return views[value]

    read: dict[Value, None] = {}
    for node in nodes:
        for value in node.inputs:
            if root(value) not in made:
                read[value] = None
        for part in node.parts:
            part.inputs = [own(v) for v in part.inputs]
            body.append(part)
    written = [v for n in nodes for v in n.outputs if _read_outside(v, inside, uses)]
    return Node(op, list(read), written, {**attrs, "body": body})


def _read_outside(value: Value, inside: set[Node], uses: Uses) -> bool:
    for reader, _ in uses[value]:
        if reader is None or (reader.op != "view" and reader not in inside):
            return True
        if reader.op == "view" and any(r is None or r not in inside for r, _ in uses[reader.out]):
            return True
    return False
