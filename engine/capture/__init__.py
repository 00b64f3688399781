"""Capture: one step of an unmodified mlx-lm model as a graph of launches.

    captured = capture(model, "llama")      # two small traces; no weight is evaluated
    graph = captured.graph(tokens=7, sampled=5)
    weights = captured.prepare(fetch)       # what the step needs computed from weights, once
"""
from metalstep.capture.capture import CapturedModel, capture
from metalstep.capture.errors import CaptureError

__all__ = ["CaptureError", "CapturedModel", "capture"]
