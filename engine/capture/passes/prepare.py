"""Prepared weights: what depends on weights alone is computed when the model is loaded."""
from __future__ import annotations

from metalstep.capture.graph import Graph
from metalstep.capture.passes.kinds import is_stored_outside


def prepare(graph: Graph) -> Graph:
    """Saves a step's work on weights: gemma's `1 + w` in every norm, MLA's weights by head.

    Their values become weights with the names "prepared.0", "prepared.1", …; graph.prepare computes them.
    """
    made = 0
    for node in graph.nodes:
        if node.op in ("view", "embedding") or not node.inputs or any(v.rows for v in node.outputs):
            continue
        if not all(is_stored_outside(v) for v in node.inputs):
            continue
        graph.prepare += [*(v.node for v in node.inputs if v.node), node]
        for value in node.outputs:
            value.kind, value.name, value.node = "weight", f"prepared.{made}", None
            made += 1
    return graph.sweep()
