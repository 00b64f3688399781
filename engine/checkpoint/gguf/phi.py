"""phi2 and phi3 from GGUF. Source: llama.cpp, conversion/phi.py."""
from __future__ import annotations

import math
from typing import Any

from metalstep.checkpoint.gguf.architecture import ATTENTION, TOP, Architecture, Facts
from metalstep.checkpoint.gguf.rope import LONG_FACTORS, SHORT_FACTORS, linear_scaling

PHI2_LAYER = {**ATTENTION, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
PHI3_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


def _phi2(facts: Facts) -> dict[str, Any]:
    facts.require_head_dim()
    facts.require_plain_rope()
    return {
        "intermediate_size": facts.metadata.size("feed_forward_length"),
        "layer_norm_eps": float(facts.metadata.number("attention.layer_norm_epsilon")),
        "partial_rotary_factor": _partial(facts),
        "hidden_act": "gelu_new",
    }


def _phi3(facts: Facts) -> dict[str, Any]:
    facts.require_head_dim()
    metadata = facts.metadata
    context = metadata.size("context_length")
    original = metadata.size("rope.scaling.original_context_length", context)
    config = {
        "intermediate_size": metadata.size("feed_forward_length"),
        "rms_norm_eps": facts.rms_norm_eps,
        "partial_rotary_factor": _partial(facts),
        "original_max_position_embeddings": original,
        "rope_scaling": _scaling(facts, context, original),
        "hidden_act": "silu",
    }
    if metadata.has("attention.sliding_window") and metadata.number("attention.sliding_window"):
        config["sliding_window"] = metadata.size("attention.sliding_window")  # neither mlx-lm nor llama.cpp uses it
    return config


def _scaling(facts: Facts, context: int, original: int) -> dict[str, Any] | None:
    metadata = facts.metadata
    factors = {name: facts.rope[name] for name in (LONG_FACTORS, SHORT_FACTORS) if name in facts.rope}
    if not factors:
        if metadata.text(f"{metadata.architecture}.rope.scaling.type", "none") == "longrope":
            raise metadata.error(f"rope.scaling.type is 'longrope', but the tensor {LONG_FACTORS} is missing")
        scaling = linear_scaling(metadata)
        return None if scaling is None else {**scaling, "type": "linear", "long_factor": [], "short_factor": []}
    if len(factors) != 2 or any(values.shape != (facts.rope_dims // 2,) for values in factors.values()):
        raise metadata.error(f"{LONG_FACTORS} and {SHORT_FACTORS} are expected both, with {facts.rope_dims // 2} factors each")
    if original == 1:  # its logarithm is a divisor
        raise metadata.error("rope.scaling.original_context_length is 1, expected the length that the model was trained with")
    ratio = context / original
    scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    stated = metadata.number("rope.scaling.attn_factor", scale)
    if not math.isclose(stated, scale, rel_tol=1e-3):
        raise metadata.error(f"rope.scaling.attn_factor is {stated}, expected the {scale:.6g} that follows from the context lengths")
    return {
        "type": "longrope",
        "rope_type": "longrope",
        "long_factor": factors[LONG_FACTORS].tolist(),
        "short_factor": factors[SHORT_FACTORS].tolist(),
    }


def _partial(facts: Facts) -> float:
    """The factor of which mlx-lm's int(head_dim * factor) is what the file says."""
    factor = facts.rope_dims / facts.head_dim
    return factor if int(facts.head_dim * factor) == facts.rope_dims else math.nextafter(factor, 1.0)


PHI2 = Architecture(
    "phi", "PhiForCausalLM", PHI2_LAYER, _phi2, top={**TOP, "output_norm": "model.final_layernorm"}, partial_rope=True
)
PHI3 = Architecture("phi3", "Phi3ForCausalLM", PHI3_LAYER, _phi3, partial_rope=True)
