"""mlx-lm's config.json of a GGUF file."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metalstep.checkpoint import blocks
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf.architecture import Architecture, Facts
from metalstep.checkpoint.gguf.file import GGUFHeader
from metalstep.checkpoint.gguf.metadata import Metadata


def read_config(
    metadata: Metadata, header: GGUFHeader, architecture: Architecture, rope: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """rope: values of the file's tensors of RoPE factors.

    Raises: CheckpointError for a RoPE or a tensor that is not supported, or metadata that is missing.
    """
    parts = header.metadata.get("split.count", 1)
    if not isinstance(parts, int):
        raise metadata.error(f"split.count is a {type(parts).__name__}, expected an integer")
    if parts > 1:
        raise CheckpointError(f"{metadata.path}: the model is split over files; join them with `llama-gguf-split --merge`")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise metadata.error("the tensor token_embd.weight is missing or has no rows")
    facts = _facts(metadata, header, architecture, rope)
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_size": facts.hidden_size,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "rope_theta": facts.rope_theta,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": metadata.size("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **architecture.config(facts),
        "torch_dtype": _dtype(header),
        **_quantization(header, architecture),
    }


def _facts(metadata: Metadata, header: GGUFHeader, architecture: Architecture, rope: Mapping[str, np.ndarray]) -> Facts:
    layers = metadata.size("block_count")
    if layers > len(header.tensors):  # before a model of that size is built
        raise metadata.error(f"block_count is {layers}, but the file has {len(header.tensors)} tensors")
    heads = metadata.size("attention.head_count")
    hidden_size = metadata.size("embedding_length")
    if hidden_size % heads and not metadata.has("attention.key_length"):
        raise metadata.error(f"embedding_length {hidden_size} does not divide into {heads} heads")
    head_dim = metadata.size("attention.key_length", hidden_size // heads)
    rope_dims = metadata.size("rope.dimension_count", head_dim)
    whole = {"attention.value_length": metadata.size("attention.value_length", head_dim)}
    if not architecture.partial_rope or rope_dims > head_dim:
        whole["rope.dimension_count"] = rope_dims
    for key, value in whole.items():
        if value != head_dim:
            raise metadata.error(f"{key} is {value}, expected the head size {head_dim}")
    return Facts(
        metadata=metadata,
        tensors=header.tensors,
        rope=rope,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=metadata.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_dims=rope_dims,
        rope_theta=float(metadata.number("rope.freq_base", 10000.0)),
    )


def _quantization(header: GGUFHeader, architecture: Architecture) -> dict[str, Any]:
    """`quantization` as mlx-lm writes it: the most frequent bits, and the layers that differ."""
    bits: dict[str, int] = {}
    for name, info in header.tensors.items():
        parameter = architecture.parameter(name)
        if info.format is not None and parameter is not None:
            bits[parameter.removesuffix(".weight")] = blocks.FORMATS[info.format].bits
    if not bits:
        return {}
    counts = list(bits.values())
    common = max(set(counts), key=lambda value: (counts.count(value), -value))
    quantization: dict[str, Any] = {"group_size": blocks.GROUP_SIZE, "bits": common, "mode": "affine"}
    for layer, own in bits.items():
        if own != common:
            quantization[layer] = {"group_size": blocks.GROUP_SIZE, "bits": own, "mode": "affine"}
    return {"quantization": quantization, "quantization_config": quantization}


def _dtype(header: GGUFHeader) -> str:
    """Dtype of activations: that of the matrices, float16 where they are quantised; norms are float32 in any file."""
    dtypes = {"float16" if info.format else info.dtype for info in header.tensors.values() if len(info.shape) > 1}
    return next((dtype for dtype in ("bfloat16", "float16") if dtype in dtypes), "float32")
