"""A model for a server: what it is loaded with, how it falls back, and caches that the server divides."""
from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from random import Random

import mlx.core as mx
import pytest
from engines import TEXT, directory_of
from families import BASE, FAMILIES, VOCAB
from session_driver import Driver
from tiny import write_model
from workload import alone, requests

import metalstep
from metalstep import CaptureError, Request, SamplingParams
from metalstep.kernels.native import KernelError
from metalstep.kv_cache import CacheGroup
from metalstep.kv_scheme import parse
from metalstep.native_model import NativeModel
from metalstep.served_model import ServedModel
from metalstep.step_session import StepSession

CONTEXT, SEQS, BLOCKS = 128, 3, 128


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return directory_of("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return directory_of("qwen3_moe", tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Six layers, every third of which sees everything."""
    config = {**BASE, **FAMILIES["gemma3_text"].config, "num_hidden_layers": 6, "sliding_window_pattern": 3}
    module = importlib.import_module("mlx_lm.models.gemma3_text")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": "gemma3_text", **config}))
    return write_model(tmp_path_factory.mktemp("windows"), model, {"model_type": "gemma3_text", **config})


def greedy(served, prompt, count):
    """The first tokens, by the driver."""
    driver = Driver(served.session, BLOCKS, Random(0), whole_prompts=True)
    (running,) = driver.run([Request(prompt, SamplingParams(), count)])
    return running.tokens[len(prompt) :]


def mlx_lm_tokens(directory, prompt, count):
    model, _ = metalstep.load(directory, device="eager")
    with model:
        steps = importlib.import_module("mlx_lm.generate").generate_step(mx.array(prompt), model.eager, max_tokens=count)
        return [int(token) for token, _ in steps]


# ---- options ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "tpu"}, "device is 'tpu', expected one of host, metal"),
        ({"device": "eager", "scheme": parse("turbo4")}, "kv_scheme is 'turbo4' on eager"),
        ({"device": "host", "arithmetic": "int4"}, "arithmetic is 'int4', expected one of"),
        ({"device": "eager", "threads": 2}, "threads is 2 on eager"),
        ({"device": "eager", "batch_invariant": True}, "batch_invariant is True on eager"),
    ],
)
def test_options_that_do_not_fit_are_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        ServedModel(llama, **options)


def test_options_reach_the_engine(llama):
    wanted = requests(3, VOCAB, tokens=(3, 6))
    options = {"device": "host", "threads": 1, "arithmetic": "int8"}
    with metalstep.load(llama, strict=True, max_context=CONTEXT, kv_dtype="float32", **options)[0] as model:
        expected = alone(model.engine, wanted)
    served = ServedModel(llama, strict=True, scheme=parse(kv_dtype="float32"), **options)
    assert served.native and served.fallback_reason is None and served.model_type == "llama"
    assert served.kv_bytes_per_token == 2 * 2 * (16 + 16) * 4  # layers, kv heads, key and value, float32
    session = served.allocate(BLOCKS, max_context=CONTEXT, max_seqs=SEQS)
    facts = served.facts()
    assert facts["threads"] == 1 and facts["arithmetic"] == "int8" and facts["launches_per_step"] > 0
    assert [x.outputs for x in Driver(session, BLOCKS, Random(0)).run(wanted)] == expected
    served.close()
    served.close()


def test_memory_for_the_cache_is_a_part_of_what_is_free_behind_the_weights(llama, monkeypatch):
    monkeypatch.setattr("metalstep.served_model.free_memory", lambda: 10**9)
    served = ServedModel(llama, device="host")
    assert served.weight_bytes == (llama / "model.safetensors").stat().st_size
    assert served.kv_memory() == (10**9 - served.weight_bytes) // 2
    served.close()


def test_a_session_that_fails_to_close_leaves_nothing_else_open(llama, monkeypatch):
    """As that of a device that has failed, which says so to whoever waits for its steps."""

    def fail(_):
        raise RuntimeError("the device has failed")

    served = ServedModel(llama, device="host", strict=True)
    session = served.allocate(BLOCKS, max_context=CONTEXT, max_seqs=SEQS)
    tensor = next(iter(served._checkpoint.tensors.values()))
    monkeypatch.setattr(StepSession, "settle", fail)
    with pytest.raises(RuntimeError, match="the device has failed"):
        served.close()
    with pytest.raises(ValueError, match="the device is closed"):
        session.device.create_buffer(1)
    with pytest.raises(ValueError, match="closed"):
        tensor.numpy()
    served.close()


# ---- eager ------------------------------------------------------------------------------------------------------------------
def test_a_model_without_kernels_warns_once_says_why_and_answers_as_mlx_lm_does(experts):
    with pytest.warns(RuntimeWarning, match="qwen3_moe has no native step yet: ArgPartition") as caught:
        served = ServedModel(experts, device="host", threads=1)
    assert len(caught) == 1
    assert not served.native and "ArgPartition" in served.fallback_reason
    (group,) = served.groups
    if mx.default_device() == mx.Device(mx.cpu):  # what MLX computes with there, not the scheme's
        assert {shape.k_codec.name for shape in group.layers.values()} == {"float32"}
    assert served.kv_bytes_per_token == group.token_bytes > 0
    served.allocate(BLOCKS, max_context=CONTEXT, max_seqs=SEQS)
    assert served.facts() == {"device": "eager", "reason": served.fallback_reason}
    assert served.session.device.info.threads == 1
    assert greedy(served, TEXT[:9], 6) == mlx_lm_tokens(experts, TEXT[:9], 6)
    served.close()
    assert served.session is None


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.native])
def test_what_has_no_kernel_is_known_before_the_server_sizes_its_cache(name, tmp_path):
    directory = directory_of(name, tmp_path / name)
    with pytest.warns(RuntimeWarning, match=f"{FAMILIES[name].model_type} has no native step yet"):
        served = ServedModel(directory, device="host")
    (group,) = served.groups
    assert group.window is None and group.layers
    served.close()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.native])
def test_what_has_kernels_is_native(name, tmp_path):
    """The plan on paper refuses nothing that the device takes."""
    served = ServedModel(directory_of(name, tmp_path / name), device="host", strict=True)
    assert served.native and served.fallback_reason is None
    served.close()


def test_strict_raises_instead(experts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CaptureError, match=r"qwen3_moe has no native step yet: ArgPartition.*load it without strict"):
            ServedModel(experts, device="host", strict=True)


@pytest.mark.parametrize("error", [CaptureError("conv9 has no kernel"), KernelError("program too large")])
def test_what_shows_when_plans_are_made_falls_back_too(llama, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(NativeModel, "warmup", fail)
    served = ServedModel(llama, device="host")
    assert served.native
    parts = [CacheGroup(None, {layer: shape}) for layer, shape in served.groups[0].layers.items()]
    with pytest.warns(RuntimeWarning, match=str(error)):
        served.allocate(BLOCKS, max_context=CONTEXT, max_seqs=SEQS, groups=parts)
    assert served.session.arrays.sizes.groups == 2  # the server goes on naming those that it was told
    assert not served.native and str(error) in served.fallback_reason
    assert greedy(served, TEXT[:9], 6) == mlx_lm_tokens(llama, TEXT[:9], 6)
    served.close()
    strict = ServedModel(llama, device="host", strict=True)
    with pytest.raises(type(error), match=str(error)):
        strict.allocate(BLOCKS, max_context=CONTEXT, max_seqs=SEQS)
    strict.close()


def test_eager_is_a_device_without_a_warning(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        served = ServedModel(llama, device="eager", strict=True)
        served.allocate(BLOCKS, max_context=CONTEXT, max_seqs=SEQS)
    assert served.fallback_reason == "device='eager' was asked for"
    if mx.default_device() == mx.Device(mx.cpu):  # what MLX computes with there
        assert {shape.k_codec.name for group in served.groups for shape in group.layers.values()} == {"float32"}
    assert greedy(served, TEXT[:9], 6) == mlx_lm_tokens(llama, TEXT[:9], 6)
    served.close()


WITHOUT_LAUNCHER = """
import sys
from metalstep.kernels.native import NativeUnavailable
from metalstep.served_model import ServedModel
try:
    ServedModel(sys.argv[1], device=sys.argv[2]).allocate(8, max_context=16, max_seqs=1)
except NativeUnavailable as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("device", ["host", "eager"])
def test_without_the_launcher_nothing_is_served_and_the_error_says_what_to_install(llama, tmp_path, device):
    environment = {**os.environ, "METALSTEP_LIBRARY": str(tmp_path / "nothing.so")}
    command = [sys.executable, "-W", "error", "-c", WITHOUT_LAUNCHER, str(llama), device]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "refused: " in run.stdout and "install a wheel" in run.stdout


# ---- groups -----------------------------------------------------------------------------------------------------------------
def divided(groups):
    """As vLLM divides layers: every group has as many as the smallest."""
    size = min(len(group.layers) for group in groups)
    parts = []
    for group in groups:
        layers = list(group.layers.items())
        parts += [CacheGroup(group.window, dict(layers[i : i + size])) for i in range(0, len(layers), size)]
    return parts


@pytest.mark.parametrize("divide", [True, False])
def test_groups_of_one_pool_share_planes_and_give_what_the_engine_gives(windows, divide):
    """Contexts cross the window of 8; a block is now one group's, now another's."""
    wanted = requests(8, VOCAB, longest=70, tokens=(4, 12))
    with metalstep.load(windows, strict=True, device="host", max_context=CONTEXT)[0] as model:
        expected = alone(model.engine, wanted)
    served = ServedModel(windows, strict=True, device="host")
    assert [(group.window, len(group.layers)) for group in served.groups] == [(None, 2), (8, 4)]
    groups = divided(served.groups) if divide else served.groups
    session = served.allocate(BLOCKS, max_context=CONTEXT, max_seqs=SEQS, groups=groups)
    planes = served._native.cache.planes
    for place in range(2):
        shared = {planes[list(group.layers)[place]].k.handle for group in groups}
        assert len(shared) == 1
    assert len({plane.k.handle for plane in planes.values()}) == max(len(group.layers) for group in groups)
    assert session.arrays.sizes.groups == len(groups) == (3 if divide else 2)
    got = Driver(session, BLOCKS, Random(1), rows=24, preempts=True).run(wanted)
    assert [running.outputs for running in got] == expected
    served.close()
