"""What the user names: found on this machine, or downloaded, and opened."""
from __future__ import annotations

import os
from pathlib import Path

from metalstep.checkpoint.checkpoint import Checkpoint
from metalstep.checkpoint.directory import DirectoryCheckpoint
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf.checkpoint import GGUFCheckpoint
from metalstep.checkpoint.quantized import QuantizedCheckpoint, parse_quantize
from metalstep.hub.errors import HubError
from metalstep.hub.local import local_path


def open_checkpoint(source: str | os.PathLike[str], revision: str | None = None, quantize: str | None = None) -> Checkpoint:
    """Open "smollm2", a .gguf file, a directory of an mlx-lm model, or a Hugging Face id (metalstep.hub.names has its forms).

    revision: branch, tag or commit of a Hugging Face id. quantize: how to quantise a floating-point model while it is loaded (see
    quantized.parse_quantize).
    Raises: CheckpointError for what does not exist, is damaged or is not supported; ValueError for a kind of quantisation that is not.
    """
    if quantize is None:
        return _open(resolve(source, revision))
    parse_quantize(quantize)  # before a download
    checkpoint = _open(resolve(source, revision))
    try:
        return QuantizedCheckpoint(checkpoint, quantize)
    except BaseException:
        checkpoint.close()
        raise


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return DirectoryCheckpoint(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: pass the directory that holds this file and its config.json")
    return GGUFCheckpoint(path)


def resolve(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A packaged model, a path, or a Hugging Face id (downloaded, or taken from its cache) as a local path.

    Raises: CheckpointError saying what to install, download or correct.
    """
    try:
        return local_path(os.fspath(source), revision)
    except HubError as error:
        raise CheckpointError(str(error)) from error
