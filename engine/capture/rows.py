"""The step for any number of rows, from two small traces: what differs between them grows linearly with the rows.

Small traces also keep to the path that models take for few rows: mixtures of experts sort their indices from 64 on.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Graph, Node, Value


class TracePair:
    """Two traces of one step, of different numbers of rows.

    Raises: CaptureError when they differ in anything but sizes.
    """

    def __init__(self, first: Graph, second: Graph):
        self.first, self.second = first, second
        if len(first.nodes) != len(second.nodes):
            raise CaptureError(
                f"the model does something else for {second.tokens} rows ({len(second.nodes)} operations) than for {first.tokens} "
                f"({len(first.nodes)})"
            )
        for a, b in zip(first.nodes, second.nodes, strict=True):
            if a.op != b.op or len(a.inputs) != len(b.inputs):
                raise CaptureError(f"the model does something else for {second.tokens} rows ({b}) than for {first.tokens} ({a})")
        self._check_constants()

    def _check_constants(self) -> None:
        pairs = {
            (x, y): None
            for a, b in zip(self.first.nodes, self.second.nodes, strict=True)
            for x, y in zip(a.inputs, b.inputs, strict=True)
            if x.kind == "const" and x.data is not y.data
        }
        equal = [
            x.data is not None and y.data is not None and x.shape == y.shape and mx.array_equal(x.data, y.data, equal_nan=True)
            for x, y in pairs
        ]
        mx.eval([e for e in equal if isinstance(e, mx.array)])
        for (x, _), same in zip(pairs, equal, strict=True):
            if not same:
                raise CaptureError(f"the model makes a constant {list(x.shape)} that depends on the number of rows")

    def at(self, tokens: int, sampled: int) -> Graph:
        """A graph of its own for `tokens` rows, `sampled` of them sampled."""
        first, second = self.first, self.second
        solve = _Solver(first.tokens, second.tokens, tokens)
        nodes = []
        for a, b in zip(first.nodes, second.nodes, strict=True):
            inputs = [solve.value(x, y) for x, y in zip(a.inputs, b.inputs, strict=True)]
            outputs = [solve.value(x, y) for x, y in zip(a.outputs, b.outputs, strict=True)]
            nodes.append(Node(a.op, inputs, outputs, {k: solve.number(v, b.attrs[k]) for k, v in a.attrs.items()}))
        return Graph(
            solve.values(first.inputs, second.inputs),
            solve.values(first.weights, second.weights),
            nodes,
            [solve.value(x, y) for x, y in zip(first.outputs, second.outputs, strict=True)],
            tokens,
            sampled,
            state_keys=list(first.state_keys),
        )


class _Solver:
    """Sizes and values at `rows` rows, given them at `first` and at `second` rows."""

    def __init__(self, first: int, second: int, rows: int):
        self.first, self.second, self.rows = first, second, rows
        self._made: dict[Value, Value] = {}

    def number(self, a: Any, b: Any) -> Any:
        """A size, or a nest of sizes and other things."""
        if type(a) is type(b) and a == b:
            return a
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            return type(a)(self.number(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {k: self.number(v, b[k]) for k, v in a.items()}
        if isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool):
            slope = (b - a) / (self.second - self.first)
            if slope == int(slope):
                return type(a)(a + slope * (self.rows - self.first))
        raise CaptureError(f"traces of {self.first} and {self.second} rows differ in {a} and {b}, which is not a number of rows")

    def value(self, a: Value, b: Value) -> Value:
        if a not in self._made:
            rows = "tokens" if a.shape[:1] == (self.first,) and b.shape[:1] == (self.second,) else None
            shape = a.shape if a.shape == b.shape else self.number(a.shape, b.shape)
            self._made[a] = Value(shape, a.dtype, None, a.kind, a.name, a.data, rows)
        return self._made[a]

    def values(self, a: Mapping[str, Value], b: Mapping[str, Value]) -> dict[str, Value]:
        return {name: self.value(value, b[name]) for name, value in a.items()}
