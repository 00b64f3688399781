"""gemma, gemma2 and gemma3 from GGUF. Source: llama.cpp, conversion/gemma.py, and src/models/gemma2.cpp and its siblings.

llama.cpp adds 1 to the weights of norms when it converts a model, mlx-lm when it runs one.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from metalstep.checkpoint.gguf.architecture import ATTENTION, MLP, QK_NORMS, Architecture, Facts
from metalstep.checkpoint.gguf.metadata import Metadata
from metalstep.checkpoint.gguf.rope import rope_scaling

FOUR_NORMS = {
    **ATTENTION,
    **MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# The largest models scale queries by hidden_size / heads, the others by the head size. The file does not say so: llama.cpp knows the
# largest by their number of layers.
LARGEST_GEMMA2, LARGEST_GEMMA3 = 46, 62
PATTERN = 6  # of gemma3: every sixth layer sees the whole context
LOCAL_THETA = 10000.0


def _gemma(facts: Facts) -> dict[str, Any]:
    facts.require_plain_rope()
    return _shared(facts)


def _gemma2(facts: Facts) -> dict[str, Any]:
    facts.require_plain_rope()
    metadata = facts.metadata
    return {
        **_shared(facts),
        "attn_logit_softcapping": float(metadata.number("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(metadata.number("final_logit_softcapping", 30.0)),
        "query_pre_attn_scalar": _query_scalar(facts, LARGEST_GEMMA2),
        "sliding_window": metadata.size("attention.sliding_window", 4096),  # mlx-lm's model has none
    }


def _gemma3(facts: Facts) -> dict[str, Any]:
    metadata = facts.metadata
    if metadata.has("final_logit_softcapping") and metadata.number("final_logit_softcapping"):
        raise metadata.error("final_logit_softcapping is set, which mlx-lm's gemma3 does not have")
    windowed = metadata.has("attention.sliding_window")
    return {
        **_shared(facts),
        "query_pre_attn_scalar": _query_scalar(facts, LARGEST_GEMMA3),
        "sliding_window": metadata.size("attention.sliding_window") if windowed else metadata.size("context_length"),
        "sliding_window_pattern": _pattern(metadata, facts.layers) if windowed else 1,
        "rope_local_base_freq": float(metadata.number("rope.freq_base_swa", LOCAL_THETA)),
        "rope_scaling": rope_scaling(metadata, facts.rope_theta, facts.head_dim, facts.rope),
    }


def _shared(facts: Facts) -> dict[str, Any]:
    return {
        "intermediate_size": facts.metadata.size("feed_forward_length"),
        "rms_norm_eps": facts.rms_norm_eps,
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _query_scalar(facts: Facts, largest: int) -> float:
    return float(facts.hidden_size // facts.heads if facts.layers == largest else facts.head_dim)


def _pattern(metadata: Metadata, layers: int) -> int:
    """Every how many layers one sees the whole context: a number, or whether each layer has a window."""
    key = f"{metadata.architecture}.attention.sliding_window_pattern"
    windows = metadata.values.get(key)
    if not isinstance(windows, np.ndarray):
        return metadata.size("attention.sliding_window_pattern", PATTERN)
    whole = np.flatnonzero(~windows.astype(bool))
    pattern = int(whole[0]) + 1 if len(whole) else layers + 1
    if len(windows) != layers or not np.array_equal(windows.astype(bool), (np.arange(layers) + 1) % pattern != 0):
        raise metadata.error(f"{key} does not repeat; mlx-lm's model has every nth layer without a window")
    return pattern


GEMMA = Architecture("gemma", "GemmaForCausalLM", {**ATTENTION, **MLP}, _gemma, norm_shift=1.0)
GEMMA2 = Architecture("gemma2", "Gemma2ForCausalLM", FOUR_NORMS, _gemma2, norm_shift=1.0)
GEMMA3 = Architecture("gemma3_text", "Gemma3ForCausalLM", {**FOUR_NORMS, **QK_NORMS}, _gemma3, norm_shift=1.0)
