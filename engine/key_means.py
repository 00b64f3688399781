"""Means of a model's keys, per layer and KV head: what `metalstep calibrate` measures and a KV scheme takes off the keys it encodes.

A file lies beside the model: `NAME.kv_key_means.safetensors` beside NAME.gguf, `kv_key_means.safetensors` in a model's directory. Where
nothing can be written there, and of a packaged model, it lies in metalstep's cache folder. Nothing here imports MLX.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metalstep.cache_folder import cache_folder
from metalstep.packaged_models import PACKAGED, packaged_file

FILE = "kv_key_means.safetensors"
BEGINNING = 1 << 20  # bytes of a packaged model's file that tell it from others
AGAIN = "run `metalstep calibrate` again for this model, or load with kv_key_center='off'"
Means = dict[object, np.ndarray]  # layer: float32 [kv_heads, key_dim]


class KeyMeansError(ValueError):
    """A file of key means cannot be used."""


def beside(model: str | os.PathLike[str]) -> Path:
    """Where the file of a model lies. model: a .gguf file or a directory."""
    path = Path(model)
    return path / FILE if path.is_dir() else path.with_name(f"{path.stem}.{FILE}")


def in_cache(model: str | os.PathLike[str]) -> Path:
    """Where it lies if not beside the model. The name changes with what the model's files are: path, size, time of their last change; of a
    packaged model, which is installed once per environment, size and beginning."""
    path = Path(model).resolve()
    if _is_packaged(path):
        with path.open("rb") as file:
            identity = hashlib.sha256(f"{path.stat().st_size}\n".encode() + file.read(BEGINNING)).hexdigest()[:16]
        return cache_folder() / "key_means" / f"{path.stem}-{identity}.{FILE}"
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    parts = [str(path), *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.name != FILE)]
    identity = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "key_means" / f"{path.stem}-{identity}.{FILE}"


def find(model: str | os.PathLike[str]) -> Path | None:
    """The file of a model, or None. model: its .gguf file or directory (a Checkpoint's path)."""
    return next((path for path in (beside(model), in_cache(model)) if path.is_file()), None)


def save(model: str | os.PathLike[str], means: Mapping[object, np.ndarray], metadata: Mapping[str, str]) -> Path:
    """Write the means of a model's layers, which come in the model's order; returns where they are. Raises: OSError where nothing can be
    written at all."""
    tensors = {f"layer.{i}": np.ascontiguousarray(mean, np.float32) for i, mean in enumerate(means.values())}
    about = {**metadata, "layers": str(len(tensors))}
    if not _is_packaged(Path(model)):
        try:
            return _write(beside(model), tensors, about)
        except OSError:  # the place of a model that is everybody's, for one
            pass
    return _write(in_cache(model), tensors, about)


def read(path: str | os.PathLike[str], shapes: Mapping[object, tuple[int, int]], model_type: str | None = None) -> Means:
    """The means in a file.

    shapes: (kv_heads, key_dim) of each layer that has a KV cache, in the model's order. model_type: of the model, if it is to be checked.
    Raises: KeyMeansError for a file that is damaged or another model's.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError, TypeError) as error:
        raise KeyMeansError(f"{path}: no key means can be read from it ({error}); {AGAIN}") from None
    made_for = about.get("model_type")
    if model_type is not None and made_for is not None and made_for != model_type:
        raise KeyMeansError(f"{path}: its key means are of a {made_for} model, and this one is {model_type}; {AGAIN}")
    if set(tensors) != {f"layer.{i}" for i in range(len(shapes))}:
        raise KeyMeansError(f"{path}: it has key means of {len(tensors)} layers, and the model has {len(shapes)}; {AGAIN}")
    means: Means = {}
    for i, (layer, shape) in enumerate(shapes.items()):
        mean = tensors[f"layer.{i}"]
        if mean.shape != shape or mean.dtype != np.float32:
            raise KeyMeansError(
                f"{path}: layer {i} has key means {mean.dtype} {list(mean.shape)}, and the model's keys need float32 {list(shape)}; {AGAIN}"
            )
        if not np.isfinite(mean).all():
            raise KeyMeansError(f"{path}: layer {i} has key means that are not finite; {AGAIN}")
        means[layer] = mean
    return means


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What the file says of itself: model_type, layers, tokens, text_sha256, version."""
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def fingerprint(means: Mapping[object, np.ndarray]) -> str:
    """Hex digits that differ where any mean does: caches of keys that were centred by others cannot be used."""
    digest = hashlib.sha256()
    for mean in means.values():
        digest.update(repr(mean.shape).encode())
        digest.update(np.ascontiguousarray(mean, np.float32).tobytes())
    return digest.hexdigest()


def _is_packaged(model: Path) -> bool:
    """A package's folder is its installer's."""
    return any((file := packaged_file(name)) is not None and model.resolve() == file.resolve() for name in PACKAGED)


def _write(path: Path, tensors: dict[str, np.ndarray], about: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        save_file(tensors, unfinished, metadata=about)
        unfinished.chmod(0o644)  # for whoever may read the model
        os.replace(unfinished, path)  # who reads meanwhile has the old ones or the new ones
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return path
