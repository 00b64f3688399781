"""Directories of mlx-lm models: the same parameters as mlx-lm's own loader, and what is refused."""
import json
import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoint_files import LLAMA_CONFIG, make_model, parameters, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from metalstep.checkpoint import CheckpointError, build_model, load_weights_eager, open_checkpoint

MOE_CONFIG = {
    **LLAMA_CONFIG,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
}


def quantised(config, mode="affine", group_size=32, bits=4, overrides=None):
    """A model with quantised layers, and the config that says so. overrides: per layer, as mlx-lm writes them."""
    model = make_model(config, mx.bfloat16)
    overrides = overrides or {}
    nn.quantize(
        model, group_size, bits, mode=mode, class_predicate=lambda path, m: overrides.get(path, hasattr(m, "to_quantized"))
    )
    return model, {**config, "quantization": {"group_size": group_size, "bits": bits, "mode": mode, **overrides}}


def same_as_mlx_lm(path, computed=()):
    """Parameters, dtypes and config of both loaders agree; tensors not named in `computed` are bytes of a file."""
    theirs, their_config = load_model(path)
    with open_checkpoint(path) as checkpoint:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        model = build_model(checkpoint)
        assert mx.get_peak_memory() - before < 100_000  # constants of RoPE at most: no weight was made
        assert checkpoint.config == their_config
        expected = parameters(theirs)
        assert {name: (a.shape, a.dtype) for name, a in parameters(model).items()} == {
            name: (a.shape, a.dtype) for name, a in expected.items()
        }
        for name, tensor in checkpoint.tensors.items():
            values = expected[name].astype(mx.float32) if mx.issubdtype(expected[name].dtype, mx.floating) else expected[name]
            np.testing.assert_array_equal(tensor.numpy(), np.array(values), err_msg=name)
            stored = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * expected[name].nbytes).from_address(tensor.address()))
            np.testing.assert_array_equal(stored, np.array(expected[name].reshape(-1).view(mx.uint8)), err_msg=name)
            assert (type(tensor).__name__ == "ComputedTensor") == any(part in name for part in computed), name
            assert tensor.dtype == str(expected[name].dtype).removeprefix("mlx.core.")
            tensor.drop_pages()
        assert type(model).__name__ == type(theirs).__name__ and model.sanitize.__self__ is model
        load_weights_eager(model, checkpoint)
        for name, array in parameters(model).items():
            assert array.dtype == expected[name].dtype
            assert mx.array_equal(array, expected[name]), name
        load_weights_eager(model, checkpoint, mx.float32)
        assert {array.dtype for array in parameters(model).values()} <= {mx.float32, mx.uint32, mx.uint8}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_dense_models_are_read_in_place(tmp_path, dtype, shards):
    same_as_mlx_lm(save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG, dtype)), shards))


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"),
    [("affine", 32, 4), ("affine", 64, 8), ("affine", 32, 3), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)],
)
def test_quantised_models_are_read_in_place(tmp_path, mode, group_size, bits):
    model, config = quantised({**LLAMA_CONFIG, "intermediate_size": 128}, mode, group_size, bits)
    same_as_mlx_lm(save_model(tmp_path, config, parameters(model)))


def test_layers_with_their_own_quantisation_are_made_so(tmp_path):
    overrides = {"model.embed_tokens": {"group_size": 64, "bits": 8}, "model.layers.0.self_attn.v_proj": False}
    model, config = quantised(LLAMA_CONFIG, overrides=overrides)
    same_as_mlx_lm(save_model(tmp_path, config, parameters(model)))
    with open_checkpoint(tmp_path) as checkpoint:
        built = build_model(checkpoint)
        assert (built.model.embed_tokens.bits, built.model.embed_tokens.group_size) == (8, 64)
        assert type(built.layers[0].self_attn.v_proj) is nn.Linear
        assert built.layers[1].self_attn.v_proj.bits == 4


def test_sanitize_drops_what_the_model_does_not_use(tmp_path):
    weights = parameters(make_model(LLAMA_CONFIG))
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((8,))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    same_as_mlx_lm(save_model(tmp_path, LLAMA_CONFIG, weights))


def test_sanitize_renames_keep_the_bytes_in_the_file(tmp_path):
    """The text model of a multimodal checkpoint: mlx-lm puts `language_model.` in front of each name and drops the images' part."""
    config = {"model_type": "qwen2_vl", "text_config": {**LLAMA_CONFIG, "model_type": "qwen2"}}
    weights = {name.removeprefix("language_model."): array for name, array in parameters(make_model(config, mx.bfloat16)).items()}
    assert "model.norm.weight" in weights
    weights["visual.merger.weight"] = mx.zeros((3, 3))
    same_as_mlx_lm(save_model(tmp_path, config, weights))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["language_model.model.norm.weight"].name == "language_model.model.norm.weight"


def test_sanitize_computes_stacked_experts_when_asked(tmp_path):
    weights = {}
    for name, array in parameters(make_model(MOE_CONFIG, mx.bfloat16)).items():
        if ".switch_mlp." in name:
            for expert in range(MOE_CONFIG["num_experts"]):
                weights[name.replace("switch_mlp", f"experts.{expert}")] = array[expert]
        else:
            weights[name] = array
    same_as_mlx_lm(save_model(tmp_path, MOE_CONFIG, weights), computed=["switch_mlp"])


def test_config_changes_before_the_build_count(tmp_path):
    save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.config["rope_theta"] = 5.0
        assert build_model(checkpoint).args.rope_theta == 5.0


def test_end_of_sequence_ids_come_from_generation_config(tmp_path):
    save_model(tmp_path, {**LLAMA_CONFIG, "eos_token_id": 3}, parameters(make_model(LLAMA_CONFIG)))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config["eos_token_id"] == [1, 2]
        assert checkpoint.file_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_tensors_are_there_without_a_build(tmp_path):
    save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["model.norm.weight"].shape == (64,)


def test_a_closed_checkpoint_refuses_to_be_read(tmp_path):
    save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)))
    checkpoint = open_checkpoint(tmp_path)
    tensor = checkpoint.tensors["model.norm.weight"]
    checkpoint.close()
    checkpoint.close()
    for read in (tensor.address, tensor.numpy):
        with pytest.raises(CheckpointError, match="closed; open it again"):
            read()


@pytest.fixture
def valid(tmp_path):
    return save_model(tmp_path, LLAMA_CONFIG, parameters(make_model(LLAMA_CONFIG)), shards=2)


def opens(path):
    with open_checkpoint(path) as checkpoint:
        build_model(checkpoint)


def edited(path, **changes):
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({key: item for key, item in config.items() if item is not None}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": None}, "no model_type, expected the config.json of an mlx-lm model"),
        ({"model_type": "no_such"}, "mlx-lm cannot make the 'no_such' model .*not supported"),
        ({"hidden_size": None}, "mlx-lm cannot make the 'llama' model .*hidden_size"),
        ({"hidden_size": "x"}, "mlx-lm cannot make the 'llama' model"),
        ({"num_attention_heads": 0}, "mlx-lm cannot make the 'llama' model .*ZeroDivisionError"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the checkpoint has 1?[0-9]+ tensors"),
        ({"num_hidden_layers": 3}, "the model needs model.layers.2.* and [0-9]+ more, missing"),
        ({"num_hidden_layers": 1}, "the model has no place for model.layers.1"),
        ({"vocab_size": 301}, "model.embed_tokens.weight has shape .300, 64., expected .301, 64. from the config; the config belongs"),
        ({"tie_word_embeddings": False}, "the model needs lm_head.weight, missing"),
        ({"quantization": {"group_size": 32, "bits": 4, "model.norm": True}}, "mlx-lm cannot make|has shape|needs"),
        ({"quantization": 3}, "mlx-lm cannot make the 'llama' model"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            r"quantised by gptq \(bits 3\), of which mlx-lm reads 4 bits .*Only bits=3.*; take",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
            r"quantised by compressed-tensors \(format float-quantized\), of which mlx-lm reads .*pack-quantized",
        ),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, r"quantised by modelopt \(quant_algo FP8\)"),
        ({"model_file": "evil.py"}, "trust_remote_code"),
    ],
)
def test_configs_that_do_not_fit_are_refused(valid, changes, text):
    edited(valid, **changes)
    with pytest.raises(CheckpointError, match=text):
        opens(valid)


def projections(weights, change):
    """The weights with `change(name, array)` in place of each projection."""
    return {
        new: made
        for name, array in weights.items()
        for new, made in (change(name, array) if name.endswith("proj.weight") else {name: array}).items()
    }


@pytest.mark.parametrize(
    ("method", "change", "text"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            lambda name, a: {name: mx.zeros(a.shape, mx.uint8), f"{name}_scale_inv": mx.ones((1, 1))},
            r"quantised by fp8 \(weight_block_size \[128, 128\]\), of which mlx-lm reads blocks of 32x32",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            lambda name, a: {name: mx.zeros((a.size // 2, 1), mx.uint8), f"{name}.absmax": mx.ones((4,))},
            r"quantised by bitsandbytes, which mlx-lm does not read \(the model has no place for .*; take the model's unquantised weights",
        ),
        (None, lambda name, a: {f"{name}.absmax": mx.ones((4,)), name: a}, "quantised by bitsandbytes"),
        (
            {"quant_method": "gptq", "bits": 4},
            lambda name, a: {name: a, name.replace("weight", "g_idx"): mx.zeros((4,), mx.int32)},
            r"quantised by gptq \(bits 4\), of which mlx-lm reads 4 bits without act-order",
        ),
        (None, lambda name, a: {name: mx.zeros(a.shape, mx.uint8)}, r"proj.weight is uint8 .*expected float32, float16 or bfloat16; take"),
        (None, lambda name, a: {name: mx.zeros(a.shape, mx.int8)}, "proj.weight is int8 .*expected float32"),
    ],
)
def test_checkpoints_that_other_tools_have_quantised_are_named(tmp_path, method, change, text):
    config = LLAMA_CONFIG if method is None else {**LLAMA_CONFIG, "quantization_config": method}
    save_model(tmp_path, config, projections(parameters(make_model(LLAMA_CONFIG, mx.bfloat16)), change))
    with pytest.raises(CheckpointError, match=text):
        opens(tmp_path)


def test_a_foreign_quantisation_in_the_config_of_plain_weights_does_not_matter(tmp_path):
    """What merging a fine-tune of a quantised model leaves behind."""
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    opens(save_model(tmp_path, config, parameters(make_model(LLAMA_CONFIG, mx.bfloat16))))


def test_packed_weights_of_another_dtype_are_refused(tmp_path):
    model, config = quantised(LLAMA_CONFIG)
    weights = projections(parameters(model), lambda name, a: {name: a.astype(mx.int32)})
    with pytest.raises(CheckpointError, match=r"proj.weight is int32, expected uint32 from the config; download"):
        opens(save_model(tmp_path, config, weights))


def test_a_float_that_no_reader_knows_is_refused_by_name(valid):
    file = valid / "model-00001-of-00002.safetensors"
    data = file.read_bytes()
    assert data.count(b'"dtype":"F32"') > 0
    file.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"F4" ', 1))
    with pytest.raises(CheckpointError, match=r"has dtype 'F4', expected one of .*; convert the model"):
        opens(valid)


def index(path, mapping):
    (path / "model.safetensors.index.json").write_text(json.dumps(mapping))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: (path / "config.json").unlink(), "no config.json; expected the directory of an mlx-lm model"),
        (lambda path: (path / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda path: (path / "config.json").write_bytes(b"\xff\xfe"), "config.json: cannot be read"),
        (lambda path: (path / "config.json").write_text("[1]"), "config.json: "),
        (lambda path: (path / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002.safetensors, which the index names"),
        (lambda path: (path / "model-00002-of-00002.safetensors").write_bytes(b""), "the file is empty"),
        (lambda path: index(path, [1]), "no weight_map"),
        (lambda path: index(path, {"weight_map": {}}), "no weight_map"),
        (lambda path: index(path, {"weight_map": {"a": 1}}), "no weight_map"),
        (lambda path: index(path, {"weight_map": {"a": "../x.safetensors"}}), "expected one in the same directory"),
        (lambda path: index(path, {"weight_map": {"a": "x\0"}}), "expected one in the same directory"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{"), "index.json: cannot be read"),
        (lambda path: [file.unlink() for file in path.glob("model*")], "no .safetensors files; download the weights"),
        (lambda path: (path / "config.json").rename(path / "model_index.json"), "no config.json; this is a diffusers model"),
        (lambda path: (path / "config.json").rename(path / "adapter_config.json"), "no config.json; this is an adapter: `mlx_lm.fuse`"),
        (
            lambda path: [file.rename(path / f"pytorch_model{i}.bin") for i, file in enumerate(path.glob("model*"))],
            "no .safetensors files, and pytorch_model0.bin is a kind that is not read",
        ),
    ],
)
def test_incomplete_directories_are_refused(valid, damage, text):
    damage(valid)
    with pytest.raises(CheckpointError, match=text):
        opens(valid)


def test_a_tensor_in_two_files_is_refused(valid):
    (valid / "model.safetensors.index.json").unlink()
    (valid / "model-3.safetensors").write_bytes((valid / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is in model-00001-of-00002\.safetensors too; remove"):
        opens(valid)


def test_a_directory_with_a_gguf_file_says_to_pass_the_file(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=r"pass the file .*/a\.gguf itself"):
        open_checkpoint(tmp_path)


def test_a_missing_tokenizer_is_refused(valid):
    with open_checkpoint(valid) as checkpoint, pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        checkpoint.tokenizer()


def test_refused_directories_leave_no_descriptor_open(valid):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("counts descriptors in /proc")
    (valid / "model-00002-of-00002.safetensors").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(CheckpointError):
            opens(valid)
    assert len(os.listdir("/proc/self/fd")) == before


SMALL = {**LLAMA_CONFIG, "num_hidden_layers": 1, "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}


@settings(max_examples=150)
@given(changes=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=4), cut=st.none() | st.integers(0, 4000))
def test_mutated_weights_never_crash(tmp_path_factory, changes, cut):
    path = tmp_path_factory.getbasetemp() / "mutated"
    if not path.exists():
        save_model(path, SMALL, parameters(make_model(SMALL)))
        (path / "valid").write_bytes((path / "model.safetensors").read_bytes())
    data = bytearray((path / "valid").read_bytes())
    for at, byte in changes:
        data[at] = byte
    (path / "model.safetensors").write_bytes(data[:cut])
    opens_or_refuses(path)


@settings(max_examples=150)
@given(
    key=st.sampled_from([*SMALL, "rope_scaling", "quantization", "layer_types", "head_dim", "sliding_window"]),
    item=st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.text(max_size=3), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
def test_any_value_in_the_config_never_crashes(tmp_path_factory, key, item):
    path = tmp_path_factory.getbasetemp() / "configs"
    if not path.exists():
        save_model(path, SMALL, parameters(make_model(SMALL)))
    (path / "config.json").write_text(json.dumps({**SMALL, key: item}))
    opens_or_refuses(path)


def opens_or_refuses(path):
    try:
        opens(path)
    except CheckpointError as error:
        assert str(error)
