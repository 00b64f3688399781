"""What the user names: found on this machine, or downloaded, and opened."""
from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from metalstep.checkpoint.checkpoint import Checkpoint
from metalstep.checkpoint.directory import DirectoryCheckpoint
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf import GGUFCheckpoint
from metalstep.packaged_models import PACKAGED, not_installed, packaged_file

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open "smollm2", a .gguf file, a directory of an mlx-lm model, or a Hugging Face id.

    Raises: CheckpointError for what does not exist, is damaged or is not supported.
    """
    path = resolve(source)
    if path.is_dir():
        return DirectoryCheckpoint(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: pass the directory that holds this file and its config.json")
    return GGUFCheckpoint(path)


def resolve(source: str | os.PathLike[str]) -> Path:
    """A packaged model, a path, or a Hugging Face id (downloaded, or taken from its cache) as a local path.

    Raises: CheckpointError saying what to install, download or correct.
    """
    name = os.fspath(source)
    if name in PACKAGED:
        return _packaged(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix != ".gguf" and HUB_ID.fullmatch(name):
        return _snapshot(name)
    raise CheckpointError(
        f"{name!r} does not exist; expected {', '.join(map(repr, PACKAGED))}, a .gguf file, a directory of an mlx-lm model, or a "
        "Hugging Face id (owner/name)"
    )


def _packaged(name: str) -> Path:
    path = packaged_file(name)
    if path is None:
        raise CheckpointError(not_installed(name))
    return path


def _snapshot(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[*DEFAULT_ALLOW_PATTERNS, "*.safetensors"]))
    except Exception as error:  # offline, no such repository, gated, disk full: many types, all with a text of their own
        raise CheckpointError(
            f"{name!r} is no path here, and its download failed ({type(error).__name__}: {str(error)[:300]}); check the name and the "
            "network, or download the model elsewhere and pass its directory"
        ) from error
