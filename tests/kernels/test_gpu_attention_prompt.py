"""Mixed attention of kind nvidia, with products in half precision: against softmax over what the cache holds in float32."""
import dataclasses
from functools import partial
from itertools import product

import numpy as np
import pytest
from gpu_attention import Cache, PackedCache
from gpu_harness import GpuHarness
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metalstep.kernels.gpu import attention_geometry, attention_prompt
from metalstep.kernels.kv_codec import KVCodec

# Relative to the greatest value: queries and weights are rounded to halves, 2^-11 each; codes' elements twice more.
TOLERANCE, PACKED_TOLERANCE = 1e-3, 2e-3
FLOATS = ("float16", "bfloat16")
WIDE = {"turbo2w": "turbo2", "turbo4w": "turbo4"}  # with scales of float32
# (head_dim, value_dim, query heads of a kv head): shares of threads that are even and not, several slices, long heads.
COVERING = [
    (16, 16, 1), (32, 32, 2), (48, 48, 5), (64, 64, 7), (64, 128, 4), (80, 80, 2), (96, 96, 3), (128, 128, 4), (128, 128, 9),
    (192, 128, 1), (256, 256, 2), (64, 64, 40),
]  # fmt: skip
PACKED = [
    ("turbo4", "turbo2", 64, 64, 4), ("turbo3", "turbo4w", 80, 80, 2), ("affine8", "turbo3", 128, 128, 4), ("float16", "turbo4", 96, 96, 3),
    ("turbo2w", "affine8", 256, 256, 2), ("turbo3", "turbo3", 48, 112, 5), ("affine8", "affine8", 16, 80, 1),
    ("turbo4", "turbo2", 128, 128, 2), ("bfloat16", "affine8", 112, 48, 7), ("turbo2", "bfloat16", 128, 64, 9),
]  # fmt: skip
WINDOWS = st.tuples(st.sampled_from([1, 2, 6, 17, 64, 150]), st.sampled_from([0, 1, 4, 16, 33, 140])) | st.just((0, 0))
CACHES = st.sampled_from([*FLOATS, ("turbo4", "turbo2"), ("affine8", "turbo3"), ("bfloat16", "turbo4")])


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def codec(name):
    return KVCodec(WIDE[name], "float32") if name in WIDE else KVCodec(name)


def cache_of(h, rng, lengths, kind, **options):
    """Of a float type's name, or a pair of codecs'."""
    if isinstance(kind, str):
        return Cache(h, rng, lengths, dtype=kind, **{"head_dim": 32, **options})
    return PackedCache(h, rng, lengths, *map(codec, kind), **{"head_dim": 64, **options})


def queries(rng, rows, heads, dim):
    return rng.standard_normal((len(rows), heads, dim)).astype(np.float32)


def attend(cache, q, rows, **options):
    return cache.attend(q, rows, variant="mixed", kind="nvidia", **options)


def assert_close(cache, got, want):
    packed = isinstance(cache, PackedCache)
    most = max(float(np.nanmax(np.abs(values))) for values in cache.values)
    np.testing.assert_allclose(got, want, rtol=0, atol=(PACKED_TOLERANCE if packed else TOLERANCE) * most)


RAGGED = [(0, 0), (1, 16), (1, 3), (2, 31), (2, 32), (2, 33), (2, 69), *((2, p) for p in range(10, 50))]


@pytest.mark.parametrize("head_dim, value_dim, group, dtype", [(*case, FLOATS[i % 2]) for i, case in enumerate(COVERING)])
def test_ragged_rows_agree_with_the_reference(h, head_dim, value_dim, group, dtype):
    """Decodes and chunks of prompts in one launch, contexts on both sides of a block and of a tile."""
    rng = np.random.default_rng(head_dim)
    cache = Cache(h, rng, [1, 17, 70], kv_heads=1 if group > 16 else 2, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    q = queries(rng, RAGGED, group * cache.heads, head_dim)
    assert_close(cache, attend(cache, q, RAGGED), cache.expected(q, RAGGED))


@pytest.mark.parametrize("k_name, v_name, head_dim, value_dim, group", PACKED)
def test_ragged_rows_over_codes_agree_with_the_reference(h, k_name, v_name, head_dim, value_dim, group):
    rng = np.random.default_rng(head_dim)
    cache = cache_of(h, rng, [1, 17, 70], (k_name, v_name), head_dim=head_dim, value_dim=value_dim)
    q = queries(rng, RAGGED, group * cache.heads, head_dim)
    assert_close(cache, attend(cache, q, RAGGED), cache.expected(q, RAGGED))


@given(
    kind=CACHES,
    group=st.sampled_from([1, 3, 8]),
    windows=st.lists(WINDOWS, min_size=2, max_size=2),
    lengths=st.lists(st.integers(20, 200), min_size=2, max_size=2),
    window=st.sampled_from([0, 0, 5, 40]),
    softcap=st.sampled_from([0.0, 0.7]),
    sinks=st.booleans(),
    block=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 1000),
)
@example("float16", 3, [(33, 33), (5, 140)], [150, 100], 0, 0.0, False, 16, 0)  # no room beside what is kept: itself
@example("float16", 1, [(2**32 - 1, 2**32 - 1), (64, 2**32 - 1)], [150, 100], 0, 0.0, True, 16, 0)
@settings(max_examples=60, deadline=None)
def test_windows_caps_and_sinks_agree_with_the_reference(h, kind, group, windows, lengths, window, softcap, sinks, block, seed):
    """Sequences with different windows in one launch; prompts' rows and decodes."""
    rng = np.random.default_rng(seed)
    cache = cache_of(h, rng, lengths, kind, block=block)
    first = [int(rng.integers(n - 9)) for n in lengths]
    rows = [(s, p) for s in range(2) for p in range(first[s], first[s] + 9)]
    rows += [(s, int(rng.integers(n))) for s, n in enumerate(lengths)]
    q = queries(rng, rows, 2 * group, cache.dims[0])
    options = dict(window=window, softcap=softcap, windows=windows)
    options |= dict(sinks=rng.standard_normal(2 * group).astype(np.float32) if sinks else None)
    assert_close(cache, attend(cache, q, rows, **options), cache.expected(q, rows, **options))


@given(seed=st.integers(0, 1000), sequences=st.integers(1, 5), count=st.integers(1, 60), kind=CACHES)
@settings(max_examples=20, deadline=None)
def test_rows_may_come_in_any_order(h, seed, sequences, count, kind):
    """Sequences and positions without any order, the same one twice."""
    rng = np.random.default_rng(seed)
    cache = cache_of(h, rng, [int(n) for n in rng.integers(1, 120, sequences)], kind, kv_heads=1)
    ids = np.repeat(rng.integers(sequences, size=count), rng.integers(1, 9, count))[:count]
    rows = [(int(s), int(rng.integers(cache.lengths[s]))) for s in ids]
    windows = [(int(rng.choice([0, 7, 30])), int(rng.choice([0, 2, 9]))) for _ in range(sequences)]
    q = queries(rng, rows, 3, cache.dims[0])
    assert_close(cache, attend(cache, q, rows, windows=windows), cache.expected(q, rows, windows=windows))


@pytest.mark.parametrize("slope", [-0.3, 0.3])
@pytest.mark.parametrize("sinks", [None, 1.0, 60.0])
def test_scores_that_rise_and_fall_along_a_context_agree_with_the_reference(h, slope, sinks):
    """Beyond the range of a half's exponent: the maximum is renewed, or what comes is nothing beside it."""
    rng = np.random.default_rng(0)
    cache = Cache(h, rng, [200], head_dim=32, dtype="float16")
    direction = rng.standard_normal(32).astype(np.float32)
    cache.keys[0] += slope * np.arange(200, dtype=np.float32)[:, None] * direction / np.linalg.norm(direction)
    cache.keys[0] = cache.keys[0].astype(np.float16).astype(np.float32)
    cache.write(0, range(200))
    rows = [(0, p) for p in range(150, 200)]
    q = queries(rng, rows, 4, 32) + 2 * direction
    options = dict(sinks=None if sinks is None else np.full(4, sinks, np.float32))
    got, want = attend(cache, q, rows, **options), cache.expected(q, rows, **options)
    scores = np.abs(q).max() * np.abs(cache.keys[0]).max() * 32**-0.5  # of which a half's rounding is a part
    np.testing.assert_allclose(got, want, atol=TOLERANCE * (1 + scores))


@given(
    kind=CACHES, group=st.sampled_from([1, 3, 8]), start=st.integers(0, 100), window=st.sampled_from([0, 0, 3, 40]),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_a_prefill_in_parts_equals_the_whole(h, kind, group, start, window, seed):
    """A decode of another sequence stands behind it. Tiles are cut elsewhere: sums come in another order."""
    rng = np.random.default_rng(seed)
    cache = cache_of(h, rng, [start + 80, 70], kind, kv_heads=1)
    rows = [(0, p) for p in range(start, start + 80)] + [(1, 69)]
    q = queries(rng, rows, group, cache.dims[0])
    whole = attend(cache, q, rows, window=window)
    cut = int(rng.integers(1, 80))
    parts = [attend(cache, q[a:b], rows[a:b], window=window) for a, b in ((0, cut), (cut, 81))]
    assert_close(cache, np.concatenate(parts), whole)
    assert_close(cache, cache.attend(q, rows, window=window), whole)  # another kind's decode


@given(
    kind=CACHES, window=st.sampled_from([30, 64]), keep=st.sampled_from([0, 1, 16, 20]), count=st.sampled_from([1, 9, 40]),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_blocks_between_the_kept_positions_and_the_window_are_not_seen(h, kind, window, keep, count, seed):
    """They are freed: their entries name a block of NaN, or none at all."""
    rng = np.random.default_rng(seed)
    cache = cache_of(h, rng, [200], kind)
    rows = [(0, p) for p in range(200 - count, 200)]
    q = queries(rng, rows, 6, cache.dims[0])
    options = dict(windows=[(window, keep)])
    before = attend(cache, q, rows, **options)
    freed = slice(-(-keep // 16), (200 - count + 1 - (window - keep)) // 16)
    assert freed.stop - freed.start > 3
    for entry in (cache.spare, -(2**30)):
        cache.tables[0, freed] = entry
        after = attend(cache, q, rows, **options)
        np.testing.assert_array_equal(after, before)
    assert np.isfinite(after).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_does_not_see_later_positions_of_its_tile(h, dtype, value):
    """What a later row wrote, even NaN, is no part of an earlier row's result; and it is not hidden from later ones."""
    rng = np.random.default_rng(0)
    cache = Cache(h, rng, [140], kv_heads=1, dtype=dtype)
    rows = [(0, p) for p in range(125, 137)]
    q = queries(rng, rows, 3, 32)
    before = attend(cache, q, rows)
    cache.values[0][:, 131:] = value
    cache.keys[0][:, 133:] = value
    cache.write(0, range(131, 140))
    after = attend(cache, q, rows)
    np.testing.assert_array_equal(after[:6], before[:6])
    assert not np.isfinite(after[6:]).any()


@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("affine8", "turbo3"), ("float16", "turbo4"), ("turbo2w", "affine8")])
def test_a_vector_that_was_not_finite_is_seen_by_those_who_see_it(h, pair):
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [140], pair, kv_heads=1)
    rows = [(0, p) for p in range(125, 137)]
    q = queries(rng, rows, 3, 64)
    before = attend(cache, q, rows)
    cache.spoil(1, 0, range(131, 133))
    cache.spoil(0, 0, range(133, 140))
    after = attend(cache, q, rows)
    np.testing.assert_array_equal(after[:6], before[:6])
    assert np.isnan(after[6:]).all()
    cache.spoil(0, 0, [3])  # where all rows of a tile see it
    assert np.isnan(attend(cache, q, rows)).all()


def test_what_a_half_cannot_hold_is_the_greatest_that_it_can(h):
    """Finite elements of bfloat16 stay finite, and so do results of float16."""
    rng = np.random.default_rng(0)
    cache = Cache(h, rng, [40], dtype="bfloat16")
    rows = [(0, p) for p in range(30, 40)]
    q = queries(rng, rows, 4, 32)
    cache.values[0][:, :, ::3] = np.float32(2.0**20)
    cache.write(0, range(40))
    got = attend(cache, q, rows)
    np.testing.assert_allclose(got[..., ::3], 65504, rtol=TOLERANCE)
    halves = attend(cache, q, rows, out_dtype="float16")
    assert np.isfinite(halves).all()
    np.testing.assert_array_equal(halves, np.clip(got, -65504, 65504).astype(np.float16))


@pytest.mark.parametrize("kind", ["float16", "float32", ("turbo4", "turbo2"), ("turbo4", "float32")])
def test_results_of_float16_are_those_of_float32_rounded(h, kind):
    """Also of what this kernel does not take."""
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [60], kind)
    rows = [(0, p) for p in range(20, 60)]
    q = queries(rng, rows, 4, cache.dims[0])
    got = [attend(cache, q, rows, out_dtype=dtype) for dtype in ("float32", "float16")]
    np.testing.assert_array_equal(got[1], got[0].astype(np.float16))


@pytest.mark.parametrize("kind", ["float16", ("turbo4", "turbo2")])
@pytest.mark.parametrize("count", [1, 5, 33])
def test_rows_that_the_step_does_not_have_are_left(h, kind, count):
    """A plan for 40 rows runs fewer, and its grid is larger than they need; queries are part of longer rows."""
    rng = np.random.default_rng(count)
    cache = cache_of(h, rng, [60], kind, head_dim=64)
    rows = [(0, p) for p in range(20, 20 + count)]
    q = queries(rng, rows, 8, 64)
    longer = np.full((40, 528), np.nan, np.float32)
    longer[:count, 8:520] = q.reshape(count, -1)
    got = attend(cache, h.put(longer), rows, num_q_heads=8, q_offset=8, q_row_stride=528, max_rows=40)
    assert_close(cache, got[:count], cache.expected(q, rows))
    assert np.isnan(got[count:]).all()


@pytest.mark.parametrize("kind", ["float16", ("turbo4", "turbo2")])
def test_a_row_without_a_place_in_the_tables_is_nan(h, kind):
    cache = cache_of(h, np.random.default_rng(0), [3], kind, kv_heads=1)
    q = np.ones((7, 1, cache.dims[0]), np.float32)
    got = attend(cache, q, [(0, 2), (0, -1), (7, 0), (-1, 0), (0, 16), (0, -1), (0, 0)])
    assert np.isfinite(got[[0, 6]]).all()
    assert np.isnan(got[1:6]).all()


def test_the_order_of_threads_does_not_matter(h, monkeypatch):
    rng = np.random.default_rng(0)
    for kind in ("float16", ("turbo3", "turbo2")):
        cache = cache_of(h, rng, [90, 20], kind, head_dim=80)
        rows = [*((0, p) for p in range(60, 90)), (1, 3)]
        q = queries(rng, rows, 6, 80)
        results = []
        for seed in range(6):
            monkeypatch.setenv("METALSTEP_SIM_SEED", str(seed))
            results.append(attend(cache, q, rows))
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])


OTHER_TUNING = [
    dict(simdgroups=8, positions=(16, 16)), dict(simdgroups=2, tiles=(2, 2), runs=1), dict(simdgroups=6, positions=(48, 48), runs=3),
    dict(tiles=(1, 1), runs=2), dict(simdgroups=1, positions=(32, 32)),
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHER_TUNING)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", ("turbo4", "turbo3")])
def test_any_tuning_gives_the_same_results(h, monkeypatch, kind, changes):
    monkeypatch.setitem(attention_prompt.TUNING, "nvidia", dataclasses.replace(attention_prompt.TUNING["nvidia"], **changes))
    rng = np.random.default_rng(0)
    cache = cache_of(h, rng, [90, 20, 5], kind, head_dim=64)
    rows = [(0, p) for p in range(10, 90)] + [(1, 19), (2, 4), (1, 18)]
    q = queries(rng, rows, 10, 64)
    options = dict(windows=[(40, 5), (0, 0), (3, 1)])
    assert_close(cache, attend(cache, q, rows, **options), cache.expected(q, rows, **options))


def test_every_geometry_fits_the_threadgroup_memory():
    geometry = partial(attention_prompt.geometry, "nvidia", KVCodec("turbo4"), KVCodec("turbo4"))
    for head_dim, value_dim, group in product((16, 64, 128, 192, 256), (16, 64, 128, 256), range(1, 300)):
        found = geometry(group, head_dim, value_dim, 16)
        assert found is not None
        assert found.rows >= 1
        assert found.threadgroup_bytes(head_dim, value_dim) <= attention_geometry.THREADGROUP_BYTES
        assert found.turns(head_dim, value_dim)


@pytest.mark.parametrize(
    "changes",
    [
        dict(kind="apple"), dict(k_codec=KVCodec("float32")), dict(v_codec=KVCodec("float32")), dict(head_dim=40), dict(value_dim=72),
        dict(block_size=8), dict(head_dim=1024), dict(value_dim=1024),
    ],
)  # fmt: skip
def test_what_is_not_for_half_precision_is_left_to_the_other_kernel(changes):
    arguments = dict(
        kind="nvidia", k_codec=KVCodec("float16"), v_codec=KVCodec("turbo2"), group=2, head_dim=128, value_dim=128, block_size=16
    )
    assert attention_prompt.geometry(**arguments) is not None
    assert attention_prompt.geometry(**arguments | changes) is None
