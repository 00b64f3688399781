"""generate and stream_generate: mlx-lm's arguments and fields, the same text whatever the path, clear refusals."""
import threading

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_sampler

import metalstep
from metalstep import generate, stream_generate


def chat(tokenizer, text):
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)


def tokens(smollm2, prompt, **options):
    model, tokenizer = smollm2
    return [r.token for r in stream_generate(model, tokenizer, prompt, **options)]


def test_the_capital_of_france_is_paris(smollm2):
    model, tokenizer = smollm2
    text = generate(model, tokenizer, chat(tokenizer, "What is the capital of France?"), max_tokens=30)
    assert "Paris" in text


def test_responses_carry_mlx_lms_fields(smollm2):
    model, tokenizer = smollm2
    prompt = chat(tokenizer, "Count to three.")
    responses = list(stream_generate(model, tokenizer, prompt, max_tokens=8))
    last = responses[-1]
    assert last.finish_reason in ("stop", "length")
    assert all(r.finish_reason is None for r in responses[:-1])
    assert [r.generation_tokens for r in responses] == list(range(1, len(responses) + 1))
    for r in responses:
        assert r.prompt_tokens == len(prompt)
        assert r.prompt_tps > 0 and r.generation_tps > 0 and r.peak_memory > 0
        assert not r.from_draft
        assert r.logprobs.shape == (model.native.vocab_size,)
        assert abs(np.exp(np.array(r.logprobs, np.float64)).sum() - 1) < 1e-5
        assert r.logprobs[r.token] == r.logprobs.max()  # greedy
    assert "".join(r.text for r in responses) == generate(model, tokenizer, prompt, max_tokens=8)


def test_text_tokens_and_arrays_are_the_same_prompt(smollm2):
    _, tokenizer = smollm2
    ids = tokenizer.encode("The weather today")
    expected = tokens(smollm2, "The weather today", max_tokens=6)
    for prompt in (ids, np.array(ids), mx.array(ids), tuple(ids)):
        assert tokens(smollm2, prompt, max_tokens=6) == expected


@settings(max_examples=8)
@given(chunk=st.integers(1, 40), length=st.integers(1, 60))
def test_prefill_in_chunks_gives_the_same_bits(smollm2, chunk, length):
    model, tokenizer = smollm2
    prompt = tokenizer.encode("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4)[:length]
    whole = next(iter(stream_generate(model, tokenizer, prompt, max_tokens=1)))
    parts = next(iter(stream_generate(model, tokenizer, prompt, max_tokens=1, prefill_step_size=chunk)))
    assert whole.token == parts.token
    np.testing.assert_array_equal(np.array(whole.logprobs), np.array(parts.logprobs))


def test_a_seeded_text_does_not_depend_on_how_its_prompt_was_cut(smollm2):
    """The counter of a seed counts the request's own tokens, not the steps of its prompt."""
    prompt = list(range(500, 537))
    options = dict(max_tokens=12, temp=1.5, seed=11)
    whole = tokens(smollm2, prompt, **options)
    for chunk in (1, 5, 36, 37):
        assert tokens(smollm2, prompt, prefill_step_size=chunk, **options) == whole


def test_prefill_and_decode_give_the_same_bits(smollm2):
    """The tokens a decode chose, fed back as a prompt, lead to the same distribution."""
    model, tokenizer = smollm2
    prompt = tokenizer.encode("In the year 1969")
    responses = list(stream_generate(model, tokenizer, prompt, max_tokens=20))
    again = next(iter(stream_generate(model, tokenizer, prompt + [r.token for r in responses[:-1]], max_tokens=1)))
    assert again.token == responses[-1].token
    np.testing.assert_array_equal(np.array(again.logprobs), np.array(responses[-1].logprobs))


def test_a_seed_replays_and_other_seeds_differ(smollm2):
    options = dict(max_tokens=16, temp=1.2, top_p=0.95)
    first = tokens(smollm2, "Tell me", seed=7, **options)
    assert tokens(smollm2, "Tell me", seed=7, **options) == first
    assert any(tokens(smollm2, "Tell me", seed=s, **options) != first for s in (8, 9))


def test_top_k_one_and_a_tiny_top_p_are_greedy(smollm2):
    greedy = tokens(smollm2, "Two plus two", max_tokens=10)
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=0.999999)):
        assert tokens(smollm2, "Two plus two", max_tokens=10, temp=1.0, seed=1, **options) == greedy


def test_mlx_lms_sampler_and_processors_are_called(smollm2):
    greedy = tokens(smollm2, "Hello", max_tokens=5)
    assert tokens(smollm2, "Hello", max_tokens=5, sampler=make_sampler(temp=0.0)) == greedy
    seen = []

    def ban(history, logits):
        seen.append(len(history))
        logits[:, greedy[0]] = -mx.inf
        return logits

    banned = tokens(smollm2, "Hello", max_tokens=5, logits_processors=[ban])
    assert greedy[0] not in banned
    assert seen == list(range(seen[0], seen[0] + len(banned)))


@pytest.mark.parametrize("options", [{}, {"temp": 1.0, "top_p": 0.9, "seed": 4}], ids=["greedy", "sampled"])
def test_threads_sharing_a_model_get_what_they_get_alone(smollm2, options):
    prompts = ["One fish", "Red sky at night", "To be or not"]
    alone = [tokens(smollm2, p, max_tokens=40, **options) for p in prompts]
    free = smollm2[0].engine.stats().free_blocks
    together = [None] * len(prompts)

    def work(i):
        together[i] = tokens(smollm2, prompts[i], max_tokens=40, **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert together == alone
    assert smollm2[0].engine.stats().free_blocks == free


def test_a_dropped_generator_gives_its_blocks_back(smollm2):
    model, tokenizer = smollm2
    free = model.engine.stats().free_blocks
    stream = stream_generate(model, tokenizer, "Once", max_tokens=50)
    next(stream)
    assert model.engine.stats().free_blocks < free
    stream.close()
    assert model.engine.stats().free_blocks == free


def test_progress_is_reported(smollm2):
    calls = []
    tokens(
        smollm2, list(range(100, 130)), max_tokens=1, prefill_step_size=10,
        prompt_progress_callback=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(0, 30), (10, 30), (20, 30), (30, 30)]


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([[1, 2]], {}, "flat list of token ids"),
        ([1.5, 2.0], {}, "flat list of token ids"),
        ([-1], {}, "token id -1 at position 0"),
        ([5, 10**6], {}, "token id 1000000 at position 1 is outside the vocabulary"),
        (np.array([2**63], np.uint64), {}, "flat list of token ids"),
        ([[1], [2, 3]], {}, "flat list of token ids"),
        ("caf\udce9", {}, "not valid Unicode: character 3"),
        ([1], {"temp": "hot"}, "temperature is 'hot'"),
        ([1], {"top_p": None}, "top_p is None"),
        ([1], {"max_tokens": 2.0}, "max_tokens is 2.0"),
        ([1] * 5000, {}, "5000 tokens do not fit into the context of 4096"),
        ([1], {"temp": float("nan")}, "temperature is nan"),
        ([1], {"temp": -1.0}, "temperature is -1.0"),
        ([1], {"top_p": float("nan")}, "top_p is nan"),
        ([1], {"top_p": 1.5}, "top_p is 1.5"),
        ([1], {"min_p": 1.5}, "min_p is 1.5"),
        ([1], {"top_k": -2}, "top_k is -2"),
        ([1], {"seed": -1}, "seed is -1"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"prefill_step_size": 0}, "prefill_step_size is 0"),
    ],
)
def test_bad_input_is_refused_and_the_engine_goes_on(smollm2, prompt, options, text):
    free = smollm2[0].engine.stats().free_blocks
    with pytest.raises(ValueError, match=text):
        tokens(smollm2, prompt, **{"max_tokens": 3, **options})
    assert smollm2[0].engine.stats().free_blocks == free
    assert len(tokens(smollm2, "Still here", max_tokens=2)) == 2


VOCABULARY = 49152


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sampler": lambda x: mx.array([VOCABULARY])}, "the sampler returned array"),
        ({"sampler": lambda x: mx.array([-1])}, "the sampler returned array"),
        ({"sampler": lambda x: None}, "the sampler returned None"),
        ({"sampler": lambda x: 1.7}, "the sampler returned 1.7"),
        ({"logits_processors": [lambda tokens, x: x * float("nan")]}, "left no token"),
        ({"logits_processors": [lambda tokens, x: x - mx.inf]}, "left no token"),
        ({"logits_processors": [lambda tokens, x: x[:, :5]]}, "shape \\(1, 5\\)"),
    ],
)
def test_what_callables_return_is_checked(smollm2, options, text):
    free = smollm2[0].engine.stats().free_blocks
    with pytest.raises(ValueError, match=text):
        tokens(smollm2, "Hello", max_tokens=3, **options)
    assert smollm2[0].engine.stats().free_blocks == free
    assert len(tokens(smollm2, "Hello", max_tokens=np.int64(2))) == 2


@pytest.mark.parametrize("name", ["draft_model", "num_draft_tokens", "kv_bits", "kv_group_size", "quantized_kv_start"])
def test_arguments_without_a_native_form_are_refused_by_name(smollm2, name):
    with pytest.raises(NotImplementedError, match=name):
        tokens(smollm2, "x", **{name: object()})
    with pytest.raises(TypeError, match="colour"):
        tokens(smollm2, "x", colour="red")


def test_a_full_context_ends_with_length():
    model, tokenizer = metalstep.load("smollm2", strict=True, max_context=40)
    with model:
        prompt = tokenizer.encode("one two three four five six seven eight nine ten eleven twelve")
        responses = list(stream_generate(model, tokenizer, prompt, max_tokens=-1, temp=1.0, seed=5))
        assert responses[-1].finish_reason == "length"
        assert len(prompt) + len(responses) == 40 + 1  # the last token needs no place in the cache
        with pytest.raises(ValueError, match="do not fit into the context of 40; shorten the prompt, or load with a larger"):
            next(stream_generate(model, tokenizer, [1] * 41))
        stream = stream_generate(model, tokenizer, prompt, max_tokens=10)
        next(stream)
    with pytest.raises(ValueError, match="the model is closed"):
        next(stream)
    with pytest.raises(ValueError, match="the model is closed"):
        next(stream_generate(model, tokenizer, prompt))


def test_the_model_is_callable(smollm2):
    model, tokenizer = smollm2
    ids = mx.array(tokenizer.encode("The model is callable like an mlx-lm model."))
    logits = model(mx.stack([ids, ids[::-1]]))
    assert logits.shape == (2, len(ids), model.native.vocab_size) and logits.dtype == mx.float32
    np.testing.assert_array_equal(np.array(logits[0]), np.array(model(ids[None])[0]))
    for bad in (ids, ids[None].astype(mx.float32), mx.zeros((1, 0), mx.int32)):
        with pytest.raises(ValueError, match="expected integers \\[batch, length\\]"):
            model(bad)
    with pytest.raises(NotImplementedError, match="cache"):
        model(ids[None], cache=[])


def test_load_refuses_unknown_options():
    with pytest.raises(ValueError, match="device is 'tpu'"):
        metalstep.load("smollm2", device="tpu")
    with pytest.raises(ValueError, match="kv_dtype is 'int2'"):
        metalstep.load("smollm2", kv_dtype="int2")
    with pytest.raises(ValueError, match="kv_dtype is \\['float16'\\]"):
        metalstep.load("smollm2", device="eager", kv_dtype=["float16"])
    with pytest.raises(ValueError, match="max_position_embeddings is -1"):
        metalstep.load("smollm2", model_config={"max_position_embeddings": -1})
    with pytest.raises(ValueError, match="arithmetic"):
        metalstep.load("smollm2", arithmetic="int4")
    for bad in (0, -5, 1.5, "many", 2**63):
        with pytest.raises(ValueError, match="max_context is"):
            metalstep.load("smollm2", max_context=bad)
    with pytest.raises(NotImplementedError, match="adapter_path"):
        metalstep.load("smollm2", adapter_path="somewhere")
