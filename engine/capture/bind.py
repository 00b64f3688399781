"""What a trace needs before it can be interpreted: attention tied to its cache, handwritten attention recognised, and reads and
writes of recurrent states turned into the operations that own them.

Binding works on primitives as traced: views are still Reshape, Transpose and so on.
"""
from __future__ import annotations

from typing import Any

from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Graph, Node, Uses, Value
from metalstep.capture.markers import CACHED_LENGTH
from metalstep.capture.ops import RESHAPES

VIEWS = frozenset({*RESHAPES, "Transpose", "Broadcast"})
RECURRENT = ("gated_delta", "ssm_update")


def bind(graph: Graph) -> Graph:
    """Raises: CaptureError for attention that does not follow from a cache, and for what depends on the cached length."""
    bind_handwritten_attention(graph)
    bind_attention(graph)
    bind_recurrent(graph)
    _refuse_left_over(graph)
    return graph


def seen_through(value: Value, ops: frozenset[str] = VIEWS) -> Value:
    """The value that `value` is a view of."""
    while value.node and value.node.op in ops:
        value = value.node.inputs[0]
    return value


def _cached(value: Value) -> tuple[Node | None, int]:
    """The kv_write whose cache `value` is a view of, and which plane (0: keys, 1: values)."""
    value = seen_through(value)
    if value.node and value.node.op == "kv_write":
        return value.node, value.node.outputs.index(value)
    return None, 0


def _scalar(value: Value) -> float | None:
    value = seen_through(value)
    return float(value.data.item()) if value.data is not None and value.data.size == 1 else None  # type: ignore[arg-type]


def _unscaled(value: Value) -> tuple[Value, float]:
    """`value` as (base, factor): products with constants taken apart."""
    factor = 1.0
    while value.node and value.node.op in ("Multiply", "Divide"):
        base, other = value.node.inputs
        number = _scalar(other)
        if number is None and value.node.op == "Multiply":
            base, other = other, base
            number = _scalar(other)
        if number is None:
            break
        factor = factor * number if value.node.op == "Multiply" else factor / number
        value = base
    return value, factor


def _cache_attrs(write: Node) -> dict[str, Any]:
    return {k: write.attrs[k] for k in ("layer", "window", "chunk")}


def bind_handwritten_attention(graph: Graph) -> None:
    """softmax(cap · tanh(q · Kᵀ / cap)) · V, as gemma2 and olmo write it, becomes attention(q, K, V; scale, softcap)."""
    uses = graph.uses()
    for softmax in [n for n in graph.nodes if n.op == "Softmax"]:
        scores, scale = _unscaled(seen_through(softmax.inputs[0], frozenset({"AsType"})))
        softcap = None
        if scores.node and scores.node.op == "Tanh":
            softcap = scale
            scores, scale = _unscaled(scores.node.inputs[0])
            scale *= softcap
        if not (scores.node and scores.node.op == "Matmul"):
            continue
        query, keys = scores.node.inputs
        write, plane = _cached(keys)
        product = _only_product(softmax.out, uses)
        if write is None or plane != 0 or product is None or _cached(product.inputs[1]) != (write, 1):
            continue
        while True:  # the query's own scaling, and the views that group heads
            base, factor = _unscaled(query)
            if factor != 1.0:
                query, scale = base, scale * factor
            elif len(query.shape) == 5 and query.node and query.node.op in VIEWS:
                query = query.node.inputs[0]
            else:
                break
        out = Value((*query.shape[:3], write.outputs[1].shape[-1]), product.out.dtype, rows=query.rows)
        inputs = [query, *write.outputs]
        attrs = {"in": ("q", "k", "v"), "scale": scale, "softcap": softcap}
        attention = Node("attention", inputs, [out], attrs)
        grouped = Node("Reshape", [attention.out], [product.out.like()])
        graph.replace(product.out, grouped.out, uses)
    graph.sweep()


def _only_product(value: Value, uses: Uses) -> Node | None:
    """The matmul that alone reads `value`, perhaps after a cast."""
    while True:
        readers = uses[value]
        if len(readers) != 1 or readers[0][0] is None:
            return None
        node = readers[0][0]
        if node.op == "Matmul":
            return node
        if node.op != "AsType":
            return None
        value = node.out


def bind_attention(graph: Graph) -> None:
    """attention(q, k, v[, mask, sinks]) reads the cache that k and v came from; the mask becomes a window or latent scores.

    attrs afterwards: in, layer, scale, window, chunk (tokens or None), softcap, mla.
    """
    for node in [n for n in graph.nodes if n.op == "attention"]:
        given = dict(zip(node.attrs["in"], node.inputs, strict=True))
        write, plane = _cached(given["k"])
        values_write, values_plane = _cached(given["v"])
        if write is None or plane != 0 or values_write is not write:
            raise CaptureError(f"attention over keys that do not come from a cache: {node}")
        inputs = {"q": given["q"], "k": write.outputs[0], "v": write.outputs[1]}
        attrs = {"scale": node.attrs["scale"], "softcap": node.attrs["softcap"], "mla": False, **_cache_attrs(write)}
        if "mask" in given:
            mask = seen_through(given["mask"])
            if mask.node and mask.node.op == "mask":
                attrs["window"] = min(w for w in (mask.node.attrs["window"], attrs["window"]) if w)
            elif mask.node and mask.node.op == "Matmul" and values_plane == 0 and _cached(mask.node.inputs[1]) == (write, 1):
                inputs["q_pe"] = mask.node.inputs[0]
                attrs["mla"] = True
            else:
                raise CaptureError(f"attention with a mask that the model computes: {mask.node or mask}")
        elif values_plane == 0:
            raise CaptureError(f"attention whose values are its keys: {node}")
        if "sinks" in given:
            inputs["sinks"] = given["sinks"]
        node.inputs, node.attrs = list(inputs.values()), {"in": tuple(inputs), **attrs}
    graph.sweep()


def bind_recurrent(graph: Graph) -> None:
    """state_read + operation + graph output becomes the operation alone, which keeps its state per sequence, so that rows of one
    step may follow each other. States of a form that is not known are read and written as they are."""
    uses = graph.uses()
    kept = []
    for key, state in zip(graph.state_keys, graph.outputs[1:], strict=True):
        reads = [n for n in graph.nodes if n.op == "state_read" and n.attrs["key"] == key]
        if not reads:
            continue  # written and never read
        if not (_bind_update(graph, key, state, reads[0], uses) or _bind_short_conv(graph, key, state, reads[0], uses)):
            kept.append(Node("state_write", [state], [state.like()], {"key": key}).out)
    graph.outputs = graph.outputs[:1] + kept
    graph.one_row_per_sequence = bool(kept)
    graph.sweep()


def _bind_update(graph: Graph, key: tuple[Any, ...], state: Value, read: Node, uses: Uses) -> bool:
    node = state.node
    if node is None or node.op not in RECURRENT or node.inputs[-1] is not read.out:
        return False
    attrs = {**node.attrs, "in": node.attrs["in"][:-1], "key": key}
    graph.replace(node.out, Node(node.op, node.inputs[:-1], [node.out.like()], attrs).out, uses)
    return True


def _bind_short_conv(graph: Graph, key: tuple[Any, ...], state: Value, read: Node, uses: Uses) -> bool:
    """The state is the last K - 1 rows of concatenate(state, x), which a convolution reads."""
    joined = seen_through(state, VIEWS | {"Slice"}).node
    if joined is None or joined.op != "Concatenate" or len(joined.inputs) != 2 or joined.inputs[0] is not read.out:
        return False
    conv = next((u for u, _ in uses[joined.out] if u and u.op == "Convolution"), None)
    if conv is None:
        return False
    attrs = {"key": key, "groups": conv.attrs["args"][5]}
    graph.replace(conv.out, Node("short_conv", [joined.inputs[1], conv.inputs[1]], [conv.out.like()], attrs).out, uses)
    return True


def _refuse_left_over(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "mask":
            raise CaptureError(f"a window mask of {node.attrs['window']} tokens that something other than attention reads")
        if node.op in ("kv_write", "attention"):
            continue
        reads_cache = node.op not in VIEWS and any(_cached(v)[0] for v in node.inputs)
        if reads_cache or any(CACHED_LENGTH in v.shape for v in node.outputs):
            raise CaptureError(f"{node.op} over all cached tokens outside of attention: it depends on the cache's length")
