"""llama, qwen2 and qwen3 from GGUF. Source: llama.cpp, conversion/llama.py and conversion/qwen.py."""
from __future__ import annotations

from typing import Any

from metalstep.checkpoint.gguf.architecture import ATTENTION, MLP, QK_NORMS, Architecture, Facts
from metalstep.checkpoint.gguf.rope import rope_scaling


def _config(facts: Facts) -> dict[str, Any]:
    metadata = facts.metadata
    config: dict[str, Any] = {
        "intermediate_size": metadata.size("feed_forward_length"),
        "rms_norm_eps": facts.rms_norm_eps,
        "rope_scaling": rope_scaling(metadata, facts.rope_theta, facts.head_dim, facts.rope),
        "attention_bias": "blk.0.attn_q.bias" in facts.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in facts.tensors,
        "hidden_act": "silu",
    }
    if metadata.has("attention.sliding_window"):  # of Mistral; as in its config.json, which has no layer_types for mlx-lm to use it
        config["sliding_window"] = metadata.size("attention.sliding_window")
    return config


LLAMA = Architecture("llama", "LlamaForCausalLM", {**ATTENTION, **MLP}, _config, permuted=True)
QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", {**ATTENTION, **MLP}, _config)
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", {**ATTENTION, **QK_NORMS, **MLP}, _config)
