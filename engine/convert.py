"""Write a model as an mlx-lm directory: quantised, dequantised, in another dtype, or out of a GGUF file."""
from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import compute_bits_per_weight, dequantize_model, save

from metalstep.checkpoint import build_model, open_checkpoint
from metalstep.checkpoint.quantized import FLOATS, Quantization, config_dtype, quantize_skeleton

ROOM = 64 << 20  # bytes that a conversion leaves free on the disk


@dataclass(frozen=True)
class Converted:
    """path: the directory. weight_bytes: of its weights; source_bytes: of those it was made from. bits: per weight, on average."""

    path: Path
    model_type: str
    source_bytes: int
    weight_bytes: int
    bits: float
    quantization: dict[str, Any] | None


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    revision: str | None = None,
    quantization: Quantization | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Converted:
    """Convert a model as `mlx_lm.convert` does, with its functions, and from GGUF files too. `output` appears when it is complete.

    dtype: of what is not quantised; None takes the config's, or else the checkpoint's own.
    Raises: CheckpointError for a model that cannot be used; ValueError for options that contradict each other or the model; OSError for a
    disk that is full or cannot be written.
    """
    target = Path(output).expanduser()
    if target.exists():
        raise ValueError(f"{target} exists already; name a directory that does not exist, or remove it")
    _check_writable(target)
    if quantization is not None and dequantize:
        raise ValueError("quantize and dequantize are both asked for, expected one; dequantise first, then quantise the result")
    progress("reading the model")
    with open_checkpoint(source, revision) as checkpoint:
        model = build_model(checkpoint)
        config = checkpoint.config
        stored = config.get("quantization") or config.get("quantization_config")
        if quantization is not None and stored:
            raise ValueError(
                f"{checkpoint.path} is quantised already, and quantising it again would lose more than it says; convert the original "
                "model, or use --dequantize"
            )
        if dequantize and not stored:
            raise ValueError(f"{checkpoint.path} is not quantised; leave --dequantize out")
        tokenizer = checkpoint.tokenizer(tokenizer_config)
        arrays = checkpoint.arrays(None)
        model.load_weights(list(arrays.items()), strict=True)
        del arrays
        _cast(model, dtype or config_dtype(config))
        if quantization is not None:
            progress("quantising")
            config = quantize_skeleton(model, config, quantization)
        if dequantize:
            config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
            model = dequantize_model(model)
        if dtype is not None:
            config = _with_dtype(config, dtype)
        nbytes = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
        bits = float(compute_bits_per_weight(model))
        progress(f"writing {nbytes / 1e9:.2f} GB")
        _write(target, checkpoint.path, nbytes, model, tokenizer, dict(config))
        quantised = config.get("quantization")
        return Converted(target, str(config.get("model_type")), checkpoint.file_bytes, nbytes, bits, quantised)


def _check_writable(target: Path) -> None:
    """Before anything is read. Raises: OSError where `target` cannot be made."""
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} {'cannot be written to' if folder.is_dir() else 'is a file'}; name a directory in another place")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says `dtype` wherever it said another: whoever converts the result again would else get that one back."""
    changed = {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in config.items()}
    if isinstance(text := config.get("text_config"), dict):
        changed["text_config"] = _with_dtype(text, dtype)
    return {**changed, "torch_dtype": dtype}


def _cast(model: Any, dtype: str | None) -> None:
    if dtype not in FLOATS:
        return
    wanted, casts = getattr(mx, dtype), getattr(model, "cast_predicate", lambda _: True)

    def cast(name: str, array: mx.array) -> mx.array:
        return array.astype(wanted) if casts(name) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _write(target: Path, source: Path, nbytes: int, model: Any, tokenizer: Any, config: dict[str, Any]) -> None:
    """Into a directory beside `target`, which is renamed at the end: nobody finds half a model."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if nbytes + ROOM > free:
        raise OSError(
            f"{target.parent} has {free / 1e9:.2f} GB free, and the model takes {nbytes / 1e9:.2f} GB; make room, or name a directory on "
            "another disk"
        )
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm's own words
            save(made, source if source.is_dir() else made, model, tokenizer, config)
        made.chmod(0o755)  # mkdtemp's is for one user
        made.rename(target)
    except RuntimeError as error:  # MLX's for a disk that is full
        raise OSError(f"{target}: the weights cannot be written ({error}); see that the disk has {nbytes / 1e9:.2f} GB free") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
