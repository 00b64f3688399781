"""Calibration: means are those of the keys that mlx-lm's own cache has, and of what `calibrate` says and writes."""
import json

import mlx.core as mx
import numpy as np
import pytest
from families import BASE, FAMILIES, VOCAB, build
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache as mlx_cache
from tiny import write_model

import metalstep
from metalstep import key_means
from metalstep.cli import main as command
from metalstep.eval import calibrate as module
from metalstep.eval.calibrate import SINKS, KeySums, calibrate, key_statistics
from metalstep.eval.kv import windows

TEXT = " ".join(str((7 * i * i + 3 * i) % VOCAB) for i in range(100))


@pytest.fixture(scope="module", params=["llama", "llama_untied", "mistral_windows"])
def tiny(request, tmp_path_factory):
    """(directory, mlx-lm's model in float32): without and with biases of keys, and with a window of 8 in every second layer."""
    model = build(request.param, quantized=False)
    config = {"model_type": FAMILIES[request.param].model_type, **BASE, **FAMILIES[request.param].config}
    return write_model(tmp_path_factory.mktemp(request.param), model, config), model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path / "cache"))


def keys_of(model, ids):
    """Keys of each layer behind RoPE, [heads, tokens, dim], as mlx-lm's cache has them; a token at a time, so that windows do not turn."""
    cache = mlx_cache(model)
    rows = [[] for _ in cache]
    for token in ids:
        model(mx.array([[token]]), cache=cache)
        for layer, found in zip(rows, cache, strict=True):
            place = found._idx - 1 if hasattr(found, "_idx") else found.offset - 1
            layer.append(np.array(found.keys[0, :, place]))
    return [np.stack(layer, axis=1) for layer in rows]


@pytest.mark.parametrize("step", [6, 512])
def test_means_are_those_of_mlx_lms_keys(tiny, monkeypatch, step):
    """step: tokens between two looks at the cache, fewer than the window of 8 that some layers have."""
    directory, model = tiny
    monkeypatch.setattr(module, "STEP", step)
    ids = [int(word) for word in TEXT.split()]
    if step > 8:  # of a window, only its last keys are seen then
        ids = ids[:8] if hasattr(mlx_cache(model)[0], "max_size") or hasattr(mlx_cache(model)[-1], "max_size") else ids
    native, _ = metalstep.load(directory, strict=True, threads=1, kv_dtype="float32")
    with native:
        got = key_statistics(native, windows([], ids, 256))
    for found, keys in zip(got.values(), keys_of(model, ids), strict=True):
        seen = keys[:, SINKS:].astype(np.float64)
        mean = seen.mean(1)
        np.testing.assert_allclose(found.mean, mean, atol=2e-3 * np.abs(keys).max())
        residual = np.sqrt(((seen - mean[:, None]) ** 2).sum(-1).mean(1))
        np.testing.assert_allclose(found.residual, residual, rtol=1e-2)
        np.testing.assert_allclose(found.ratios, np.linalg.norm(mean, axis=1) / residual, rtol=2e-2, atol=1e-3)


def test_the_first_tokens_of_every_window_are_left_out(tiny):
    directory, _ = tiny
    ids = [int(word) for word in TEXT.split()]
    native, _ = metalstep.load(directory, strict=True, threads=1, kv_dtype="float32")
    with native:
        cut = windows([], ids[:60], 20)
        apart = [key_statistics(native, [window]) for window in cut]
        together = key_statistics(native, cut)
    for layer, found in together.items():
        np.testing.assert_allclose(found.mean, np.mean([one[layer].mean for one in apart], axis=0), atol=1e-5)


@given(seed=st.integers(0, 999), cut=st.integers(1, 39))
@settings(max_examples=30)
def test_sums_do_not_depend_on_where_they_are_cut(seed, cut):
    keys = (np.random.default_rng(seed).standard_normal((2, 40, 16)) + 3).astype(np.float32)
    whole, parts = KeySums(2, 16), KeySums(2, 16)
    whole.add(keys)
    parts.add(keys[:, :cut])
    parts.add(keys[:, cut:])
    np.testing.assert_allclose(whole.statistics().mean, keys.astype(np.float64).mean(1), rtol=1e-6)
    np.testing.assert_allclose(whole.statistics().mean, parts.statistics().mean, rtol=1e-6)
    np.testing.assert_allclose(whole.statistics().residual, parts.statistics().residual, rtol=1e-9)


def test_keys_that_do_not_vary_are_all_mean():
    sums = KeySums(2, 4)
    sums.add(np.stack([np.ones((9, 4)), np.zeros((9, 4))]))
    assert sums.statistics().ratios.tolist() == [np.inf, 0.0]


def test_the_command_writes_what_a_scheme_finds(tiny, tmp_path, capsys):
    directory, _ = tiny
    (tmp_path / "text").write_text(TEXT)
    argv = ["calibrate", "--model", str(directory), "--text", str(tmp_path / "text"), "--threads", "1"]
    assert command.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    try:
        assert key_means.find(directory) == directory / key_means.FILE
        about = key_means.metadata(report["file"])
        assert int(about["tokens"]) == report["tokens"] >= 100 and about["text_sha256"] == report["text_sha256"]
        path, layers, _ = calibrate(directory, TEXT, threads=1)
        assert path == directory
        means = key_means.read(report["file"], {layer: found.mean.shape for layer, found in layers.items()}, about["model_type"])
        for layer, found in layers.items():
            np.testing.assert_array_equal(means[layer], found.mean)
        assert report["fingerprint"] == key_means.fingerprint(means)
        metalstep.load(directory, strict=True, threads=1)[0].close()  # no weights are seen in it
        assert command.main(argv) == 0
        text = capsys.readouterr().out
        assert f"saved      {directory / key_means.FILE}" in text and "of 2 ha" in text
    finally:
        key_means.beside(directory).unlink()


def test_a_centred_cache_gives_the_logits_of_one_that_is_not(tiny):
    """Softmax does not see the mean, so only the codec's error is another: affine8's, which is small either way."""
    directory, _ = tiny
    ids = [int(word) for word in TEXT.split()][:50]
    plain, _ = metalstep.load(directory, strict=True, threads=1)
    with plain:
        expected = plain.engine.logits(ids)
    path, layers, about = calibrate(directory, TEXT, threads=1)
    saved = key_means.save(path, {layer: found.mean for layer, found in layers.items()}, about)
    try:
        centred, _ = metalstep.load(directory, strict=True, threads=1, kv_scheme="affine8")
        with centred:
            got = centred.engine.logits(ids)
    finally:
        saved.unlink()
    spread = expected.max(-1, keepdims=True) - expected.min(-1, keepdims=True)
    assert (np.abs(got - expected) / spread).max() < 0.02


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        ([], "the following arguments are required: --model", "metalstep calibrate --help"),
        (["--model", "smollm2", "--text", "/nowhere/x"], "--text /nowhere/x: No such file or directory", "the name of a text file"),
        (["--model", "nowhere.gguf"], "'nowhere.gguf' does not exist", "expected 'smollm2'"),
        (["--model", "smollm2", "--tokens", "5000", "--threads", "1"], "has 1191 tokens, expected at least 5000", "pass a longer"),
        (["--model", "smollm2", "--device", "eager"], "argument --device: invalid choice: 'eager'", "metalstep calibrate --help"),
    ],
)
def test_a_wrong_call_says_what_to_do(capsys, argv, message, hint):
    assert command.main(["calibrate", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"hint: {hint}" in error
