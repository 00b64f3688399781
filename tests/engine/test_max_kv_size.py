"""max_kv_size: a row sees the first 4 positions and the last ones; blocks behind them are given back."""
import copy

import mlx.core as mx
import numpy as np
import pytest
from families import BASE, FAMILIES, VOCAB, build
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import cache as mlx_caches
from tiny import write_model

import metalstep
from metalstep import Request, batch_generate, generate, stream_generate
from metalstep.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache

KEPT = 4
TEXT = [(11 * i + 5) % (VOCAB - 1) + 1 for i in range(90)]
RANGE = 1e-3  # of a row's range of logits, as in test_native_families


class Masked(mlx_caches.KVCache):
    """mlx-lm's cache, with what max_kv_size lets a row see as an explicit mask. window: the layer's own."""

    def __init__(self, size, window=None):
        super().__init__()
        self.size, self.window = size, window

    def make_mask(self, N, return_array=False, window_size=None):
        rows = np.arange(self.offset, self.offset + N)[:, None]
        columns = np.arange(self.offset + N)[None]
        back = rows - columns
        seen = (back >= 0) & ((columns < KEPT) | (back < self.size - KEPT))
        window = window_size or self.window
        return mx.array(seen if window is None else seen & (back < window))


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def family(request, tmp_path_factory):
    """(model, tokenizer, mlx-lm's model); gemma3_text has layers with a window of 8 of their own."""
    name = request.param
    config = {"model_type": FAMILIES[name].model_type, **BASE, **FAMILIES[name].config, "max_position_embeddings": 2048}
    directory = write_model(tmp_path_factory.mktemp(name), build(name, quantized=False), config)
    model, tokenizer = metalstep.load(directory, strict=True)
    with model:
        yield model, tokenizer, metalstep.load(directory, device="eager")[0].eager


def windows_of(model):
    return [cache.max_size if isinstance(cache, mlx_caches.RotatingKVCache) else None for cache in mlx_caches.make_prompt_cache(model)]


@settings(max_examples=15)
@given(size=st.integers(5, 100), length=st.integers(1, 90), chunk=st.sampled_from([1, 5, 512]))
def test_every_row_sees_the_first_four_positions_and_the_last_ones(family, size, length, chunk):
    model, _, eager = family
    text = TEXT[:length]
    caches = [Masked(size, window) for window in windows_of(eager)]
    want = np.array(eager(mx.array([text]), cache=caches)[0])
    got = np.stack(model.engine.collect(Request(text, max_tokens=0, max_kv_size=size, prefill_rows=chunk)))
    spread = want.max(-1) - want.min(-1)
    assert (np.abs(got - want).max(-1) <= RANGE * spread).all()
    if length <= size:
        np.testing.assert_array_equal(got, np.stack(model.engine.collect(Request(text, max_tokens=0))))


@settings(max_examples=10)
@given(size=st.integers(5, 60), first=st.integers(1, 60), count=st.integers(1, 30))
def test_decodes_and_caches_give_the_bits_of_one_prompt(family, size, first, count):
    model, tokenizer, _ = family
    cache = make_prompt_cache(model, size)
    other = make_prompt_cache(model, size)
    tokens = answer(family, TEXT[:first], count, prompt_cache=cache)
    assert tokens == answer(family, TEXT[:first], count, max_kv_size=size)
    held = [*TEXT[:first], *tokens]
    after = answer(family, [3, 4], 5, prompt_cache=copy.deepcopy(cache), max_kv_size=size)
    assert after == answer(family, [*held, 3, 4], 5, prompt_cache=other)
    batch = batch_generate(model, tokenizer, [[3, 4], [*held, 3, 4]], [cache, None], 5, max_kv_size=size, return_prompt_caches=True)
    assert batch.texts[0] == batch.texts[1] == generate(model, tokenizer, [*held, 3, 4], max_tokens=5, max_kv_size=size)
    assert [c.max_kv_size for c in batch.caches] == [size, size]


def answer(family, prompt, count, **options):
    return [r.token for r in stream_generate(*family[:2], prompt, max_tokens=count, banned_token_ids=[0], **options)]


def test_memory_is_bounded(family):
    model = family[0]
    before = model.engine.stats()
    size, text = 64, TEXT * 15
    bound = 1 + (size - KEPT + 512) // 16 + 2  # the kept block, and what a step's rows and the window span
    for cache in (None, make_prompt_cache(model, size)):
        stream = stream_generate(*family[:2], text, max_tokens=200, max_kv_size=size, prompt_cache=cache, banned_token_ids=[0])
        used = [before.free_blocks - model.engine.stats().free_blocks for _ in stream]
        assert len(used) == 200
        assert 0 < max(used) <= bound
        assert max(used[10:]) <= size // 16 + 3  # decodes need no more
    assert len(text) // 16 > bound


def test_it_is_a_ring_buffer_to_mlx_lm(family, tmp_path):
    model, _, eager = family
    path = str(tmp_path / "cache.safetensors")
    cache = make_prompt_cache(model, 24)
    tokens = answer(family, TEXT[:50], 4, prompt_cache=cache)
    if any(windows_of(eager)):
        with pytest.raises(ValueError, match="mlx-lm has no cache with max_kv_size for a model with windows of its own"):
            save_prompt_cache(path, cache)
        return
    for save in (save_prompt_cache, mlx_caches.save_prompt_cache):
        save(path, cache)
        theirs = mlx_caches.load_prompt_cache(path)
        assert {type(layer) for layer in theirs} == {mlx_caches.RotatingKVCache}
        assert (theirs[0].offset, theirs[0].max_size, theirs[0].keep, theirs[0].size()) == (54, 24, KEPT, 24)
        ours = load_prompt_cache(path)
        assert ours.max_kv_size == 24 and ours[0].offset == 54 and ours[0].size() == 24
        assert trim_prompt_cache(ours, 3) == 0
        one_by_one = []
        for token in (3, 4, 5):
            one_by_one.append(np.array(eager(mx.array([[token]]), cache=theirs)[0, -1]))
        want = model.engine.collect(Request([*TEXT[:50], *tokens, 3, 4, 5], max_tokens=0, max_kv_size=24))[-3:]
        np.testing.assert_array_equal(model.engine.collect(Request([3, 4, 5], max_tokens=0, prompt_cache=ours)), want)
        assert (np.abs(np.array(one_by_one) - want) <= RANGE * np.ptp(want)).all()
        mlx_caches.save_prompt_cache(path, theirs)  # its buffer has turned
        again = load_prompt_cache(path)
        got = model.engine.collect(Request([7], max_tokens=0, prompt_cache=again))
        want = model.engine.collect(Request([7], max_tokens=0, prompt_cache=ours))
        assert (np.abs(got[0] - want[0]) <= RANGE * np.ptp(want[0])).all()


def test_sizes_that_keep_nothing_are_refused(family):
    for size in (0, 4, -1, 7.5, True):
        with pytest.raises(ValueError, match="max_kv_size is"):
            answer(family, [1], 1, max_kv_size=size)
        with pytest.raises(ValueError, match="max_kv_size is"):
            make_prompt_cache(family[0], size)
