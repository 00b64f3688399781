"""A model's weights in bfloat16 as a directory that vLLM's own backends read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from metalstep.bench.json_process import PeerError
from metalstep.cache_folder import cache_folder
from metalstep.checkpoint import Checkpoint, CheckpointError

QUANTISED = ("quantization", "quantization_config")
COMPLETE = "complete"


def bfloat16_directory(checkpoint: Checkpoint, cache: Path | None = None) -> Path:
    """Write `checkpoint` dequantised, with config and tokenizer, below `cache` unless it is there already; the directory.

    cache: of all such directories, by default bfloat16 in metalstep's cache folder. The parameters keep mlx-lm's names, which for
    plain decoder models are transformers' own. Raises: PeerError for a model without `architectures` in its config.
    """
    if not checkpoint.config.get("architectures"):
        raise PeerError(
            f"{checkpoint.path}: config.json names no architectures, so vLLM's own backend cannot be told what to run",
            "leave --against vllm out",
        )
    folder = (cache or cache_folder() / "bfloat16") / f"{checkpoint.path.stem}-{fingerprint(checkpoint)}"
    if (folder / COMPLETE).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # one that was not finished
    folder.mkdir(parents=True)
    checkpoint.build()
    weights = dequantised(checkpoint.arrays(mx.bfloat16), checkpoint.config)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANTISED}
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}, indent=1, default=str))
    checkpoint.tokenizer(None)._tokenizer.save_pretrained(folder)
    (folder / COMPLETE).touch()
    return folder


def fingerprint(checkpoint: Checkpoint) -> str:
    """Changes when another file takes the model's place."""
    stat = checkpoint.path.stat()
    known = [str(checkpoint.path.resolve()), stat.st_mtime_ns, checkpoint.file_bytes, checkpoint.config]
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:12]


def dequantised(arrays: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """Parameters by name, packed weights as plain ones in the dtype of their scales, the rest as it is.

    Raises: CheckpointError for weights that are packed without an entry in the config.
    """
    quantization = config.get("quantization") or {}
    out = {}
    for name, array in arrays.items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.scales" not in arrays:
            out[name] = array
        elif part == "weight":
            how = quantization.get(layer) or quantization
            if "bits" not in how:
                raise CheckpointError(f"{layer} has scales, but the config does not say how it is quantised; convert the model again")
            out[name] = mx.dequantize(
                array,
                arrays[f"{layer}.scales"],
                arrays.get(f"{layer}.biases"),
                group_size=how["group_size"],
                bits=how["bits"],
                mode=how.get("mode", "affine"),
            )
        elif part not in ("scales", "biases"):
            out[name] = array  # the layer's own bias
    return out
