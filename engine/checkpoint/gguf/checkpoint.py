"""A GGUF file as a checkpoint."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalstep.checkpoint.checkpoint import Checkpoint
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf.architecture import Architecture
from metalstep.checkpoint.gguf.config import read_config
from metalstep.checkpoint.gguf.file import GGUFHeader, read_gguf
from metalstep.checkpoint.gguf.metadata import Metadata
from metalstep.checkpoint.gguf.names import find_architecture, parameter_names, row_order
from metalstep.checkpoint.gguf.rope import ROPE_TENSORS
from metalstep.checkpoint.gguf.tokenizer import Vocabulary, build_tokenizer, special_ids
from metalstep.checkpoint.mapped_file import MappedFile
from metalstep.checkpoint.skeleton import gguf_skeleton
from metalstep.checkpoint.tensors import BlockPart, FileTensor, ShiftedTensor, Tensor


class GGUFCheckpoint(Checkpoint):
    """One .gguf file. Raises: CheckpointError for a file that is damaged or of a kind that is not supported."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._file = MappedFile(path)
        try:
            self._open(read_gguf(self._file))
        except BaseException:
            self._file.close()
            raise

    def _open(self, header: GGUFHeader) -> None:
        self.file_bytes = self._file.size
        metadata = Metadata(self.path, header.metadata)
        architecture = find_architecture(metadata)
        rope = {name: self._tensor(name, header).numpy() for name in ROPE_TENSORS if name in header.tensors}
        self.config = read_config(metadata, header, architecture, rope)
        vocabulary = Vocabulary(self.path, header.metadata)
        self._vocabulary: Vocabulary | None = vocabulary
        if len(vocabulary.tokens) > self.config["vocab_size"]:
            raise CheckpointError(
                f"{self.path}: {len(vocabulary.tokens)} tokens, but token_embd.weight has {self.config['vocab_size']} rows; "
                "convert the model again"
            )
        self.config.update(special_ids(vocabulary))
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameter_names(metadata, header, architecture).items():
            weight = self._parameter(name, parameter, header, architecture)
            tensors[parameter] = weight
            if weight.format is not None:
                base = parameter.removesuffix("weight")
                for part in ("scales", "biases"):
                    tensors[base + part] = BlockPart(base + part, weight, part)
        self._tensors = tensors

    def _tensor(self, name: str, header: GGUFHeader) -> FileTensor:
        info = header.tensors[name]
        return FileTensor(name, info.shape, info.dtype, self._file, info.start, info.end, info.format)

    def _parameter(self, name: str, parameter: str, header: GGUFHeader, architecture: Architecture) -> FileTensor:
        info = header.tensors[name]
        order, shift = row_order(self.config, architecture, info), architecture.shift(name)
        shape = (1, *info.shape) if len(info.shape) == 1 and name.split(".")[-2] in architecture.matrices else info.shape
        if shift and info.format is None:
            return ShiftedTensor(parameter, shape, info.dtype, self._file, info.start, info.end, shift)
        return FileTensor(parameter, shape, info.dtype, self._file, info.start, info.end, info.format, order)

    def build(self) -> nn.Module:
        return gguf_skeleton(self.path, self.config, self.tensors)

    def arrays(self, dtype: mx.Dtype | None) -> dict[str, mx.array]:
        dtype = dtype or getattr(mx, self.config["torch_dtype"])
        arrays = {}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, BlockPart):  # comes with its words
                continue
            for part, values in self._values(name, tensor).items():
                array = mx.array(values)
                arrays[part] = array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
            tensor.drop_pages()
        return arrays

    def _values(self, name: str, tensor: Tensor) -> dict[str, np.ndarray]:
        """A tensor as parameters by name: itself, or the three that its blocks make."""
        if tensor.format is None:
            return {name: tensor.numpy()}
        assert isinstance(tensor, FileTensor)  # blocks come from files
        parts, base = tensor.affine(), name.removesuffix("weight")
        planes = {base + "scales": parts.scales, base + "biases": parts.biases}
        shaped = {part: values.astype(np.float32).reshape(self.tensors[part].shape) for part, values in planes.items()}
        return {name: parts.words.reshape(tensor.parameter_shape), **shaped}

    def tokenizer(self, overrides: dict[str, Any] | None = None) -> Any:
        vocabulary = self._vocabulary or Vocabulary(self.path, read_gguf(self._file).metadata)
        self._vocabulary = None  # the tokenizer has copies of its own, and these strings take 10 MB; read again when asked again
        return build_tokenizer(vocabulary, self.config, overrides)

    def close(self) -> None:
        self._file.close()
