"""Dense products in one form: x · Wᵀ with the weight itself as the second input, biases as additions."""
from __future__ import annotations

from metalstep.capture.graph import Graph, Node


def matmuls(graph: Graph) -> Graph:
    """Saves nothing itself; later passes and kernels see one form of product where MLX has three."""
    uses = graph.uses()
    for node in [n for n in graph.nodes if n.op == "AddMM" and list(n.attrs["args"]) == [1.0, 1.0]]:
        a, b, c = node.inputs
        product = Node("Matmul", [a, b], [node.out.like()], {"transpose": False})
        graph.replace(node.out, Node("Add", [product.out, c], [node.out.like()], {"args": []}).out, uses)
    graph.sweep()
    for node in graph.nodes:
        if node.op == "Matmul" and (maker := node.inputs[1].node) is not None and maker.op == "Transpose":
            weight = maker.inputs[0]
            if weight.kind == "weight" and len(weight.shape) == 2 and list(maker.attrs["args"][0]) == [1, 0]:
                node.inputs[1], node.attrs["transpose"] = weight, True
    return graph.sweep()
