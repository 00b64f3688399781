"""metalstep: language models from Python, their decode step captured once and replayed as one native call."""
from metalstep.capture import CaptureError
from metalstep.checkpoint import CheckpointError
from metalstep.generate import GenerationResponse, generate, stream_generate
from metalstep.kv_cache import OutOfBlocksError
from metalstep.model import Model, load
from metalstep.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "CheckpointError",
    "GenerationResponse",
    "Model",
    "OutOfBlocksError",
    "SamplingParams",
    "generate",
    "load",
    "stream_generate",
]
