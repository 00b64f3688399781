"""Directories of every quantisation that mlx-lm writes, natively on the host device and a GPU, against MLX in float32."""
import importlib
import json

import mlx.core as mx
import numpy as np
import pytest
from metal_models import DEVICE
from mlx_lm.utils import quantize_model, save_config, save_model
from tiny import write_tokenizer

import metalstep
from metalstep.checkpoint import build_model, load_weights_eager, open_checkpoint

CONVERT = importlib.import_module("mlx_lm.convert")
IDS = [(7 * i) % 96 for i in range(21)]
RANGE = {"host": 1e-3, DEVICE: 5e-6}  # of a row's range of logits: 15-bit activations; sums in another order
CONFIG = {
    "model_type": "qwen2",  # linears with biases
    "hidden_size": 128,
    "num_hidden_layers": 8,  # recipes give more bits to the first and the last eighth
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
}


def written(path, *, dtype=mx.bfloat16, mode="affine", bits=None, group=None, recipe=None, keep=(), own=None, **config):
    """What `mlx_lm.convert -q` writes. keep: parts of names of layers that stay as they are; own: a layer's quantisation by its path."""
    config = {**CONFIG, **config}
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    predicate = None
    if recipe:
        predicate = CONVERT.mixed_quant_predicate_builder(recipe, model, group or 64)
    elif keep or own:
        predicate = lambda name, _: (own or {}).get(name, not any(part in name for part in keep))  # noqa: E731
    model, config = quantize_model(model, config, group, bits, mode=mode, quant_predicate=predicate)
    path.mkdir()
    save_model(path, model)
    save_config(config, path / "config.json")
    write_tokenizer(path, config["vocab_size"])
    return path


def check(path, device="host"):
    """Logits of the native model are MLX's, and on the host a prompt's are the same bits in one of another length."""
    with open_checkpoint(path) as checkpoint:
        model = build_model(checkpoint)
        load_weights_eager(model, checkpoint, mx.float32)
        want = np.array(model(mx.array([IDS])).astype(mx.float32))[0]
    kv = {"kv_dtype": "float32"} if device != "host" else {}
    native, _ = metalstep.load(path, strict=True, device=device, max_context=64, kv_memory="16MB", **kv)
    with native:
        got = np.array(native(mx.array([IDS])))[0]
        assert (np.abs(got - want) / np.ptp(want, axis=-1, keepdims=True)).max() <= RANGE[device]
        if device == "host":
            np.testing.assert_array_equal(native.engine.logits(IDS[:7])[-1], got[6])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_modes_of_floats_run_natively(tmp_path, mode, tied):
    path = written(tmp_path / "m", mode=mode, tie_word_embeddings=tied)
    assert json.loads((path / "config.json").read_text())["quantization"]["mode"] == mode
    check(path)


@pytest.mark.parametrize("recipe", CONVERT.QUANT_RECIPES)
def test_mixed_recipes_run_natively(tmp_path, recipe):
    path = written(tmp_path / "m", recipe=recipe)
    layers = [how["bits"] for how in json.loads((path / "config.json").read_text())["quantization"].values() if isinstance(how, dict)]
    assert {f"mixed_{low}_{high}" for low in layers for high in layers} >= {recipe}
    check(path)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_width_runs_natively_in_one_model(tmp_path, group, dtype):
    """A width per layer, embeddings and head left as they are in some."""
    widths = (1, 2, 3, 4, 5, 6, 8)
    own = {}
    for layer, bits in enumerate(widths):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            own[f"model.layers.{layer}.{name}"] = {"group_size": group, "bits": bits, "mode": "affine"}
        for name in ("gate_proj", "up_proj", "down_proj"):
            own[f"model.layers.{layer}.mlp.{name}"] = {"group_size": group, "bits": widths[-1 - layer], "mode": "affine"}
    keep = {32: ("lm_head",), 64: ("embed_tokens", "layers.7"), 128: ("layers.7.mlp",)}[group]
    path = written(tmp_path / "m", dtype=dtype, group=group, bits=4, own=own, keep=keep)
    check(path)


def test_a_model_of_all_modes_runs_on_a_gpu(tmp_path):
    """Affine layers, the three modes of floats and dense ones, read from the file as they are."""
    modes = [("affine", 4, 64), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
    own = {}
    for layer, (mode, bits, group) in enumerate(modes):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            own[f"model.layers.{layer}.{name}"] = {"group_size": group, "bits": bits, "mode": mode}
    for layer, (mode, bits, group) in enumerate(modes[::-1]):
        for name in ("gate_proj", "up_proj", "down_proj"):
            own[f"model.layers.{layer}.mlp.{name}"] = {"group_size": group, "bits": bits, "mode": mode}
    own["model.embed_tokens"] = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    own["lm_head"] = False
    path = written(tmp_path / "m", own=own, num_hidden_layers=4)
    check(path)
    check(path, DEVICE)
