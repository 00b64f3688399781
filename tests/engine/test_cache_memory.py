"""How the KV cache's memory is divided, stored in files, and asked for."""
from __future__ import annotations

import numpy as np
import pytest
from families import BASE, build
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import write_model

import metalstep
from metalstep.kernels.kv_codec import NAMES, KVCodec
from metalstep.kv_cache import BLOCK_SIZE, CacheGroup, LayerShape, cache_capacity, from_blocks, to_blocks
from metalstep.memory_size import free_memory, memory_size

sizes = st.integers(1, 40)
codecs = st.builds(KVCodec, st.sampled_from(NAMES), st.sampled_from(["float16", "float32"]))
dims = st.sampled_from([64, 80, 96, 128, 256])
shapes = st.builds(LayerShape, sizes, sizes, sizes) | st.builds(LayerShape, sizes, dims, dims, codecs, codecs)
groups = st.lists(st.tuples(st.none() | st.integers(1, 400), st.lists(shapes, min_size=1, max_size=3)), min_size=1, max_size=4).map(
    lambda rows: [CacheGroup(window, dict(enumerate(layers))) for window, layers in rows]
)
limits = st.fixed_dictionaries({"context": st.integers(1, 3000), "max_seqs": st.integers(1, 64), "chunk": st.integers(1, 512)})
budgets = st.integers(1, 10**9)


def needed(group, context, chunk):
    """Blocks that one sequence uses at most."""
    blocks = -(-context // BLOCK_SIZE)
    return blocks if group.window is None else min(blocks, -(-(group.window + chunk) // BLOCK_SIZE) + 1)


@given(groups=groups, budget=budgets, limits=limits)
def test_a_capacity_keeps_the_budget_and_is_never_more_than_asked(groups, budget, limits):
    capacity = cache_capacity(groups, budget=budget, **limits)
    assert 0 <= capacity.tokens <= limits["context"]
    if capacity.tokens:  # else loading is refused
        used = sum(n * BLOCK_SIZE * g.token_bytes for n, g in zip(capacity.num_blocks, groups, strict=True))
        assert used <= budget
    for count, group in zip(capacity.num_blocks, groups, strict=True):
        assert count <= needed(group, limits["context"], limits["chunk"]) * limits["max_seqs"]


@given(groups=groups, budget=budgets, limits=limits)
def test_a_sequence_of_the_capacitys_tokens_has_its_blocks(groups, budget, limits):
    capacity = cache_capacity(groups, budget=budget, **limits)
    for count, group in zip(capacity.num_blocks, groups, strict=True):
        assert not capacity.tokens or count >= needed(group, capacity.tokens, limits["chunk"])


@given(groups=groups, budgets=st.tuples(budgets, budgets).map(sorted), limits=limits)
def test_more_memory_is_never_a_smaller_cache(groups, budgets, limits):
    less, more = (cache_capacity(groups, budget=budget, **limits) for budget in budgets)
    assert less.tokens <= more.tokens
    assert all(a <= b for a, b in zip(less.num_blocks, more.num_blocks, strict=True))


@given(groups=groups, limits=limits)
def test_memory_without_end_gives_all_that_the_sequences_can_use(groups, limits):
    capacity = cache_capacity(groups, budget=10**15, **limits)
    assert capacity.tokens == limits["context"]
    for count, group in zip(capacity.num_blocks, groups, strict=True):
        assert count == needed(group, limits["context"], limits["chunk"]) * limits["max_seqs"]


@given(heads=st.integers(1, 4), tokens=st.integers(1, 50), key_dim=st.integers(1, 9), value_dim=st.integers(1, 9))
@example(heads=1, tokens=BLOCK_SIZE, key_dim=1, value_dim=1)
def test_blocks_are_keys_and_values_in_another_order(heads, tokens, key_dim, value_dim):
    keys = np.arange(1, heads * tokens * key_dim + 1, dtype=np.float32).reshape(heads, tokens, key_dim)
    values = -np.arange(1, heads * tokens * value_dim + 1, dtype=np.float32).reshape(heads, tokens, value_dim)
    blocks = to_blocks(keys, values)
    count = -(-tokens // BLOCK_SIZE)
    assert blocks[0].shape == (count, heads, BLOCK_SIZE, key_dim) and blocks[1].shape == (count, heads, BLOCK_SIZE, value_dim)
    assert [np.count_nonzero(b) for b in blocks] == [keys.size, values.size]  # padded with zeros
    again = from_blocks(blocks, tokens)
    np.testing.assert_array_equal(again[0], keys)
    np.testing.assert_array_equal(again[1], values)
    np.testing.assert_array_equal(blocks[0][-1, :, (tokens - 1) % BLOCK_SIZE], keys[:, -1])


@given(count=st.integers(1, 2**45), space=st.sampled_from(["", " "]))
def test_a_size_is_bytes_or_a_number_with_a_unit(count, space):
    assert memory_size("it", count) == memory_size("it", str(count)) == count
    for unit, factor in {"k": 1000, "M": 10**6, "GB": 10**9, "tb": 10**12, "KiB": 2**10, "mi": 2**20, "GiB": 2**30, "TiB": 2**40}.items():
        assert memory_size("it", f"{space}{count}{space}{unit}{space}") == count * factor
    assert memory_size("it", f"{count}.5kb") == count * 1000 + 500
    assert memory_size("it", "9" * 400 + "GB") == int("9" * 400) * 10**9


def test_a_fraction_is_of_the_free_memory():
    for whole, part in ((1.0, 0.5), ("1.0", ".5")):
        assert 0 < memory_size("it", part) < memory_size("it", whole)
    assert memory_size("it", 1.0) == pytest.approx(free_memory(), rel=0.3)  # other processes take and free meanwhile


BAD = ["", "much", "2 bytes", "1,5GB", "1e9", "-1GB", "0", "0GB", "1.5", "0.0", "GB", "1XB", 0, -1, 1.5, 0.0, -0.5, True, [], b"1GB"]
BAD += [2 + 0j, float("nan"), float("inf")]


@pytest.mark.parametrize("value", BAD)
def test_anything_else_is_no_size(value):
    with pytest.raises(ValueError, match=r"^it is .*, expected bytes \(2_000_000_000\), a size"):
        memory_size("it", value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), build("llama", quantized=False), {"model_type": "llama", **BASE})


@pytest.mark.parametrize("value", ["much", "1.5", 0, -1, 1.5, True])
def test_loading_refuses_what_is_no_size(llama, value):
    with pytest.raises(ValueError, match=r"^kv_memory is .*, expected bytes"):
        metalstep.load(llama, strict=True, kv_memory=value)


def test_loading_refuses_memory_that_holds_no_block(llama):
    with pytest.raises(ValueError, match=r"a KV cache of 1 bytes holds 0 tokens, .* load with a larger kv_memory"):
        metalstep.load(llama, strict=True, kv_memory=1)


def test_loading_takes_no_more_than_the_memory(llama):
    for kv_memory in (100_000, "100kB", "1MB"):
        model, _ = metalstep.load(llama, strict=True, kv_memory=kv_memory)
        with model:
            cache = model.native.cache
            blocks = zip(model.native.num_blocks, cache.groups, strict=True)
            used = sum(n * BLOCK_SIZE * group.token_bytes for n, group in blocks)
            assert 0 < used <= memory_size("kv_memory", kv_memory)
