"""Prompt caches: two calls give what one gives, bit for bit; trimming, copying, files, host memory, and who may use one when."""
import copy
import gc
from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from engines import directory_of
from families import VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step as mlx_generate_step
from mlx_lm.models import cache as mlx_caches

import metalstep
from metalstep import Request, batch_generate, generate, stream_generate
from metalstep.models.cache import (
    CacheFileError,
    PromptCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

FEW = settings(max_examples=12)
TEXT = [(7 * i + 3) % (VOCAB - 3) + 3 for i in range(60)]
BEHIND = [5, 9, 11]
FAMILY_NAMES = ["llama", "mistral_windows", "gemma2", "gemma3_text"]  # no window; a window and none; softcaps; a window and none


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {name: directory_of(name, tmp_path_factory.mktemp(name)) for name in FAMILY_NAMES}


@pytest.fixture(scope="module")
def models(directories):
    """Every family's (model, tokenizer), by name."""
    loaded = {name: metalstep.load(path, strict=True) for name, path in directories.items()}
    yield loaded
    for model, _ in loaded.values():
        model.close()


@pytest.fixture(params=FAMILY_NAMES)
def family(request, models):
    return models[request.param]


def answer(family, prompt, cache=None, count=6, banned=(0,), **options):
    """(tokens, logprobs [count, vocab]) of a text that no stop token ends."""
    responses = list(stream_generate(*family, prompt, max_tokens=count, prompt_cache=cache, banned_token_ids=banned, **options))
    return [r.token for r in responses], np.stack([np.array(r.logprobs) for r in responses])


def same(got, want):
    assert got[0] == want[0]
    np.testing.assert_array_equal(got[1], want[1])


def free_blocks(model):
    return model.engine.stats().free_blocks


def filled_cache(family, prompt=TEXT[:20], count=4, max_kv_size=None):
    """(cache, the ids that it holds)."""
    cache = make_prompt_cache(family[0], max_kv_size)
    tokens, _ = answer(family, prompt, cache, count)
    return cache, [*prompt, *tokens]


# ---- two calls and one -----------------------------------------------------------------------------------------------------


@FEW
@given(
    name=st.sampled_from(FAMILY_NAMES),
    first=st.integers(1, 40),
    count=st.integers(1, 20),
    second=st.integers(1, 20),
    chunk=st.sampled_from([1, 7, 512]),
    seeded=st.booleans(),
)
def test_two_calls_give_what_one_call_with_the_whole_text_gives(models, name, first, count, second, chunk, seeded):
    family = models[name]
    options = dict(temp=0.9, top_p=0.9, seed=5, logprobs=3) if seeded else {}
    cache = make_prompt_cache(family[0])
    before, _ = answer(family, TEXT[:first], cache, count, prefill_step_size=chunk, **options)
    assert cache[0].offset == first + count
    held = [*TEXT[:first], *before]
    got = answer(family, BEHIND[:1] * second, cache, **options)
    same(got, answer(family, held + BEHIND[:1] * second, **options))
    assert cache[0].offset == len(held) + second + 6
    same(answer(family, BEHIND, cache), answer(family, held + BEHIND[:1] * second + got[0] + BEHIND))


def test_generate_and_batch_generate_continue_a_cache_too(family):
    model, tokenizer = family
    cache, held = filled_cache(family)
    texts = batch_generate(model, tokenizer, [BEHIND, BEHIND[:1]], [cache, None], max_tokens=5, return_prompt_caches=True)
    assert cache[0].offset == len(held)  # as with mlx-lm, they are copied
    assert texts.texts[0] == generate(model, tokenizer, held + BEHIND, max_tokens=5)
    again = answer(family, [7], texts.caches[0])
    assert generate(model, tokenizer, BEHIND, max_tokens=5, prompt_cache=cache) == texts.texts[0]
    same(again, answer(family, [7], cache))
    same(again, answer(family, cache.tokens[: -len(again[0])], None))


def test_a_sampler_and_a_processor_of_the_callers_own_see_this_calls_tokens_only(models):
    """As with mlx-lm: what the cache holds is not among the tokens that a logits processor gets."""
    family, seen = models["llama"], []
    cache, held = filled_cache(family)

    def processor(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    own = dict(logits_processors=[processor], sampler=lambda x: mx.argmax(x, -1))
    own = list(stream_generate(*family, BEHIND, max_tokens=3, prompt_cache=cache, **own))
    tokens = [r.token for r in own]
    assert seen == [BEHIND, BEHIND + tokens[:1], BEHIND + tokens[:2]]
    assert cache.tokens == held + BEHIND + tokens  # though the last pick was made outside of the engine
    assert cache[0].offset == len(held) + 6


def test_penalties_count_this_calls_tokens_only_whoever_applies_them(models):
    from metalstep.sample_utils import make_logits_processors

    family = models["llama"]
    native = make_logits_processors(repetition_penalty=3.0, repetition_context_size=50, presence_penalty=1.0, presence_context_size=50)
    own = [lambda tokens, logits, f=f: f(tokens, logits) for f in native]
    for extra in ({}, {"logits_processors": native}, {"repetition_penalty": 3.0}):
        cache, _ = filled_cache(family)
        got = [r.token for r in stream_generate(*family, BEHIND, max_tokens=12, prompt_cache=cache, **extra)]
        if extra.get("logits_processors"):
            cache, _ = filled_cache(family)
            assert got == [r.token for r in stream_generate(*family, BEHIND, max_tokens=12, prompt_cache=cache, logits_processors=own)]


# ---- trimming --------------------------------------------------------------------------------------------------------------


@FEW
@given(first=st.integers(1, 40), trimmed=st.integers(0, 50), through=st.sampled_from([trim_prompt_cache, mlx_caches.trim_prompt_cache]))
def test_a_trimmed_cache_is_that_of_the_shorter_text(models, first, trimmed, through):
    family = models["llama"]
    cache, held = filled_cache(family, TEXT[:first])
    other = copy.deepcopy(cache)
    assert can_trim_prompt_cache(cache) and mlx_caches.can_trim_prompt_cache(cache)
    took = through(cache, trimmed)
    assert took == min(trimmed, len(held))
    left = held[: len(held) - took]
    assert cache[0].offset == cache.offset == len(left)
    same(answer(family, BEHIND, cache), answer(family, left + BEHIND))
    same(answer(family, BEHIND, other), answer(family, held + BEHIND))  # its blocks were not written to


def test_what_a_window_has_passed_cannot_be_trimmed(models):
    family = models["mistral_windows"]
    short, _ = filled_cache(family, TEXT[:2], 2)
    assert trim_prompt_cache(short, 1) == 1
    long, held = filled_cache(family, TEXT[:50])
    assert not can_trim_prompt_cache(long)
    assert trim_prompt_cache(long, 10) == mlx_caches.trim_prompt_cache(long, 10) == 0
    with pytest.raises(ValueError, match="behind an attention window"):
        long.trim(10)
    same(answer(family, BEHIND, long), answer(family, held + BEHIND))
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="the number of tokens to trim is"):
            trim_prompt_cache(short, bad)


# ---- copies, and who uses it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, PromptCache.copy])
def test_a_copy_shares_blocks_and_does_not_disturb(family, way):
    cache, held = filled_cache(family, TEXT[:40])
    free = free_blocks(family[0])
    other = way(cache)
    assert free_blocks(family[0]) == free
    first, second = answer(family, BEHIND, other), answer(family, [7], cache)
    same(first, answer(family, held + BEHIND))
    same(second, answer(family, [*held, 7]))
    same(answer(family, [8], other), answer(family, [*held, *BEHIND, *first[0], 8]))


def test_a_cache_that_is_in_use_is_refused_until_its_request_has_ended(models):
    family = models["llama"]
    cache, held = filled_cache(family)
    stream = stream_generate(*family, BEHIND, max_tokens=5, prompt_cache=cache)
    first = next(stream).token
    refused = [
        lambda: next(stream_generate(*family, [1], prompt_cache=cache)),
        lambda: trim_prompt_cache(cache, 1),
        lambda: copy.deepcopy(cache),
        lambda: save_prompt_cache("never", cache),
        lambda: cache[0].state,
    ]
    for use in refused:
        with pytest.raises(ValueError, match="in use by a request that has not ended"):
            use()
    assert cache[0].offset == len(held)
    stream.close()
    assert cache.tokens == [*held, *BEHIND, first]
    same(answer(family, [1], cache), answer(family, [*held, *BEHIND, first, 1]))


@FEW
@given(name=st.sampled_from(FAMILY_NAMES), taken=st.integers(0, 12), steps=st.sampled_from([1, 8]))
def test_an_abandoned_text_leaves_what_its_caller_saw(models, name, taken, steps):
    """The engine may have been further: others drive it, or several tokens come at once."""
    family = models[name]
    engine = family[0].engine
    cache, held = filled_cache(family, TEXT[:30])
    with closing(engine.submit(Request(BEHIND, max_tokens=12, prompt_cache=cache, decode_steps=steps))) as stream:
        tokens = [next(stream).token for _ in range(taken)]
        other = engine.submit(Request(TEXT[:3], max_tokens=20))
        list(other)  # drives both
    want = held + BEHIND + tokens if taken or cache.offset != len(held) else held
    assert cache.tokens == want
    same(answer(family, [1], cache), answer(family, [*want, 1]))


def test_a_text_that_was_never_begun_leaves_the_cache_as_it_was(models):
    family = models["llama"]
    cache, held = filled_cache(family)
    stream_generate(*family, BEHIND, prompt_cache=cache).close()
    gc.collect()
    assert cache.tokens == held


def test_other_things_than_this_models_caches_are_refused(models, tmp_path):
    family = models["llama"]
    model, tokenizer = family
    mlx_cache = mlx_caches.make_prompt_cache(model.eager)
    for function, refused in (
        (lambda: list(stream_generate(model, tokenizer, [1], prompt_cache=mlx_cache)), "prompt_cache is "),
        (lambda: batch_generate(model, tokenizer, [[1]], [mlx_cache]), "prompt_cache is "),
        (lambda: batch_generate(model, tokenizer, [[1]], [5]), "prompt_cache is "),
        (lambda: answer(family, [1], filled_cache(models["gemma2"])[0]), "belongs to another model"),
        (lambda: answer(family, [1], make_prompt_cache(model, 12), max_kv_size=16), "max_kv_size is 16 and the prompt cache's 12"),
        (lambda: make_prompt_cache(model, 4), "max_kv_size is 4"),
    ):
        with pytest.raises(ValueError, match=refused):
            function()
    assert len(answer(family, [1])[0]) == 6


def test_a_dropped_cache_gives_its_blocks_back(family):
    model = family[0]
    gc.collect()
    free = free_blocks(model)
    cache, _ = filled_cache(family, TEXT)
    other = copy.deepcopy(cache)
    layer = cache[0]
    assert free_blocks(model) < free
    del cache
    gc.collect()
    with pytest.raises(ValueError, match="is gone; keep the whole list"):
        _ = layer.offset
    assert free_blocks(model) < free
    del other
    gc.collect()
    assert free_blocks(model) == free


# ---- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["talk.safetensors", "talk"])
def test_a_file_that_is_not_written_whole_leaves_the_one_from_before(family, tmp_path, monkeypatch, name):
    cache, _ = filled_cache(family, TEXT[:40])
    path, file = tmp_path / name, tmp_path / "talk.safetensors"
    save_prompt_cache(path, cache)
    before, write = file.read_bytes(), mx.save_safetensors

    def fill_the_disk(path, *args):
        write(path, *args)
        with open(path, "r+b") as file:
            file.truncate(100)
        raise RuntimeError("[write] Unable to write 20000 bytes")

    monkeypatch.setattr(mx, "save_safetensors", fill_the_disk)
    with pytest.raises(OSError, match=r"talk\.safetensors: the prompt cache cannot be written: .* 20000 bytes; a file from before"):
        save_prompt_cache(path, cache)
    assert [each.name for each in tmp_path.iterdir()] == [file.name] and file.read_bytes() == before
    monkeypatch.undo()
    with pytest.raises(OSError, match="the prompt cache cannot be written"):
        save_prompt_cache(tmp_path / "no folder" / name, cache)


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_file_gives_another_model_object_the_same_text(directories, tmp_path, name, kv_dtype):
    path = tmp_path / "cache.safetensors"
    with metalstep.load(directories[name], strict=True, kv_dtype=kv_dtype)[0] as model:
        family = model, metalstep.load(directories[name])[1]
        for length in (3, 16, 45):
            cache, held = filled_cache(family, TEXT[:length])
            save_prompt_cache(path, cache, {"of": "a test", "length": str(length)})
            want = answer(family, BEHIND, cache)
            same(want, answer(family, held + BEHIND))
            with metalstep.load(directories[name], strict=True, kv_dtype=kv_dtype)[0] as other:
                loaded, metadata = load_prompt_cache(path, return_metadata=True)
                assert metadata == {"of": "a test", "length": str(length)}
                assert loaded.tokens == held and loaded[0].offset == len(held)
                same(answer((other, family[1]), BEHIND, loaded), want)


def test_an_eager_model_takes_mlx_lms_caches(directories, tmp_path, models):
    eager, tokenizer = metalstep.load(directories["llama"], device="eager")
    cache = make_prompt_cache(eager)
    first = [r.token for r in stream_generate(eager, tokenizer, TEXT[:9], max_tokens=3, prompt_cache=cache)]
    save_prompt_cache(tmp_path / "eager.safetensors", cache)
    again = mlx_caches.load_prompt_cache(str(tmp_path / "eager.safetensors"))
    text = generate(eager, tokenizer, BEHIND, max_tokens=4, prompt_cache=again)
    assert text == generate(eager, tokenizer, TEXT[:9] + first + BEHIND, max_tokens=4)
    assert trim_prompt_cache(again, 2) == 2
    ours = load_prompt_cache(tmp_path / "eager.safetensors")
    for call in (
        lambda: list(stream_generate(eager, tokenizer, BEHIND, prompt_cache=ours)),
        lambda: batch_generate(eager, tokenizer, [BEHIND], [ours]),
    ):
        with pytest.raises(ValueError, match="for a model that runs natively"):
            call()


@settings(max_examples=30)
@given(data=st.data(), name=st.sampled_from(["llama", "mistral_windows"]))
def test_damaged_files_are_refused_by_name(models, tmp_path_factory, data, name):
    path = str(tmp_path_factory.mktemp("damaged") / "cache.safetensors")
    save_prompt_cache(path, filled_cache(models[name], TEXT[:30])[0])
    arrays, header = mx.load(path, return_metadata=True)
    key = data.draw(st.sampled_from(sorted(arrays)))
    damage = data.draw(st.sampled_from(["gone", "number", "shape", "class", "tokens"]))
    if damage == "gone":
        del arrays[key]
    elif damage == "number":
        arrays[key] = mx.array(data.draw(st.sampled_from([-1, 10**6, 2.5])))
    elif damage == "shape":
        arrays[key] = mx.zeros((1, 3, 7))
    elif damage == "class":
        header["1.0"] = "Something"
    else:
        header["0.metalstep"] = data.draw(st.sampled_from(["{", "[]", '{"tokens": [1, -5]}', '{"tokens": "many"}', '{"max_kv_size": 2}']))
    mx.save_safetensors(path, arrays, header)
    with pytest.raises(CacheFileError, match=r"cache\.safetensors: "):
        load_prompt_cache(path)


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("length", [3, 21, 50])
def test_files_go_to_mlx_lm_and_back(models, directories, tmp_path, name, length):
    """Within the tolerance of the native step, whoever filled the cache and whoever continues it."""
    family = models[name]
    eager, _ = metalstep.load(directories[name], device="eager")
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    text = TEXT[:length]
    reference = mlx_caches.make_prompt_cache(eager.eager)
    list(mlx_generate_step(mx.array(text), eager.eager, max_tokens=0, prompt_cache=reference))
    mlx_caches.save_prompt_cache(str(theirs), reference, {"by": "mlx-lm"})
    cache, metadata = load_prompt_cache(theirs, return_metadata=True)
    assert metadata == {"by": "mlx-lm"}
    assert cache[0].offset == length and cache.tokens == [-1] * length
    _, got = answer(family, BEHIND, cache, 1, ())
    _, want = answer(family, text + BEHIND, None, 1, ())
    np.testing.assert_allclose(got, want, atol=5e-3)

    cache, held = filled_cache(family, text)
    for save in (save_prompt_cache, mlx_caches.save_prompt_cache):
        save(str(ours), cache)
        loaded = mlx_caches.load_prompt_cache(str(ours))
        assert loaded[0].offset == len(held)
        logits = eager.eager(mx.array([BEHIND]), cache=loaded)[0, -1]
        logits = eager.eager(mx.array([[3]]), cache=loaded)[0, -1]
        _, want = answer(family, [*held, *BEHIND, 3], None, 1, ())
        np.testing.assert_allclose(np.array(logits - mx.logsumexp(logits)), want[0], atol=5e-3)
    again = load_prompt_cache(ours)  # as mlx-lm's function wrote it: without the tokens
    assert again.tokens == [-1] * len(held)
    same(answer(family, BEHIND, again), answer(family, BEHIND, cache))


def test_an_empty_cache_goes_to_a_file_and_back(models, tmp_path):
    family = models["mistral_windows"]
    path = str(tmp_path / "empty.safetensors")
    for save in (save_prompt_cache, mlx_caches.save_prompt_cache):
        save(path, make_prompt_cache(family[0]))
        assert all(layer.empty() for layer in mlx_caches.load_prompt_cache(path))
        cache = load_prompt_cache(path)
        assert cache[0].empty() and cache[0].offset == 0
        same(answer(family, BEHIND, cache), answer(family, BEHIND))


def test_a_loaded_cache_can_be_trimmed_copied_and_saved_before_it_is_used(models, tmp_path):
    family = models["llama"]
    path = tmp_path / "cache.safetensors"
    cache, held = filled_cache(family)
    save_prompt_cache(path, cache)
    loaded = load_prompt_cache(path)
    other = copy.deepcopy(loaded)
    assert trim_prompt_cache(loaded, 5) == 5 and loaded[0].nbytes > 0
    save_prompt_cache(path, loaded)
    same(answer(family, BEHIND, loaded), answer(family, held[:-5] + BEHIND))
    same(answer(family, BEHIND, other), answer(family, held + BEHIND))
    same(answer(family, BEHIND, load_prompt_cache(path)), answer(family, held[:-5] + BEHIND))
    assert trim_prompt_cache(other, 10**6) == len(held) + len(BEHIND) + 6
    same(answer(family, TEXT, other), answer(family, TEXT))


def test_files_that_are_no_caches_are_refused_by_name(models, tmp_path):
    cache, _ = filled_cache(models["llama"])
    with pytest.raises(ValueError, match="metadata has 'n': 3"):
        save_prompt_cache(tmp_path / "x.safetensors", cache, {"n": 3})
    quantized = [layer.to_quantized(bits=4) for layer in mlx_caches.make_prompt_cache(models["llama"][0].eager)]
    mlx_caches.save_prompt_cache(str(tmp_path / "q.safetensors"), quantized)
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"weight": mx.zeros(3)})
    (tmp_path / "t.safetensors").write_text("text")
    for name, text in (
        ("q.safetensors", "it holds QuantizedKVCache"),
        ("w.safetensors", "not a prompt cache"),
        ("t.safetensors", "not a prompt cache"),
        ("none.safetensors", "not a prompt cache"),
    ):
        with pytest.raises(CacheFileError, match=f"{name}: {text}"):
            load_prompt_cache(tmp_path / name)
    save_prompt_cache(tmp_path / "g.safetensors", filled_cache(models["gemma2"])[0])
    save_prompt_cache(tmp_path / "l.safetensors", cache)
    shallow = copy.deepcopy(cache)
    shallow.pop()
    shallow.engine = None
    with pytest.raises(ValueError, match="the prompt cache has 1 layers, the model 2; it was made for another model"):
        answer(models["llama"], BEHIND, shallow)


def test_a_file_of_another_models_layers_is_refused(models, tmp_path):
    path = str(tmp_path / "other.safetensors")
    caches = [mlx_caches.KVCache() for _ in range(2)]
    for heads, size, text in (
        (1, 16, r"has \(heads, key_dim, value_dim\) \(1, 16, 16\), the model \(2, 16, 16\)"),
        (2, 8, "it was made for another model"),
    ):
        for layer in caches:
            layer.state = (mx.zeros((1, heads, 6, size)), mx.zeros((1, heads, 6, size)), 6)
        mlx_caches.save_prompt_cache(path, caches)
        with pytest.raises(ValueError, match=text):
            answer(models["llama"], BEHIND, load_prompt_cache(path))
    small = mlx_caches.RotatingKVCache(4)
    small.state = (mx.zeros((1, 2, 4, 16)), mx.zeros((1, 2, 4, 16)), 9, 0, 4, 4)
    mlx_caches.save_prompt_cache(path, [small, small])
    with pytest.raises(ValueError, match="lacks position 0 of 9, which the model's next row sees"):
        answer(models["llama"], BEHIND, load_prompt_cache(path))


# ---- when blocks are short -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "mistral_windows"])
def cramped(request, directories):
    """A model whose KV cache holds 12 blocks of 16 tokens (in each group)."""
    need = metalstep.load(directories[request.param], strict=True)[0]
    model, tokenizer = metalstep.load(
        directories[request.param], strict=True, max_context=96, kv_memory=need.native.cache.bytes_per_token * 16 * 12
    )
    need.close()
    with model:
        yield model, tokenizer


def test_many_caches_go_to_the_host_and_come_back(cramped):
    kept = [filled_cache(cramped, [*TEXT[i : i + 30]], 3) for i in range(12)]
    assert any(cache.spilled is not None for cache, _ in kept)
    lone = [answer(cramped, held + BEHIND) for _, held in kept]
    for (cache, held), want in zip(kept, lone, strict=True):
        other = copy.deepcopy(cache)
        same(answer(cramped, BEHIND, cache), want)
        assert cache.tokens == held + BEHIND + want[0]
        same(answer(cramped, BEHIND, other), want)
    for cache, held in kept:
        if can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, 6 + len(BEHIND))
            same(answer(cramped, BEHIND, cache), answer(cramped, held + BEHIND))


def test_spilled_caches_can_be_saved(cramped, tmp_path):
    kept = [filled_cache(cramped, TEXT[i : i + 30], 3) for i in range(12)]
    for i, (cache, held) in enumerate(kept):
        save_prompt_cache(tmp_path / f"{i}.safetensors", cache)
        same(answer(cramped, BEHIND, load_prompt_cache(tmp_path / f"{i}.safetensors")), answer(cramped, held + BEHIND))


def test_more_requests_with_caches_than_fit_at_once(cramped, tmp_path):
    """They are preempted; those whose cache came from a file without tokens are saved and restored."""
    model, _ = cramped
    kept = [filled_cache(cramped, TEXT[i : i + 20], 3) for i in range(8)]
    lone = [answer(cramped, held + BEHIND, count=30)[0] for _, held in kept]
    caches = []
    for i, (cache, _) in enumerate(kept):
        path = str(tmp_path / f"{i}.safetensors")
        (save_prompt_cache if i % 2 else mlx_caches.save_prompt_cache)(path, cache)
        caches.append(load_prompt_cache(path) if i < 5 else cache)
    preempted = model.engine.stats().preemptions
    streams = [stream_generate(*cramped, BEHIND, max_tokens=30, prompt_cache=cache, banned_token_ids=[0]) for cache in caches]
    got = [[] for _ in streams]
    for _ in range(30):
        for tokens, stream in zip(got, streams, strict=True):
            tokens.append(next(stream).token)
    assert got == lone
    assert model.engine.stats().preemptions > preempted
    for cache, tokens in zip(caches, got, strict=True):
        same(answer(cramped, [4], copy.deepcopy(cache), 1), answer(cramped, [4], cache, 1))
        assert cache.offset == 23 + 3 + len(tokens) + 2


def test_a_cache_larger_than_what_is_left_is_recomputed_or_refused_but_not_lost(cramped):
    model, tokenizer = cramped
    cache, held = filled_cache(cramped, TEXT[:50], 40)
    with pytest.raises(ValueError, match="90 of them in the prompt cache"):
        list(stream_generate(model, tokenizer, TEXT[:20], prompt_cache=cache))
    assert cache.tokens == held
    same(answer(cramped, [4], cache, 2), answer(cramped, [*held, 4], None, 2))
