"""metalstep: language models from Python, their decode step captured once and replayed as one native call.

The names below are imported when they are first used: a vLLM process that only reads the plugin's settings never loads MLX.
"""
from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metalstep.batch import BatchResponse, batch_generate
    from metalstep.capture import CaptureError
    from metalstep.checkpoint import CheckpointError
    from metalstep.engine import Engine, EngineStats
    from metalstep.generate import GenerationResponse, generate, stream_generate
    from metalstep.model import Model, load
    from metalstep.request import Request, TokenOutput
    from metalstep.sampling import SamplingParams
    from metalstep.stream import Stream

__version__ = "0.1.0"
__all__ = [
    "BatchResponse",
    "CaptureError",
    "CheckpointError",
    "Engine",
    "EngineStats",
    "GenerationResponse",
    "Model",
    "Request",
    "SamplingParams",
    "Stream",
    "TokenOutput",
    "batch_generate",
    "generate",
    "load",
    "stream_generate",
]
_MODULES = {
    "BatchResponse": "batch",
    "CaptureError": "capture",
    "CheckpointError": "checkpoint",
    "Engine": "engine",
    "EngineStats": "engine",
    "GenerationResponse": "generate",
    "Model": "model",
    "Request": "request",
    "SamplingParams": "sampling",
    "Stream": "stream",
    "TokenOutput": "request",
    "batch_generate": "batch",
    "load": "model",
    "stream_generate": "generate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`metalstep.generate` is the function, also after an import of the module of that name, which Python would put in its place."""

    @property
    def generate(self) -> Any:
        return import_module(f"{__name__}.generate").generate

    @generate.setter
    def generate(self, module: ModuleType) -> None:
        """Python sets the attribute when it imports the module."""


sys.modules[__name__].__class__ = _Package
