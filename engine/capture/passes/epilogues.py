"""Epilogues: elementwise work on a linear's products is done where they are made: biases, residuals, silu · mul, softcaps."""
from __future__ import annotations

from collections.abc import Iterable

from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.passes.fuse import fuse
from metalstep.capture.passes.kinds import depths, is_row_node, is_scalar, root, row_part, row_size
from metalstep.kernels.elementwise import is_elementwise

LAST = 1 << 60  # behind every heavy node of the same depth

Columns = tuple[Value, int, int]  # product, first column, number of columns


def epilogues(graph: Graph) -> Graph:
    """Saves a launch and a stored row per chain of elementwise nodes behind a linear.

    Each expression works on one block of columns: its products, and whatever else it reads, have its own width and order. What it
    reads besides must be ready when the linear runs.
    """
    return _Epilogues(graph).run()


class _Epilogues:
    """`owner`: the linear that each chosen elementwise node joins."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.uses = graph.uses()
        self.depth = depths(graph)
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.owner: dict[Node, Node] = {}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if is_elementwise(node.op):
                self._choose(node)
        self._choose_operands()
        while any([self._drop_late(), self._drop_overlapping()]):
            pass
        for linear, nodes in self._expressions().items():
            fuse(sorted([linear, *nodes], key=self.order.__getitem__), "linear", self.uses, experts=False)
        return self.graph.sweep()

    def _expressions(self) -> dict[Node, list[Node]]:
        """The chosen nodes of each linear, in topological order."""
        found: dict[Node, list[Node]] = {}
        for node in sorted(self.owner, key=self.order.__getitem__):
            found.setdefault(self.owner[node], []).append(node)
        return found

    def _key(self, node: Node) -> tuple[int, int]:
        """When the launch of `node` runs: launches only read from launches with a smaller key, so that there is no cycle."""
        if node in self.owner:
            return self._key(self.owner[node])
        return self.depth[node], LAST if is_row_node(node) else self.order[node]

    def _choose(self, node: Node) -> None:
        makers = [root(v).node for v in node.inputs]
        found = [self.owner.get(m, m) for m in makers if m]
        linears = [m for m in found if m.op == "linear" and not m.attrs["experts"] and "planes" not in m.attrs]
        if linears:
            last = max(linears, key=self._key)
            if self._fits(node, last):
                self.owner[node] = last

    def _choose_operands(self) -> None:
        """Elementwise nodes that only one linear's epilogue reads join it too: they would be a launch of their own."""
        for node in reversed(self.graph.nodes):
            if not is_elementwise(node.op) or node in self.owner:
                continue
            owners = {self.owner.get(r) if r else None for r in self._readers(node)}
            linear = owners.pop() if len(owners) == 1 else None
            if linear is not None and self._fits(node, linear):
                self.owner[node] = linear

    def _readers(self, node: Node) -> Iterable[Node | None]:
        for value in node.outputs:
            for reader, _ in self.uses[value]:
                if reader is not None and reader.op == "view":
                    yield from (behind for behind, _ in self.uses[reader.out])
                else:
                    yield reader

    def _fits(self, node: Node, linear: Node) -> bool:
        """Whether all that `node` reads is as wide as its result, in order, and ready when `linear` runs."""
        width = row_size(node.out)
        if node.out.rows is None or node.out.rows != linear.out.rows:
            return False
        for value in node.inputs:
            if is_scalar(value):
                continue
            part = row_part(value)
            stored = root(value)
            if part is None or row_size(value) != width or stored.kind == "input":
                return False
            maker = stored.node
            if maker is None or maker is linear:
                continue
            if "planes" in maker.attrs:
                return False  # a row program adds them up
            if self.owner.get(maker) is linear:
                if row_size(stored) != width:
                    return False  # a part of a result: epilogues keep whole ones
            elif self._key(maker) >= self._key(linear):
                return False
        return True

    def _drop_late(self) -> bool:
        late = [n for n, linear in self.owner.items() if not self._fits(n, linear)]
        for node in late:
            del self.owner[node]
        return bool(late)

    def _drop_overlapping(self) -> bool:
        """Give up expressions whose columns of a product are also read in another division of it, or are of several widths."""
        dropped = False
        for linear, nodes in self._expressions().items():
            written = [v for n in [linear, *nodes] for v in n.outputs if self._is_read_elsewhere(v, linear)]
            columns = {v: self._columns(v, linear) for v in written}
            bad = {v for v, mine in columns.items() if len({n for _, _, n in mine}) != 1}
            for v, mine in columns.items():
                bad |= {v for other, theirs in columns.items() if other is not v and _overlap(mine, theirs)}
            for value in bad:
                for node in self._expression(value, linear):
                    dropped |= self.owner.pop(node, None) is not None
        return dropped

    def _is_read_elsewhere(self, value: Value, linear: Node) -> bool:
        for reader, _ in self.uses[value]:
            behind = [r for r, _ in self.uses[reader.out]] if reader is not None and reader.op == "view" else [reader]
            if any(r is None or self.owner.get(r) is not linear for r in behind):
                return True
        return False

    def _expression(self, value: Value, linear: Node) -> list[Node]:
        """The nodes of `linear`'s epilogue behind `value`."""
        found: list[Node] = []
        stack = [root(value).node]
        while stack:
            node = stack.pop()
            if node is not None and self.owner.get(node) is linear and node not in found:
                found.append(node)
                stack += [root(v).node for v in node.inputs]
        return found

    def _columns(self, value: Value, linear: Node) -> set[Columns]:
        """The columns of products that `value` is made of."""
        if value.node is linear:
            return {(value, 0, row_size(value))}
        found: set[Columns] = set()
        for node in self._expression(value, linear):
            for v in node.inputs:
                part = row_part(v)
                if part is not None and part[0].node is linear:
                    found.add((*part, row_size(v)))
        return found


def _overlap(mine: set[Columns], theirs: set[Columns]) -> bool:
    """Whether two results read common columns of a product, but not the very same blocks."""
    return any(
        p is q and (first, n) != (other, m) and first < other + m and other < first + n
        for p, first, n in mine
        for q, other, m in theirs
    )
