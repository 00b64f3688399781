"""From an mlx-lm model to the graph of its step."""
from __future__ import annotations

import contextlib
import linecache
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from metalstep.capture.bind import bind
from metalstep.capture.errors import CaptureError
from metalstep.capture.graph import Graph, interpret
from metalstep.capture.passes import Fusion, passes
from metalstep.capture.rows import TracePair
from metalstep.capture.trace import trace

TRACED_ROWS = (2, 3)  # the fewest that tell sizes from numbers of rows
CHECKED_ROWS = (7, 5)  # tokens and sampled rows that `capture` runs the passes for
HOST = Fusion()
OWN_CODE = ("metalstep.", "mlx.", "contextlib")


class CapturedModel:
    """A model's step for any number of rows. Safe to use from several threads."""

    def __init__(self, model_type: str, traces: TracePair):
        self.model_type = model_type
        self._traces = traces
        self._graphs: dict[tuple[int, int, Fusion], Graph] = {}
        self._lock = threading.Lock()

    def bound(self, tokens: int, sampled: int) -> Graph:
        """A graph of its own for these rows, before the passes. Raises: CaptureError."""
        return bind(self._traces.at(tokens, sampled))

    def graph(self, tokens: int, sampled: int, fusion: Fusion = HOST) -> Graph:
        """The graph for `tokens` rows of which `sampled` give logits, after all passes. It is shared: do not change it.

        fusion: what the device's launches take in; the host device's without it.

        Raises: CaptureError naming the operation that cannot be captured; ValueError for row counts that do not fit.
        """
        if not 1 <= sampled <= tokens:
            raise ValueError(f"graph: sampled is {sampled}, expected 1 to {tokens} (tokens)")
        with self._lock:
            key = (tokens, sampled, fusion)
            if key not in self._graphs:
                with _explained(self.model_type):
                    graph = self.bound(tokens, sampled)
                    for apply in passes(fusion):
                        graph = apply(graph)
                self._graphs[key] = graph
            return self._graphs[key]

    def prepare(self, fetch: Callable[[str], mx.array]) -> dict[str, mx.array]:
        """The weights that the step needs computed from weights, by name ("prepared.0", …).

        fetch: gives a weight by its mlx-lm name; floats of any size (float32 is exact), packed words as uint32.
        """
        graph = self.graph(*CHECKED_ROWS)
        values: dict[Any, Any] = {}
        for node in graph.prepare:
            for value in node.inputs:
                if value.kind == "weight" and value not in values:
                    values[value] = fetch(value.name)
            interpret([node], values, None, any_float=True)
        prepared = {v.name: values[v] for node in graph.prepare for v in node.outputs if v.kind == "weight" and v.name}
        mx.eval(list(prepared.values()))
        return prepared


def capture(model: Any, model_type: str) -> CapturedModel:
    """Capture one step of `model`, an mlx-lm model, which is left as it was. No weight is evaluated.

    The model must not run in another thread meanwhile; other models may. Captures of several threads take turns.
    model_type: as in the model's config.json; errors name it.
    Raises: CaptureError naming the model, the operation and the reason.
    """
    with _explained(model_type):
        first, second = (trace(model, rows) for rows in TRACED_ROWS)
        captured = CapturedModel(model_type, TracePair(first, second))
    captured.graph(*CHECKED_ROWS)
    return captured


@contextlib.contextmanager
def _explained(model_type: str) -> Iterator[None]:
    """Turns what goes wrong inside into a CaptureError that names the model and the line of its code."""
    try:
        yield
    except Exception as error:
        place = _place_in_model(error)
        text = f"{model_type or 'the model'} cannot be captured: {_reason(error)}"
        raise CaptureError(f"{text} (in {place})" if place else text) from error


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "eval" in text and "function transformations" in text:
        return "its code asks for the value of an array (a branch on it, .item() or mx.eval), which one step cannot know in advance"
    return text if isinstance(error, CaptureError) else f"{type(error).__name__}: {text}"


def _place_in_model(error: BaseException) -> str | None:
    """The innermost line outside of capture and MLX, e.g. `mlx_lm.models.llama line 97: …`."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(OWN_CODE):
            code = linecache.getline(frame.f_code.co_filename, line).strip()
            found = f"{module} line {line}: {code}"
    return found
