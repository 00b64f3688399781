"""GGUF's tensor names and metadata as mlx-lm's parameter names and config.json. Source: llama.cpp, gguf-py/gguf/constants.py."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metalstep.checkpoint import blocks
from metalstep.checkpoint.errors import CheckpointError
from metalstep.checkpoint.gguf_file import GGUFHeader, TensorInfo
from metalstep.checkpoint.gguf_metadata import Metadata
from metalstep.checkpoint.gguf_rope import rope_scaling

GLOBALS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # becomes rope_scaling in the config


@dataclass(frozen=True)
class Architecture:
    """permuted: q and k rows are stored for interleaved RoPE, which llama.cpp uses for this architecture alone."""

    model_type: str
    name: str
    permuted: bool


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", permuted=False),
}


def read_config(path: Path, header: GGUFHeader, rope_factors: np.ndarray | None = None) -> dict[str, Any]:
    """mlx-lm's config.json of a GGUF file. rope_factors: the values of ROPE_FACTORS where the file has that tensor.

    Raises: CheckpointError for an architecture, a RoPE or a tensor that is not supported, or metadata that is missing.
    """
    metadata = Metadata(path, header.metadata)
    if metadata.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {metadata.architecture!r} is not supported from GGUF, expected one of "
            f"{', '.join(ARCHITECTURES)}; use an mlx-lm directory of this model (`mlx_lm.convert`)"
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path}: the model is split over files; join them with `llama-gguf-split --merge`")
    if metadata.has("expert_count") and metadata.number("expert_count"):
        raise CheckpointError(f"{path}: mixture-of-experts models are not supported from GGUF; use an mlx-lm directory")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise metadata.error("the tensor token_embd.weight is missing or has no rows")
    layers = metadata.size("block_count")
    if layers > len(header.tensors):  # before a model of that size is built
        raise metadata.error(f"block_count is {layers}, but the file has {len(header.tensors)} tensors")
    heads = metadata.size("attention.head_count")
    hidden_size = metadata.size("embedding_length")
    if hidden_size % heads and not metadata.has("attention.key_length"):
        raise metadata.error(f"embedding_length {hidden_size} does not divide into {heads} heads")
    head_dim = metadata.size("attention.key_length", hidden_size // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.size(key, head_dim) != head_dim:
            raise metadata.error(f"{key} is {metadata.size(key)}, expected the head size {head_dim}")
    architecture = ARCHITECTURES[metadata.architecture]
    theta = float(metadata.number("rope.freq_base", 10000.0))
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(metadata, theta, head_dim, rope_factors),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": metadata.size("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "hidden_act": "silu",
        "torch_dtype": _dtype(header),
        **_quantization(header),
    }


def parameter_names(path: Path, header: GGUFHeader) -> dict[str, str]:
    """mlx-lm's name of each tensor of the file. Raises: CheckpointError for tensors that the architecture does not have."""
    names = {name: _parameter_name(name) for name in header.tensors if name != ROPE_FACTORS}
    unknown = [name for name, parameter in names.items() if parameter is None]
    if unknown:
        raise CheckpointError(
            f"{path}: a {header.metadata['general.architecture']} model has no place for {', '.join(unknown[:4])} "
            f"({len(unknown)} in all); use an mlx-lm directory of this model"
        )
    return {name: parameter for name, parameter in names.items() if parameter is not None}


def _parameter_name(name: str) -> str | None:
    match name.split("."):
        case [part, leaf] if part in GLOBALS:
            return f"{GLOBALS[part]}.{leaf}"
        case ["blk", layer, part, leaf] if part in LAYER and layer.isascii() and layer.isdigit():
            return f"model.layers.{layer}.{LAYER[part]}.{leaf}"
    return None


def row_order(config: Mapping[str, Any], info: TensorInfo) -> np.ndarray | None:
    """Where the rows of q and k are in the file, int32 [n]; None where they are in order.

    llama.cpp interleaves the halves of a head for its RoPE (convert_hf_to_gguf.py, `permute`); mlx-lm wants them one after the other.
    """
    architecture = ARCHITECTURES[config["model_type"]]
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


def _quantization(header: GGUFHeader) -> dict[str, Any]:
    """`quantization` as mlx-lm writes it: the most frequent bits, and the layers that differ."""
    bits: dict[str, int] = {}
    for name, info in header.tensors.items():
        parameter = _parameter_name(name)
        if info.format is not None and parameter is not None:
            bits[parameter.removesuffix(".weight")] = blocks.FORMATS[info.format].bits
    if not bits:
        return {}
    counts = list(bits.values())
    common = max(set(counts), key=lambda value: (counts.count(value), -value))
    quantization: dict[str, Any] = {"group_size": blocks.BLOCK_SIZE, "bits": common, "mode": "affine"}
    for layer, own in bits.items():
        if own != common:
            quantization[layer] = {"group_size": blocks.BLOCK_SIZE, "bits": own, "mode": "affine"}
    return {"quantization": quantization, "quantization_config": quantization}


def _dtype(header: GGUFHeader) -> str:
    """Dtype of activations: that of the matrices (of their scales when quantised); norms are float32 in any file."""
    dtypes = {info.dtype for info in header.tensors.values() if len(info.shape) > 1}
    return next((dtype for dtype in ("bfloat16", "float16") if dtype in dtypes), "float32")
