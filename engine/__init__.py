"""metalstep: language models from Python, their decode step captured once and replayed as one native call."""
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
