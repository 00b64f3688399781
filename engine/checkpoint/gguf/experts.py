"""Mixtures of experts from GGUF: qwen2moe, qwen3moe, and llama with experts (Mixtral). Source: llama.cpp, conversion/qwen.py.

The experts of a layer are one tensor [experts, n, k], as in mlx-lm's switch layers.
"""
from __future__ import annotations

from typing import Any

from metalstep.checkpoint.gguf.architecture import ATTENTION, QK_NORMS, Architecture, Facts


def _experts(block: str) -> dict[str, str]:
    return {
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": f"{block}.gate",
        "ffn_gate_exps": f"{block}.switch_mlp.gate_proj",
        "ffn_up_exps": f"{block}.switch_mlp.up_proj",
        "ffn_down_exps": f"{block}.switch_mlp.down_proj",
    }


SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def _shared(facts: Facts) -> dict[str, Any]:
    facts.require_plain_rope()
    return {
        "intermediate_size": facts.metadata.size("feed_forward_length"),
        "rms_norm_eps": facts.rms_norm_eps,
        "num_experts_per_tok": facts.metadata.size("expert_used_count"),
        "hidden_act": "silu",
    }


def _qwen2(facts: Facts) -> dict[str, Any]:
    facts.require_head_dim()
    config, metadata = _shared(facts), facts.metadata
    intermediate = config["intermediate_size"]
    return {
        **config,
        "num_experts": metadata.size("expert_count"),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length", max(1, intermediate // config["num_experts_per_tok"])),
        "shared_expert_intermediate_size": metadata.size("expert_shared_feed_forward_length", intermediate),
    }


def _qwen3(facts: Facts) -> dict[str, Any]:
    metadata = facts.metadata
    return {
        **_shared(facts),
        "num_experts": metadata.size("expert_count"),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,  # llama.cpp has no key for it and always does
    }


def _mixtral(facts: Facts) -> dict[str, Any]:
    facts.require_head_dim()
    return {**_shared(facts), "num_local_experts": facts.metadata.size("expert_count")}


QWEN2_MOE = Architecture(
    "qwen2_moe", "Qwen2MoeForCausalLM", {**ATTENTION, **_experts("mlp"), **SHARED_EXPERT}, _qwen2,
    matrices=frozenset({"ffn_gate_inp_shexp"}),
)  # fmt: skip
QWEN3_MOE = Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**ATTENTION, **QK_NORMS, **_experts("mlp")}, _qwen3)
MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", {**ATTENTION, **_experts("block_sparse_moe")}, _mixtral, permuted=True)
