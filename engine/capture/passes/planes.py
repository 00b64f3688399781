"""Planes: a linear of few outputs divides k among threadgroups and leaves a plane of sums of each part to who reads them."""
from __future__ import annotations

from collections.abc import Callable

from metalstep.capture.graph import Graph, Uses, Value
from metalstep.capture.passes.kinds import is_row_node
from metalstep.kernels.elementwise import is_elementwise

PlanesOf = Callable[[int, int, int], int]  # of a linear's outputs, k and bits (16: dense)
NORMS = ("rms_norm", "layer_norm")
NEAR = 4  # elementwise nodes between a product and its norm at most: a bias, a scale, a residual


def planes(graph: Graph, planes_of: PlanesOf) -> Graph:
    """Saves no launch: where the rows are few, a weight of few rows keeps only a part of a GPU busy. What is added to the products is no
    epilogue then, but joins the norm that follows in its row program, which adds up the planes too.

    Sets attrs["planes"] of the linears whose products only row nodes read, on their way to a norm.
    """
    uses = graph.uses()
    for node in [n for n in graph.nodes if n.op == "linear" and not n.attrs["experts"]]:
        products = node.parts
        outputs, bits = sum(p.out.shape[-1] for p in products), max(p.attrs.get("bits", 16) for p in products)
        count = planes_of(outputs, products[0].inputs[0].shape[-1], bits)
        if count > 1 and all(_is_normed(v, uses, NEAR) for v in node.outputs):
            node.attrs["planes"] = count
    return graph


def _is_normed(value: Value, uses: Uses, near: int) -> bool:
    """Whether row nodes alone read `value`, and one of them norms it, or what it becomes."""
    readers = [reader for reader, _ in uses[value]]
    return all(reader is not None and is_row_node(reader) for reader in readers) and _meets_norm(value, uses, near)


def _meets_norm(value: Value, uses: Uses, near: int) -> bool:
    """Whether a norm reads `value`, or what up to `near` elementwise nodes make of it."""
    readers = [reader for reader, _ in uses[value] if reader is not None]
    return any(
        reader.op in NORMS or (near > 0 and is_elementwise(reader.op) and _meets_norm(reader.out, uses, near - 1)) for reader in readers
    )
