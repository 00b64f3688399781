"""An engine on the Metal device (simulated off Apple): batches, sampling, options, and the packaged model."""
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engines import TEXT, directory_of, load
from families import build
from gpu_device import DEVICE
from steps import reference
from workload import answers, requests

import metalstep
from metalstep import Request, SamplingParams
from metalstep.kernels import sample
from metalstep.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

OPTIONS = {"device": DEVICE, "kv_memory": "32MB", "max_context": 224}
DRAWS = 192  # of one distribution


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights on the Metal device, with batch_invariant, and on the host."""
    path = tmp_path_factory.mktemp("qwen3")
    kinds = {"metal": OPTIONS, "invariant": {**OPTIONS, "batch_invariant": True}, "host": {**OPTIONS, "device": "host"}}
    loaded = {kind: load("qwen3", path / kind, **options) for kind, options in kinds.items()}
    yield loaded
    for model in loaded.values():
        model.close()


def test_batch_invariant_requests_are_the_same_bits_in_any_batch(models):
    """Alone, a token at a time; and all together in chunks, with several steps a call: other plans, other rows beside them."""
    engine = models["invariant"].engine
    wanted = requests(9, models["invariant"].native.vocab_size, longest=40, seed=3, tokens=(3, 7))
    lone = [answers(engine, [replace(request, decode_steps=1)])[0] for request in wanted]
    assert answers(engine, [replace(r, decode_steps=4, prefill_rows=7 + i) for i, r in enumerate(wanted[::-1])])[::-1] == lone


def test_a_report_names_the_device_as_load_does_and_nothing_that_is_the_host_s(models):
    metal, host = models["metal"].explain(), models["host"].explain()
    assert (metal["device"], host["device"]) == (DEVICE, "host")
    assert metal["batch_invariant"] is False and host["arithmetic"] == "int16" and host["threads"] > 0 and host["isa"]
    assert not {"isa", "threads", "arithmetic"} & set(metal)


def test_without_it_logits_agree_within_rounding(models):
    native = models["metal"]
    alone = native.engine.logits(TEXT[:30])
    chunked = native.engine.collect(Request(TEXT[:30], max_tokens=0, prefill_rows=3, prompt_cache=make_prompt_cache(native)))
    np.testing.assert_allclose(np.stack(chunked), alone, atol=2e-3 * np.ptp(alone))  # the cache's float16


def test_tokens_are_the_host_s_wherever_rounding_does_not_decide(models):
    """Same seeds, every kind of sampling. The devices add in another order, so a draw near an edge may fall on the other side."""
    same = total = 0
    wanted = requests(9, models["host"].native.vocab_size, longest=40, seed=5, tokens=(6, 10))
    for ours, hosts in zip(*(answers(models[kind].engine, wanted) for kind in ("metal", "host")), strict=True):
        for mine, host in zip(ours, hosts, strict=False):
            total += 1
            if mine[0] != host[0]:
                break  # what follows is another text
            same += 1
            np.testing.assert_allclose(mine[1], host[1], atol=5e-3)
    assert total > 40 and same / total > 0.9


FILTERS = [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.8}, {"temperature": 1.5, "top_k": 7, "min_p": 0.02}]


@pytest.mark.parametrize("options", FILTERS)
def test_sampled_requests_follow_the_reference_distribution(models, options):
    engine, prompt = models["metal"].engine, TEXT[:20]
    logits = engine.logits(prompt)[-1].astype(np.float64)
    expected = sample.probabilities(logits, sample.Parameters(**options))
    streams = [engine.submit(Request(prompt, SamplingParams(seed=i, **options), 1)) for i in range(DRAWS)]
    tokens = np.array([next(stream).token for stream in streams])
    assert expected[tokens].min() > 0
    # Pearson's statistic over the likely tokens and the rest; 5 standard deviations above its mean.
    likely = np.argsort(expected)[::-1][:8]
    cells = np.array([*expected[likely], 1 - expected[likely].sum()])
    seen = np.array([*((tokens == token).sum() for token in likely), (~np.isin(tokens, likely)).sum()])
    counted = cells * DRAWS > 1
    statistic = ((seen - cells * DRAWS) ** 2 / np.maximum(cells * DRAWS, 1e-9))[counted].sum()
    freedom = counted.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * max(freedom, 1))


def test_a_prompt_cache_goes_from_one_device_to_the_other(models, tmp_path):
    prompt, more = TEXT[:33], TEXT[33:40]
    cache = make_prompt_cache(models["host"])
    models["host"].engine.collect(Request(prompt, max_tokens=0, prompt_cache=cache))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    stream = models["metal"].engine.submit(Request(more, SamplingParams(), 1, prompt_cache=cache))
    (token,) = [output.token for output in stream]
    assert token == models["metal"].engine.logits(prompt + more)[-1].argmax()


def test_options_of_the_host_device_are_refused(tmp_path):
    with pytest.raises(ValueError, match="arithmetic is 'int8' on metal-sim, which computes in float32"):
        load("llama", tmp_path / "a", device="metal-sim", arithmetic="int8")
    with pytest.raises(ValueError, match="threads is 2 on metal-sim"):
        load("llama", tmp_path / "b", device="metal-sim", threads=2)


@pytest.mark.skipif(sys.platform == "darwin", reason="this machine has a Metal device")
def test_a_machine_without_a_gpu_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"no Metal device.*metal-sim"):
        load("llama", tmp_path / "a", device="metal")


@pytest.mark.simulator
def test_weights_that_lie_in_the_file_as_kernels_read_them_are_not_copied(tmp_path):
    """A dense model whose file happens to be aligned is bound as it is mapped; one that is not gives the same from a copy."""
    directory = directory_of("llama", tmp_path / "m")
    path = directory / "model.safetensors"
    tensors, logits = mx.load(str(path)), []
    for aligned in (True, False):
        for padding in range(16):
            mx.save_safetensors(str(path), tensors, {"format": "mlx", "padding": " " * padding})
            if (int.from_bytes(path.read_bytes()[:8], "little") % 16 == 8) is aligned:
                break
        model, _ = metalstep.load(directory, strict=True, **OPTIONS)
        with model:
            assert (model.native.weights.mapped_bytes > 0) is aligned
            logits.append(model.engine.logits(TEXT[:9]))
    np.testing.assert_array_equal(*logits)
    want = reference(build("llama", quantized=False), TEXT[:9])
    assert np.abs(logits[0] - want).max() < 1e-3 * np.ptp(want)


def test_the_packaged_model_answers():
    """SmolLM2-135M through the shaders: slow, and right."""
    model, tokenizer = metalstep.load("smollm2", strict=True, device=DEVICE, kv_memory="64MB", max_context=128)
    with model:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True)
        text = metalstep.generate(model, tokenizer, prompt=prompt, max_tokens=7)
    assert "Paris" in text
