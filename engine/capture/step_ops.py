"""What the operations of a step compute, in MLX: the markers of a trace (markers.py) and what passes make of them.

One row per token: arrays are [rows, ...]. Caches live in a StepCache. MLX's own functions are looked up when this module is
imported, before a trace replaces them.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from metalstep.capture.graph import Node
from metalstep.capture.ops import PRIMITIVES, Interpretation

ROPE = mx.fast.rope
RMS_NORM = mx.fast.rms_norm
LAYER_NORM = mx.fast.layer_norm
ATTENTION = mx.fast.scaled_dot_product_attention
DEQUANTIZE = mx.dequantize


class StepCache:
    """Caches of `sequences` sequences of up to `max_len` tokens, for interpretation.

    KV planes [sequences + 1, max_len, heads, dim] by layer (the last sequence takes padding rows); recurrent states by key and
    sequence.
    """

    def __init__(self, sequences: int, max_len: int):
        self.sequences, self.max_len = sequences, max_len
        self.planes: dict[object, list[mx.array]] = {}
        self.recurrent: dict[object, dict[int, mx.array]] = {}
        self.start([], [])

    def start(self, seq_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Begin a step: the sequence and position of each row. Sequence -1 is padding."""
        self.seq_ids = [s if s >= 0 else self.sequences for s in seq_ids]
        self.positions = list(positions)
        self.rows = mx.array(self.seq_ids, mx.int32), mx.array(self.positions, mx.int32)

    def write(self, layer: object, keys: mx.array, values: mx.array) -> None:
        """keys and values [rows, heads, 1, dim] go to the rows' places."""
        if layer not in self.planes:
            shape = (self.sequences + 1, self.max_len)
            self.planes[layer] = [mx.zeros((*shape, a.shape[1], a.shape[3]), a.dtype) for a in (keys, values)]
        for plane, rows in zip(self.planes[layer], (keys, values), strict=True):
            plane[self.rows] = rows[:, :, 0]

    def read(self, layer: object) -> list[mx.array]:
        """Keys and values of each row's sequence, [rows, heads, max_len, dim]."""
        return [plane[self.rows[0]].transpose(0, 2, 1, 3) for plane in self.planes[layer]]

    def visible(self, window: int | None, chunk: int | None) -> mx.array:
        """[rows, 1, 1, max_len]: which cached positions a row may look at. Units: window and chunk in tokens."""
        cached, position = mx.arange(self.max_len)[None], self.rows[1][:, None]
        seen = cached <= position
        if window:
            seen = seen & (cached > position - window)
        if chunk:
            seen = seen & (cached // chunk == position // chunk)
        return seen[:, None, None]

    def sequential(self, key: object, zero: mx.array | None, step: Callable[..., Any], *rows: mx.array) -> mx.array:
        """`step(state, *row) -> (out, state)` for each row, in order of position within its sequence; outs concatenated."""
        outs: list[Any] = [None] * len(self.seq_ids)
        states = self.recurrent.setdefault(key, {})
        for r in sorted(range(len(outs)), key=lambda r: (self.seq_ids[r], self.positions[r])):
            sequence = self.seq_ids[r]
            state = zero if self.positions[r] == 0 or sequence == self.sequences else states[sequence]
            outs[r], states[sequence] = step(state, *[a[r : r + 1] for a in rows])
        return mx.concatenate(outs)


def named(node: Node, operands: Sequence[mx.array]) -> dict[str, mx.array]:
    """A marker's operands by argument name."""
    return dict(zip(node.attrs["in"], operands, strict=True))


def rope(node: Node, cache: StepCache, *operands: mx.array) -> mx.array:
    given, attrs = named(node, operands), node.attrs
    return ROPE(
        given["x"],
        attrs["dims"],
        traditional=attrs["traditional"],
        base=None if "freqs" in given else attrs["base"],
        scale=attrs["scale"],
        offset=given["offset"],
        freqs=given.get("freqs"),
    )


def rms_norm(node: Node, cache: StepCache, *operands: mx.array) -> mx.array:
    given = named(node, operands)
    return RMS_NORM(given["x"], given.get("weight"), node.attrs["eps"])


def layer_norm(node: Node, cache: StepCache, *operands: mx.array) -> mx.array:
    given = named(node, operands)
    return LAYER_NORM(given["x"], given.get("weight"), given.get("bias"), node.attrs["eps"])


def dequantize(node: Node, cache: StepCache, *operands: mx.array) -> mx.array:
    given = named(node, operands)
    return _dequantized(node, given["w"], given["scales"], given.get("biases"))


def _dequantized(node: Node, w: mx.array, scales: mx.array, biases: mx.array | None) -> mx.array:
    attrs = node.attrs
    out = DEQUANTIZE(w, scales, biases, group_size=attrs["group_size"], bits=attrs["bits"], mode=attrs["mode"])
    return out.astype(node.out.dtype)


def embedding(
    node: Node, cache: StepCache, ids: mx.array, table: mx.array, scales: mx.array | None = None, biases: mx.array | None = None
) -> mx.array:
    """ids [rows, 1]; the table is quantised when it has scales."""
    rows = table[ids]
    if scales is not None:
        rows = _dequantized(node, rows, scales[ids], None if biases is None else biases[ids])
    return rows.reshape(node.out.shape).astype(node.out.dtype)


def kv_write(node: Node, cache: StepCache, keys: mx.array, values: mx.array) -> tuple[None, None]:
    """The outputs are handles: only attention reads the cache."""
    cache.write(node.attrs["layer"], keys, values)
    return None, None


def attention(node: Node, cache: StepCache, q: mx.array, *operands: Any) -> mx.array:
    """q [rows, heads, 1, dim] against the cache of attrs["layer"]. Latent attention (attrs["mla"]): scores add q_pe · the V plane,
    and the values are the K plane. attrs: scale, window and chunk (tokens), softcap."""
    attrs = node.attrs
    given = named(node, (q, *operands))
    keys, values = cache.read(attrs["layer"])
    seen = cache.visible(attrs["window"], attrs["chunk"])
    if attrs["mla"]:
        bias = given["q_pe"] @ values.swapaxes(-1, -2)
        bias = mx.where(seen, bias, mx.array(-mx.inf, bias.dtype))
        return ATTENTION(q, keys, keys, scale=attrs["scale"], mask=bias)
    if not attrs["softcap"]:
        return ATTENTION(q, keys, values, scale=attrs["scale"], mask=seen, sinks=given.get("sinks"))
    repeats = q.shape[1] // keys.shape[1]
    if repeats > 1:
        keys, values = mx.repeat(keys, repeats, 1), mx.repeat(values, repeats, 1)
    scores = mx.tanh(q @ keys.swapaxes(-1, -2) * (attrs["scale"] / attrs["softcap"])) * attrs["softcap"]
    return mx.softmax(mx.where(seen, scores, mx.array(-mx.inf, scores.dtype)), -1, precise=True) @ values


def state_read(node: Node, cache: StepCache) -> mx.array:
    """Rows of a recurrent state that no operation owns: right only while a step has one row per sequence."""
    states = cache.recurrent.setdefault(node.attrs["key"], {})
    live = [s for s in cache.seq_ids if s < cache.sequences]
    if len(live) != len(set(live)):
        raise ValueError(f"{node.attrs['key']}: a step with two rows of one sequence")
    zero = mx.zeros((1, *node.out.shape[1:]), node.out.dtype)
    rows = zip(cache.seq_ids, cache.positions, strict=True)
    return mx.concatenate([zero if p == 0 or s not in states else states[s] for s, p in rows])


def state_write(node: Node, cache: StepCache, state: mx.array) -> mx.array:
    for r, sequence in enumerate(cache.seq_ids):
        cache.recurrent.setdefault(node.attrs["key"], {})[sequence] = state[r : r + 1]
    return state


def short_conv(node: Node, cache: StepCache, x: mx.array, w: mx.array) -> mx.array:
    """Causal convolution over the last K inputs of a sequence; x [rows, 1, channels], w [channels, K, ...]."""

    def step(state: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
        inputs = mx.concatenate([state, x], 1)
        return mx.conv1d(inputs, w, groups=node.attrs["groups"]), inputs[:, 1:]

    return cache.sequential(node.attrs["key"], mx.zeros((1, w.shape[1] - 1, x.shape[2]), x.dtype), step, x)


def gated_delta(
    node: Node, cache: StepCache, q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, A_log: mx.array, dt_bias: mx.array
) -> mx.array:
    from mlx_lm.models.gated_delta import gated_delta_update

    options = node.attrs["options"]

    def step(state: mx.array, q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        return gated_delta_update(q, k, v, a, b, A_log, dt_bias, state, use_kernel=False, **options)

    zero = mx.zeros((1, v.shape[2], v.shape[3], q.shape[3]), mx.float32)
    return cache.sequential(node.attrs["key"], zero, step, q, k, v, a, b)


def ssm_update(
    node: Node,
    cache: StepCache,
    x: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
) -> mx.array:
    from mlx_lm.models.ssm import ssm_update as update

    def step(state: mx.array | None, x: mx.array, B: mx.array, C: mx.array, dt: mx.array) -> tuple[mx.array, mx.array]:
        return update(x, A_log, B, C, D, dt, dt_bias, state, node.attrs["limit"])

    return cache.sequential(node.attrs["key"], None, step, x, B, C, dt)


INTERPRETATIONS: dict[str, Interpretation] = {
    **PRIMITIVES,
    "attention": attention,
    "copy": lambda node, _, a: a.reshape(node.out.shape),
    "dequantize": dequantize,
    "embedding": embedding,
    "gated_delta": gated_delta,
    "kv_write": kv_write,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "rope": rope,
    "short_conv": short_conv,
    "ssm_update": ssm_update,
    "state_read": state_read,
    "state_write": state_write,
    "take_rows": lambda node, _, a, rows: a[rows],
    "view": lambda node, _, a: mx.as_strided(a, node.out.shape, node.attrs["strides"], node.attrs["offset"]),  # in elements
}
