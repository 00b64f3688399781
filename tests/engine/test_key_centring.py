"""Keys with a large common offset, as biases of Qwen2 give them: what a calibration's means do for their codes, and where they must not."""
import contextlib

import mlx.core as mx
import numpy as np
import pytest
from metal_models import build
from tiny import write_model

import metalstep
from metalstep import Request, key_means
from metalstep.eval.calibrate import calibrate
from metalstep.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

WORDS = " ".join(str((7 * i * i + 3 * i) % 90 + 3) for i in range(200))  # token i of the tiny tokenizer is the word `i`
TEXT = [(11 * i + i * i % 17) % 90 + 3 for i in range(150)]


def biased(name, path, offset, **config):
    """A tiny model whose keys have a common offset of this norm per head, in the elements that RoPE hardly turns over the text."""
    network, config, _ = build(name, head_dim=64, rope_theta=1e6, **config)
    for layer in network.layers:
        bias = np.zeros((2, 64), np.float32)
        slow = np.r_[22:32, 54:64]  # pairs of the lowest frequencies: less than a hundredth of a radian a token
        bias[:, slow] = np.random.default_rng(0).choice([-1, 1], (2, slow.size)) * offset / slow.size**0.5
        layer.self_attn.k_proj.bias = mx.array(bias.reshape(-1))
    return write_model(path, network, config)


def divergence(directory, reference=None, **options):
    """(mean KL divergence from `reference`, log-probabilities) over the text."""
    with metalstep.load(directory, strict=True, **options)[0] as model:
        logits = np.array(model(mx.array([TEXT])))[0].astype(np.float64)
        centred = len(model.native.key_means)
    logits -= logits.max(-1, keepdims=True)
    found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return (None if reference is None else float((np.exp(reference) * (reference - found)).sum(-1).mean())), found, centred


@contextlib.contextmanager
def calibrated(directory):
    _, layers, about = calibrate(directory, WORDS)
    saved = key_means.save(directory, {layer: found.mean for layer, found in layers.items()}, about)
    try:
        yield
    finally:
        saved.unlink()


@pytest.mark.parametrize("scheme", ["turbo4", "turbo3"])
def test_an_offset_wrecks_codes_and_centring_brings_them_back(tmp_path, scheme):
    small, large = (biased("llama_untied", tmp_path / str(offset), offset) for offset in (0, 300))
    usual = divergence(small, divergence(small, kv_dtype="float32")[1], kv_scheme=scheme)[0]
    reference = divergence(large, kv_dtype="float32")[1]
    without = divergence(large, reference, kv_scheme=scheme)[0]
    with calibrated(large):
        centred, _, count = divergence(large, reference, kv_scheme=scheme)
        off, _, none = divergence(large, reference, kv_scheme=scheme, kv_key_center="off")
    assert (count, none) == (2, 0) and off == without
    assert without > 20 * usual
    assert centred < 3 * usual


def test_centring_changes_no_result_of_exact_keys(tmp_path):
    """Softmax does not see it: with affine8 keys of a small offset what is left is the codec's error."""
    directory = biased("llama_untied", tmp_path, 3)
    reference = divergence(directory, kv_dtype="float32")[1]
    without = divergence(directory, reference, kv_scheme="affine8")[0]
    with calibrated(directory):
        assert divergence(directory, reference, kv_scheme="affine8")[0] < 2 * without + 1e-7
        assert divergence(directory, reference)[2] == 0  # a plain cache holds the keys themselves


def test_layers_whose_scores_are_capped_keep_their_keys(tmp_path):
    """A softcap sees what all scores have in common."""
    network, config, _ = build("gemma2", head_dim=64)
    directory = write_model(tmp_path, network, config)
    before = divergence(directory, kv_scheme="turbo4")[1]
    with calibrated(directory):
        _, after, count = divergence(directory, kv_scheme="turbo4")
    assert count == 0
    np.testing.assert_array_equal(after, before)


def test_other_means_are_another_cache(tmp_path):
    """In the prefix cache's digests and in saved prompt caches."""
    directory = biased("llama_untied", tmp_path / "model", 10)
    path = tmp_path / "cache.safetensors"
    with metalstep.load(directory, strict=True, kv_scheme="turbo4")[0] as model:
        cache = make_prompt_cache(model)
        list(model.engine.submit(Request(TEXT[:40], max_tokens=2, prompt_cache=cache)))
        save_prompt_cache(path, cache)
        plain = model.native.encoding
    with calibrated(directory), metalstep.load(directory, strict=True, kv_scheme="turbo4")[0] as model:
        assert model.native.encoding != plain
        with pytest.raises(ValueError, match=r"saved with kv_scheme turbo4, .*and the model has kv_scheme turbo4, .*keys less the means"):
            model.engine.submit(Request(TEXT[:3], max_tokens=2, prompt_cache=load_prompt_cache(path)))
        assert model.explain()["kv"]["centred_layers"] == 2


def test_a_cache_that_was_trimmed_goes_on_bit_for_bit(tmp_path):
    directory = biased("llama_untied", tmp_path, 5)
    with metalstep.load(directory, strict=True, kv_scheme="turbo4v2")[0] as model:

        def answer(ids, cache):
            return [(o.token, o.logprob) for o in model.engine.submit(Request(ids, max_tokens=6, prompt_cache=cache))]

        for length, cut in ((40, 3), (64, 17), (65, 1), (33, 33)):
            cache = make_prompt_cache(model)
            answer(TEXT[:length], cache)
            cache.trim(cache.offset - length + cut)
            got = answer(TEXT[length - cut : length + 4], cache)
            assert got == answer(TEXT[: length + 4], make_prompt_cache(model))
