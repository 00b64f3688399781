"""A GGUF file as a checkpoint."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalstep.checkpoint.checkpoint import Checkpoint
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf_file import GGUFHeader, read_gguf
from metalstep.checkpoint.gguf_names import ROPE_FACTORS, parameter_names, read_config, row_order
from metalstep.checkpoint.gguf_tokenizer import Vocabulary, build_tokenizer, special_ids
from metalstep.checkpoint.mapped_file import MappedFile
from metalstep.checkpoint.skeleton import gguf_skeleton
from metalstep.checkpoint.tensors import BlockPart, FileTensor, Tensor


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
        factors = self._tensor(ROPE_FACTORS, header) if ROPE_FACTORS in header.tensors else None
        self.config = read_config(self.path, header, None if factors is None else factors.numpy())
        vocabulary = Vocabulary(self.path, header.metadata)
        self._vocabulary: Vocabulary | None = vocabulary
        if len(vocabulary.tokens) > self.config["vocab_size"]:
            raise CheckpointError(
                f"{self.path}: {len(vocabulary.tokens)} tokens, but token_embd.weight has {self.config['vocab_size']} rows; "
                "convert the model again"
            )
        self.config.update(special_ids(vocabulary))
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameter_names(self.path, header).items():
            weight = self._tensor(name, header, parameter)
            tensors[parameter] = weight
            if weight.format is not None:
                base = parameter.removesuffix("weight")
                for part in ("scales", "biases"):
                    tensors[base + part] = BlockPart(base + part, weight, part)
        self._tensors = tensors

    def _tensor(self, name: str, header: GGUFHeader, parameter: str | None = None) -> FileTensor:
        info = header.tensors[name]
        order = None if parameter is None else row_order(self.config, info)
        return FileTensor(parameter or name, info.shape, info.dtype, self._file, info.start, info.end, info.format, order)

    def build(self) -> nn.Module:
        return gguf_skeleton(self.path, self.config, self.tensors)

    def arrays(self, dtype: mx.Dtype | None) -> dict[str, mx.array]:
        dtype = dtype or getattr(mx, self.config["torch_dtype"])
        arrays = {}
        for name, tensor in self.tensors.items():
            array = mx.array(tensor.numpy())
            arrays[name] = array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
            tensor.drop_pages()
        return arrays

    def tokenizer(self, overrides: dict[str, Any] | None = None) -> Any:
        vocabulary = self._vocabulary or Vocabulary(self.path, read_gguf(self._file).metadata)
        self._vocabulary = None  # the tokenizer has copies of its own, and these strings take 10 MB; read again when asked again
        return build_tokenizer(vocabulary, self.config, overrides)

    def close(self) -> None:
        self._file.close()
