"""input_embeddings: rows of the caller's own in place of the model's. Its own rows give its own text, bit for bit."""
import copy

import mlx.core as mx
import numpy as np
import pytest
from families import BASE, FAMILIES, VOCAB, build
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_model

import metalstep
from metalstep import Request, stream_generate
from metalstep.generate import generate_step
from metalstep.models.cache import make_prompt_cache, save_prompt_cache, trim_prompt_cache
from metalstep.sample_utils import make_logits_processors

TEXT = [(13 * i + 7) % (VOCAB - 1) + 1 for i in range(70)]
RANGE = 1e-3  # of a row's range of logits, as in test_native_families
FEW = settings(max_examples=12)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3"])
def family(request, tmp_path_factory):
    """(model, tokenizer, mlx-lm's model). gemma3_text multiplies embeddings by a constant, the caller's too."""
    name = request.param
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config, "max_position_embeddings": 512}
    directory = write_model(tmp_path_factory.mktemp(name), build(name, quantized=False), config)
    model, tokenizer = metalstep.load(directory, strict=True)
    with model:
        yield model, tokenizer, metalstep.load(directory, device="eager")[0].eager


def rows_of(family, ids):
    """The model's own embeddings, [len(ids), hidden_size], as it has them."""
    return family[2].model.embed_tokens(mx.array(ids))


def answer(family, prompt, count=8, **options):
    responses = list(stream_generate(*family[:2], prompt, max_tokens=count, banned_token_ids=[0], **options))
    return [r.token for r in responses], np.stack([np.array(r.logprobs) for r in responses])


def same(got, want):
    assert got[0] == want[0]
    np.testing.assert_array_equal(got[1], want[1])


@FEW
@given(length=st.integers(1, 70), chunk=st.sampled_from([1, 7, 512]), with_ids=st.booleans())
def test_the_models_own_rows_give_its_own_text(family, length, chunk, with_ids):
    text = TEXT[:length]
    rows = rows_of(family, text)
    got = answer(family, text if with_ids else [], input_embeddings=rows, prefill_step_size=chunk)
    same(got, answer(family, text))
    same(answer(family, [], input_embeddings=np.array(rows)), got)


@FEW
@given(data=st.data(), length=st.integers(1, 30))
def test_any_rows_give_what_mlx_lm_makes_of_them(family, data, length):
    model, _, eager = family
    seed = data.draw(st.integers(0, 1000))
    mx.random.seed(seed)
    own = rows_of(family, TEXT[:length])
    mixed = mx.where(mx.random.uniform(shape=(length, 1)) < 0.5, own, own.std() * mx.random.normal(own.shape))
    want = np.array(eager(mx.array([TEXT[:length]]), input_embeddings=mixed[None])[0])
    got = np.stack(model.engine.collect(Request(TEXT[:length], max_tokens=0, embeddings=np.array(mixed))))
    spread = want.max(-1) - want.min(-1)
    assert (np.abs(got - want).max(-1) <= RANGE * spread).all()


def test_requests_with_and_without_them_share_a_batch(family):
    model, tokenizer, _ = family
    prompts = [TEXT[i : i + 5 + i] for i in range(12)]
    lone = [answer(family, prompt)[0] for prompt in prompts]
    streams = [
        stream_generate(
            model, tokenizer, prompt, max_tokens=8, banned_token_ids=[0], input_embeddings=rows_of(family, prompt) if i % 2 else None
        )
        for i, prompt in enumerate(prompts)
    ]
    assert [[r.token for r in stream] for stream in streams] == lone


def test_nothing_of_them_is_found_in_the_prefix_cache(family):
    """Whoever asks with the same ids later gets the model's own text."""
    text = TEXT[5:60]
    before = answer(family, [*text[:1], 9, *text[1:]])
    rows = -2.0 * rows_of(family, [*text[:1], 9, *text[1:]])
    other = answer(family, [*text[:1], 9, *text[1:]], input_embeddings=rows)
    assert not np.array_equal(other[1], before[1])
    same(answer(family, [*text[:1], 9, *text[1:]]), before)
    same(answer(family, [*text[:1], 9, *text[1:]], input_embeddings=rows), other)


def test_a_prompt_cache_continues_them_and_they_continue_a_prompt_cache(family, tmp_path):
    rows = 0.5 * rows_of(family, TEXT[:20])
    cache, whole = make_prompt_cache(family[0]), make_prompt_cache(family[0])
    first = answer(family, [], 4, input_embeddings=rows, prompt_cache=cache)[0]
    assert cache.tokens == [-1] * 20 + first
    list(generate_step([], family[0], max_tokens=0, input_embeddings=mx.concatenate([rows, rows_of(family, first)]), prompt_cache=whole))
    assert whole.tokens == [-1] * 24
    other = copy.deepcopy(whole)
    want = answer(family, [5, 6], prompt_cache=whole)
    same(answer(family, [5, 6], prompt_cache=cache), want)
    save_prompt_cache(tmp_path / "rows.safetensors", other)
    same(answer(family, [], prompt_cache=other, input_embeddings=rows_of(family, [5, 6])), want)
    if trim_prompt_cache(other, 6):
        cut = make_prompt_cache(family[0])
        answer(family, [], 4, input_embeddings=rows, prompt_cache=cut)
        same(answer(family, [9], prompt_cache=other), answer(family, [*first, 5, 6, *want[0][:2], 9][4:], prompt_cache=cut))


def test_only_known_tokens_count_for_penalties(family):
    """As in mlx-lm, where an empty prompt leaves no tokens."""
    rows = rows_of(family, TEXT[:10])
    seen = []

    def processor(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    tokens = answer(family, [], 4, input_embeddings=rows)[0]
    list(stream_generate(*family[:2], [], max_tokens=4, input_embeddings=rows, logits_processors=[processor]))
    assert all(min(known, default=0) >= 0 for known in seen) and len(seen) == 3
    native = make_logits_processors(repetition_penalty=5.0, repetition_context_size=50)

    def own(ids, logits):
        return native[0](ids, logits)

    free = [
        [r.token for r in stream_generate(*family[:2], [], max_tokens=12, input_embeddings=rows, logits_processors=processors)]
        for processors in (native, [own])
    ]
    assert free[0] == free[1]
    assert free[0][0] == answer(family, TEXT[:10], 1)[0][0] == tokens[0]


@pytest.mark.parametrize(
    ("prompt", "shape", "text"),
    [
        ([1, 2], (3, 64), r"input_embeddings has shape \(3, 64\), expected \(2, 64\)"),
        ([1, 2], (2, 63), r"input_embeddings has shape \(2, 63\), expected \(2, 64\)"),
        ([], (2, 65), r"input_embeddings has shape \(2, 65\), expected \(2, 64\)"),
        ([1, 2], (1, 2, 64), r"input_embeddings has shape \(1, 2, 64\), expected \[prompt length, hidden_size\]"),
        ([], (0, 64), r"input_embeddings has shape \(0, 64\)"),
        ("1 2 3", (2, 64), r"input_embeddings has shape \(2, 64\), expected \(3, 64\)"),
    ],
)
def test_other_shapes_are_refused(family, prompt, shape, text):
    free = family[0].engine.stats().free_blocks
    with pytest.raises(ValueError, match=text):
        answer(family, prompt, input_embeddings=mx.zeros(shape))
    assert family[0].engine.stats().free_blocks == free


def test_other_values_are_refused(family):
    rows = mx.zeros((2, 64))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="input_embeddings has values that are not finite"):
            answer(family, [1, 2], input_embeddings=rows + value)
    with pytest.raises(ValueError, match="input_embeddings is 'rows'"):
        answer(family, [1, 2], input_embeddings="rows")
    with pytest.raises(ValueError, match="prompt_logprobs needs the prompt's token ids"):
        answer(family, [], input_embeddings=rows, prompt_logprobs=1)
    with pytest.raises(ValueError, match="the prompt is empty"):
        answer(family, [])


def test_models_that_do_not_take_them_say_so(tmp_path):
    name = "gemma2"
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config}
    model, tokenizer = metalstep.load(write_model(tmp_path / name, build(name, quantized=False), config), strict=True)
    with model, pytest.raises(ValueError, match="gemma2 does not take input_embeddings; pass token ids"):
        list(stream_generate(model, tokenizer, [1], input_embeddings=mx.zeros((1, 64))))
