"""Attention on a GPU over keys and values that are codes: against softmax over what they decode to, in float32."""
from functools import partial
from itertools import product

import numpy as np
import pytest
from gpu_attention import PackedCache, vectors
from gpu_attention_layer import KEY_ERROR, Layer
from gpu_harness import GpuHarness
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_attention import OTHER_TUNING

from metalstep.kernels import kv_codec, turboquant
from metalstep.kernels.gpu import attention, attention_geometry
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer

# Beside the order of sums, as for floats: a rotation of the queries and one of the result, each some ten sums and a product.
TOLERANCE = 1e-5
VARIANTS = ("decode", "mixed")
WIDE = {"turbo2w": "turbo2", "turbo3w": "turbo3", "turbo4w": "turbo4"}  # with scales of float32


def codec(name, scale="matched"):
    return KVCodec(WIDE[name], "float32", scale) if name in WIDE else KVCodec(name, scale=scale)


# (codec of keys, of values, head_dim, value_dim, query heads of a kv head): each codec on both sides, with dims of every base, lanes
# without elements, elements in parts, several slices.
COVERING = [
    ("turbo4", "turbo2", 64, 64, 4), ("turbo3", "turbo4w", 80, 80, 2), ("affine8", "turbo3", 128, 128, 4),
    ("float16", "turbo4", 96, 96, 3), ("turbo2w", "affine8", 256, 256, 2), ("turbo3w", "turbo3w", 48, 112, 5),
    ("affine8", "affine8", 16, 80, 1), ("turbo2", "float32", 128, 64, 9), ("turbo4w", "turbo2w", 512, 256, 2),
    ("bfloat16", "affine8", 112, 48, 7),
]  # fmt: skip
NAMES = ["float16", "bfloat16", "float32", "affine8", "turbo2", "turbo3", "turbo4", *WIDE]
PACKED = [pair for pair in product(NAMES, NAMES) if not (codec(pair[0]).is_float and codec(pair[1]).is_float)]
DIMS = [(16, 16), (64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256)]
ALL = [(*PACKED[i % len(PACKED)], *dims, group) for i, (dims, group) in enumerate(product(DIMS, range(1, 17)))]
ALL += [(*pair, 64, 64, 4) for pair in PACKED]
INSTANCES = [pytest.param(*case, id=str(case)) for case in COVERING] + [
    pytest.param(*case, marks=pytest.mark.all_instances, id=f"all-{case}") for case in ALL
]
FEW = [("turbo4", "turbo2"), ("turbo3", "turbo4w"), ("affine8", "turbo3"), ("float16", "turbo4"), ("turbo2w", "affine8")]
PAIRS = st.sampled_from(FEW)
WINDOWS = st.tuples(st.sampled_from([1, 2, 6, 17, 64, 150]), st.sampled_from([0, 1, 4, 16, 33, 140])) | st.just((0, 0))
LAYERS = dict(  # what attention does inside of itself, over sequences and windows of all sorts
    norms=st.tuples(*[st.sampled_from([None, "plain", "weight"])] * 2),
    dims=st.sampled_from([0, 30, 64]),
    traditional=st.booleans(),
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    splits=st.sampled_from([1, 3]),
    window=st.sampled_from([0, 0, 1, 20]),
    own=st.sampled_from([(0, 0), (0, 0), (6, 2), (60, 33)]),
    softcap=st.sampled_from([0.0, 0.7]),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def packed(h, rng, lengths, pair, **options):
    return PackedCache(h, rng, lengths, *map(codec, pair), **{"head_dim": 64, **options})


def queries(rng, rows, heads, dim=64):
    return rng.standard_normal((len(rows), heads, dim)).astype(np.float32)


def pieces(variant, splits=3, split_len=32):
    return dict(splits=splits, split_len=split_len) if variant == "decode" else {}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k_name, v_name, head_dim, value_dim, group", INSTANCES)
def test_ragged_rows_agree_with_the_reference(h, k_name, v_name, head_dim, value_dim, group, variant):
    """Decodes and a prefill chunk in one launch, contexts on both sides of a block and of a tile."""
    rng = np.random.default_rng(head_dim)
    cache = packed(h, rng, [1, 17, 70], (k_name, v_name), head_dim=head_dim, value_dim=value_dim)
    rows = [(0, 0), (1, 16), (1, 3), (2, 31), (2, 32), (2, 33), (2, 69)]
    q = queries(rng, rows, 2 * group, head_dim)
    want = cache.expected(q, rows)
    for options in ({}, pieces(variant)):
        np.testing.assert_allclose(cache.attend(q, rows, variant=variant, **options), want, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("affine8", "turbo3")])
def test_contexts_around_a_power_of_two_agree_with_the_reference(h, pair, variant):
    rng = np.random.default_rng(0)
    lengths = [1, 63, 64, 65, 129]
    cache = packed(h, rng, lengths, pair)
    rows = [(s, n - 1) for s, n in enumerate(lengths)]
    q = queries(rng, rows, 8)
    for options in ({}, pieces(variant, 4, 64)):
        np.testing.assert_allclose(cache.attend(q, rows, variant=variant, **options), cache.expected(q, rows), atol=TOLERANCE)


@given(
    variant=st.sampled_from(VARIANTS),
    pair=PAIRS,
    heads=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 150), min_size=2, max_size=2),
    windows=st.lists(WINDOWS, min_size=2, max_size=2),
    window=st.sampled_from([0, 0, 5, 40]),
    softcap=st.sampled_from([0.0, 0.7]),
    sinks=st.booleans(),
    splits=st.sampled_from([1, 4]),
    block=st.sampled_from([8, 16, 64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_windows_caps_sinks_and_pieces_agree_with_the_reference(
    h, variant, pair, heads, lengths, windows, window, softcap, sinks, splits, block, seed
):
    """Sequences with different windows in one launch; rows of prompts, in any order."""
    rng = np.random.default_rng(seed)
    cache = packed(h, rng, lengths, pair, kv_heads=heads, block=block)
    first = [int(rng.integers(max(1, n - 9))) for n in lengths]
    rows = [(s, p) for s, n in enumerate(lengths) for p in range(first[s], min(first[s] + 9, n))]
    rows += [(s, int(rng.integers(n))) for s, n in enumerate(lengths)]
    q = queries(rng, rows, 3 * heads)
    options = dict(window=window, softcap=softcap, windows=windows)
    options |= dict(sinks=rng.standard_normal(3 * heads).astype(np.float32) if sinks else None)
    got = cache.attend(q, rows, variant=variant, **pieces(variant, splits), **options)
    np.testing.assert_allclose(got, cache.expected(q, rows, **options), atol=TOLERANCE)


@given(splits=st.sampled_from([1, 3]), pair=PAIRS, seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_a_row_is_the_same_bits_alone_and_in_any_batch(h, splits, pair, seed):
    """Of the decode variant; among others that have more pieces, and in another order."""
    rng = np.random.default_rng(seed)
    cache = packed(h, rng, [int(n) for n in rng.integers(1, 150, 3)], pair)
    rows = [(s, int(rng.integers(n))) for s, n in enumerate(cache.lengths) for _ in range(2)]
    q = queries(rng, rows, 6)
    options = pieces("decode", splits, 48)
    together = cache.attend(q, rows, **options)
    alone = np.concatenate([cache.attend(q[i : i + 1], rows[i : i + 1], **options) for i in range(len(rows))])
    np.testing.assert_array_equal(together, alone)
    order = rng.permutation(len(rows))
    np.testing.assert_array_equal(cache.attend(q[order], [rows[i] for i in order], **options), together[order])


@given(length=st.integers(1, 150), pair=PAIRS, window=st.sampled_from([0, 20, 64]), sinks=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_a_row_of_one_piece_is_the_same_bits_with_any_number_of_splits(h, length, pair, window, sinks, seed):
    rng = np.random.default_rng(seed)
    cache = packed(h, rng, [length, 150], pair)
    rows = [(0, length - 1), (1, 149)]
    q = queries(rng, rows, 6)
    options = dict(window=window, sinks=rng.standard_normal(6).astype(np.float32) if sinks else None)
    whole, parts = (cache.attend(q, rows, splits=n, split_len=64, **options) for n in (1, 3))
    for i, seen in enumerate((length, 150)):
        if (min(window, seen) or seen) <= 64:
            np.testing.assert_array_equal(parts[i], whole[i])


@pytest.mark.parametrize("variant", VARIANTS)
@given(pair=PAIRS, block=st.sampled_from([8, 32]), seed=st.integers(0, 1000))
@settings(max_examples=6, deadline=None)
def test_blocks_elsewhere_are_the_same_bits(h, variant, pair, block, seed):
    rng = np.random.default_rng(seed)
    cache = packed(h, rng, [int(n) for n in rng.integers(12, 120, 3)], pair, block=block)
    rows = [(s, p) for s, n in enumerate(cache.lengths) for p in range(n - int(rng.integers(1, 12)), n)]
    q = queries(rng, rows, 6)
    before = cache.attend(q, rows, variant=variant)
    cache.move(rng)
    np.testing.assert_array_equal(cache.attend(q, rows, variant=variant), before)


@given(pair=PAIRS, start=st.integers(0, 60), window=st.sampled_from([0, 0, 3, 40]), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_prefill_in_parts_equals_the_whole(h, pair, start, window, seed):
    """Rows of two sequences; tiles are cut elsewhere, and decode takes none: sums come in another order."""
    rng = np.random.default_rng(seed)
    cache = packed(h, rng, [start + 50, 70], pair, kv_heads=1)
    rows = [(0, p) for p in range(start, start + 50)] + [(1, 69)]
    q = queries(rng, rows, 3)
    whole = cache.attend(q, rows, variant="mixed", window=window)
    cut = int(rng.integers(1, 50))
    parts = [cache.attend(q[a:b], rows[a:b], variant="mixed", window=window) for a, b in ((0, cut), (cut, 51))]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=TOLERANCE)
    np.testing.assert_allclose(cache.attend(q, rows, window=window), whole, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("affine8", "turbo3"), ("float16", "turbo4"), ("turbo2w", "affine8")])
def test_a_vector_that_was_not_finite_is_seen_by_those_who_see_it(h, pair, variant):
    """Its scale is NaN: what a later row wrote is no part of an earlier row's result, and it is not hidden from later ones."""
    rng = np.random.default_rng(0)
    cache = packed(h, rng, [140], pair, kv_heads=1)
    rows = [(0, p) for p in range(125, 137)]
    q = queries(rng, rows, 3)
    before = cache.attend(q, rows, variant=variant)
    cache.spoil(1, 0, range(131, 133))
    cache.spoil(0, 0, range(133, 140))
    after = cache.attend(q, rows, variant=variant)
    np.testing.assert_array_equal(after[:6], before[:6])
    assert np.isnan(after[6:]).all()
    cache.spoil(0, 0, [3])  # where all rows of a tile see it
    assert np.isnan(cache.attend(q, rows, variant=variant)).all()
    windowed = cache.attend(q, rows[:6], variant=variant, window=100)[:6]
    np.testing.assert_allclose(windowed, cache.expected(q[:6], rows[:6], window=100), atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("affine8", "affine8")])
def test_blocks_between_the_kept_positions_and_the_window_are_not_seen(h, pair, variant):
    """They are freed: their entries name a block of NaN."""
    rng = np.random.default_rng(0)
    cache = packed(h, rng, [200], pair)
    rows = [(0, p) for p in range(191, 200)]
    q = queries(rng, rows, 8)
    options = dict(windows=[(64, 20)], variant=variant)
    before = cache.attend(q, rows, **options)
    cache.tables[0, 2:9] = cache.spare
    after = cache.attend(q, rows, **options)
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(after).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("affine8", "turbo3"), ("turbo2w", "affine8")])
@pytest.mark.parametrize("size", [0.0, 1e-3, 2e3])
def test_vectors_of_zeros_and_great_ones_agree_with_the_reference(h, pair, size, variant):
    """Values beyond what a product of halves could hold; scores stay as they are."""
    rng = np.random.default_rng(0)
    cache = packed(h, rng, [40], pair, size=size)
    rows = [(0, p) for p in range(30, 40)]
    q = queries(rng, rows, 8) / max(size, 1)
    want = cache.expected(q, rows)
    np.testing.assert_allclose(cache.attend(q, rows, variant=variant), want, rtol=1e-4, atol=TOLERANCE * max(size, 1e-3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_without_a_place_in_the_tables_is_nan(h, variant):
    cache = packed(h, np.random.default_rng(0), [3], ("turbo4", "turbo2"), kv_heads=1)
    got = cache.attend(np.ones((5, 4, 64), np.float32), [(0, 2), (0, -1), (7, 0), (-1, 0), (0, 16)], variant=variant)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1:]).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 33])
def test_rows_that_the_step_does_not_have_are_left(h, variant, count):
    """A plan for 40 rows runs fewer; queries are part of longer rows."""
    rng = np.random.default_rng(count)
    cache = packed(h, rng, [60], ("turbo4", "turbo2"))
    rows = [(0, p) for p in range(20, 20 + count)]
    q = queries(rng, rows, 8)
    longer = np.full((40, 528), np.nan, np.float32)
    longer[:count, 8:520] = q.reshape(count, -1)
    options = dict(num_q_heads=8, q_offset=8, q_row_stride=528, max_rows=40)
    got = cache.attend(h.put(longer), rows, variant=variant, **options, **pieces(variant, 2))
    np.testing.assert_allclose(got[:count], cache.expected(q, rows), atol=TOLERANCE)
    assert np.isnan(got[count:]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_threads_does_not_matter(h, monkeypatch, variant):
    rng = np.random.default_rng(0)
    cache = packed(h, rng, [90, 20], ("turbo3", "turbo4"), head_dim=160)
    rows = [(0, 88), (0, 89), (1, 3)]
    q = queries(rng, rows, 6, 160)
    results = []
    for seed in range(6):
        monkeypatch.setenv("METALSTEP_SIM_SEED", str(seed))
        results.append(cache.attend(q, rows, variant=variant, **pieces(variant, 2, 48)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("variant, changes", OTHER_TUNING)
def test_any_tuning_gives_the_same_results(h, monkeypatch, variant, changes):
    """Figures of another device than those that exist."""
    tuning = attention_geometry.TUNING["apple"]
    monkeypatch.setitem(attention_geometry.TUNING, "other", tuning | {variant: tuning[variant] | changes})
    rng = np.random.default_rng(0)
    cache = packed(h, rng, [70, 20, 5], ("turbo4", "turbo3"), head_dim=128)
    rows = [(0, p) for p in range(30, 70)] + [(1, 19), (2, 4), (1, 18)]
    q = queries(rng, rows, 10, 128)
    options = dict(windows=[(20, 5), (0, 0), (3, 1)])
    got = cache.attend(q, rows, variant=variant, kind="other", **options)
    np.testing.assert_allclose(got, cache.expected(q, rows, **options), atol=TOLERANCE)


# ---- with norms, rotation and the write to the cache inside -------------------------------------------------------------------
class PackedLayer(Layer):
    """As Layer, of any codecs."""

    def __init__(self, h, seed, lengths, group, codecs, **options):
        cache = partial(PackedCache, k_codec=codecs[0], v_codec=codecs[1])
        super().__init__(h, seed, lengths, group, cache=cache, **{"head_dim": 64, **options})

    def forget(self):
        """The newest positions hold NaN."""
        for s, p in self.rows:
            block, place = self.cache.tables[s, p // self.cache.block], p % self.cache.block
            for which in range(2):
                codes, scales = self.cache.views(which)
                codes[block, :, place].view(np.uint8)[...] = 0xFF
                if scales is not None:
                    scales[block, ..., place] = np.nan
        self.before = self.planes()

    def planes(self):
        planes = (self.cache.k_plane, self.cache.v_plane)
        return [self.h.device.numpy(plane, np.uint8, (plane.nbytes,)).copy() for plane in planes]

    def adopt(self):
        found = []
        for which, arrays in enumerate((self.cache.keys, self.cache.values)):
            new = [self.cache.read(which, slot) for slot in self.slots]
            for array, rows in zip(arrays, new, strict=True):
                array[:, -1] = rows
            found.append(np.stack(new))
        return found

    def check(self, allowed=None, **options):
        """As Layer's."""
        got, planes = self.attend(**options), self.planes()
        for which, (found, given_vectors) in enumerate(zip(self.adopt(), (self.prepared(self.k, 1), self.v), strict=True)):
            self.check_vectors(which, found, given_vectors)
        known = {name: options[name] for name in ("window", "softcap", "sinks", "windows") if name in options}
        self.check_results(got, known, allowed, 2 * TOLERANCE)
        before = self.before
        self.forget()
        for now, then in zip(self.planes(), before, strict=True):
            np.testing.assert_array_equal(now, then)
        return got, planes

    def check_vectors(self, which, found, given_vectors):
        """As the reference encodes them, but for what lies next to a boundary of rounding: such an element is one step away."""
        own, dim, seed = self.cache.codecs[which], self.cache.dims[which], (turboquant.K_SEED, turboquant.V_SEED)[which]
        want = turboquant.decode(*turboquant.encode(given_vectors, own, seed), own, dim, seed)
        size = np.sqrt(np.mean(want**2, axis=-1, keepdims=True))
        beside = np.abs(found - want) > 2e-3 * size + KEY_ERROR
        assert beside.any(-1).mean() <= (1.0 if own.is_float else 0.34)  # of vectors: of few, one
        error = {2: 0.7, 3: 0.4, 4: 0.25, 8: 0.05, 16: 0.01, 32: 1e-5}[own.bits]
        assert (np.linalg.norm(found - want, axis=-1) <= error * np.linalg.norm(want, axis=-1) + KEY_ERROR).all()


INSIDE = [*COVERING[:8], ("turbo4w", "turbo2w", 256, 128, 8)]
INSIDE_INSTANCES = [pytest.param(*case, id=str(case)) for case in INSIDE] + [
    pytest.param(*case, marks=pytest.mark.all_instances, id=f"all-{case}") for case in ALL
]


@pytest.mark.parametrize("k_name, v_name, head_dim, value_dim, group", INSIDE_INSTANCES)
def test_ragged_sequences_agree_with_the_references_inside(h, k_name, v_name, head_dim, value_dim, group):
    """New positions that begin a sequence, begin and end a block, and lie within one."""
    codecs = codec(k_name), codec(v_name)
    PackedLayer(h, head_dim, [1, 16, 17, 70], group, codecs, head_dim=head_dim, value_dim=value_dim).check()


@given(
    pair=PAIRS,
    block=st.sampled_from([8, 16, 64]),
    **LAYERS,
)
@settings(max_examples=40, deadline=None)
def test_what_is_done_inside_agrees_with_the_references(
    h, pair, norms, dims, traditional, lengths, splits, window, own, softcap, sinks, block, seed
):
    options = dict(dims=dims, traditional=traditional, q_norm=norms[0], k_norm=norms[1], block=block)
    layer = PackedLayer(h, seed, lengths, 3, tuple(map(codec, pair)), **options)
    logits = np.random.default_rng(seed).standard_normal(layer.heads).astype(np.float32) if sinks else None
    layer.check(splits=splits, split_len=32, window=window, windows=[own] * len(lengths), softcap=softcap, sinks=logits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("pair", FEW)
def test_the_new_position_counts_as_the_cache_holds_it(h, splits, pair):
    """Attention alone over what the launch wrote, of queries that need nothing inside, gives the same bits."""
    layer = PackedLayer(h, 0, [1, 40, 100], 3, tuple(map(codec, pair)), dims=0, q_norm=None)
    options = pieces("decode", splits, 40)
    got = layer.attend(**options)
    np.testing.assert_array_equal(layer.cache.attend(layer.q, layer.rows, **options), got)


@pytest.mark.parametrize("scales", [("raw", "unbiased"), ("unbiased", "raw")])
def test_scales_are_as_the_codec_says(h, scales):
    layer = PackedLayer(h, 0, [1, 40], 3, tuple(map(codec, ("turbo4", "turbo2"), scales)))
    layer.check()
    ratio = np.linalg.norm(layer.adopt()[1][0]), np.linalg.norm(layer.v[0])
    assert ratio[0] != ratio[1]


@given(splits=st.sampled_from([1, 3]), pair=PAIRS, seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_a_row_is_the_same_bits_alone_and_in_any_batch_inside(h, splits, pair, seed):
    lengths = np.random.default_rng(seed).integers(1, 120, 4)
    layer = PackedLayer(h, seed, [int(n) for n in lengths], 3, tuple(map(codec, pair)))
    options = pieces("decode", splits, 40)
    together, planes = layer.attend(**options), layer.planes()
    layer.forget()
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(layer.attend(order, **options), together[order])
    layer.forget()
    np.testing.assert_array_equal(np.concatenate([layer.attend([i], **options) for i in range(4)]), together)
    for now, before in zip(layer.planes(), planes, strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("affine8", "turbo3")])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_negative_slot_is_not_written(h, splits, pair):
    """Its row attends to its own key and value all the same, and other rows to theirs."""
    layer = PackedLayer(h, 0, [30, 100], 9, tuple(map(codec, pair)))
    options = pieces("decode", splits, 40)
    whole, planes = layer.attend(**options), layer.planes()
    layer.forget()
    got = layer.attend(slots=[-1, layer.slots[1]], **options)
    np.testing.assert_array_equal(got, whole)
    shape = (layer.cache.blocks, layer.kv_heads, layer.cache.block)
    block, place = divmod(layer.slots[0], layer.cache.block)
    for own, dim, now, before, written in zip(layer.cache.codecs, layer.cache.dims, layer.planes(), layer.before, planes, strict=True):
        (codes, scales), (old_codes, old_scales) = vectors(own, written, shape, dim), vectors(own, before, shape, dim)
        codes[block, :, place], scales[block, ..., place] = old_codes[block, :, place], old_scales[block, ..., place]
        np.testing.assert_array_equal(now, written)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("affine8", "turbo3"), ("float16", "affine8")])
def test_a_new_vector_that_is_not_finite_is_its_own_rows_alone(h, pair, which):
    layer = PackedLayer(h, 0, [30, 50], 3, tuple(map(codec, pair)))
    clean = layer.attend()
    layer.forget()
    width = layer.kv_heads * layer.cache.dims[which == "v"]
    offset = layer.k_offset if which == "k" else layer.v_offset
    layer.row[0, offset : offset + width : layer.cache.dims[which == "v"]] = np.inf  # an element of each head
    got = layer.attend()
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(got[1], clean[1])
    found = layer.adopt()[which == "v"]
    assert np.isfinite(found[1]).all()
    if not layer.cache.codecs[which == "v"].is_float:
        assert np.isnan(found[0]).all()
        assert (layer.cache.views(which == "v")[0][layer.slots[0] // 16, :, layer.slots[0] % 16] == 0).all()


def test_the_order_of_threads_does_not_matter_inside(h, monkeypatch):
    layer = PackedLayer(h, 0, [30, 100], 4, (codec("turbo3"), codec("turbo4")), head_dim=160)
    results = []
    for seed in range(6):
        monkeypatch.setenv("METALSTEP_SIM_SEED", str(seed))
        layer.forget()
        results.append([layer.attend(splits=2, split_len=48), *layer.planes()])
    for result in results[1:]:
        for now, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(now, first)


# ---- what fits ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", list(attention_geometry.TUNING))
def test_every_geometry_fits_the_threadgroup_memory(device):
    """Of all heads that a codec takes: decode and mixed; a tile has few positions, whatever the context."""
    dims = [dim for dim in range(16, 513, 16) if kv_codec.hadamard_base(dim) is not None]
    for head_dim, value_dim, group in product(dims, dims, (1, 2, 3, 4, 7, 8, 16, 40, 129)):
        decode = attention_geometry.decode_geometry(group, head_dim, value_dim, device)
        assert decode.threadgroup_bytes(head_dim, value_dim, 4, inside=True, packed=True) <= attention_geometry.THREADGROUP_BYTES
        mixed = attention_geometry.mixed_geometry(group, head_dim, value_dim, 4, device, packed=True)
        assert mixed.threadgroup_bytes(head_dim, value_dim, 4, packed=True) <= attention_geometry.THREADGROUP_BYTES
        assert mixed.rows >= 1 and mixed.positions <= 32


def test_a_name_says_the_codecs(h):
    """Kernels of different text have different names."""
    texts = {}
    for k_name, v_name, scale in product(NAMES, NAMES, kv_codec.SCALES):
        if codec(k_name).is_float and codec(v_name).is_float:
            continue
        for launch in given_launches(h, k_codec=codec(k_name, scale), v_codec=codec(v_name, scale), splits=2):
            assert launch.kernel in launch.code.text
            assert texts.setdefault(launch.kernel, launch.code.text) == launch.code.text
    assert "attention_decode_turbo4_turbo2_d64_v64_h4_l8_u2_s8_m4" in texts
    assert len(set(texts.values())) == len(texts) == len(PACKED) + 2  # with and without a rotation behind pieces


def given_launches(h, **changes):
    """Of 8 query heads in 2 groups, 64 elements each, turbo4 and turbo2."""
    codecs = {"k_codec": codec("turbo4"), "v_codec": codec("turbo2")} | {name: changes[name] for name in changes if name.endswith("codec")}
    for which, dim in (("k", "head_dim"), ("v", "value_dim")):
        if f"{which}_plane" not in changes:
            changes[f"{which}_plane"] = region(codecs[f"{which}_codec"], changes.get(dim, 64))
    arguments = dict(
        q=Buffer(0, 0, (3, 512), "float32"), q_offset=0, q_row_stride=512,
        out=Buffer(0, 0, (3, 8, 64), "float32"), step=h.step(3), num_q_heads=8, num_kv_heads=2, head_dim=64, value_dim=64, block_size=16,
        scale=1.0, max_rows=3, workspace=Buffer(0, 0, (100000,), "float32"), **codecs,
    )  # fmt: skip
    return attention.launches(**arguments | changes)


def region(own, dim):
    return Buffer(0, 0, (4, 2, 16, dim), own.name) if own.is_float else Buffer(0, 0, (4 * 2 * 16 * own.vector_bytes(dim),), "uint8")


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(head_dim=72), "attention: head_dim is 72: turbo4 takes vectors of 16, "),
        (dict(value_dim=576), "attention: value_dim is 576: turbo2 takes vectors of 16, "),
        (dict(head_dim=144), "head_dim is 144: turbo4"),
        (dict(k_codec=KVCodec("affine8"), head_dim=24, k_plane=Buffer(0, 0, (4,), "uint8")), "head_dim is 24: affine8 takes vectors of a"),
        (dict(k_codec=KVCodec("float16"), v_codec=KVCodec("float32")), "codecs are float16 and float32, expected one of"),
        (dict(k_plane=Buffer(0, 0, (1000,), "uint8")), r"k_plane has 1000 bytes, expected a multiple of 2 \* 16 \* 34"),
        (dict(v_plane=Buffer(0, 0, (4, 2, 16, 64), "uint8")), r"v_plane has 8192 bytes, .* 2 \* 16 \* 18 .* turbo2 vector of value_dim 64"),
        (dict(v_plane=Buffer(0, 8, (1152,), "uint8")), "v_plane starts at byte 8"),
        (dict(k_codec=KVCodec("float16"), k_plane=Buffer(0, 0, (4, 2, 32, 64), "float16")), "k_plane has shape"),
    ],
)
def test_what_does_not_fit_is_refused(h, changes, text):
    with pytest.raises(ValueError, match=text):
        given_launches(h, **changes)
