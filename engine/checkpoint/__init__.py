"""Models on disk: GGUF files and directories of mlx-lm models, mapped and checked before a byte of them is used."""
from metalstep.checkpoint.checkpoint import Checkpoint, build_model, load_weights_eager
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.source import open_checkpoint
from metalstep.checkpoint.tensors import Tensor

__all__ = ["Checkpoint", "CheckpointError", "Tensor", "build_model", "load_weights_eager", "open_checkpoint"]
