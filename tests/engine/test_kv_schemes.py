"""Models whose KV cache has a scheme: a request's bits depend on the request alone, memory is what was said, and nothing is silently
another cache."""
from __future__ import annotations

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engines import directory_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from metal_models import build
from tiny import write_model
from workload import alone, answers, requests, watched

import metalstep
from metalstep import Request, SamplingParams, stream_generate
from metalstep.kv_cache import BLOCK_SIZE, cache_capacity, with_scheme
from metalstep.kv_scheme import NAMES, parse
from metalstep.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from metalstep.scheduler import GroupSpec, KVBlocks, Sequence

NO_SHRINKING = (Phase.explicit, Phase.generate)  # an example takes seconds
SCHEMES = ["turbo4v2", "turbo8v4"]
POISON = 90  # a token that no text has
TEXT = [(7 * i + 3) % (POISON - 3) + 3 for i in range(200)]
COUNT = 14


@pytest.fixture(scope="module", params=SCHEMES)
def loaded(request):
    """SmolLM2 with a scheme: roomy, and in a cache for a fraction of what the requests need."""
    options = dict(strict=True, max_context=320, kv_scheme=request.param)
    token = 3 * sum(codec.vector_bytes(64) for pair in parse(request.param).layer_codecs(30) for codec in pair)
    with metalstep.load("smollm2", **options)[0] as roomy, metalstep.load("smollm2", kv_memory=20 * 16 * token, **options)[0] as cramped:
        wanted = requests(COUNT, roomy.native.vocab_size, tokens=(20, 40))
        yield roomy, cramped, wanted, alone(roomy.engine, wanted)


@settings(max_examples=2, phases=NO_SHRINKING)
@given(
    order=st.permutations(range(COUNT)),
    chunks=st.lists(st.sampled_from([1, 3, 16, 17, 64, 512]), min_size=COUNT, max_size=COUNT),
    steps=st.sampled_from([1, 8]),
)
def test_a_request_is_the_same_bits_in_any_batch_with_any_chunks(loaded, order, chunks, steps):
    roomy, _, wanted, lone = loaded
    got = answers(roomy.engine, [replace(wanted[i], prefill_rows=chunks[i], decode_steps=steps) for i in order])
    for i, answer in zip(order, got, strict=True):
        assert answer == lone[i], f"request {i}"


@settings(max_examples=2, phases=NO_SHRINKING)
@given(order=st.permutations(range(COUNT)), steps=st.sampled_from([1, 8]), chunk=st.sampled_from([5, 48, 512]))
def test_and_after_preemption(loaded, order, steps, chunk):
    _, cramped, wanted, lone = loaded
    with watched(cramped.engine):
        got = answers(cramped.engine, [replace(wanted[i], decode_steps=steps, prefill_rows=chunk) for i in order])
    for i, answer in zip(order, got, strict=True):
        assert answer == lone[i], f"request {i}"
    stats = cramped.engine.stats()
    assert stats.preemptions > 0 and stats.free_blocks == stats.total_blocks


def test_and_with_a_prefix_hit(loaded):
    engine = loaded[0].engine
    prompt = [(7 * i) % 40_000 + 5 for i in range(200)]
    first = [(o.token, o.logprob, o.top) for o in engine.submit(Request(prompt, SamplingParams(logprobs=3), 8))]
    hot = engine.submit(Request(prompt, SamplingParams(logprobs=3), 8))
    assert [(o.token, o.logprob, o.top) for o in hot] == first
    assert hot.cached_tokens >= 192


def test_the_allocators_bytes_are_the_formulas(loaded):
    for model in loaded[:2]:
        native, about = model.native, model.explain()["kv"]
        formula = sum(entry["bytes_per_token"] for entry in about["layers"])
        assert native.cache.nbytes == sum(native.num_blocks) * BLOCK_SIZE * formula
        assert about["bytes_per_token"] == native.cache.bytes_per_token == formula < about["float16_bytes_per_token"] == 23_040
        assert about["capacity"] == 23_040 / formula


# ---- every scheme ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain():
    with metalstep.load("smollm2", strict=True, max_context=64)[0] as model:
        yield model


@pytest.mark.parametrize("name", NAMES)
def test_the_same_memory_holds_more_sequences_by_the_schemes_ratio(plain, name):
    """Sequences of 2,048 tokens that have all their blocks at once, in memory for 40 of them as float16."""
    budget = 40 * 2048 * 23_040

    def count(scheme: str) -> int:
        groups = with_scheme(plain.native.groups, parse(scheme))
        capacity = cache_capacity(groups, budget=budget, context=2048, max_seqs=1024, chunk=512)
        blocks = KVBlocks([GroupSpec(group.window, n) for group, n in zip(groups, capacity.num_blocks, strict=True)], BLOCK_SIZE, 512)
        held = 0
        while True:
            sequence = Sequence(tokens=[5] * 2048, prompt_len=2047, max_tokens_total=2048)
            blocks.open(sequence)
            if not blocks.reserve(sequence, 2048):
                return held
            held += 1

    nbytes = sum(group.token_bytes for group in with_scheme(plain.native.groups, parse(name)))
    assert count("none") == 40
    assert count(name) / 40 == pytest.approx(23_040 / nbytes, rel=0.03)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Tiny models of 10 layers with heads of 64, so that boundary layers exist."""
    found = {}
    for name in ("llama", "mistral_windows", "qwen3"):
        changes = dict(num_hidden_layers=10, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
        if name == "mistral_windows":
            changes["layer_types"] = ["sliding_attention", "full_attention"] * 5
        network, config, _ = build(name, **changes)
        found[name] = write_model(tmp_path_factory.mktemp(name), network, config)
    return found


def logprobs(model, tokenizer, prompt, cache=None, count=6):
    responses = list(stream_generate(model, tokenizer, prompt, max_tokens=count, prompt_cache=cache, banned_token_ids=(0,)))
    return [r.token for r in responses], np.stack([np.array(r.logprobs) for r in responses])


@pytest.mark.parametrize("name", ["llama", "mistral_windows"])
@pytest.mark.parametrize("scheme", ["turbo4v2", "affine8", "turbo0v3"])
def test_a_saved_cache_goes_on_bit_for_bit_and_only_under_its_own_scheme(wide, tmp_path, name, scheme):
    path = tmp_path / "cache.safetensors"
    with metalstep.load(wide[name], strict=True, kv_scheme=scheme)[0] as model:
        tokenizer = metalstep.load(wide[name], strict=True)[1]
        for length in (3, 16, 45):
            cache = make_prompt_cache(model)
            tokens, _ = logprobs(model, tokenizer, TEXT[:length], cache, 4)
            save_prompt_cache(path, cache)
            want = logprobs(model, tokenizer, [5, 9, 11], cache)
            whole = logprobs(model, tokenizer, [*TEXT[:length], *tokens, 5, 9, 11])
            with metalstep.load(wide[name], strict=True, kv_scheme=scheme)[0] as other:
                got = logprobs(other, tokenizer, [5, 9, 11], load_prompt_cache(path))
            for answer in (whole, got):
                assert answer[0] == want[0]
                np.testing.assert_array_equal(answer[1], want[1])
        for others in ("none", "turbo4"):
            with metalstep.load(wide[name], strict=True, kv_scheme=others)[0] as other:
                with pytest.raises(ValueError, match=rf"saved with kv_scheme {scheme}.*and the model has"):
                    logprobs(other, tokenizer, [5], load_prompt_cache(path))
                plain_path = tmp_path / "plain.safetensors"
                own = make_prompt_cache(other)
                logprobs(other, tokenizer, TEXT[:5], own, 2)
                save_prompt_cache(plain_path, own)
            with pytest.raises(ValueError, match=rf"the prompt cache was saved with .*and the model has kv_scheme {scheme}"):
                logprobs(model, tokenizer, [5], load_prompt_cache(plain_path))


def test_boundary_layers_are_counted_among_the_layers_that_have_a_cache(wide):
    with metalstep.load(wide["mistral_windows"], strict=True, kv_scheme="turbo4v2")[0] as model:
        kinds = [(entry["keys"], entry["values"]) for entry in model.explain()["kv"]["layers"]]
        assert kinds == [("affine8", "affine8")] * 2 + [("turbo4", "turbo2")] * 6 + [("affine8", "affine8")] * 2


def test_more_bits_are_nearer_to_floats(wide):
    """Mean distance of log-probabilities from the float32 cache's over a text, in schemes of falling bits."""
    found = {}
    for scheme in ("none", "affine8", "turbo8v4", "turbo4", "turbo3", "turbo2"):
        options = dict(kv_dtype="float32") if scheme == "none" else dict(kv_boundary=0) if scheme in ("turbo4", "turbo3", "turbo2") else {}
        with metalstep.load(wide["qwen3"], strict=True, kv_scheme=scheme, **options)[0] as model:
            logits = np.array(model(mx.array([TEXT[:150]])))[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        found[scheme] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    reference = found.pop("none")
    distances = [float((np.exp(reference) * (reference - other)).sum(-1).mean()) for other in found.values()]
    assert all(a < b for a, b in itertools.pairwise(distances)), distances
    assert 0 < distances[0] < 1e-4


@pytest.mark.parametrize("scheme", ["turbo4v2", "affine8"])
def test_a_nan_in_one_sequence_ends_that_request_alone(wide, tmp_path, scheme):
    network, config, _ = build("llama_untied", num_hidden_layers=10, head_dim=64)
    weight = np.array(network.model.embed_tokens.weight)
    weight[POISON] = np.nan
    network.model.embed_tokens.weight = mx.array(weight)
    clean = [TEXT[i : i + 20] for i in (0, 3, 9)]
    with metalstep.load(write_model(tmp_path / "poisoned", network, config), strict=True, kv_scheme=scheme)[0] as model:
        sampling = SamplingParams(banned_token_ids=(POISON,))
        lone = [[o.token for o in model.engine.submit(Request(prompt, sampling, 8))] for prompt in clean]
        # In the middle of the prompt, so that its keys and values are in the cache and others are sampled behind it.
        streams = [model.engine.submit(Request(prompt, sampling, 8)) for prompt in (clean[0], [5, POISON, *TEXT[:40]], *clean[1:])]
        with pytest.raises(RuntimeError, match="not finite"):
            list(streams[1])
        assert [[o.token for o in stream] for stream in (streams[0], *streams[2:])] == lone


# ---- what is refused ------------------------------------------------------------------------------------------------------------
def test_no_model_gets_another_cache_than_it_was_loaded_with(tmp_path):
    experts = directory_of("qwen3_moe", tmp_path / "experts")
    with pytest.raises(metalstep.CaptureError, match="an eager cache is not encoded: load it with kv_scheme='none', not 'turbo4'"):
        metalstep.load(experts, kv_scheme="turbo4")
    with pytest.raises(ValueError, match="kv_scheme is 'affine8' on eager"):
        metalstep.load("smollm2", device="eager", kv_scheme="affine8")
    network, config, _ = build("llama", head_dim=36)
    odd = write_model(tmp_path / "odd", network, config)
    with pytest.raises(ValueError, match=r"kv_scheme is 'turbo4': layer 0: turbo4 takes vectors of 16, 32, .*and these have 36"):
        metalstep.load(odd, kv_scheme="turbo4")
