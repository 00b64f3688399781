"""Writes mlx-lm models as GGUF files by the rules of llama.cpp's converter, with names and quantisers of gguf-py."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_py
import mlx.core as mx
import numpy as np
from checkpoint_files import byte_tokens, gguf, make_model, parameters
from mlx.utils import tree_unflatten

VOCAB = 96
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens()[: VOCAB - 4], '!"']
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
KEYS = {  # of config.json, as the converter names them
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (VOCAB - 3),
    "tokenizer.ggml.merges": ['! "'],
    "tokenizer.ggml.eos_token_id": 2,
}


def random_model(config: dict[str, Any]) -> Any:
    """mlx-lm's model with norms away from 1 and biases away from 0, so that a lost one shows."""
    model = make_model(config)
    if hasattr(model, "sanitize"):
        names = [name for name in parameters(model) if name != "lm_head.weight" or not config["tie_word_embeddings"]]
        model.sanitize(dict.fromkeys(names, mx.zeros(())))
    weights = parameters(model)
    moved = [(name, a + 0.3 * mx.random.normal(a.shape)) for name, a in weights.items() if a.ndim == 1]
    model.update(tree_unflatten(moved))
    return model


def metadata(arch: str, config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The file's metadata. changes: keys without the architecture, `__` for a dot; None leaves one out."""
    own: dict[str, Any] = {key: config[name] for name, key in KEYS.items() if name in config}
    own |= {"rope.freq_base": config["rope_theta"]}
    if arch in ("gemma", "gemma2", "gemma3", "qwen3", "qwen3moe"):
        own |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if "partial_rotary_factor" in config:
        own["rope.dimension_count"] = int(config["partial_rotary_factor"] * config["hidden_size"]) // config["num_attention_heads"]
    own |= {key.replace("__", "."): value for key, value in changes.items()}
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in own.items() if value is not None}, **TOKENIZER}


def tensors(arch: str, config: dict[str, Any], model: Any, kind: str = "F32") -> list[tuple[str, tuple[int, ...], int, bytes]]:
    """Names as gguf-py maps them, matrices quantised by it as `kind`, in the order and with the shifts of the converter."""
    architecture = next(a for a, name in gguf_py.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf_py.get_tensor_name_map(architecture, config["num_hidden_layers"])
    out = []
    for parameter, array in parameters(model).items():
        stacked = parameter.replace("block_sparse_moe.switch_mlp", "mlp.experts").replace("switch_mlp", "experts")
        name = names.get_name(stacked, try_suffixes=(".weight", ".bias"))
        assert name is not None, parameter
        values = np.array(array)
        if arch == "llama" and parameter.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if "q_proj" in parameter else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        values = values.squeeze()
        quantised = values.ndim > 1 and not name.endswith("ffn_gate_inp.weight")
        type_ = gguf_py.GGMLQuantizationType[kind if quantised else "F32"]
        out.append((name, values.shape, int(type_), gguf_py.quantize(np.ascontiguousarray(values), type_).tobytes()))
    return out


def write(path: Path, arch: str, config: dict[str, Any], model: Any, kind: str = "F32", extra: Any = (), **changes: Any) -> Path:
    path.write_bytes(gguf(metadata(arch, config, **changes), [*tensors(arch, config, model, kind), *extra]))
    return path


def dequantised(model: Any, config: dict[str, Any], kind: str) -> Any:
    """A model of the values that `kind` keeps of `model`'s matrices."""
    other = random_model(config)
    kept = []
    for name, array in parameters(model).items():
        values, type_ = np.array(array), gguf_py.GGMLQuantizationType[kind]
        if values.squeeze().ndim > 1 and not name.endswith(".gate.weight"):
            values = gguf_py.dequantize(gguf_py.quantize(values, type_), type_).reshape(values.shape)
        kept.append((name, mx.array(values)))
    other.update(tree_unflatten(kept))
    return other
