"""attention and kv_write: paged, ragged, windowed, against softmax over the plain keys and values in float32."""
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from harness import Harness
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metalstep.kernels import attention, kv_write, params, row_program
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Launch
from metalstep.kernels.program import Program

TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}  # of the largest value: the cache's own rounding
CODES = {"float32": params.MS_FLOAT32, "float16": params.MS_FLOAT16, "bfloat16": params.MS_BFLOAT16}
BLOCK = 16


class Cache:
    """Sequences of random keys and values, written through kv_write into shuffled blocks of poisoned planes."""

    def __init__(self, h, rng, lengths, kv_heads, head_dim, dtype, block=BLOCK):
        self.h, self.lengths, self.heads, self.dim, self.dtype, self.block = h, lengths, kv_heads, head_dim, dtype, block
        self.codec = KVCodec(dtype)
        counts = [-(-n // block) for n in lengths]
        order, self.tables = iter(rng.permutation(sum(counts) + 1)), np.zeros((len(lengths), max(counts)), np.int32)
        for row, count in zip(self.tables, counts, strict=True):
            row[:count] = [next(order) for _ in range(count)]
        blocks = sum(counts) + 1
        bits = np.uint32 if dtype == "float32" else np.uint16
        poison = np.full((blocks, kv_heads, head_dim, block), 0xFFFF if bits is np.uint16 else 0xFFFFFFFF, bits)
        self.k_plane, self.v_plane = h.put(poison, dtype), h.put(poison, dtype)
        self.keys = [rng.standard_normal((kv_heads, n, head_dim)).astype(np.float32) for n in lengths]
        self.values = [rng.standard_normal((kv_heads, n, head_dim)).astype(np.float32) for n in lengths]
        for s, n in enumerate(lengths):
            self.write(s, range(n))

    def slot(self, s, position):
        return int(self.tables[s, position // self.block]) * self.block + position % self.block

    def write(self, s, positions):
        width = self.heads * self.dim
        k, v = (np.stack([a[s][:, p].reshape(-1) for p in positions]) for a in (self.keys, self.values))
        program, first = Program(), params.MS_SLOT_FIRST
        regs = [program.load(first + i, width, rows=params.MS_ROW_SELF, row_stride=width) for i in range(2)]
        kv_write.emit(program, *regs, first + 2, first + 3, self.heads, self.block, self.codec, self.codec)
        step = self.h.step(len(k), slots=[self.slot(s, p) for p in positions])
        buffers = [self.h.put(k), self.h.put(v), self.k_plane, self.v_plane]
        self.h.run(row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, len(k)), len(k))

    def attend(self, q, rows, windows=None, **options):
        """q [rows, q_heads, dim] for rows (sequence, position); windows: (window, keep) of each sequence."""
        sequences = np.zeros(len(self.tables), params.record("MSSequence"))
        if windows:
            sequences["window"], sequences["keep"] = zip(*windows, strict=True)
        step = self.h.step(
            len(rows), seq_ids=[s for s, _ in rows], positions=[p for _, p in rows], tables=self.tables, sequences=sequences
        )
        out = self.h.empty(q.shape)
        launches = attention.launches(
            self.h.put(q.reshape(len(rows), -1)), 0, q[0].size, self.k_plane, self.v_plane, out, step,
            num_q_heads=q.shape[1], num_kv_heads=self.heads, head_dim=self.dim, value_dim=self.dim,
            block_size=self.block, k_codec=self.codec, v_codec=self.codec, scale=self.dim**-0.5, max_rows=len(rows), **options,
        )  # fmt: skip
        self.h.run(launches, len(rows))
        return self.h.get(out)

    def expected(self, q, rows, window=0, softcap=0.0, sinks=None, windows=None):
        return np.stack(
            [
                np.array(
                    attention.reference(
                        mx.array(row), mx.array(self.keys[s]), mx.array(self.values[s]), p, self.dim**-0.5, window, softcap,
                        None if sinks is None else mx.array(sinks), *(windows[s] if windows else ()),
                    )
                )
                for row, (s, p) in zip(q, rows, strict=True)
            ]
        )  # fmt: skip


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_ragged_rows_agree_with_the_reference(dtype, dim):
    """Decodes and a prefill chunk in one launch, contexts on both sides of a block and of a chunk."""
    rng = np.random.default_rng(dim)
    with Harness() as h:
        cache = Cache(h, rng, [1, 17, 300], 2, dim, dtype)
        rows = [(0, 0), (1, 16), (1, 3), (2, 299), (2, 128), (2, 127)]
        q = rng.standard_normal((len(rows), 6, dim)).astype(np.float32)
        error = np.abs(cache.attend(q, rows) - cache.expected(q, rows)).max()
    assert error < TOLERANCE[dtype] * 4


@given(
    group=st.integers(1, 9),
    heads=st.integers(1, 3),
    length=st.integers(1, 600),
    window=st.sampled_from([0, 1, 5, 16, 100]),
    softcap=st.sampled_from([0.0, 0.7]),
    sinks=st.booleans(),
    block=st.sampled_from([16, 32]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_heads_windows_caps_and_sinks_agree_with_the_reference(group, heads, length, window, softcap, sinks, block, seed):
    rng = np.random.default_rng(seed)
    with Harness() as h:
        cache = Cache(h, rng, [length], heads, 64, "float32", block)
        rows = [(0, length - 1), (0, int(rng.integers(length)))]
        q = rng.standard_normal((2, group * heads, 64)).astype(np.float32)
        logits = rng.standard_normal(group * heads).astype(np.float32) if sinks else None
        given_sinks = None if logits is None else h.put(logits)
        got = cache.attend(q, rows, window=window, softcap=softcap, sinks=given_sinks)
        want = cache.expected(q, rows, window, softcap, logits)
    np.testing.assert_allclose(got, want, atol=5e-6)


@given(threads=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_row_is_the_same_bits_alone_and_in_any_batch(threads, seed):
    rng = np.random.default_rng(seed)
    with Harness(threads) as h:
        cache = Cache(h, rng, [int(n) for n in rng.integers(1, 400, 4)], 3, 64, "float16")
        rows = [(s, int(rng.integers(n))) for s, n in enumerate(cache.lengths) for _ in range(3)]
        q = rng.standard_normal((len(rows), 9, 64)).astype(np.float32)
        together = cache.attend(q, rows)
        alone = np.concatenate([cache.attend(q[i : i + 1], rows[i : i + 1]) for i in range(len(rows))])
    np.testing.assert_array_equal(together, alone)


@given(
    group=st.sampled_from([1, 3, 4, 9]),
    length=st.sampled_from([20, 130, 259, 1100]),
    window=st.sampled_from([0, 1, 7, 40, 300]),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_rows_of_a_prefill_are_the_same_bits_as_decodes(group, length, window, threads, dtype, seed):
    """Neighbouring rows of a sequence share their loads of keys and values; each still sums as it does alone."""
    rng = np.random.default_rng(seed)
    with Harness(threads) as h:
        cache = Cache(h, rng, [length, 5], 2, 32, dtype)
        first = int(rng.integers(length - 19))
        rows = [(0, p) for p in range(first, first + 20)] + [(1, 4)]
        q = rng.standard_normal((len(rows), 2 * group, 32)).astype(np.float32)
        together = cache.attend(q, rows, window=window)
        alone = np.concatenate([cache.attend(q[i : i + 1], rows[i : i + 1], window=window) for i in range(len(rows))])
    np.testing.assert_array_equal(together, alone)


WINDOWS = st.tuples(st.sampled_from([1, 2, 6, 17, 64, 150, 400]), st.sampled_from([0, 1, 4, 16, 33, 140]))  # some keep too much


@given(
    group=st.sampled_from([1, 3, 4, 9]),
    windows=st.lists(WINDOWS | st.just((0, 0)), min_size=2, max_size=2),
    lengths=st.lists(st.integers(20, 700), min_size=2, max_size=2),
    window=st.sampled_from([0, 0, 5, 40, 200]),
    softcap=st.sampled_from([0.0, 0.7]),
    dtype=st.sampled_from(list(TOLERANCE)),
    block=st.sampled_from([16, 32]),
    seed=st.integers(0, 1000),
)
@example(3, [(33, 33), (5, 140)], [300, 200], 0, 0.0, "float32", 16, 0)  # no room beside what is kept: itself
@example(3, [(2**32 - 1, 2**32 - 1), (64, 2**32 - 1)], [300, 200], 0, 0.0, "float32", 16, 0)
@settings(max_examples=40, deadline=None)
def test_sequences_windows_and_kept_positions_agree_with_the_reference(group, windows, lengths, window, softcap, dtype, block, seed):
    """Sequences with different windows in one launch, each also alone; prompts' rows and decodes."""
    rng = np.random.default_rng(seed)
    with Harness() as h:
        cache = Cache(h, rng, lengths, 2, 32, dtype, block)
        first = [int(rng.integers(n - 19)) for n in lengths]
        rows = [(s, p) for s in range(2) for p in range(first[s], first[s] + 19)]
        rows += [(s, int(rng.integers(n))) for s, n in enumerate(lengths)]
        q = rng.standard_normal((len(rows), 2 * group, 32)).astype(np.float32)
        options = dict(window=window, softcap=softcap, windows=windows)
        together = cache.attend(q, rows, **options)
        alone = np.concatenate([cache.attend(q[i : i + 1], rows[i : i + 1], **options) for i in range(len(rows))])
        want = cache.expected(q, rows, **options)
    np.testing.assert_array_equal(together, alone)
    assert np.abs(together - want).max() < TOLERANCE[dtype] * 4


@given(
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (9, 3), (7, 1)]),
    start=st.integers(0, 300),
    window=st.sampled_from([0, 0, 3, 90]),
    own=WINDOWS | st.just((0, 0)),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_a_long_chunk_is_the_same_bits_as_short_ones(heads, start, window, own, threads, dtype, seed):
    """Many rows of a sequence convert its keys and values once for all; decodes of another sequence stand beside them."""
    rng = np.random.default_rng(seed)
    with Harness(threads) as h:
        cache = Cache(h, rng, [start + 260, 70], heads[1], 32, dtype)
        rows = [(0, p) for p in range(start, start + 260)] + [(1, 69), (1, 3)]
        q = rng.standard_normal((len(rows), heads[0], 32)).astype(np.float32)
        options = dict(window=window, windows=[own, (20, 2)])
        whole = cache.attend(q, rows, **options)
        cuts = [0, *sorted(rng.integers(0, len(rows), 4).tolist()), len(rows)]
        parts = [cache.attend(q[a:b], rows[a:b], **options) for a, b in pairwise(cuts) if a < b]
        few = rng.integers(0, len(rows), 6)
        alone = np.concatenate([cache.attend(q[i : i + 1], [rows[i]], **options) for i in few])
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    np.testing.assert_array_equal(whole[few], alone)


@given(
    window=st.sampled_from([30, 64, 130]),
    keep=st.sampled_from([0, 1, 16, 20]),
    rows=st.sampled_from([1, 9, 60]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_blocks_between_the_kept_positions_and_the_window_are_not_seen(window, keep, rows, dtype, seed):
    """They are freed: their entries name block 0, which holds NaN, and what they held is overwritten with it."""
    rng = np.random.default_rng(seed)
    with Harness() as h:
        cache = Cache(h, rng, [16, 500], 2, 32, dtype)
        where = [(1, p) for p in range(500 - rows, 500)]
        q = rng.standard_normal((rows, 6, 32)).astype(np.float32)
        options = dict(windows=[(0, 0), (window, keep)])
        before = cache.attend(q, where, **options)
        freed = slice(-(-keep // BLOCK), (500 - rows + 1 - (window - keep)) // BLOCK)
        cache.keys[1][:, freed.start * BLOCK : freed.stop * BLOCK] = np.nan
        cache.values[1][:, freed.start * BLOCK : freed.stop * BLOCK] = np.nan
        cache.write(1, range(freed.start * BLOCK, freed.stop * BLOCK))
        cache.keys[0][:], cache.values[0][:] = np.nan, np.nan
        cache.write(0, range(16))
        cache.tables[1, freed] = cache.tables[0, 0]
        after = cache.attend(q, where, **options)
    assert freed.stop - freed.start > 10
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(after).all()


def test_a_window_that_is_never_full_changes_nothing():
    rng = np.random.default_rng(0)
    with Harness() as h:
        cache = Cache(h, rng, [300], 2, 64, "float16")
        rows = [(0, p) for p in (0, 16, 63, 299)]
        q = rng.standard_normal((4, 6, 64)).astype(np.float32)
        np.testing.assert_array_equal(cache.attend(q, rows), cache.attend(q, rows, windows=[(300, 4)]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_does_not_see_later_positions_of_its_tile(value):
    """What a later row wrote, even NaN, is no part of an earlier row's result."""
    rng = np.random.default_rng(0)
    with Harness() as h:
        cache = Cache(h, rng, [140], 1, 32, "float16")
        rows = [(0, p) for p in range(125, 137)]
        q = rng.standard_normal((len(rows), 3, 32)).astype(np.float32)
        before = cache.attend(q, rows)
        cache.values[0][:, 131:] = value
        cache.keys[0][:, 131:] = value
        cache.write(0, range(131, 140))
        after = cache.attend(q, rows)
    np.testing.assert_array_equal(after[:6], before[:6])
    assert np.isnan(after[6:]).all()


def test_a_row_without_a_place_in_the_tables_is_nan():
    with Harness() as h:
        cache = Cache(h, np.random.default_rng(0), [3], 1, 32, "float32")
        got = cache.attend(np.ones((4, 1, 32), np.float32), [(0, 2), (0, -1), (7, 0), (0, 16)])
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1:]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_kv_heads=0), "0 kv heads"),
        (dict(block_size=24), "block_size is 24"),
        (dict(value_dim=20), "value_dim 20"),
        (dict(k_codec=params.MS_INT32), "k_codec"),
        (dict(scale=float("nan")), "not finite"),
    ],
)
def test_malformed_launches_are_refused_when_the_plan_is_made(change, message):
    fields = dict(
        num_q_heads=2, num_kv_heads=1, head_dim=32, value_dim=32, block_size=16, k_codec=params.MS_KV_FLOAT16,
        v_codec=params.MS_KV_FLOAT16, q_row_stride=64, scale=1.0,
    )
    with Harness() as h:
        buffers = [h.empty((64,)) for _ in range(10)]
        launch = Launch("attention", buffers, params.pack("MSAttentionParams", **fields | change), (1, 1, 1), (1, 1, 1))
        with pytest.raises(ValueError, match=message):
            h.run([launch], 1)


def test_a_negative_slot_is_not_written():
    with Harness() as h:
        cache = Cache(h, np.random.default_rng(0), [3], 1, 32, "float32")
        before = h.get(cache.k_plane, np.uint32).copy()
        cache.slot = lambda s, p: -1
        cache.write(0, range(3))
        np.testing.assert_array_equal(h.get(cache.k_plane, np.uint32), before)


def test_head_counts_that_do_not_divide_are_refused():
    with Harness() as h:
        cache = Cache(h, np.random.default_rng(0), [3], 2, 32, "float32")
        with pytest.raises(ValueError, match="num_q_heads"):
            cache.attend(np.zeros((1, 3, 32), np.float32), [(0, 0)])
