"""A directory of an mlx-lm model as a checkpoint: config.json, *.safetensors, tokenizer files."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from metalstep.checkpoint.checkpoint import Checkpoint
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.mapped_file import MappedFile
from metalstep.checkpoint.safetensors_file import read_safetensors
from metalstep.checkpoint.skeleton import directory_skeleton
from metalstep.checkpoint.tensors import ComputedTensor, FileTensor
from metalstep.key_means import FILE as KEY_MEANS

INDEX = "model.safetensors.index.json"


class DirectoryCheckpoint(Checkpoint):
    """Raises: CheckpointError for files that are missing, damaged or contradict each other."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.config = read_config(path)
        self._mapped: list[MappedFile] = []
        self._files: dict[str, FileTensor] = {}
        self._arrays: dict[str, mx.array] | None = None
        try:
            for weights in weight_files(path):
                self._map(weights)
        except BaseException:
            self.close()
            raise
        self.file_bytes = sum(file.size for file in self._mapped)

    def _map(self, path: Path) -> None:
        file = MappedFile(path)
        self._mapped.append(file)
        for name, tensor in read_safetensors(file).items():
            if name in self._files:
                raise CheckpointError(f"{path}: tensor {name!r} is in {self._files[name].file.path.name} too; remove the stale file")
            self._files[name] = tensor

    def build(self) -> nn.Module:
        arrays: dict[str, mx.array] = {}
        try:
            for file in self._mapped:
                loaded = mx.load(str(file.path), format="safetensors")  # lazy: the header alone is read
                arrays.update(loaded)  # type: ignore[arg-type]  # MLX types all of its formats as one
        except Exception as error:  # MLX is stricter than the header check in places
            raise CheckpointError(f"{file.path}: MLX cannot read the file ({error}); convert the model again") from error
        model, self._tensors, self._arrays = directory_skeleton(self.path, self.config, self._files, arrays)
        return model

    def arrays(self, dtype: mx.Dtype | None) -> dict[str, mx.array]:
        if self._arrays is None:
            self.build()
        assert self._arrays is not None  # set by build
        # Handed over: arrays kept here would hold the file's own dtype beside the one asked for.
        arrays, self._arrays = self._arrays, None
        return {
            name: array.astype(dtype) if dtype is not None and mx.issubdtype(array.dtype, mx.floating) else array
            for name, array in arrays.items()
        }

    def tokenizer(self, overrides: dict[str, Any] | None = None) -> Any:
        try:
            return mlx_lm_utils.load_tokenizer(self.path, overrides, eos_token_ids=self.config.get("eos_token_id"))
        except Exception as error:  # transformers raises many types for files that are missing or damaged
            raise CheckpointError(
                f"{self.path}: the tokenizer cannot be loaded ({type(error).__name__}: {str(error)[:400]}); copy tokenizer.json and "
                "tokenizer_config.json of the model into the directory"
            ) from error

    def close(self) -> None:
        for tensor in (self._tensors or {}).values():
            if isinstance(tensor, ComputedTensor):
                tensor.close()
        self._arrays = None
        for file in self._mapped:
            file.close()


OTHER_MODELS = {  # by a file that is no language model's
    "model_index.json": "this is a diffusers model, which makes images, expected a language model",
    "adapter_config.json": "this is an adapter: `mlx_lm.fuse` puts it into the model that it was made for",
}


def read_config(path: Path) -> dict[str, Any]:
    """config.json, with generation_config.json's end-of-sequence ids as mlx-lm takes them. Raises: CheckpointError."""
    if not (path / "config.json").is_file():
        gguf = sorted(path.glob("*.gguf"))
        if gguf:
            hint = f"pass the file {gguf[0]} itself"
        else:
            others = (hint for name, hint in OTHER_MODELS.items() if (path / name).is_file())
            hint = next(others, "expected the directory of an mlx-lm model")
        raise CheckpointError(f"{path}: no config.json; {hint}")
    try:
        config = mlx_lm_utils.load_config(path)
    except Exception as error:  # JSON, UTF-8, permissions, or another type than an object
        raise CheckpointError(f"{path}/config.json: cannot be read ({error}); download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}/config.json: no model_type, expected the config.json of an mlx-lm model")
    return config


def weight_files(path: Path) -> list[Path]:
    """The files that the index names, or model*.safetensors, or every .safetensors file of weights. Raises: CheckpointError."""
    if (path / INDEX).is_file():
        return [path / name for name in _index(path)]
    files = sorted(path.glob("model*.safetensors")) or sorted(f for f in path.glob("*.safetensors") if f.name != KEY_MEANS)
    if not files:
        if pickled := sorted(path.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{path}: no .safetensors files, and {pickled[0].name} is a kind that is not read, as it may hold any program; take a "
                "version with .safetensors files, or write them with transformers' save_pretrained"
            )
        raise CheckpointError(f"{path}: no .safetensors files; download the weights, or convert them with `mlx_lm.convert`")
    return files


def _index(path: Path) -> list[str]:
    try:
        parsed = json.loads((path / INDEX).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / INDEX}: cannot be read ({error}); download it again") from error
    entries = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries.values()):
        raise CheckpointError(f"{path / INDEX}: no weight_map from tensors to files; download it again")
    names = sorted(set(entries.values()))
    for name in names:
        if name != Path(name).name or "\0" in name:
            raise CheckpointError(f"{path / INDEX}: names the file {name!r}, expected one in the same directory")
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name}, which the index names, is missing; download it")
    return names
