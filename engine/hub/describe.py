"""What a model on this machine is, from its config.json or its GGUF header: no weight is read."""
from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalstep.hub import choose
from metalstep.hub.cache import missing_files, snapshot_files
from metalstep.hub.gguf_header import FILE_TYPES, read_facts


@dataclass(frozen=True)
class Description:
    """format: safetensors or gguf. architecture, quantization, context_length: None where the files do not say. size: bytes.
    problem: why it cannot be loaded as it is, or None."""

    format: str
    architecture: str | None
    quantization: str | None
    bits: float | None
    context_length: int | None
    size: int
    problem: str | None

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "format": self.format,
            "architecture": self.architecture,
            "quantization": self.quantization,
            "bits": self.bits,
            "context_length": self.context_length,
            "size_bytes": self.size,
        }


def describe_gguf(path: Path) -> Description:
    """A .gguf file."""
    size = path.stat().st_size
    try:
        facts, end = read_facts(path)
    except (OSError, ValueError) as error:
        return Description("gguf", None, choose.quant_label(path.name) or None, None, None, size, str(error).rpartition(": ")[2])
    architecture = _text(facts.get("general.architecture"))
    quantization = choose.quant_label(path.name) or FILE_TYPES.get(facts.get("general.file_type", -1))
    context = _count(facts.get(f"{architecture}.context_length"))
    split = choose.SPLIT.search(path.name)
    problem = None
    if split:
        problem = f"split over {int(split[1])} files"
    elif not architecture:
        problem = "the header is damaged"
    elif end is None or end > size:
        problem = "the file is cut off"
    return Description("gguf", architecture, quantization, _gguf_bits(quantization), context, size, problem)


def _gguf_bits(quantization: str | None) -> float | None:
    digits = [c for c in (quantization or "") if c.isdigit()]
    if not quantization or not digits:
        return None
    return float(quantization.lstrip("BFP")) if quantization.lstrip("BFP") in ("16", "32") else float(digits[0])


def describe_directory(folder: Path) -> Description:
    """A directory with config.json and .safetensors files."""
    names = snapshot_files(folder)
    config = _config(folder / "config.json")
    missing = missing_files(folder, names)
    size = sum((folder / name).stat().st_size for name in names)
    problem = None
    if missing:
        problem = f"missing {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    elif short := [name for name in choose.safetensors(names) if not _is_long_enough(folder / name)]:
        problem = f"{short[0]} is cut off"
    elif not config:
        problem = "config.json cannot be read"
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    quantization, bits = _quantization(config)
    context = _count(config.get("max_position_embeddings")) or _count((text or {}).get("max_position_embeddings"))
    return Description("safetensors", _text(config.get("model_type")), quantization, bits, context, size, problem)


def damage(folder: Path) -> str | None:
    """What is wrong with the weights of a directory that names some: a file that is missing or cut off; None: nothing."""
    names = snapshot_files(folder)
    weights = choose.safetensors(names)
    if not weights and choose.INDEX not in names:
        return None
    if absent := [name for name in missing_files(folder, names) if name.endswith(".safetensors")]:
        return f"{absent[0]} is missing"
    short = [name for name in weights if not _is_long_enough(folder / name)]
    return f"{short[0]} is cut off" if short else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 1 << 31 else None


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _quantization(config: dict[str, Any]) -> tuple[str | None, float | None]:
    """(as `4 bit`, `4-6 bit` or `mxfp4`, the fewest bits) of mlx-lm's entry, or the weights' dtype."""
    entry = config.get("quantization") or config.get("quantization_config")
    if isinstance(entry, dict):
        parts = [part for part in (entry, *entry.values()) if isinstance(part, dict)]
        bits = sorted({count for part in parts if (count := _count(part.get("bits")))})
        mode = entry.get("mode") or entry.get("quant_method")
        if not bits:
            return (str(mode) if mode else None), None
        label = f"{bits[0]} bit" if len(bits) == 1 else f"{bits[0]}-{bits[-1]} bit"
        return (label if mode in (None, "affine") else str(mode)), float(bits[0])
    dtype = config.get("torch_dtype") or config.get("dtype")
    return (dtype, {"bfloat16": 16.0, "float16": 16.0, "float32": 32.0}.get(dtype)) if isinstance(dtype, str) else (None, None)


def _is_long_enough(path: Path) -> bool:
    """Whether the file has all the bytes that its header names."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100 << 20)))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        return bool(path.stat().st_size >= 8 + length + end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error, RecursionError):
        return False
