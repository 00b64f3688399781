"""GGUF's architectures, and its tensors as mlx-lm's parameters."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf.architecture import Architecture
from metalstep.checkpoint.gguf.experts import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from metalstep.checkpoint.gguf.file import GGUFHeader, TensorInfo
from metalstep.checkpoint.gguf.gemma import GEMMA, GEMMA2, GEMMA3
from metalstep.checkpoint.gguf.llama import LLAMA, QWEN2, QWEN3
from metalstep.checkpoint.gguf.metadata import Metadata
from metalstep.checkpoint.gguf.phi import PHI2, PHI3
from metalstep.checkpoint.gguf.rope import ROPE_TENSORS

ARCHITECTURES = {
    **{"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3},
    **{"gemma": GEMMA, "gemma2": GEMMA2, "gemma3": GEMMA3, "phi2": PHI2, "phi3": PHI3},
    **{"qwen2moe": QWEN2_MOE, "qwen3moe": QWEN3_MOE},
}
WITH_EXPERTS = {"llama": MIXTRAL, "qwen2moe": QWEN2_MOE, "qwen3moe": QWEN3_MOE}


def find_architecture(metadata: Metadata) -> Architecture:
    """Raises: CheckpointError for an architecture that is not supported."""
    name = metadata.architecture
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.path}: architecture {name!r} is not supported from GGUF, expected one of {', '.join(ARCHITECTURES)}; "
            "use an mlx-lm directory of this model (`mlx_lm.convert`)"
        )
    if not (metadata.has("expert_count") and metadata.number("expert_count")):
        return ARCHITECTURES[name]
    if name not in WITH_EXPERTS:
        raise CheckpointError(
            f"{metadata.path}: {name} as a mixture of experts is not supported from GGUF, expected one of {', '.join(WITH_EXPERTS)}; "
            "use an mlx-lm directory of this model (`mlx_lm.convert`)"
        )
    return WITH_EXPERTS[name]


def parameter_names(metadata: Metadata, header: GGUFHeader, architecture: Architecture) -> dict[str, str]:
    """mlx-lm's name of each tensor of the file. Raises: CheckpointError for tensors that the architecture does not have."""
    names = {name: architecture.parameter(name) for name in header.tensors if name not in ROPE_TENSORS}
    unknown = [name for name, parameter in names.items() if parameter is None]
    if unknown:
        raise CheckpointError(
            f"{metadata.path}: a {metadata.architecture} model has no place for {', '.join(unknown[:4])} "
            f"({len(unknown)} in all); use an mlx-lm directory of this model"
        )
    return {name: parameter for name, parameter in names.items() if parameter is not None}


def row_order(config: Mapping[str, Any], architecture: Architecture, info: TensorInfo) -> np.ndarray | None:
    """Where the rows of q and k are in the file, int32 [n]; None where they are in order.

    llama.cpp interleaves the halves of a head for its RoPE (conversion/llama.py, `permute`); mlx-lm wants them one after the other.
    """
    part = info.name.split(".")[-2]
    if not architecture.permuted or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    rows, head_dim = info.shape[0] if info.shape else 0, config["head_dim"]
    if rows != heads * head_dim or head_dim % 2:
        raise CheckpointError(
            f"{info.name} has {rows} rows, expected {heads} heads of {head_dim}; the file's metadata does not fit its tensors: "
            "convert the model again"
        )
    order = np.arange(rows, dtype=np.int32).reshape(heads, head_dim // 2, 2)
    return np.ascontiguousarray(order.swapaxes(1, 2).reshape(rows))
