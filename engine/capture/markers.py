"""Stand-ins for MLX functions during a trace: each leaves one marker node instead of its decomposition.

A marker is a Depends on zeros (the outputs' shapes) whose first extra input is an int32 constant that numbers it: a number in the
outputs' dtype would collide with the model's own constants in bfloat16.
"""
from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from metalstep.capture.errors import CaptureError

FIRST_NUMBER = 1 << 24  # no model has a scalar int32 constant this large that it depends on
CACHED_LENGTH = (1 << 20) - 3  # of the cache in a trace; a shape that keeps it means that the model looked at the length

QUANT_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # MLX's group size and bits of a mode
_lock = threading.Lock()


class Marks:
    """The markers of one trace, by number.

    positions: the step's positions [tokens], set when the traced function starts.
    """

    def __init__(self) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.positions: mx.array | None = None

    def add(
        self, op: str, outputs: Sequence[tuple[Sequence[int], mx.Dtype]], inputs: Mapping[str, mx.array | None], **attrs: Any
    ) -> list[mx.array]:
        """Leave a node `op` with outputs of the given shapes and dtypes; attrs["in"] names the inputs that are present."""
        present = {name: value for name, value in inputs.items() if isinstance(value, mx.array)}
        number = mx.array(FIRST_NUMBER + len(self.made), mx.int32)
        self.made.append((op, {"in": tuple(present), **attrs}))
        zeros = [mx.zeros(shape, dtype) for shape, dtype in outputs]
        return mx.depends(zeros, [number, *present.values()])

    # The functions below have the signatures of those they stand for.

    def rope(
        self,
        x: mx.array,
        dims: int,
        *,
        traditional: bool,
        base: float | None,
        scale: float,
        offset: int | mx.array,
        freqs: mx.array | None = None,
        **_: Any,
    ) -> mx.array:
        if isinstance(offset, int) and offset == CACHED_LENGTH - x.shape[-2] and self.positions is not None:
            offset = self.positions  # the model derived it from the cached keys' shape
        if not isinstance(offset, mx.array):
            raise CaptureError(f"rope with the constant offset {offset}; expected the cache's offset")
        inputs = {"x": x, "offset": offset, "freqs": freqs}
        attrs = {"dims": dims, "traditional": traditional, "base": base, "scale": scale}
        return self.add("rope", [(x.shape, x.dtype)], inputs, **attrs)[0]

    def rms_norm(self, x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        return self.add("rms_norm", [(x.shape, x.dtype)], {"x": x, "weight": weight}, eps=eps)[0]

    def layer_norm(self, x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **_: Any) -> mx.array:
        return self.add("layer_norm", [(x.shape, x.dtype)], {"x": x, "weight": weight, "bias": bias}, eps=eps)[0]

    def scaled_dot_product_attention(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: str | mx.array | None = None,
        sinks: mx.array | None = None,
        **_: Any,
    ) -> mx.array:
        """A mask that is a word ("causal") says nothing more: rows are causal by their positions."""
        inputs = {"q": q, "k": k, "v": v, "mask": None if isinstance(mask, str) else mask, "sinks": sinks}
        return self.add("attention", [((*q.shape[:3], v.shape[-1]), q.dtype)], inputs, scale=scale, softcap=None)[0]

    def dequantize(
        self,
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        global_scale: mx.array | None = None,
        dtype: mx.Dtype | None = None,
        **_: Any,
    ) -> mx.array:
        if global_scale is not None:
            raise CaptureError(f"dequantize with a global scale ({mode})")
        default_group, default_bits = QUANT_DEFAULTS[mode]
        bits = bits or default_bits
        shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
        inputs = {"w": w, "scales": scales, "biases": biases}
        attrs = {"group_size": group_size or default_group, "bits": bits, "mode": mode}
        own = scales.dtype if mode == "affine" else mx.bfloat16  # scales of a byte say nothing, and MLX takes this
        return self.add("dequantize", [(shape, dtype or own)], inputs, **attrs)[0]

    def gated_delta_update(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        a: mx.array,
        b: mx.array,
        A_log: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        *,
        use_kernel: bool = True,
        **options: Any,
    ) -> tuple[mx.array, ...]:
        batch, length, _, key_dim = q.shape
        heads, value_dim = v.shape[-2:]
        outputs = [((batch, length, heads, value_dim), q.dtype), ((batch, heads, value_dim, key_dim), mx.float32)]
        inputs = {"q": q, "k": k, "v": v, "a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias, "state": state}
        return tuple(self.add("gated_delta", outputs, inputs, options=options))

    def ssm_update(
        self,
        hidden_states: mx.array,
        A_log: mx.array,
        B: mx.array,
        C: mx.array,
        D: mx.array,
        dt: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        time_step_limit: Sequence[float] = (0.0, float("inf")),
        mask: mx.array | None = None,
        lengths: mx.array | None = None,
        **_: Any,
    ) -> tuple[mx.array, ...]:
        batch, _length, heads, head_dim = shape = hidden_states.shape
        dtype = hidden_states.dtype
        inputs = {"x": hidden_states, "A_log": A_log, "B": B, "C": C, "D": D, "dt": dt, "dt_bias": dt_bias, "state": state}
        outputs = [(shape, dtype), ((batch, heads, head_dim, B.shape[-1]), dtype)]
        return tuple(self.add("ssm_update", outputs, inputs, limit=tuple(time_step_limit)))


@contextlib.contextmanager
def tracing() -> Iterator[Marks]:
    """Replace MLX's functions by markers for this thread; everything is put back at the end, whatever happens.

    Traces of several threads take turns. Other threads get the real functions meanwhile. The CPU is the default device and Metal
    counts as absent, so that a trace is the same on every platform: some models pick Metal kernels of their own otherwise.
    """
    marks, thread, saved = Marks(), threading.get_ident(), []

    def put(owner: Any, name: str, function: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(function)
        def either(*args: Any, **kwargs: Any) -> Any:
            return (function if threading.get_ident() == thread else original)(*args, **kwargs)

        saved.append((owner, name, original))
        setattr(owner, name, either)

    def put_back() -> None:
        while saved:
            setattr(*saved[-1])
            saved.pop()
        mx.set_default_device(device)

    with _lock:
        device = mx.default_device()
        try:
            mx.set_default_device(mx.cpu)
            for name in ("rope", "rms_norm", "layer_norm", "scaled_dot_product_attention"):
                put(mx.fast, name, getattr(marks, name))
            put(mx, "dequantize", marks.dequantize)
            put(mx, "contiguous", lambda a, *_, **__: a)  # its arguments are not in the trace, and the graph has no layouts
            put(mx.metal, "is_available", lambda: False)
            for owner in [mx.fast, *(m for path, m in list(sys.modules.items()) if path.startswith("mlx_lm.models"))]:
                for name in ("gated_delta_update", "ssm_update"):  # models import these by name
                    if hasattr(owner, name):
                        put(owner, name, getattr(marks, name))
            yield marks
        finally:
            try:
                put_back()
            finally:  # where an interrupt cut the first one short
                put_back()
