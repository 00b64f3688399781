"""One trace of a model's step with MLX's tracer (mx.export_function, an experimental API: only this file touches it)."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from metalstep.capture.caches import RecurrentStates, stand_in
from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Graph, Node, Value
from metalstep.capture.markers import FIRST_NUMBER, Marks, tracing
from metalstep.capture.ops import QUANT_MODES

STEP_INPUTS = ("ids", "positions")


def trace(model: Any, tokens: int) -> Graph:
    """The graph of one step of `tokens` rows, as the model computes it: ids [tokens, 1], positions [tokens], weights by name.

    Every token is a batch row of its own, with its own position. Weights are lazy zeros of their shapes: none is evaluated.
    Recurrent models take a second trace, because the first one learns the shapes of their states.
    Raises: CaptureError, or what the model raises.
    """
    states = RecurrentStates()
    while True:
        graph = _trace_once(model, tokens, states)
        if states.known or not states.written:
            return graph
        states.known = {key: (tuple(a.shape), a.dtype) for key, a in states.written.items()}


def _trace_once(model: Any, tokens: int, states: RecurrentStates) -> Graph:
    events: list[dict[str, Any]] = []
    states.written = {}
    with tracing() as marks:
        names, arrays = zip(*tree_flatten(model.parameters()), strict=True)
        caches = make_prompt_cache(model)

        def step(ids: mx.array, positions: mx.array, *weights: mx.array) -> list[mx.array]:
            model.update(tree_unflatten(list(zip(names, weights, strict=True))))
            marks.positions = positions
            logits = model(ids, cache=[stand_in(c, layer, marks, states) for layer, c in enumerate(caches)])
            return [getattr(logits, "logits", logits), *states.written.values()]

        weights = [mx.zeros(a.shape, a.dtype) for a in arrays]
        try:
            mx.export_function(events.append, step, mx.zeros((tokens, 1), mx.int32), mx.zeros((tokens,), mx.int32), *weights)
        finally:
            model.update(tree_unflatten(list(zip(names, arrays, strict=True))))
    return graph_of(events, marks, names, list(states.written), tokens)


def graph_of(events: Sequence[dict[str, Any]], marks: Marks, names: Sequence[str], state_keys: list[tuple[Any, ...]], tokens: int) -> Graph:
    """The tracer's events as a graph.

    Inputs come in the order of the arguments, so weights are known by position; constants come with their data; a marker is a
    Depends whose input behind those it passes on is a constant from FIRST_NUMBER on.
    """
    by_type: dict[str, list[Any]] = defaultdict(list)
    for event in events:
        by_type[event["type"]].append(event)
    values: dict[str, Value] = {}
    inputs: dict[str, Value] = {}
    weights: dict[str, Value] = {}
    for (key, shape, dtype), name in zip(by_type["inputs"][0]["inputs"], (*STEP_INPUTS, *names), strict=True):
        kind = "weight" if len(inputs) == len(STEP_INPUTS) else "input"
        values[key] = Value(tuple(shape), dtype, kind=kind, name=name)
        (weights if kind == "weight" else inputs)[name] = values[key]
    for event in by_type["constants"]:
        for key, data in event["constants"]:
            values[key] = Value(tuple(data.shape), data.dtype, kind="const", data=data)
    nodes = []
    for event in by_type["primitive"]:
        operands = [values[key] for key, _, _ in event["inputs"]]
        outputs = [Value(tuple(shape), dtype) for _, shape, dtype in event["outputs"]]
        node = _node(event["name"], operands, outputs, event["arguments"], marks)
        nodes.append(node)
        for (key, _, _), value in zip(event["outputs"], outputs, strict=True):
            values[key] = value
    outputs = [values[key] for key, _, _ in by_type["outputs"][0]["outputs"]]
    return Graph(inputs, weights, nodes, outputs, tokens, tokens, state_keys=state_keys).sweep()


def _node(op: str, operands: list[Value], outputs: list[Value], args: Sequence[Any], marks: Marks) -> Node:
    attrs: dict[str, Any] = {"args": args}
    if op == "Depends":
        number = _marker_number(operands, len(outputs))
        if number is None or number >= len(marks.made):
            raise CaptureError(f"mx.depends over {operands} has no meaning in a step")
        op, attrs = marks.made[number]
        operands = operands[len(outputs) + 1 :]
    elif op in ("QuantizedMatmul", "GatherQMM"):
        group_size, bits, mode, transpose = args[:4]
        attrs |= {"group_size": group_size, "bits": bits, "mode": QUANT_MODES[mode], "transpose": bool(transpose)}
    elif op == "Matmul":
        attrs["transpose"] = False
    return Node(op, operands, outputs, attrs)


def _marker_number(operands: Sequence[Value], passed_on: int) -> int | None:
    if len(operands) <= passed_on:
        return None
    number = operands[passed_on]
    if number.data is None or number.data.size != 1 or number.dtype != mx.int32:
        return None
    found = int(number.data.item()) - FIRST_NUMBER  # type: ignore[arg-type]
    return found if found >= 0 else None
