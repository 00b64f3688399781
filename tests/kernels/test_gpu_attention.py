"""Attention on a GPU, decode and mixed: paged, ragged, windowed, against softmax over what the cache holds in float32."""
from itertools import pairwise, product

import numpy as np
import pytest
from gpu_attention import Cache
from gpu_harness import GpuHarness
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metalstep.kernels.gpu import attention, attention_geometry
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer

# float32 on both sides: sums of a few hundred terms in another order, and exp2 for exp. The cache's rounding is in the reference.
TOLERANCE = 5e-6
VARIANTS = ("decode", "mixed")
DTYPES = ("float32", "float16", "bfloat16")
# (head_dim, value_dim, query heads of a kv head): lanes without elements, elements in parts, one slice and several.
COVERING = [
    (16, 16, 1), (24, 40, 3), (32, 32, 2), (48, 48, 5), (64, 64, 7), (64, 128, 4), (80, 80, 2), (96, 96, 3), (128, 128, 4), (128, 128, 9),
    (192, 128, 1), (256, 256, 2), (256, 256, 40), (576, 512, 2),
]  # fmt: skip
DIMS = [*((dim, dim) for dim in (16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 256)), (192, 128)]
ALL = [(*dims, group) for dims in DIMS for group in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16)]
INSTANCES = [pytest.param(*case, DTYPES[i % 3], id=f"{case}-{DTYPES[i % 3]}") for i, case in enumerate(COVERING)] + [
    pytest.param(*case, dtype, marks=pytest.mark.all_instances, id=f"all-{case}-{dtype}") for case, dtype in product(ALL, DTYPES)
]
WINDOWS = st.tuples(st.sampled_from([1, 2, 6, 17, 64, 150]), st.sampled_from([0, 1, 4, 16, 33, 140]))  # some keep too much


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def queries(rng, rows, heads, dim):
    return rng.standard_normal((len(rows), heads, dim)).astype(np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim, value_dim, group, dtype", INSTANCES)
def test_ragged_rows_agree_with_the_reference(h, head_dim, value_dim, group, dtype, variant):
    """Decodes and a prefill chunk in one launch, contexts on both sides of a block and of a tile."""
    rng = np.random.default_rng(head_dim)
    cache = Cache(h, rng, [1, 17, 70], kv_heads=1 if group > 16 else 2, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    rows = [(0, 0), (1, 16), (1, 3), (2, 31), (2, 32), (2, 33), (2, 69)]
    q = queries(rng, rows, group * cache.heads, head_dim)
    np.testing.assert_allclose(cache.attend(q, rows, variant=variant), cache.expected(q, rows), atol=TOLERANCE)


@given(
    variant=st.sampled_from(VARIANTS),
    group=st.sampled_from([1, 3, 8, 9]),
    heads=st.integers(1, 3),
    length=st.integers(1, 200),
    window=st.sampled_from([0, 1, 5, 16, 100]),
    softcap=st.sampled_from([0.0, 0.7]),
    sinks=st.booleans(),
    block=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_heads_windows_caps_and_sinks_agree_with_the_reference(h, variant, group, heads, length, window, softcap, sinks, block, seed):
    rng = np.random.default_rng(seed)
    cache = Cache(h, rng, [length], kv_heads=heads, block=block)
    rows = [(0, length - 1), *[(0, int(p)) for p in rng.integers(length, size=2)]]
    q = queries(rng, rows, group * heads, 32)
    options = dict(window=window, softcap=softcap, sinks=rng.standard_normal(group * heads).astype(np.float32) if sinks else None)
    np.testing.assert_allclose(cache.attend(q, rows, variant=variant, **options), cache.expected(q, rows, **options), atol=TOLERANCE)


@given(
    variant=st.sampled_from(VARIANTS),
    group=st.sampled_from([1, 3, 8]),
    windows=st.lists(WINDOWS | st.just((0, 0)), min_size=2, max_size=2),
    lengths=st.lists(st.integers(20, 200), min_size=2, max_size=2),
    window=st.sampled_from([0, 0, 5, 40]),
    softcap=st.sampled_from([0.0, 0.7]),
    splits=st.sampled_from([1, 4]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@example("mixed", 3, [(33, 33), (5, 140)], [150, 100], 0, 0.0, 1, "float32", 0)  # no room beside what is kept: itself
@example("decode", 3, [(2**32 - 1, 2**32 - 1), (64, 2**32 - 1)], [150, 100], 0, 0.0, 4, "float32", 0)
@example("mixed", 1, [(2**32 - 1, 2**32 - 1), (64, 2**32 - 1)], [150, 100], 0, 0.0, 1, "float32", 0)
@settings(max_examples=40, deadline=None)
def test_sequences_windows_and_kept_positions_agree_with_the_reference(
    h, variant, group, windows, lengths, window, softcap, splits, dtype, seed
):
    """Sequences with different windows in one launch; prompts' rows and decodes."""
    rng = np.random.default_rng(seed)
    cache = Cache(h, rng, lengths, dtype=dtype)
    first = [int(rng.integers(n - 9)) for n in lengths]
    rows = [(s, p) for s in range(2) for p in range(first[s], first[s] + 9)]
    rows += [(s, int(rng.integers(n))) for s, n in enumerate(lengths)]
    q = queries(rng, rows, 2 * group, 32)
    options = dict(window=window, softcap=softcap, windows=windows)
    pieces = dict(splits=splits, split_len=32) if variant == "decode" else {}
    got = cache.attend(q, rows, variant=variant, **pieces, **options)
    np.testing.assert_allclose(got, cache.expected(q, rows, **options), atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 1000), sequences=st.integers(1, 5), count=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_rows_may_come_in_any_order(h, variant, seed, sequences, count):
    """Sequences and positions without any order, the same one twice: what mixed takes together is read from the rows."""
    rng = np.random.default_rng(seed)
    cache = Cache(h, rng, [int(n) for n in rng.integers(1, 120, sequences)], kv_heads=1, dtype="float16")
    ids = np.repeat(rng.integers(sequences, size=count), rng.integers(1, 9, count))[:count]
    rows = [(int(s), int(rng.integers(cache.lengths[s]))) for s in ids]
    windows = [(int(rng.choice([0, 7, 30])), int(rng.choice([0, 2, 9]))) for _ in range(sequences)]
    q = queries(rng, rows, 3, 32)
    got = cache.attend(q, rows, variant=variant, windows=windows)
    np.testing.assert_allclose(got, cache.expected(q, rows, windows=windows), atol=TOLERANCE)


@given(
    splits=st.integers(2, 6),
    split_len=st.sampled_from([16, 24, 32]),
    edge=st.integers(1, 6),
    beside=st.integers(-1, 1),
    sinks=st.booleans(),
    window=st.sampled_from([0, 0, 50]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_contexts_around_the_ends_of_pieces_agree_with_the_reference(h, splits, split_len, edge, beside, sinks, window, seed):
    """Also more positions than the pieces should have: the last has the rest."""
    rng = np.random.default_rng(seed)
    length = max(1, split_len * edge + beside)
    cache = Cache(h, rng, [length, 5], dtype="bfloat16")
    rows = [(0, length - 1), (1, 4), (0, length // 2)]
    q = queries(rng, rows, 6, 32)
    options = dict(window=window, sinks=rng.standard_normal(6).astype(np.float32) if sinks else None)
    got = cache.attend(q, rows, splits=splits, split_len=split_len, **options)
    np.testing.assert_allclose(got, cache.expected(q, rows, **options), atol=TOLERANCE)


@given(length=st.integers(1, 200), window=st.sampled_from([0, 20, 64]), sinks=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_row_of_one_piece_is_the_same_bits_with_any_number_of_splits(h, length, window, sinks, seed):
    """Also behind a window in a long context: pieces are counted from the first position that a row sees."""
    rng = np.random.default_rng(seed)
    cache = Cache(h, rng, [length, 150])
    rows = [(0, length - 1), (1, 149)]
    q = queries(rng, rows, 6, 32)
    options = dict(window=window, sinks=rng.standard_normal(6).astype(np.float32) if sinks else None)
    whole, pieces = (cache.attend(q, rows, splits=n, split_len=64, **options) for n in (1, 3))
    for i, seen in enumerate((length, 150)):
        if (min(window, seen) or seen) <= 64:
            np.testing.assert_array_equal(pieces[i], whole[i])


@given(splits=st.sampled_from([1, 3]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_a_row_is_the_same_bits_alone_and_in_any_batch(h, splits, dtype, seed):
    """Of the decode variant; among others that have more pieces, and in another order."""
    rng = np.random.default_rng(seed)
    cache = Cache(h, rng, [int(n) for n in rng.integers(1, 200, 4)], kv_heads=3, dtype=dtype)
    rows = [(s, int(rng.integers(n))) for s, n in enumerate(cache.lengths) for _ in range(2)]
    q = queries(rng, rows, 9, 32)
    pieces = dict(splits=splits, split_len=48)
    together = cache.attend(q, rows, **pieces)
    alone = np.concatenate([cache.attend(q[i : i + 1], rows[i : i + 1], **pieces) for i in range(len(rows))])
    np.testing.assert_array_equal(together, alone)
    order = rng.permutation(len(rows))
    np.testing.assert_array_equal(cache.attend(q[order], [rows[i] for i in order], **pieces), together[order])


@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_an_exchange_of_sequences_exchanges_their_results(h, variant, seed):
    """Other rows of the block tables, in another order of rows."""
    rng = np.random.default_rng(seed)
    cache = Cache(h, rng, [int(n) for n in rng.integers(12, 120, 4)], dtype="float16")
    chunks = [[(s, p) for p in range(n - int(rng.integers(1, 12)), n)] for s, n in enumerate(cache.lengths)]
    q = [queries(rng, chunk, 6, 32) for chunk in chunks]
    before = cache.attend(np.concatenate(q), [row for chunk in chunks for row in chunk], variant=variant)
    ends = np.cumsum([0, *map(len, chunks)])
    order, number = rng.permutation(4), np.argsort(rng.permutation(4))
    cache.tables[number] = cache.tables.copy()
    rows = [(int(number[s]), p) for i in order for s, p in chunks[i]]
    after = cache.attend(np.concatenate([q[i] for i in order]), rows, variant=variant)
    want = np.concatenate([before[ends[i] : ends[i + 1]] for i in order])
    np.testing.assert_allclose(after, want, atol=0 if variant == "decode" else TOLERANCE)


@given(
    group=st.sampled_from([1, 3, 8]),
    start=st.integers(0, 100),
    window=st.sampled_from([0, 0, 3, 40]),
    own=WINDOWS | st.just((0, 0)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_a_prefill_in_parts_equals_the_whole(h, group, start, window, own, dtype, seed):
    """A decode of another sequence stands behind it. Tiles are cut elsewhere: sums come in another order."""
    rng = np.random.default_rng(seed)
    cache = Cache(h, rng, [start + 80, 70], kv_heads=1, dtype=dtype)
    rows = [(0, p) for p in range(start, start + 80)] + [(1, 69)]
    q = queries(rng, rows, group, 32)
    options = dict(window=window, windows=[own, (20, 2)])
    whole = cache.attend(q, rows, variant="mixed", **options)
    cuts = [0, *sorted(rng.integers(0, len(rows), 3).tolist()), len(rows)]
    parts = [cache.attend(q[a:b], rows[a:b], variant="mixed", **options) for a, b in pairwise(cuts) if a < b]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=TOLERANCE)
    np.testing.assert_allclose(cache.attend(q, rows, **options), whole, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    window=st.sampled_from([30, 64]),
    keep=st.sampled_from([0, 1, 16, 20]),
    rows=st.sampled_from([1, 9, 40]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8, deadline=None)
def test_blocks_between_the_kept_positions_and_the_window_are_not_seen(h, variant, window, keep, rows, dtype, seed):
    """They are freed: their entries name a block of NaN, and what they held is overwritten with it."""
    rng = np.random.default_rng(seed)
    cache = Cache(h, rng, [200], dtype=dtype)
    where = [(0, p) for p in range(200 - rows, 200)]
    q = queries(rng, where, 6, 32)
    options = dict(windows=[(window, keep)], variant=variant)
    before = cache.attend(q, where, **options)
    freed = slice(-(-keep // 16), (200 - rows + 1 - (window - keep)) // 16)
    cache.keys[0][:, freed.start * 16 : freed.stop * 16] = np.nan
    cache.values[0][:, freed.start * 16 : freed.stop * 16] = np.nan
    cache.write(0, range(freed.start * 16, freed.stop * 16))
    cache.tables[0, freed] = cache.spare
    after = cache.attend(q, where, **options)
    assert freed.stop - freed.start > 3
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(after).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_does_not_see_later_positions_of_its_tile(h, variant, dtype, value):
    """What a later row wrote, even NaN, is no part of an earlier row's result; and it is not hidden from later ones."""
    rng = np.random.default_rng(0)
    cache = Cache(h, rng, [140], kv_heads=1, dtype=dtype)
    rows = [(0, p) for p in range(125, 137)]
    q = queries(rng, rows, 3, 32)
    before = cache.attend(q, rows, variant=variant)
    cache.values[0][:, 131:] = value
    cache.keys[0][:, 133:] = value
    cache.write(0, range(131, 140))
    after = cache.attend(q, rows, variant=variant)
    np.testing.assert_array_equal(after[:6], before[:6])
    assert not np.isfinite(after[6:]).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_without_a_place_in_the_tables_is_nan(h, variant):
    cache = Cache(h, np.random.default_rng(0), [3], kv_heads=1)
    got = cache.attend(np.ones((5, 1, 32), np.float32), [(0, 2), (0, -1), (7, 0), (-1, 0), (0, 16)], variant=variant)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1:]).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 5, 33])
def test_rows_that_the_step_does_not_have_are_left(h, variant, count):
    """A plan for 40 rows runs fewer, and its grid is larger than they need; queries are part of longer rows."""
    rng = np.random.default_rng(count)
    cache = Cache(h, rng, [60], dtype="float16")
    rows = [(0, p) for p in range(20, 20 + count)]
    q = queries(rng, rows, 6, 32)
    longer = np.full((40, 250), np.nan, np.float32)
    longer[:count, 8:200] = q.reshape(count, -1)
    options = dict(variant=variant, **dict(splits=2, split_len=32) if variant == "decode" else {})
    with pytest.raises(ValueError, match=r"rows at 8 \+ i \* 250 elements"):
        cache.attend(h.put(longer), rows, num_q_heads=6, q_offset=8, q_row_stride=250, max_rows=40, **options)
    longer = np.pad(longer, ((0, 0), (0, 2)), constant_values=np.nan)
    got = cache.attend(h.put(longer), rows, num_q_heads=6, q_offset=8, q_row_stride=252, max_rows=40, **options)
    np.testing.assert_allclose(got[:count], cache.expected(q, rows), atol=TOLERANCE)
    assert np.isnan(got[count:]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_threads_does_not_matter(h, monkeypatch, variant):
    rng = np.random.default_rng(0)
    cache = Cache(h, rng, [90, 20], head_dim=256, dtype="float16")
    rows = [(0, 88), (0, 89), (1, 3)]
    q = queries(rng, rows, 6, 256)
    results = []
    for seed in range(6):
        monkeypatch.setenv("METALSTEP_SIM_SEED", str(seed))
        results.append(cache.attend(q, rows, variant=variant, **dict(splits=2, split_len=48) if variant == "decode" else {}))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


OTHER_TUNING = [
    ("decode", dict(registers=256, positions=1, simdgroups=2)),
    ("decode", dict(registers=16, positions=3, simdgroups=4, merged_bytes=512)),
    ("decode", dict(simdgroups=1, merged_bytes=100)),
    ("mixed", dict(matrix_rows=64, tiles=2, runs=1)),
    ("mixed", dict(matrix_rows=16, tiles=2, long_positions=8, elements=32, runs=2)),
    ("mixed", dict(matrix_rows=8, long_positions=32, runs=3)),
]


@pytest.mark.parametrize("variant, changes", OTHER_TUNING)
def test_any_tuning_gives_the_same_results(h, monkeypatch, variant, changes):
    """Figures of another device than those that exist."""
    tuning = attention_geometry.TUNING["apple"]
    monkeypatch.setitem(attention_geometry.TUNING, "other", tuning | {variant: tuning[variant] | changes})
    rng = np.random.default_rng(0)
    cache = Cache(h, rng, [70, 20, 5], head_dim=128, dtype="float16")
    rows = [(0, p) for p in range(30, 70)] + [(1, 19), (2, 4), (1, 18)]
    q = queries(rng, rows, 10, 128)
    got = cache.attend(q, rows, variant=variant, kind="other", windows=[(20, 5), (0, 0), (3, 1)])
    want = cache.attend(q, rows, variant=variant, windows=[(20, 5), (0, 0), (3, 1)])
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize("device", list(attention_geometry.TUNING))
def test_every_geometry_fits_the_threadgroup_memory(device):
    """Of heads of 16 to 1024 elements: decode always, mixed up to what its error says."""
    for head_dim, value_dim, group, size in product((16, 64, 72, 128, 256, 512, 1024), (16, 64, 200, 256, 1024), range(1, 130), (2, 4)):
        decode = attention_geometry.decode_geometry(group, head_dim, value_dim, device)
        assert decode.threadgroup_bytes(head_dim, value_dim, size, inside=True) <= attention_geometry.THREADGROUP_BYTES
        if max(head_dim, value_dim) <= 256:
            mixed = attention_geometry.mixed_geometry(group, head_dim, value_dim, size, device)
            assert mixed.threadgroup_bytes(head_dim, value_dim, size) <= attention_geometry.THREADGROUP_BYTES
            assert mixed.rows >= 1
    with pytest.raises(ValueError, match="threadgroup memory"):
        attention_geometry.mixed_geometry(4, 1024, 1024, 4, device)


def test_a_workspace_has_a_part_for_each_piece_of_each_head():
    assert attention.workspace_bytes(4, 32, 3, 1) == 0
    assert attention.workspace_bytes(4, 32, 3, 2) == 3 * 4 * 2 * (32 + 2) * 4


def region(shape, dtype="float32", offset=0):
    return Buffer(0, offset, shape, dtype)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(num_q_heads=3), "num_q_heads is 3, expected a positive multiple of num_kv_heads, which is 2"),
        (dict(head_dim=20), "head_dim is 20, expected a multiple of 8 from 16"),
        (dict(value_dim=8), "value_dim is 8, expected a multiple of 8 from 16"),
        (dict(block_size=24), "block_size is 24, expected a power of two"),
        (dict(v_codec=KVCodec("float16")), "codecs are float32 and float16, expected one of"),
        (dict(scale=float("nan")), "scale is nan"),
        (dict(softcap=-1.0), "softcap -1.0"),
        (dict(window=-1), "window is -1"),
        (dict(max_rows=0), "max_rows 0"),
        (dict(variant="prefill"), "variant is 'prefill', expected 'decode' or 'mixed'"),
        (dict(kind="tpu"), "kind is 'tpu', expected apple or nvidia"),
        (dict(out=region((3, 4, 32), "bfloat16")), "out is bfloat16, expected float32 or float16 of the decode variant"),
        (dict(k_plane=region((4, 2, 32, 16))), r"k_plane has shape \(4, 2, 32, 16\), expected \(4, 2, 16, 32\)"),
        (dict(v_plane=region((4, 1, 16, 32))), r"v_plane has shape"),
        (dict(v_plane=region((4, 2, 16, 32), offset=4)), "v_plane starts at byte 4, expected multiples of 16 bytes"),
        (dict(q_offset=6), r"q starts at byte 0 and has rows at 6 \+ i \* 128 elements"),
        (dict(splits=0), "splits is 0"),
        (dict(splits=2, split_len=0), "split_len 0"),
        (dict(splits=2), "2 splits need a workspace of 3264 bytes, and there is none"),
        (dict(splits=2, workspace=region((800,))), "one of 3200 bytes"),
        (dict(splits=2, variant="mixed"), "the mixed variant has neither splits nor anything inside"),
    ],
)
def test_what_does_not_fit_is_refused(h, changes, text):
    step = h.step(3)
    arguments = dict(
        q=region((3, 128)), q_offset=0, q_row_stride=128, k_plane=region((4, 2, 16, 32)), v_plane=region((4, 2, 16, 32)),
        out=region((3, 4, 32)), step=step, num_q_heads=4, num_kv_heads=2, head_dim=32, value_dim=32, block_size=16,
        k_codec=KVCodec("float32"), v_codec=KVCodec("float32"), scale=1.0, max_rows=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=text):
        attention.launches(**arguments | changes)
