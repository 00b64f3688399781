"""Decode attention by half tiles, which GPUs of kind nvidia have: against softmax over what the cache holds, within bounds of rounding."""
from functools import partial
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from gpu_attention import Cache, PackedCache
from gpu_attention_layer import Layer
from gpu_harness import GpuHarness
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_attention_packed import LAYERS, WINDOWS, PackedLayer, codec, queries

from metalstep.kernels import attention as plain
from metalstep.kernels.gpu import attention, attention_geometry, attention_tiles
from metalstep.kernels.kv_codec import KVCodec

NVIDIA = dict(kind="nvidia")
HALF = 2.0**-11  # of a number, at most, by rounding to half
NAMES = ["float16", "affine8", "turbo2", "turbo3", "turbo4", "turbo2w", "turbo4w"]
# (keys, values, head_dim, value_dim, query heads of a kv head): each codec on both sides with each number of elements; one slice of
# heads and several, results merged at once and in turns.
COVERING = [
    ("float16", "float16", 128, 128, 2), ("float16", "float16", 64, 64, 7), ("turbo4", "turbo2", 128, 128, 4),
    ("turbo4", "turbo2", 64, 128, 8), ("turbo3", "turbo4w", 128, 64, 3), ("affine8", "turbo3", 64, 64, 1),
    ("turbo2w", "affine8", 128, 128, 9), ("affine8", "affine8", 64, 128, 2), ("turbo2", "turbo4", 64, 64, 12),
    ("float16", "turbo3", 128, 128, 5), ("turbo4w", "float16", 64, 64, 16),
]  # fmt: skip
ALL = [(k, v, *dims, 1 + i % 9) for i, (k, v, dims) in enumerate(product(NAMES, NAMES, product(attention_tiles.DIMS, repeat=2)))]
INSTANCES = [pytest.param(*case, id=str(case)) for case in COVERING] + [
    pytest.param(*case, marks=pytest.mark.all_instances, id=f"all-{case}") for case in ALL
]
PAIRS = st.sampled_from([("float16", "float16"), ("turbo4", "turbo2"), ("affine8", "affine8"), ("turbo3", "float16")])


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def cache_of(h, rng, lengths, pair, **options):
    if pair == ("float16", "float16"):
        return Cache(h, rng, lengths, **{"head_dim": 64, "dtype": "float16", **options})
    return PackedCache(h, rng, lengths, *map(codec, pair), **{"head_dim": 64, **options})


def layer_of(h, seed, lengths, group, pair, **options):
    if pair == ("float16", "float16"):
        return Layer(h, seed, lengths, group, **{"head_dim": 64, "dtype": "float16", **options})
    return PackedLayer(h, seed, lengths, group, tuple(map(codec, pair)), **{"head_dim": 64, **options})


def allowed(cache, q, rows, *, window=0, softcap=0.0, sinks=None, windows=None):
    """Errors [rows, q heads, value_dim]: queries and what codes of keys stand for are rounded to half, and so are weights and elements of
    values. Rotated values have their errors anywhere, but no more of them."""
    found = []
    for row, (s, p) in zip(q, rows, strict=True):
        keys, values = mx.array(cache.keys[s]), mx.array(cache.values[s])
        seen = plain.visible(p, window, *(windows[s] if windows else (0, 0)))
        group = row.shape[0] // cache.heads
        products = mx.repeat(mx.abs(keys[:, seen]), group, axis=0) @ mx.abs(mx.array(row))[:, :, None]
        scores = np.array(products)[..., 0].max(1, initial=0) * cache.dims[0] ** -0.5 * 2 * HALF
        sizes = mx.linalg.norm(values, axis=-1, keepdims=True) if cache.codecs[1].is_turbo else mx.abs(values)
        size = plain.reference(mx.array(row), keys, mx.broadcast_to(sizes, values.shape), p, cache.dims[0] ** -0.5, window, softcap,
                               None if sinks is None else mx.array(sinks), *(windows[s] if windows else ()))  # fmt: skip
        found.append((2 * scores[:, None] + 3 * HALF) * np.array(size) + 1e-5)
    return np.stack(found)


def check(cache, got, q, rows, **options):
    error = np.abs(got - cache.expected(q, rows, **options))
    assert (error <= allowed(cache, q, rows, **options)).all(), error.max()


@pytest.mark.parametrize("k_name, v_name, head_dim, value_dim, group", INSTANCES)
def test_ragged_rows_agree_with_the_reference(h, k_name, v_name, head_dim, value_dim, group):
    """Contexts on both sides of a block and of a tile, in one piece and in several."""
    rng = np.random.default_rng(head_dim)
    cache = cache_of(h, rng, [1, 17, 70], (k_name, v_name), head_dim=head_dim, value_dim=value_dim)
    rows = [(0, 0), (1, 16), (1, 3), (2, 15), (2, 31), (2, 32), (2, 33), (2, 69)]
    q = queries(rng, rows, 2 * group, head_dim)
    for pieces in ({}, dict(splits=3, split_len=32)):
        check(cache, cache.attend(q, rows, **NVIDIA, **pieces), q, rows)


@given(
    pair=PAIRS,
    group=st.sampled_from([1, 3, 8, 9]),
    heads=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 200), min_size=2, max_size=2),
    windows=st.lists(WINDOWS, min_size=2, max_size=2),
    window=st.sampled_from([0, 0, 5, 40]),
    softcap=st.sampled_from([0.0, 0.7]),
    sinks=st.booleans(),
    pieces=st.sampled_from([{}, dict(splits=4, split_len=32), dict(splits=40, split_len=16), dict(splits=2, split_len=24)]),
    block=st.sampled_from([16, 64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_windows_caps_sinks_and_pieces_agree_with_the_reference(
    h, pair, group, heads, lengths, windows, window, softcap, sinks, pieces, block, seed
):
    rng = np.random.default_rng(seed)
    cache = cache_of(h, rng, lengths, pair, kv_heads=heads, block=block)
    rows = [(s, int(rng.integers(n))) for s, n in enumerate(lengths) for _ in range(3)]
    q = queries(rng, rows, group * heads)
    options = dict(window=window, softcap=softcap, windows=windows)
    options |= dict(sinks=rng.standard_normal(group * heads).astype(np.float32) if sinks else None)
    check(cache, cache.attend(q, rows, **NVIDIA, **pieces, **options), q, rows, **options)


@given(
    pair=PAIRS,
    block=st.sampled_from([16, 32]),
    **LAYERS,
)
@settings(max_examples=40, deadline=None)
def test_what_is_done_inside_agrees_with_the_references(
    h, pair, norms, dims, traditional, lengths, splits, window, own, softcap, sinks, block, seed
):
    options = dict(dims=dims, traditional=traditional, q_norm=norms[0], k_norm=norms[1], block=block)
    layer = layer_of(h, seed, lengths, 3, pair, **options)
    logits = np.random.default_rng(seed).standard_normal(layer.heads).astype(np.float32) if sinks else None
    options = dict(splits=splits, split_len=32, window=window, windows=[own] * len(lengths), softcap=softcap, sinks=logits)
    layer.check(partial(allowed, layer.cache), **NVIDIA, **options)


@pytest.mark.parametrize("k_name, v_name, head_dim, value_dim, group", INSTANCES)
def test_ragged_sequences_agree_with_the_references_inside(h, k_name, v_name, head_dim, value_dim, group):
    """New positions that begin a sequence, begin and end a block, and lie within one."""
    layer = layer_of(h, head_dim, [1, 16, 17, 70], group, (k_name, v_name), head_dim=head_dim, value_dim=value_dim)
    layer.check(partial(allowed, layer.cache), **NVIDIA)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("pair", [("float16", "float16"), ("turbo4", "turbo2"), ("affine8", "turbo3")])
def test_the_new_position_counts_as_the_cache_holds_it(h, splits, pair):
    """Attention alone over what the launch wrote, of queries that need nothing inside, gives the same bits."""
    layer = layer_of(h, 0, [1, 40, 100], 3, pair, dims=0, q_norm=None)
    options = dict(splits=splits, split_len=48, **NVIDIA)
    got = layer.attend(**options)
    np.testing.assert_array_equal(layer.cache.attend(layer.q, layer.rows, **options), got)


@given(pair=PAIRS, splits=st.sampled_from([1, 3]), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_a_row_is_the_same_bits_alone_and_in_any_batch(h, pair, splits, seed):
    lengths = np.random.default_rng(seed).integers(1, 120, 4)
    layer = layer_of(h, seed, [int(n) for n in lengths], 3, pair)
    options = dict(splits=splits, split_len=48, invariant=True, **NVIDIA)
    together, planes = layer.attend(**options), layer.planes()
    layer.forget()
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(layer.attend(order, **options), together[order])
    layer.forget()
    np.testing.assert_array_equal(np.concatenate([layer.attend([i], **options) for i in range(4)]), together)
    for now, before in zip(layer.planes(), planes, strict=True):
        np.testing.assert_array_equal(now, before)


@given(length=st.integers(1, 200), window=st.sampled_from([0, 20, 64]), pair=PAIRS, seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_a_row_of_one_piece_is_the_same_bits_with_any_number_of_splits(h, length, window, pair, seed):
    """A piece has whole tiles: of 64 positions that begin anywhere there may be five."""
    rng = np.random.default_rng(seed)
    cache = cache_of(h, rng, [length, 150], pair)
    rows = [(0, length - 1), (1, 149)]
    q = queries(rng, rows, 6)
    whole, pieces = (cache.attend(q, rows, splits=n, split_len=64, window=window, invariant=True, **NVIDIA) for n in (1, 3))
    for i, seen in enumerate((length, 150)):
        first = max(0, seen - window) if window else 0
        if (seen - 1) // 16 - first // 16 < 4:
            np.testing.assert_array_equal(pieces[i], whole[i])


@pytest.mark.parametrize("pair", [("float16", "float16"), ("turbo4", "turbo2")])
@pytest.mark.parametrize("splits", [1, 3])
def test_halves_are_the_floats_rounded(h, pair, splits):
    """And finite ones stay finite: values near the greatest half, of one position, come out as they are."""
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [1, 100], pair)
    rows = [(0, 0), (1, 99)]
    q = queries(rng, rows, 6)
    floats, halves = (cache.attend(q, rows, splits=splits, split_len=32, out_dtype=dtype, **NVIDIA) for dtype in ("float32", "float16"))
    assert halves.dtype == np.float16
    np.testing.assert_array_equal(halves, np.clip(floats, -65504, 65504).astype(np.float16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_does_not_see_later_positions_of_its_tile(h, value):
    """What a later row wrote, even NaN, is no part of an earlier row's result; and it is not hidden from later ones."""
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [140], ("float16", "float16"), kv_heads=1)
    rows = [(0, p) for p in range(125, 137)]
    q = queries(rng, rows, 3)
    before = cache.attend(q, rows, **NVIDIA)
    cache.values[0][:, 131:] = value
    cache.keys[0][:, 133:] = value
    cache.write(0, range(131, 140))
    after = cache.attend(q, rows, **NVIDIA)
    np.testing.assert_array_equal(after[:6], before[:6])
    assert not np.isfinite(after[6:]).any()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("affine8", "affine8")])
def test_a_vector_that_was_not_finite_is_seen_by_those_who_see_it(h, pair, which):
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [60, 40], pair)
    rows = [(0, 20), (0, 59), (1, 39)]
    q = queries(rng, rows, 6)
    before = cache.attend(q, rows, **NVIDIA)
    cache.spoil(which, 0, [30])
    after = cache.attend(q, rows, **NVIDIA)
    assert np.isnan(after[1]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("turbo4w", "turbo4w")])
@pytest.mark.parametrize("size", [0.0, 1e-6, 300.0])
def test_values_of_any_size_keep_their_precision(h, pair, size):
    """Scales of values are part of the weights: neither what they are nor that some are zero costs bits."""
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [90], pair, size=size)
    rows = [(0, 5), (0, 89)]
    q = queries(rng, rows, 6)
    check(cache, cache.attend(q, rows, splits=2, split_len=48, **NVIDIA), q, rows)


@pytest.mark.parametrize("window, keep", [(64, 20), (30, 16)])
def test_blocks_between_the_kept_positions_and_the_window_are_not_seen(h, window, keep):
    """They are freed: their entries name a block of NaN, and what they held is overwritten with it."""
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [200], ("float16", "float16"))
    where = [(0, 199), (0, 190)]
    q = queries(rng, where, 6)
    options = dict(windows=[(window, keep)], **NVIDIA)
    before = cache.attend(q, where, **options)
    freed = slice(-(-keep // 16), (191 - (window - keep)) // 16)
    for planes in (cache.keys, cache.values):
        planes[0][:, freed.start * 16 : freed.stop * 16] = np.nan
    cache.write(0, range(freed.start * 16, freed.stop * 16))
    cache.tables[0, freed] = cache.spare
    np.testing.assert_array_equal(cache.attend(q, where, **options), before)
    assert freed.stop - freed.start > 3 and np.isfinite(before).all()


@pytest.mark.parametrize("pair", [("float16", "float16"), ("turbo4", "turbo2"), ("affine8", "turbo3")])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_negative_slot_is_not_written(h, splits, pair):
    """Its row attends to its own key and value all the same, and other rows to theirs."""
    layer = layer_of(h, 0, [30, 100], 9, pair)
    options = dict(splits=splits, split_len=48, **NVIDIA)
    whole = layer.attend(**options)
    layer.forget()
    np.testing.assert_array_equal(layer.attend(slots=[-1, layer.slots[1]], **options), whole)
    layer.forget()
    np.testing.assert_array_equal(layer.attend(slots=[-1, -1], **options), whole)
    for now, before in zip(layer.planes(), layer.before, strict=True):
        np.testing.assert_array_equal(now.view(np.uint8), before.view(np.uint8))


def test_a_row_without_a_place_in_the_tables_is_nan(h):
    cache = cache_of(h, np.random.default_rng(0), [3], ("float16", "float16"), kv_heads=1)
    got = cache.attend(np.ones((5, 1, 64), np.float32), [(0, 2), (0, -1), (7, 0), (-1, 0), (0, 16)], **NVIDIA)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1:]).all()


@pytest.mark.parametrize("count", [1, 5, 33])
def test_rows_that_the_step_does_not_have_are_left(h, count):
    rng = np.random.default_rng(count)
    cache = cache_of(h, rng, [60], ("turbo4", "turbo2"))
    rows = [(0, p) for p in range(20, 20 + count)]
    q = queries(rng, rows, 6)
    longer = np.concatenate([q, np.full((40 - count, 6, 64), np.nan, np.float32)])
    got = cache.attend(longer, rows, max_rows=40, splits=2, split_len=32, **NVIDIA)
    check(cache, got[:count], q, rows)
    assert np.isnan(got[count:]).all()


@pytest.mark.parametrize("pair", [("float16", "float16"), ("turbo4", "turbo2")])
def test_the_order_of_threads_does_not_matter(h, monkeypatch, pair):
    layer = layer_of(h, 0, [30, 100], 4, pair)
    results = []
    for seed in range(6):
        monkeypatch.setenv("METALSTEP_SIM_SEED", str(seed))
        layer.forget()
        results.append([layer.attend(splits=2, split_len=48, **NVIDIA), *layer.planes()])
    for result in results[1:]:
        for now, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(now, first)


@pytest.mark.parametrize("options", [dict(dtype="bfloat16"), dict(dtype="float32"), dict(head_dim=80), dict(block=8)], ids=str)
def test_what_tiles_do_not_take_is_as_on_apple(h, options):
    """To the bit, in one piece and in several; halves are those results rounded."""
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [40, 100], ("float16", "float16"), **options)
    rows = [(0, 39), (1, 99)]
    q = queries(rng, rows, 6, cache.dims[0])
    for pieces in ({}, dict(splits=3, split_len=48)):
        want = cache.attend(q, rows, **pieces)
        np.testing.assert_array_equal(cache.attend(q, rows, **NVIDIA, **pieces), want)
        np.testing.assert_array_equal(cache.attend(q, rows, out_dtype="float16", **NVIDIA, **pieces), want.astype(np.float16))


# ---- which caches, and how work is divided --------------------------------------------------------------------------------------
def test_tiles_take_halves_and_codes_of_whole_runs_in_blocks_of_whole_tiles():
    half, turbo, affine = KVCodec("float16"), KVCodec("turbo4"), KVCodec("affine8")
    assert all(attention_tiles.takes("nvidia", 128, 64, 16, k, v) for k, v in product((half, turbo, affine), repeat=2))
    assert not attention_tiles.takes("apple", 128, 128, 16, half, half)
    assert not attention_tiles.takes("nvidia", 128, 128, 8, half, half)
    assert not any(attention_tiles.takes("nvidia", dim, 128, 16, half, half) for dim in (80, 96, 256))
    assert not any(attention_tiles.takes("nvidia", 128, 128, 16, KVCodec(name), turbo) for name in ("bfloat16", "float32"))


@pytest.mark.parametrize("kind", list(attention_tiles.TUNING))
@pytest.mark.parametrize("k_name, v_name", [("float16", "float16"), ("turbo4", "turbo4"), ("affine8", "turbo2")])
def test_heads_are_divided_evenly_and_merged_within_the_memory(kind, k_name, v_name):
    codecs, tuning = (KVCodec(k_name), KVCodec(v_name)), attention_tiles.TUNING[kind]
    for group, dim, rows, splits, invariant in product(range(1, 40), attention_tiles.DIMS, (1, 8, 64), (1, 8), (False, True)):
        g = attention_tiles.geometry(
            kind, group, 8, dim, *codecs, rows=rows, splits=splits, split_len=1024, invariant=invariant
        )  # fmt: skip
        assert g.heads <= attention_tiles.HEADS and -(-group // g.heads) == -(-group // attention_tiles.HEADS)
        assert 1 <= g.merged <= g.heads and g.simdgroups * g.merged * dim * 4 <= tuning.merged_bytes
        assert g.simdgroups * g.share * attention_geometry.SIMD <= 1024


def test_where_batches_are_invariant_neither_rows_nor_contexts_change_the_kernel():
    half = KVCodec("float16")
    shapes = set()
    for rows, context in product((1, 3, 64), (1, 1024, 1025, 100_000)):
        splits, split_len = attention.pieces("nvidia", rows, context, invariant=True)
        g = attention_tiles.geometry("nvidia", 4, 8, 128, half, half, rows=rows, splits=splits, split_len=split_len, invariant=True)
        shapes.add((split_len, g))
    assert len(shapes) == 1


@pytest.mark.parametrize("kind", ["apple", "nvidia"])
@given(rows=st.integers(1, 64), context=st.integers(1, 1 << 20), kv_heads=st.integers(1, 64), invariant=st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_have_all_of_a_context_and_whole_tiles(kind, rows, context, kv_heads, invariant):
    splits, split_len = attention.pieces(kind, rows, context, kv_heads=kv_heads, invariant=invariant)
    assert splits * split_len >= context
    assert split_len % attention_tiles.TILE == 0 and splits & (splits - 1) == 0
    assert splits == 1 or (splits // 2) * split_len < context or split_len * splits < 2 * context


def test_more_rows_have_fewer_pieces():
    for context in (1, 300, 1024, 8192, 100_000):
        splits = [attention.pieces("nvidia", rows, context)[0] for rows in (1, 2, 4, 8, 16, 32, 64)]
        assert splits == sorted(splits, reverse=True)
