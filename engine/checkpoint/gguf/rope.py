"""GGUF's RoPE metadata as the `rope_scaling` of a config.json."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metalstep.checkpoint.gguf.metadata import Metadata

# Tensors that are factors of RoPE's frequencies; they become rope_scaling in the config.
FACTORS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FACTORS, LONG_FACTORS, SHORT_FACTORS)
# Llama 3.1 and later: constants of every published model; the factor is read off the file's own factors.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_scaling(metadata: Metadata, theta: float, head_dim: int, rope: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The config's `rope_scaling`, or None.

    rope: of ROPE_TENSORS, those that the file has, float32 [head_dim / 2].
    Raises: CheckpointError for a kind that is not supported.
    """
    others = [name for name in rope if name != FACTORS]
    if others:
        raise metadata.error(f"the tensor {others[0]} is not expected in a {metadata.architecture} model")
    if FACTORS in rope:
        return _llama3(metadata, theta, head_dim, rope[FACTORS])
    kind = metadata.text(f"{metadata.architecture}.rope.scaling.type", "none")
    return _yarn(metadata) if kind == "yarn" else linear_scaling(metadata, "none, linear or yarn")


def linear_scaling(metadata: Metadata, expected: str = "none or linear") -> dict[str, Any] | None:
    """The config's `rope_scaling` where the kind is linear, None where it is none. Raises: CheckpointError for another kind."""
    kind = metadata.text(f"{metadata.architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise metadata.error(f"rope.scaling.type is {kind!r}, expected {expected}")
    return {"rope_type": "linear", "factor": float(metadata.number("rope.scaling.factor", 1.0))}


def _yarn(metadata: Metadata) -> dict[str, Any]:
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"):
        if metadata.number(key, 1.0) != 1:
            raise metadata.error(f"{key} is {metadata.number(key)}, expected 1, which is what mlx-lm's YaRN has")
    betas = {
        name: float(metadata.number(f"rope.scaling.yarn_{name}"))
        for name in ("beta_fast", "beta_slow")
        if metadata.has(f"rope.scaling.yarn_{name}")
    }
    return {
        "rope_type": "yarn",
        "factor": float(metadata.number("rope.scaling.factor", 1.0)),
        "original_max_position_embeddings": metadata.size("rope.scaling.original_context_length"),
        **betas,
    }


def _llama3(metadata: Metadata, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    factor = float(factors.max())
    fits = theta > 0 and factor >= 1 and factors.shape == (-(-head_dim // 2),)
    if not fits or not np.allclose(factors, llama3_factors(theta, head_dim, factor), rtol=1e-3):
        raise metadata.error(f"the tensor {FACTORS} holds other factors than Llama 3's, which is the one kind supported")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What Llama 3 divides each frequency by, float32 [head_dim / 2]. Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel."""
    low, high, context = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"], LLAMA3["original_max_position_embeddings"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))
    return factors.astype(np.float32)
