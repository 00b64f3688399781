"""GGUF's RoPE metadata as the `rope_scaling` of a config.json."""
from __future__ import annotations

from typing import Any

import numpy as np

from metalstep.checkpoint.gguf_metadata import Metadata

# Llama 3.1 and later: constants of every published model; the factor is read off the file's own factors.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_scaling(metadata: Metadata, theta: float, head_dim: int, factors: np.ndarray | None) -> dict[str, Any] | None:
    """The config's `rope_scaling`, or None.

    factors: the tensor `rope_freqs` where the file has one, float32 [head_dim / 2].
    Raises: CheckpointError for a kind that is not supported.
    """
    if factors is not None:
        return _llama3(metadata, theta, head_dim, factors)
    kind = metadata.text(f"{metadata.architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = float(metadata.number("rope.scaling.factor", 1.0))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = metadata.size("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise metadata.error(f"rope.scaling.type is {kind!r}, expected none, linear or yarn")


def _llama3(metadata: Metadata, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    factor = float(factors.max())
    fits = theta > 0 and factor >= 1 and factors.shape == (-(-head_dim // 2),)
    if not fits or not np.allclose(factors, llama3_factors(theta, head_dim, factor), rtol=1e-3):
        raise metadata.error("the tensor rope_freqs.weight holds other factors than Llama 3's, which is the one kind supported")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What Llama 3 divides each frequency by, float32 [head_dim / 2]. Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel."""
    low, high, context = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"], LLAMA3["original_max_position_embeddings"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))
    return factors.astype(np.float32)
