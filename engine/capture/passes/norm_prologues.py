"""Norm prologues: a norm joins the linears that read it, which read its whole row anyway."""
from __future__ import annotations

from collections.abc import Callable

from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.passes.kinds import root, row_size

NORMS = ("rms_norm", "layer_norm")
NormFits = Callable[[int], bool]  # of a row's elements


def norm_prologues(graph: Graph, norms: tuple[str, ...] = NORMS, fits: NormFits | None = None) -> Graph:
    """Saves a launch per norm that only linears read, and the normed rows: 228 launches become 172 in a llama of 28 layers.

    fits: whether linears norm rows of so many elements; None: of any number.
    """
    uses = graph.uses()
    for norm in [n for n in graph.nodes if _is_norm(n, norms) and (fits is None or fits(row_size(n.out)))]:
        readers: dict[Node | None, list[Value]] = {}
        for reader, _ in uses[norm.out]:
            if reader is not None and reader.op == "view":
                for behind, _ in uses[reader.out]:
                    readers.setdefault(behind, []).append(reader.out)
            else:
                readers.setdefault(reader, []).append(norm.out)
        if any(r is None or r.op != "linear" or r.attrs["experts"] or not _only_input(r, v) for r, v in readers.items()):
            continue
        for linear, values in readers.items():
            assert linear is not None
            _join(norm, linear, values)
    return graph.sweep()


def _is_norm(node: Node, norms: tuple[str, ...]) -> bool:
    """Whether a row program is one of these norms with one result."""
    work = [part.op for part in node.parts if part.op != "view"]
    return node.op == "row_program" and len(work) == 1 and work[0] in norms


def _only_input(linear: Node, values: list[Value]) -> bool:
    """Whether the linear reads the values as its input x and not in its epilogue."""
    products = [p for p in linear.parts if "transpose" in p.attrs]
    return all(p.inputs[0] in values for p in products) and not any(
        v in values for p in linear.parts for v in (p.inputs[1:] if p in products else p.inputs)
    )


def _join(norm: Node, linear: Node, values: list[Value]) -> None:
    views = {v: Node("view", [norm.out], [v.like()], dict(v.node.attrs)) for v in values if v.node and root(v) is not v}
    for part in linear.parts:
        part.inputs = [views[v].out if v in views else v for v in part.inputs]
    linear.attrs["body"] = [*norm.parts, *views.values(), *linear.parts]
    kept = [v for v in linear.inputs if v not in values]
    linear.inputs = list(dict.fromkeys([*norm.inputs, *kept]))
