"""Row programs: everything that is left between two heavy operations and stays in its row is one launch."""
from __future__ import annotations

from typing import Any

from metalstep.capture.graph import Graph, Node
from metalstep.capture.passes.fuse import fuse
from metalstep.capture.passes.kinds import depths, is_row_node


def row_programs(graph: Graph) -> Graph:
    """Saves launches and stored rows: embedding + norm; q and k norms + rope + cache write; norm + add + norm; a router.

    Row nodes of one depth always fit one launch without cycles. Each runs as late as its readers allow, so that it meets them.
    """
    depth, uses = depths(graph), graph.uses()
    for node in reversed(graph.nodes):
        readers = [reader for v in node.outputs for reader, _ in uses[v]]
        if is_row_node(node) and node.op != "kv_write" and readers and all(r and is_row_node(r) for r in readers):
            depth[node] = min(depth[r] for r in readers if r)
    levels: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.nodes:
        if is_row_node(node):
            rows = {v.rows for v in node.outputs}
            levels.setdefault((depth[node], *sorted(map(str, rows))), []).append(node)
    for nodes in levels.values():
        fuse(nodes, "row_program", uses)
    return graph.sweep()
