"""Every architecture from GGUF: a random mlx-lm model, written as llama.cpp's converter does, gives the model's own logits."""
import gguf as gguf_py
import gguf_models as files
import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import F32
from steps import reference

import metalstep
from metalstep.checkpoint import CheckpointError, build_model, load_weights_eager, open_checkpoint

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONG = {"type": "longrope", "long_factor": [1.0 + 0.2 * i for i in range(4)], "short_factor": [1.0] * 4}
# Architecture, mlx-lm's model type, what its config has beside BASE, and what the metadata has beside the config's own keys.
CASES = {
    "llama": ("llama", "llama", {}, {}),
    "llama-untied": ("llama", "llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, {}),
    "mistral": ("llama", "llama", {"sliding_window": 128}, {"rope__dimension_count": 16}),
    "qwen2": ("qwen2", "qwen2", {}, {}),
    "qwen3": ("qwen3", "qwen3", {}, {}),
    "gemma": ("gemma", "gemma", {}, {}),
    "gemma2": (
        "gemma2", "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16, "sliding_window": 300}, {},
    ),
    "gemma3": (
        "gemma3", "gemma3_text",
        {
            **{"sliding_window": 8, "sliding_window_pattern": 2, "num_hidden_layers": 3, "rope_local_base_freq": 5e3},
            **{"query_pre_attn_scalar": 16, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        },
        {
            **{"attention__sliding_window_pattern": 2, "rope__freq_base_swa": 5e3},
            **{"rope__scaling__type": "linear", "rope__scaling__factor": 2.0},
        },
    ),
    "gemma3-one-window": (
        "gemma3", "gemma3_text", {"sliding_window_pattern": 1, "query_pre_attn_scalar": 16}, {}
    ),
    "phi2": (
        "phi2", "phi",
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "num_key_value_heads": 4, "tie_word_embeddings": False}, {},
    ),
    "phi3": ("phi3", "phi3", {"original_max_position_embeddings": 256, "tie_word_embeddings": False}, {"attention__sliding_window": 64}),
    "phi3-longrope": (
        "phi3", "phi3", {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.5, "rope_scaling": LONG},
        {"rope__scaling__type": "longrope", "rope__scaling__attn_factor": float(np.sqrt(2))},
    ),
    "qwen2moe": ("qwen2moe", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64, "tie_word_embeddings": False}, {}),
    "qwen3moe": (
        "qwen3moe", "qwen3_moe", {**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}, {}
    ),
    "mixtral": ("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}, {}),
}  # fmt: skip
EAGER = ("qwen2moe", "qwen3moe", "mixtral")  # no kernels for experts yet
TEXT = [(7 * i + 3) % files.VOCAB for i in range(37)]  # longer than windows and original_max_position_embeddings above
RANGE = {"F32": 2e-5, "quantised": 1e-3}  # of a row's range of logits; quantised linears round activations to 15 bits


def case(name):
    arch, model_type, own, extra = CASES[name]
    config = {"model_type": model_type, **files.BASE, **own}
    rope = []
    if "rope_scaling" in config and config["rope_scaling"] is LONG:
        for part in ("long", "short"):
            factors = np.array(LONG[f"{part}_factor"], np.float32)
            rope.append((f"rope_factors_{part}.weight", factors.shape, F32, factors.tobytes()))
    return arch, config, rope, extra


def eager(path):
    with open_checkpoint(path) as checkpoint:
        model = build_model(checkpoint)
        load_weights_eager(model, checkpoint, mx.float32)
        return model, checkpoint.config


def within(got, want):
    spread = want.max(-1, keepdims=True) - want.min(-1, keepdims=True)
    return (np.abs(got - want) / spread).max()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_model_that_was_converted(name, tmp_path):
    """Float32 is exact, up to the 1 that is added to gemma's norms and taken away again; natively within rounding."""
    arch, config, rope, extra = case(name)
    model = files.random_model(config)
    expected = reference(model, TEXT)
    path = files.write(tmp_path / "model.gguf", arch, config, model, extra=rope, **extra)
    loaded, _ = eager(path)
    np.testing.assert_allclose(reference(loaded, TEXT), expected, rtol=0, atol=2e-5 if arch.startswith("gemma") else 0)
    if name in EAGER:
        with pytest.raises(Exception, match="strict"):
            metalstep.load(path, strict=True)
        return
    native, _ = metalstep.load(path, strict=True, kv_dtype="float32")
    with native:
        assert within(np.array(native(mx.array([TEXT]))[0]), expected) <= RANGE["F32"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("llama", "Q5_0"), ("qwen3", "Q5_1"), ("gemma2", "Q8_0"), ("gemma3", "Q5_0")],
        *[("phi3", "Q5_1"), ("phi2", "Q5_0"), ("qwen2moe", "Q5_1")],
    ],
)
def test_quantised_files_give_the_logits_of_their_own_values(name, kind, tmp_path):
    """Against mlx-lm's model of what gguf-py reads from the same blocks; all kinds of layers, the embedding and the head too."""
    arch, config, rope, extra = case(name)
    model = files.random_model(config)
    expected = reference(files.dequantised(model, config, kind), TEXT)
    path = files.write(tmp_path / "model.gguf", arch, config, model, kind, extra=rope, **extra)
    loaded, read = eager(path)
    assert read["quantization"]["bits"] == int(kind[1])
    np.testing.assert_allclose(reference(loaded, TEXT), expected, rtol=0, atol=5e-5)
    if name not in EAGER:
        native, _ = metalstep.load(path, strict=True, kv_dtype="float32")
        with native:
            assert within(np.array(native(mx.array([TEXT]))[0]), expected) <= RANGE["quantised"]


@pytest.mark.parametrize(("layers", "scalar"), [(46, 32.0), (42, 16.0)])
def test_the_largest_gemma2_scales_queries_by_its_own_rule(tmp_path, layers, scalar):
    """gemma2-27b: hidden_size / heads, which no key says; llama.cpp tells it by its 46 layers."""
    config = {"model_type": "gemma2", **files.BASE, "num_attention_heads": 2, "num_hidden_layers": 1, "sliding_window": 9}
    model = files.random_model(config)
    content = files.tensors("gemma2", config, model)
    layer = [entry for entry in content if entry[0].startswith("blk.0.")]
    more = [(entry[0].replace("blk.0.", f"blk.{i}."), *entry[1:]) for i in range(1, layers) for entry in layer]
    path = tmp_path / "model.gguf"
    path.write_bytes(files.gguf(files.metadata("gemma2", {**config, "num_hidden_layers": layers}), content + more))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("gemma2", {"rope__scaling__type": "linear"}, "the RoPE scaling is linear, expected none in a gemma2 model"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ("gemma3", {"attention__sliding_window_pattern": [1, 0, 0]}, "sliding_window_pattern does not repeat"),
        ("gemma", {"expert_count": 4}, "gemma as a mixture of experts is not supported from GGUF"),
        ("phi3", {"rope__scaling__type": "yarn"}, "'yarn', expected none or linear"),
        ("phi3", {"rope__scaling__type": "longrope"}, "the tensor rope_factors_long.weight is missing"),
        ("phi3-longrope", {"rope__scaling__attn_factor": 1.0}, "attn_factor is 1.0, expected the 1.41421"),
        ("phi3-longrope", {"rope__scaling__original_context_length": 1}, "original_context_length is 1, expected the length"),
        ("phi3", {"rope__dimension_count": 32}, "rope.dimension_count is 32, expected the head size 16"),
        ("phi2", {"attention__key_length": 8}, "attention.(key|value)_length"),
        ("llama", {"rope__scaling__type": "yarn", "rope__scaling__attn_factor": 2.0}, "attn_factor is 2.*mlx-lm's YaRN"),
        ("qwen3moe", {"rope__scaling__type": "yarn"}, "the RoPE scaling is yarn, expected none in a qwen3moe model"),
        ("qwen3moe", {"expert_used_count": None}, "no qwen3moe.expert_used_count"),
        ("qwen3moe", {"expert_count": 3}, "has shape .*, expected .* from the config"),
    ],
)
def test_what_the_models_of_mlx_lm_lack_is_refused(tmp_path, name, changes, text):
    arch, config, rope, extra = case(name)
    path = files.write(tmp_path / "model.gguf", arch, config, files.random_model(config), extra=rope, **{**extra, **changes})
    with pytest.raises(CheckpointError, match=text), open_checkpoint(path) as checkpoint:
        build_model(checkpoint)


@pytest.mark.parametrize("windows", [[1, 0, 1], 2])
def test_gemma3_says_its_windows_as_a_number_or_per_layer(tmp_path, windows):
    arch, config, _, extra = case("gemma3")
    path = files.write(
        tmp_path / "model.gguf", arch, config, files.random_model(config), **{**extra, "attention__sliding_window_pattern": windows}
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["sliding_window_pattern"] == 2


def test_parts_have_the_names_of_gguf_py():
    """Each architecture's tensors are ones that gguf-py knows for it."""
    from metalstep.checkpoint.gguf.names import ARCHITECTURES

    for arch, architecture in ARCHITECTURES.items():
        known = gguf_py.MODEL_TENSORS[next(a for a, name in gguf_py.MODEL_ARCH_NAMES.items() if name == arch)]
        names = {gguf_py.TENSOR_NAMES[tensor].removeprefix("blk.{bid}.") for tensor in known}
        assert set(architecture.layer) <= names | {"attn_q_norm", "attn_k_norm"}, arch
