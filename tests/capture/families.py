"""Tiny models of every family that capture is tested with.

Thresholds are small, so that the test texts cross them: windows, original_max_position_embeddings, softcaps. Norm weights and
biases are away from 1 and 0, so that a lost one shows.
"""
from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

VOCAB = 96
BASE: dict[str, Any] = dict(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    vocab_size=VOCAB,
    max_position_embeddings=256,
    rope_theta=1e4,
    tie_word_embeddings=True,
)
LINEAR_ATTENTION: dict[str, Any] = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
    full_attention_interval=2,
    partial_rotary_factor=0.5,
    attention_bias=False,
)
EXPERTS: dict[str, Any] = dict(
    num_experts=8,
    num_experts_per_tok=2,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    moe_intermediate_size=32,
    norm_topk_prob=True,
)


@dataclass(frozen=True)
class Family:
    """A configuration. tolerance: absolute, of logits; 0 is bit for bit, more where mlx-lm's own ring buffer adds up in another
    order. native: whether it must lower to kernels. per_layer: the most launches a layer may take."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    native: bool = True
    per_layer: int = 6


FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "llama_untied": Family("llama", dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "llama3_rope": Family(
        "llama",
        dict(
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            )
        ),
    ),
    "llama_traditional_rope": Family("llama", dict(rope_traditional=True)),
    "mistral": Family("llama", dict(model_type="mistral")),
    "mistral_windows": Family(
        "llama", dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"]), tolerance=1e-5
    ),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "phi3_longrope": Family(
        "phi3",
        dict(
            rope_scaling=dict(
                type="longrope",
                short_factor=[1.0] * 8,
                long_factor=[1.0 + 0.1 * i for i in range(8)],
            ),
            original_max_position_embeddings=16,
        ),
    ),
    "phi3_su_partial": Family(
        "phi3",
        dict(
            partial_rotary_factor=0.5,
            rope_scaling=dict(
                type="su",
                short_factor=[1.0] * 4,
                long_factor=[1.0 + 0.2 * i for i in range(4)],
                original_max_position_embeddings=16,
            ),
            original_max_position_embeddings=16,
        ),
    ),
    "olmo2": Family("olmo2", per_layer=8),
    "granite": Family(
        "granite",
        dict(
            logits_scaling=2.0,
            attention_multiplier=0.1,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_bias=False,
            mlp_bias=False,
        ),
    ),
    "glm4": Family("glm4", dict(attention_bias=True, partial_rotary_factor=0.5), per_layer=8),
    "smollm3": Family("smollm3", dict(no_rope_layer_interval=2)),
    "gemma2": Family(
        "gemma2", dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0), tolerance=1e-5, per_layer=8
    ),
    "gemma3_text": Family("gemma3_text", dict(sliding_window=8, sliding_window_pattern=2), tolerance=1e-5, per_layer=8),
    "starcoder2": Family("starcoder2", dict(norm_epsilon=1e-5)),
    "cohere2": Family("cohere2", dict(sliding_window=8, sliding_window_pattern=2, layer_norm_eps=1e-5), tolerance=1e-5, per_layer=5),
    "qwen3_moe": Family("qwen3_moe", EXPERTS, native=False, per_layer=11),
    "gpt_oss": Family(
        "gpt_oss",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
        ),
        tolerance=1e-5,
        native=False,
        per_layer=11,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        dict(
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
            qk_nope_head_dim=32,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_shared_experts=1,
            first_k_dense_replace=1,
            num_key_value_heads=4,
        ),
        native=False,
        per_layer=17,
    ),
    "qwen3_next": Family(
        "qwen3_next",
        {**LINEAR_ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 32},
        native=False,
        per_layer=14,
    ),
    "qwen3_5": Family(
        "qwen3_5",
        dict(text_config={**BASE, **LINEAR_ATTENTION, "model_type": "qwen3_5_text"}),
        native=False,
        per_layer=8,
    ),
}


def build(name: str, *, quantized: bool, layers: int = 2) -> nn.Module:
    """The mlx-lm model of a family with random float32 weights; 4 bits in groups of 32 where `quantized`."""
    family = FAMILIES[name]
    mx.random.seed(0)
    module = importlib.import_module(f"mlx_lm.models.{family.model_type}")
    config = {"model_type": family.model_type, **BASE, **family.config, "num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][i % 2] for i in range(layers)]
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "num_hidden_layers": layers}
    model = module.Model(module.ModelArgs.from_dict(config))
    if quantized:
        nn.quantize(model, 32, 4, class_predicate=lambda _, layer: _fits(layer))
    weights = dict(tree_flatten(model.parameters()))
    for key, weight in weights.items():
        if weight.dtype == mx.float32 and weight.ndim == 1:
            weights[key] = weight + 0.3 * mx.random.normal(weight.shape)
    model.update(tree_unflatten(list(weights.items())))
    return model


def _fits(layer: Any) -> bool:
    return hasattr(layer, "to_quantized") and (not hasattr(layer, "weight") or layer.weight.shape[-1] % 32 == 0)
