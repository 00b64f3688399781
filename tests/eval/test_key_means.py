"""Files of key means: what is written is read, where they lie, and files of other models."""
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from metalstep import key_means
from metalstep.checkpoint.directory import weight_files
from metalstep.key_means import KeyMeansError
from metalstep.packaged_models import packaged_file

SHAPES = {0: (2, 16), 1: (2, 16), (5, 0): (1, 32)}  # a layer may be part of another
ABOUT = {"model_type": "llama", "tokens": "100"}
WHAT_TO_DO = r"run `metalstep calibrate` again for this model, or load with kv_key_center='off'"


def means_of(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {layer: rng.standard_normal(shape).astype(np.float32) for layer, shape in shapes.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["file", "directory"])
def model(request, tmp_path):
    if request.param == "file":
        path = tmp_path / "models" / "some.model.Q4_1.gguf"
        path.parent.mkdir()
        path.write_bytes(b"GGUF")
    else:
        path = tmp_path / "model"
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_what_is_written_is_found_and_read(model):
    assert key_means.find(model) is None
    saved = key_means.save(model, means_of(), ABOUT)
    assert key_means.find(model) == saved == key_means.beside(model)
    got = key_means.read(saved, SHAPES, "llama")
    assert list(got) == list(SHAPES)
    for layer, mean in means_of().items():
        np.testing.assert_array_equal(got[layer], mean)
    assert key_means.metadata(saved) == {**ABOUT, "layers": "3"}
    assert saved.stat().st_mode & 0o044 == 0o044  # others read the model, so they read this too
    assert [file.name for file in saved.parent.iterdir() if file.name.endswith(".new")] == []


def test_the_names_are_the_models(tmp_path):
    assert key_means.beside(tmp_path / "a.b.gguf") == tmp_path / "a.b.kv_key_means.safetensors"
    assert key_means.beside(tmp_path) == tmp_path / "kv_key_means.safetensors"


def test_where_nothing_can_be_written_it_lies_in_the_cache_folder(model):
    """A folder of that name is in the way, for root too."""
    key_means.beside(model).mkdir()
    (key_means.beside(model) / "full").touch()
    saved = key_means.save(model, means_of(), ABOUT)
    assert saved == key_means.in_cache(model) == key_means.find(model)
    assert "cache" in saved.parts


def test_of_a_packaged_model_it_lies_in_the_cache_folder():
    model = packaged_file("smollm2")
    saved = key_means.save(model, means_of(), ABOUT)
    assert saved == key_means.in_cache(model)
    assert not key_means.beside(model).exists()


def test_a_packaged_model_of_another_environment_finds_them_too(tmp_path, monkeypatch):
    here = packaged_file("smollm2")
    saved = key_means.save(here, means_of(), ABOUT)
    there = tmp_path / "site-packages" / here.name
    there.parent.mkdir()
    there.write_bytes(here.read_bytes())
    monkeypatch.setattr("metalstep.key_means.packaged_file", lambda _: there)
    assert key_means.find(there) == saved
    there.write_bytes(here.read_bytes()[:-1])
    assert key_means.find(there) is None


def test_another_file_in_the_models_place_does_not_find_the_old_ones_means(model):
    key_means.beside(model).mkdir()
    key_means.save(model, means_of(), ABOUT)
    weights = model if model.is_file() else model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before + b"more")
    assert key_means.find(model) is None
    weights.write_bytes(before[::-1])  # of the same size
    os.utime(weights, (1, 1))
    assert key_means.find(model) is None


def test_what_lies_beside_the_model_comes_first(model):
    in_cache = key_means.in_cache(model)
    in_cache.parent.mkdir(parents=True)
    in_cache.touch()
    assert key_means.find(model) == in_cache
    key_means.save(model, means_of(), ABOUT)
    assert key_means.find(model) == key_means.beside(model)


@given(layer=st.sampled_from(list(SHAPES)), place=st.integers(0, 31), change=st.sampled_from([1e-3, -1.0, 5.0]))
@settings(max_examples=25)
def test_fingerprints_differ_where_any_mean_does(layer, place, change):
    means, others = means_of(), means_of()
    assert key_means.fingerprint(means) == key_means.fingerprint(others)
    others[layer].reshape(-1)[place % others[layer].size] += np.float32(change)
    assert key_means.fingerprint(means) != key_means.fingerprint(others)


def test_a_fingerprint_sees_shapes_and_the_order_of_layers():
    means = means_of()
    assert key_means.fingerprint(means) != key_means.fingerprint({layer: mean.reshape(-1, 8) for layer, mean in means.items()})
    assert key_means.fingerprint(means) != key_means.fingerprint(dict(reversed(list(means.items()))))


@pytest.mark.parametrize(
    ("shapes", "model_type", "message"),
    [
        (dict(list(SHAPES.items())[:2]), "llama", "it has key means of 3 layers, and the model has 2"),
        ({**SHAPES, 9: (1, 32)}, "llama", "it has key means of 3 layers, and the model has 4"),
        ({**SHAPES, 1: (4, 16)}, "llama", r"layer 1 has key means float32 \[2, 16\], and the model's keys need float32 \[4, 16\]"),
        (SHAPES, "qwen3", "its key means are of a llama model, and this one is qwen3"),
    ],
)
def test_another_models_file_is_refused(model, shapes, model_type, message):
    saved = key_means.save(model, means_of(), ABOUT)
    with pytest.raises(KeyMeansError, match=f"{saved}: .*{message}; {WHAT_TO_DO}"):
        key_means.read(saved, shapes, model_type)


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "gone"])
def test_a_damaged_file_is_refused(model, damage):
    saved = key_means.save(model, means_of(), ABOUT)
    if damage == "gone":
        saved.unlink()
    else:
        saved.write_bytes({"text": b"means" * 99, "cut": saved.read_bytes()[:-40], "empty": b""}[damage])
    with pytest.raises(KeyMeansError, match=f"{saved}: no key means can be read from it .*; {WHAT_TO_DO}"):
        key_means.read(saved, SHAPES, "llama")


@pytest.mark.parametrize(("value", "dtype", "message"), [
    (np.nan, np.float32, "layer 1 has key means that are not finite"),
    (np.inf, np.float32, "layer 1 has key means that are not finite"),
    (1.0, np.float16, r"layer 1 has key means float16 \[2, 16\], and the model's keys need float32"),
])  # fmt: skip
def test_means_that_are_no_means_are_refused(tmp_path, value, dtype, message):
    tensors = {f"layer.{i}": mean for i, mean in enumerate(means_of().values())}
    tensors["layer.1"] = np.full((2, 16), value, dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(KeyMeansError, match=message):
        key_means.read(tmp_path / "x.safetensors", SHAPES)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_the_means_in_a_models_directory_are_no_weights(tmp_path, name):
    (tmp_path / name).touch()
    key_means.save(tmp_path, means_of(), ABOUT)
    assert weight_files(tmp_path) == [tmp_path / name]
