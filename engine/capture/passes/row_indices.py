"""Row indices: a sampled row's launch reads its token's row itself, so a row selection is not a launch."""
from __future__ import annotations

from metalstep.capture.graph import Graph

READERS = ("linear", "row_program")  # their loads take MS_ROW_SAMPLED


def row_indices(graph: Graph) -> Graph:
    """Saves a copy of every row that enters the sampled part. Sets attrs["folded"] on the row selections that are not launches."""
    uses = graph.uses()
    for node in [n for n in graph.nodes if n.op == "take_rows"]:
        readers = {reader for reader, _ in uses[node.out]}
        readers |= {behind for reader in readers if reader and reader.op == "view" for behind, _ in uses[reader.out]}
        if all(r is not None and r.op in (*READERS, "view") for r in readers):
            node.attrs["folded"] = True
    return graph
