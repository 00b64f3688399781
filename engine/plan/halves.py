"""Which values of a graph may be float16: a linear rounds its rows to that anyway where it multiplies halves."""
from __future__ import annotations

from collections.abc import Sequence

from metalstep.capture.graph import Graph, Node, Value
from metalstep.plan.layout import row_view

WRITERS = ("row_program", "linear", "attention")
MATMULS = ("QuantizedMatmul", "Matmul")


def half_values(graph: Graph, nodes: Sequence[Node]) -> set[Value]:
    """Stored values that linears alone read, as rows to multiply and not to norm: normed rows, attention's results, silu(gate) * up.
    Residuals, whose elements grow with every layer, are none of them."""
    read: set[Value] = set()
    wide = {row_view(value).root for value in graph.outputs}
    for node in nodes:
        roots = {row_view(value).root for value in node.inputs}
        read |= roots
        wide |= roots - (_multiplied(node) if node.op == "linear" else set())
    made = {value for node in nodes if node.op in WRITERS and "planes" not in node.attrs for value in node.outputs}
    return (made & read) - wide


def _multiplied(linear: Node) -> set[Value]:
    """What a linear reads for its products alone."""
    products = [part for part in linear.parts if part.op in MATMULS]
    others = {row_view(value).root for part in linear.parts if part not in products for value in part.inputs}
    others |= {row_view(value).root for part in products for value in part.inputs[1:]}
    return {row_view(part.inputs[0]).root for part in products} - others
