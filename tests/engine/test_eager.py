"""What cannot run natively runs through mlx-lm's own code, after one warning that says why."""
import os
import subprocess
import sys
import warnings

import mlx.core as mx
import numpy as np
import pytest
from families import BASE, FAMILIES, build
from mlx_lm import stream_generate as mlx_lm_stream_generate
from tiny import write_model

import metalstep


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = {"model_type": "llama", **BASE}
    return write_model(tmp_path_factory.mktemp("llama"), build("llama", quantized=True), config, {"group_size": 32, "bits": 4})


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A family whose graph has no native kernels."""
    config = {"model_type": "qwen3_moe", **BASE, **FAMILIES["qwen3_moe"].config}
    return write_model(tmp_path_factory.mktemp("moe"), build("qwen3_moe", quantized=False), config)


def test_a_model_without_kernels_warns_once_and_answers_as_mlx_lm_does(experts):
    with pytest.warns(RuntimeWarning, match="qwen3_moe has no native step yet: ArgPartition") as caught:
        model, tokenizer = metalstep.load(experts)
    assert len(caught) == 1
    with model:
        assert model.native is None and model.fallback_reason
        report = model.explain()
        assert report["device"] == "eager" and report["fallback_reason"] == model.fallback_reason
        ours = [r.token for r in metalstep.stream_generate(model, tokenizer, [3, 1, 4, 1, 5], max_tokens=6)]
        theirs = [r.token for r in mlx_lm_stream_generate(model.eager, tokenizer, [3, 1, 4, 1, 5], max_tokens=6)]
        assert ours == theirs
        with pytest.raises(ValueError, match="outside the vocabulary"):
            next(metalstep.stream_generate(model, tokenizer, [3, 10**6]))


def test_ids_that_mlx_would_read_beyond_its_table_are_refused(experts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = metalstep.load(experts)
    with model:
        for bad in (10**6, BASE["vocab_size"], -1):
            with pytest.raises(ValueError, match="outside the vocabulary"):
                model(mx.array([[bad]]))
            with pytest.raises(ValueError, match="the sampler returned"):
                metalstep.generate(model, tokenizer, [1, 2], max_tokens=3, sampler=lambda x, bad=bad: mx.array([bad]))


def test_strict_raises_instead(experts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(metalstep.CaptureError, match="qwen3_moe has no native step yet: ArgPartition"):
            metalstep.load(experts, strict=True)


WITHOUT_DYLIB = """
import sys, warnings
import metalstep
from metalstep.kernels.native import NativeUnavailable
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    model, tokenizer = metalstep.load(sys.argv[1])
assert [w.category for w in caught if "eager MLX" in str(w.message)] == [RuntimeWarning], caught
assert model.native is None
assert len(list(metalstep.stream_generate(model, tokenizer, [1, 2, 3], max_tokens=4))) == 4
try:
    metalstep.load(sys.argv[1], strict=True)
except NativeUnavailable as error:
    print("refused:", error)
"""


def test_without_the_dylib_one_warning_and_eager(llama, tmp_path):
    environment = {**os.environ, "METALSTEP_LIBRARY": str(tmp_path / "nothing.so")}
    run = subprocess.run([sys.executable, "-c", WITHOUT_DYLIB, str(llama)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "refused: " in run.stdout


def test_eager_and_native_agree(llama):
    eager, _ = metalstep.load(llama, device="eager")
    native, _ = metalstep.load(llama, strict=True)
    ids = mx.array([[5, 9, 2, 60, 33, 7]])
    with eager, native:
        want, got = np.array(eager(ids)), np.array(native(ids))
    assert (np.abs(got - want).max(-1) / np.ptp(want, axis=-1)).max() <= 1e-3


@pytest.fixture(scope="module")
def eager(llama):
    model, tokenizer = metalstep.load(llama, device="eager")
    with model:
        yield model, tokenizer


def own_sampler(logprobs):
    return mx.argmax(logprobs, axis=-1)


def test_prompt_logprobs_are_refused_by_name(eager):
    for options in ({}, {"sampler": own_sampler}, {"logits_processors": [lambda tokens, logits: logits]}):
        with pytest.raises(NotImplementedError, match="prompt_logprobs: a model that runs eagerly"):
            metalstep.generate(*eager, [3, 1], max_tokens=2, prompt_logprobs=2, **options)
        with pytest.raises(NotImplementedError, match="prompt_logprobs: a model that runs eagerly"):
            metalstep.batch_generate(*eager, [[3, 1], [4]], max_tokens=2, prompt_logprobs=2, **options)


def test_a_callers_sampler_is_checked_for_each_row_of_a_batch(eager):
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6]]
    want = metalstep.batch_generate(*eager, prompts, max_tokens=4, return_token_ids=True)
    got = metalstep.batch_generate(*eager, prompts, max_tokens=4, return_token_ids=True, sampler=own_sampler)
    assert got.token_ids == want.token_ids
    for bad in (BASE["vocab_size"], -1, 2**40):
        with pytest.raises(ValueError, match=r"the sampler returned .*, expected 3 token ids from 0"):
            metalstep.batch_generate(*eager, prompts, max_tokens=4, sampler=lambda x, bad=bad: np.array([1, 2, bad][: len(x)]))
    with pytest.raises(ValueError, match=r"the sampler returned .*, expected 3 token ids from 0"):
        metalstep.batch_generate(*eager, prompts, max_tokens=4, sampler=lambda x: mx.array([1]))


def test_greedy_leaves_mlxs_random_state_and_a_seed_sets_it(eager):
    def draw_after(**options):
        mx.random.seed(77)
        metalstep.generate(*eager, [3, 1, 4], max_tokens=3, **options)
        metalstep.batch_generate(*eager, [[3, 1, 4]], max_tokens=3, **options)
        return mx.random.uniform(shape=(4,)).tolist()

    mx.random.seed(77)
    untouched = mx.random.uniform(shape=(4,)).tolist()
    assert draw_after() == draw_after(seed=5) == draw_after(repetition_penalty=1.3) == untouched
    assert draw_after(temp=1.0, seed=5) == draw_after(temp=1.0, seed=5) != untouched
