"""Quantisations of other tools that mlx-lm does not read, said by name."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from metalstep.checkpoint.errors import CheckpointError

HINT = "take the model's unquantised weights (`metalstep convert` quantises them), or a copy that was converted for MLX"
READ = {  # what mlx-lm reads of a tool's checkpoints, by quant_method
    "awq": "4 bits",
    "gptq": "4 bits without act-order (g_idx)",
    "compressed-tensors": "the formats pack-quantized (4 bits), nvfp4-pack-quantized and mxfp4-pack-quantized",
    "modelopt": "NVFP4",
    "fp8": "blocks of 32x32 with ue8m0 scales, and those that the model's own code dequantises (DeepSeek V3)",
}
SIGNS = {  # ends of tensors' names that a tool leaves
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
}


def foreign_error(path: Path, config: Mapping[str, Any], names: Iterable[str], error: Exception) -> CheckpointError | None:
    """What is raised in place of `error`, which a checkpoint that does not load has met, where another tool has quantised it."""
    said = foreign(config, names)
    if said is None:
        return None
    reason = str(error).removeprefix(f"{path}: ").split("; ")[0][:300]
    return CheckpointError(f"{path}: {said} ({reason}); {HINT}")


def foreign(config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Which other tool has quantised a checkpoint that does not load; None when none has.

    names: of the tensors in its files.
    """
    if config.get("quantization") is not None and not any(name.endswith(tuple(SIGNS)) for name in names):
        return None  # MLX's own; mlx-lm writes a quantization_config beside it
    text = config.get("text_config")
    parts = [config, text if isinstance(text, dict) else {}]
    configs = (part.get("quantization_config") for part in parts)
    found: dict[str, Any] = next((config for config in configs if isinstance(config, dict)), {})
    method = found.get("quant_method")
    if not isinstance(method, str):
        method = next((tool for name in names for end, tool in SIGNS.items() if name.endswith(end)), None)
    if method is None:
        return None
    details = [f"{key} {found[key]}" for key in ("bits", "format", "quant_algo", "weight_block_size") if key in found]
    which = f" ({', '.join(details)})" if details else ""
    known = f", of which mlx-lm reads {READ[method]}" if method in READ else ", which mlx-lm does not read"
    return f"the weights are quantised by {method}{which}{known}"
