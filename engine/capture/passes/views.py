"""Views: chains of reshape, transpose, split, slice and broadcast become one strided view of a stored value."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.ops import RESHAPES
from metalstep.capture.passes.kinds import VIEWS, contiguous, is_contiguous
from metalstep.kernels.program import merge_axes


def views(graph: Graph) -> Graph:
    """Saves every launch that would only move elements. A reshape that needs a copy stays, as `copy`.

    attrs of a view: offset and strides, in elements of the stored value (its only input), which is contiguous.
    """
    return _Views(graph).run()


class _Views:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.looks: dict[Value, tuple[Value, int, list[int]]] = {}  # what, from where, with which strides
        self.made: dict[tuple[Any, ...], Value] = {}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if node.op not in VIEWS or not self._follow(node):
                node.inputs = [self._view(v) for v in node.inputs]
        self.graph.outputs = [self._view(v) for v in self.graph.outputs]
        return self.graph.sweep()

    def _look(self, value: Value) -> tuple[Value, int, list[int]]:
        return self.looks.get(value, (value, 0, contiguous(value.shape)))

    def _view(self, value: Value) -> Value:
        """`value` as a stored value or a view of one."""
        root, offset, strides = self._look(value)
        if root is value or (root.kind == "const" and math.prod(root.shape) == 1):
            return root
        if offset == 0 and value.shape == root.shape and is_contiguous(value.shape, strides):
            return root
        key = (root, offset, tuple(strides), value.shape)
        if key not in self.made:
            self.made[key] = Node("view", [root], [value.like()], {"offset": offset, "strides": tuple(strides)}).out
        return self.made[key]

    def _follow(self, node: Node) -> bool:
        """Note what a view node looks at. False when it needs a copy."""
        value, out = node.inputs[0], node.out
        root, offset, strides = self._look(value)
        args: Any = node.attrs.get("args")
        if node.op in (*RESHAPES, "StopGradient"):
            new = reshaped(value.shape, strides, out.shape)
            if new is None:
                node.op, node.attrs = "copy", {}
                return False
            self.looks[out] = (root, offset, new)
        elif node.op == "Transpose":
            self.looks[out] = (root, offset, [strides[axis] for axis in args[0]])
        elif node.op in ("Broadcast", "BroadcastAxes", "Full"):
            added = len(out.shape) - len(value.shape)
            spread = [0 if length == 1 else stride for length, stride in zip(value.shape, strides, strict=True)]
            self.looks[out] = (root, offset, [0] * added + spread)
        elif node.op == "Slice":
            start, _, step = args
            offset += sum(first * stride for first, stride in zip(start, strides, strict=True))
            self.looks[out] = (root, offset, [k * stride for k, stride in zip(step, strides, strict=True)])
        else:  # Split
            places, axis = args
            for part, first in zip(node.outputs, (0, *places), strict=True):
                self.looks[part] = (root, offset + first * strides[axis], strides)
        return True


def reshaped(shape: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> list[int] | None:
    """Strides of a reshape without a copy, or None. Axes of length 1 get stride 0."""
    runs = merge_axes(shape, strides)
    out: list[int] = []
    at, left = 0, runs[0][0] if runs else 1
    for length in new:
        if length == 1:
            out.append(0)
            continue
        if at < len(runs) and left == 1:
            at += 1
            left = runs[at][0]
        if left % length:
            return None
        left //= length
        out.append(runs[at][1] * left)
    return out
