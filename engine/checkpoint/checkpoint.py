"""An open checkpoint: config, tensors by parameter name, tokenizer."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.tensors import Tensor


class Checkpoint:
    """A model on disk, mapped and not read. Close it to give the files back; weights cannot be read afterwards.

    path: the file or directory. config: mlx-lm's config as a plain dict; changes count until the model is built.
    file_bytes: of the weight files in all.
    """

    path: Path
    config: dict[str, Any]
    file_bytes: int

    def __init__(self) -> None:
        self._tensors: Mapping[str, Tensor] | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By mlx-lm's parameter name. Those depend on the model, so this builds it when `build_model` has not."""
        if self._tensors is None:
            self.build()
        assert self._tensors is not None  # set by build
        return self._tensors

    def build(self) -> nn.Module:
        """mlx-lm's model with lazy zeros for weights; sets `tensors`. Raises: CheckpointError when the weights do not fit it."""
        raise NotImplementedError

    def arrays(self, dtype: mx.Dtype | None) -> dict[str, mx.array]:
        """Parameters by name, floats in `dtype` (None: the checkpoint's own). After `build`."""
        raise NotImplementedError

    def tokenizer(self, overrides: dict[str, Any] | None = None) -> Any:
        """mlx-lm's TokenizerWrapper. overrides: of the tokenizer's own config. Raises: CheckpointError."""
        raise NotImplementedError

    def close(self) -> None:
        """Unmap the files; more than once is fine."""
        raise NotImplementedError

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_model(checkpoint: Checkpoint) -> nn.Module:
    """mlx-lm's model of `checkpoint`: quantised layers as the config says, lazy zeros for weights, nothing evaluated.

    Raises: CheckpointError when the config does not make a model or the tensors do not fit it.
    """
    return checkpoint.build()


def load_weights_eager(model: nn.Module, checkpoint: Checkpoint, dtype: mx.Dtype | None = None) -> None:
    """Give `model`, which build_model made, its weights, and evaluate them.

    dtype: of all floating parameters; None keeps the checkpoint's own.
    """
    model.update(tree_unflatten(list(checkpoint.arrays(dtype).items())))
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path}: MLX cannot load the weights ({error}); convert the model again") from error
