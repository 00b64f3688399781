"""Random weights of a public shape: a directory that loads everywhere, and numbers as large as a real model's."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import metalstep
from metalstep import shapes
from metalstep.bench.prompts import Prompts
from metalstep.bench.shape_model import LOGITS, write_shape_model
from metalstep.bench.subject import subject_of

SMALL = dict(hidden=256, layers=3, intermediate=512, heads=4)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request, tmp_path_factory):
    """A small model of each of the two kinds of shape."""
    make = {"qwen3": lambda: shapes._qwen3(**SMALL), "llama": lambda: shapes._llama3(**SMALL, factor=32.0, head_dim=64)}[request.param]
    config = {**make(), "vocab_size": 4096, "num_key_value_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "small", shapes.Shape("nobody/small", 0, config))
        yield write_shape_model(tmp_path_factory.mktemp(request.param), "small")


def test_metalstep_and_mlx_lm_load_it_and_agree(folder):
    model, tokenizer = metalstep.load(folder, strict=True, max_context=256)
    with model:
        prompt = Prompts.of(tokenizer).take(1, 70)[0]
        logits = model.engine.logits(prompt)
        reference, config = load_model(folder)
        reference.set_dtype(mx.float32)
        want = np.array(reference(mx.array([prompt]))[0])
        assert config["quantization"] == {"group_size": 64, "bits": 4}
        np.testing.assert_allclose(logits, want, atol=2e-3 * np.ptp(want))


def test_logits_are_spread_as_a_real_models_and_nothing_leaves_float16(folder):
    model, tokenizer = metalstep.load(folder, strict=True, max_context=256)
    with model:
        logits = model.engine.logits(Prompts.of(tokenizer).take(1, 70)[0])
    assert 0.7 * LOGITS < logits.std() < 1.5 * LOGITS
    weights = mx.load(str(folder / "model.safetensors"))
    for name, scales in weights.items():
        if name.endswith(".scales"):
            layer = name.removesuffix(".scales")
            dense = mx.dequantize(weights[f"{layer}.weight"], scales, weights[f"{layer}.biases"], group_size=64, bits=4)
            assert 0.9 < float(mx.sqrt(mx.mean(mx.square(dense.astype(mx.float32)))) * math.sqrt(dense.shape[1])) < 1.1
            assert abs(float(mx.mean(dense.astype(mx.float32)))) * math.sqrt(dense.shape[1]) < 0.1


def test_a_folder_that_is_complete_stays_and_another_shape_is_written_anew(tmp_path):
    path = write_shape_model(tmp_path / "a", "smollm2-135m", group_size=32)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert write_shape_model(path, "smollm2-135m", group_size=32) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    write_shape_model(path, "smollm2-135m", group_size=64)
    assert (path / "model.safetensors").stat().st_mtime_ns > before
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["quantization"]["group_size"] == 64


def test_a_temporary_folder_goes_and_a_chosen_one_stays(tmp_path):
    with subject_of("smollm2", None) as subject:
        assert (subject.model, subject.name) == ("smollm2", "smollm2")
    with subject_of("smollm2", "SmolLM2-135M", str(tmp_path)) as subject:
        assert subject.model == str(tmp_path / "smollm2-135m")
        assert subject.name == "smollm2-135m, random 4-bit weights in groups of 64"
    assert (tmp_path / "smollm2-135m" / "config.json").exists()


def test_a_shape_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shape is 'gpt-9', expected one of"), subject_of("smollm2", "gpt-9", str(tmp_path)):
        pass
