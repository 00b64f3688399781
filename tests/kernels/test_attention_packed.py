"""attention over packed planes on the host device: against softmax over what the codes decode to, in float32."""
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from harness import Harness
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kv_planes import Plane

from metalstep.kernels import attention, params, turboquant
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Launch

# Keys as the host device reads them: its codebooks are integers of a byte, so that scores are exact integer sums.
INTEGERS = {2: (35.5, 118.5), 3: (12.5, 38.5, 68.5, 109.5), 4: (5, 15, 25, 36, 48, 62, 79, 104)}
FACTORS = {2: 78.447, 3: 50.929, 4: 38.214}
# A query's elements are rounded to 1/65278 of the largest, which moves a score by about 3e-5, and a result by twice that times a value.
TOLERANCE = 4e-4
# Against the codec's own codebook: its rounding to integers is 2e-4, 8e-4 and 3e-3 of a key (the root of what it adds to the codebook's
# error), and so much of a score.
CODEBOOK_TOLERANCE = {"turbo2": 2e-3, "turbo3": 6e-3, "turbo4": 2.5e-2}

FLOATS = [KVCodec("float32"), KVCodec("float16"), KVCodec("bfloat16")]
PACKED = [KVCodec(name) for name in ("turbo2", "turbo3", "turbo4", "affine8")] + [KVCodec(name, "float32") for name in ("turbo3", "turbo4")]
PAIRS = [(k, v) for k in FLOATS + PACKED for v in FLOATS + PACKED if not (k.is_float and v.is_float)]
DIMS = (64, 80, 96, 128, 256)
ANY_DIM = st.sampled_from((*DIMS, 16, 32, 48, 112, 160, 512))


class Cache:
    """Sequences of random keys and values in shuffled blocks of planes that are NaN elsewhere."""

    def __init__(self, h, rng, lengths, heads, k, v, dims=(64, 64), block=16):
        self.h, self.lengths, self.heads, self.dims, self.block, self.codecs = h, lengths, heads, dims, block, (k, v)
        counts = [-(-n // block) for n in lengths]
        order, self.tables = iter(rng.permutation(sum(counts) + 1)), np.zeros((len(lengths), max(counts)), np.int32)
        for row, count in zip(self.tables, counts, strict=True):
            row[:count] = [next(order) for _ in range(count)]
        self.planes = [Plane(c, sum(counts) + 1, heads, block, d, i == 0) for i, (c, d) in enumerate(zip((k, v), dims, strict=True))]
        self.words = [np.full(plane.nbytes // 4, 0xFFFFFFFF, np.uint32) for plane in self.planes]
        self.vectors = [[rng.standard_normal((heads, n, d)).astype(np.float32) for n in lengths] for d in dims]
        for s, n in enumerate(lengths):
            self.write(s, range(n))

    def write(self, s, positions):
        """Encodes what self.vectors has at these positions of a sequence."""
        at = list(positions)
        block, place = self.tables[s, np.array(at) // self.block], np.array(at) % self.block
        for plane, words, vectors, seed in zip(self.planes, self.words, self.vectors, (turboquant.K_SEED, turboquant.V_SEED), strict=True):
            codes, scales = turboquant.encode(vectors[s][:, at], plane.codec, seed)
            to, to_scales = layout(plane, words)
            to[block, :, place] = codes.view(to.dtype).swapaxes(0, 1)
            if not plane.codec.is_float:
                to_scales[block, :, place] = scales.swapaxes(0, 1)

    def attend(self, q, rows, windows=None, **options):
        """q [rows, q_heads, dim] for rows (sequence, position); windows: (window, keep) of each sequence."""
        sequences = np.zeros(len(self.tables), params.record("MSSequence"))
        if windows:
            sequences["window"], sequences["keep"] = zip(*windows, strict=True)
        step = self.h.step(
            len(rows), seq_ids=[s for s, _ in rows], positions=[p for _, p in rows], tables=self.tables, sequences=sequences
        )
        out = self.h.empty((*q.shape[:2], self.dims[1]))
        launches = attention.launches(
            self.h.put(q.reshape(len(rows), -1)), 0, q[0].size, *(self.h.put(words) for words in self.words), out, step,
            num_q_heads=q.shape[1], num_kv_heads=self.heads, head_dim=self.dims[0], value_dim=self.dims[1], block_size=self.block,
            k_codec=self.codecs[0], v_codec=self.codecs[1], scale=self.dims[0] ** -0.5, max_rows=len(rows), **options,
        )  # fmt: skip
        self.h.run(launches, len(rows))
        return self.h.get(out)

    def expected(self, q, rows, window=0, softcap=0.0, sinks=None, windows=None, exact_books=False):
        """exact_books: keys by the codec's own codebook, not the host's integers."""
        k, v = self.codecs
        keys = [decoded_keys(x, k) if k.is_turbo and not exact_books else decoded(x, k, turboquant.K_SEED) for x in self.vectors[0]]
        values = [decoded(x, v, turboquant.V_SEED) for x in self.vectors[1]]
        return np.stack(
            [
                np.array(
                    attention.reference(
                        mx.array(row), mx.array(keys[s]), mx.array(values[s]), p, self.dims[0] ** -0.5, window, softcap,
                        None if sinks is None else mx.array(sinks), *(windows[s] if windows else ()),
                    )
                )
                for row, (s, p) in zip(q, rows, strict=True)
            ]
        )  # fmt: skip


def layout(plane, words):
    """Views of a plane: what a vector's codes are (elements of floats) [block, head, place, ...], and its scales."""
    codec, lead = plane.codec, (plane.blocks, plane.heads)
    if not codec.is_float:
        codes = words[: plane.scales_at].reshape(*lead, *((-1, plane.block_size) if plane.across else (plane.block_size, -1)))
        dtype = np.float32 if codec.norm_dtype == "float32" and codec.is_turbo else np.float16
        scales = words[plane.scales_at :].view(dtype)
        scales = scales.reshape(*lead, plane.block_size, 1) if codec.is_turbo else scales.reshape(*lead, -1, 2, plane.block_size)
        return codes.swapaxes(2, 3) if plane.across else codes, scales if codec.is_turbo else np.moveaxis(scales, -1, 2)
    codes = words.view(np.uint16 if codec.bits == 16 else np.uint32)
    codes = codes.reshape(*lead, *((plane.dim, plane.block_size) if plane.across else (plane.block_size, plane.dim)))
    return codes.swapaxes(2, 3) if plane.across else codes, None


def decoded(x, codec, seed):
    return turboquant.decode(*turboquant.encode(x, codec, seed), codec, x.shape[-1], seed)


def decoded_keys(x, codec):
    """What the host device takes turbo keys for."""
    codes, scales = turboquant.encode(x, codec, turboquant.K_SEED)
    half = np.array(INTEGERS[codec.bits])
    book = np.concatenate([-half[::-1], half]) / (FACTORS[codec.bits] * np.sqrt(x.shape[-1]))
    y = book.astype(np.float32)[turboquant.unpack(codes, codec.bits, x.shape[-1])] * scales.astype(np.float32)
    return turboquant.rotate_back(y, turboquant.K_SEED)


def queries(rng, rows, heads, dim):
    return rng.standard_normal((len(rows), heads, dim)).astype(np.float32)


pairs = st.sampled_from(PAIRS)
PAIR_NAMES = [f"{k.name}{'w' * (k.norm_dtype == 'float32')}-{v.name}{'w' * (v.norm_dtype == 'float32')}" for k, v in PAIRS]


@pytest.mark.parametrize(("k", "v"), PAIRS, ids=PAIR_NAMES)
def test_ragged_rows_agree_with_the_decoded_reference(k, v):
    """Every pair of codecs, contexts on both sides of a vector, a block and a chunk, in one launch; a zero vector among them."""
    rng = np.random.default_rng(1)
    lengths = [1, 15, 16, 63, 64, 65, 127, 129, 300]
    with Harness() as h:
        cache = Cache(h, rng, lengths, 2, k, v)
        for vectors in cache.vectors:
            vectors[5][:, 7] = 0
        cache.write(5, range(7, 8))
        rows = [(s, n - 1) for s, n in enumerate(lengths)] + [(8, 3), (8, 256)]
        q = queries(rng, rows, 6, 64)
        got = cache.attend(q, rows)
        assert np.abs(got - cache.expected(q, rows)).max() < TOLERANCE
        if k.is_turbo:
            assert np.abs(got - cache.expected(q, rows, exact_books=True)).max() < CODEBOOK_TOLERANCE[k.name]


@given(
    pair=pairs,
    dims=st.tuples(ANY_DIM, ANY_DIM),
    block=st.sampled_from([16, 32, 64, 128]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (9, 3), (7, 1)]),
    length=st.integers(1, 330),
    seed=st.integers(0, 1000),
)
@example((KVCodec("affine8"), KVCodec("affine8")), (496, 496), 16, (3, 1), 40, 0)  # 31 groups
@example((KVCodec("turbo3"), KVCodec("turbo3")), (80, 80), 32, (9, 3), 100, 0)  # an odd number of halves of three words
@settings(max_examples=60, deadline=None)
def test_dims_blocks_and_heads_agree_with_the_decoded_reference(pair, dims, block, heads, length, seed):
    rng = np.random.default_rng(seed)
    with Harness() as h:
        cache = Cache(h, rng, [length, 20], heads[1], *pair, dims, block)
        rows = [(0, length - 1), (1, 16), (0, int(rng.integers(length)))]
        q = queries(rng, rows, heads[0], dims[0])
        error = np.abs(cache.attend(q, rows) - cache.expected(q, rows)).max()
    assert error < TOLERANCE


WINDOWS = st.tuples(st.sampled_from([1, 2, 6, 17, 64, 150, 400]), st.sampled_from([0, 1, 4, 16, 33, 140]))  # some keep too much


@given(
    pair=pairs,
    group=st.sampled_from([1, 3, 4, 9]),
    windows=st.lists(WINDOWS | st.just((0, 0)), min_size=2, max_size=2),
    lengths=st.lists(st.integers(20, 500), min_size=2, max_size=2),
    window=st.sampled_from([0, 0, 5, 40, 200]),
    softcap=st.sampled_from([0.0, 0.7]),
    sinks=st.booleans(),
    block=st.sampled_from([16, 32]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_windows_caps_and_sinks_agree_with_the_decoded_reference(pair, group, windows, lengths, window, softcap, sinks, block, seed):
    """Sequences with different windows in one launch, each also alone; prompts' rows and decodes."""
    rng = np.random.default_rng(seed)
    with Harness() as h:
        cache = Cache(h, rng, lengths, 2, *pair, (64, 64), block)
        first = [int(rng.integers(n - 19)) for n in lengths]
        rows = [(s, p) for s in range(2) for p in range(first[s], first[s] + 19)]
        rows += [(s, int(rng.integers(n))) for s, n in enumerate(lengths)]
        q = queries(rng, rows, 2 * group, 64)
        logits = rng.standard_normal(2 * group).astype(np.float32) if sinks else None
        options = dict(window=window, softcap=softcap, windows=windows)
        given_sinks = None if logits is None else h.put(logits)
        together = cache.attend(q, rows, sinks=given_sinks, **options)
        alone = [cache.attend(q[i : i + 1], rows[i : i + 1], sinks=given_sinks, **options) for i in range(len(rows))]
        want = cache.expected(q, rows, sinks=logits, **options)
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert np.abs(together - want).max() < TOLERANCE


@given(
    pair=pairs,
    dim=st.sampled_from(DIMS),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (9, 3), (7, 1)]),
    start=st.integers(0, 300),
    window=st.sampled_from([0, 0, 3, 90]),
    own=WINDOWS | st.just((0, 0)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_a_long_chunk_is_the_same_bits_as_short_ones_and_as_decodes(pair, dim, heads, start, window, own, threads, seed):
    """Wide tiles, narrow ones and single rows do the same operations, whatever stands beside them and however many threads there are."""
    rng = np.random.default_rng(seed)
    with Harness(threads) as h, Harness(1) as one:
        cache = Cache(h, rng, [start + 130, 70], heads[1], *pair, (dim, dim))
        rows = [(0, p) for p in range(start, start + 130)] + [(1, 69), (1, 3)]
        q = queries(rng, rows, heads[0], dim)
        options = dict(window=window, windows=[own, (20, 2)])
        whole = cache.attend(q, rows, **options)
        cuts = [0, *sorted(rng.integers(0, len(rows), 4).tolist()), len(rows)]
        parts = [cache.attend(q[a:b], rows[a:b], **options) for a, b in pairwise(cuts) if a < b]
        few = rng.integers(0, len(rows), 6)
        cache.h = one
        alone = np.concatenate([cache.attend(q[i : i + 1], [rows[i]], **options) for i in few])
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    np.testing.assert_array_equal(whole[few], alone)


@given(pair=pairs, block=st.sampled_from([16, 64]), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_where_blocks_lie_and_what_other_sequences_hold_change_nothing(pair, block, seed):
    rng = np.random.default_rng(seed)
    with Harness() as h:
        cache = Cache(h, rng, [150, 90, 40], 2, *pair, block=block)
        rows = [(0, 149), (0, 30), (2, 39)]
        q = queries(rng, rows, 6, 64)
        before = cache.attend(q, rows)
        order = rng.permutation(cache.planes[0].blocks)
        cache.tables = order.astype(np.int32)[cache.tables]
        for words in cache.words:
            words[:] = 0xFFFFFFFF
        cache.vectors[0][1][:], cache.vectors[1][1][:] = np.nan, rng.standard_normal(cache.vectors[1][1].shape) * 1e4
        for s, n in enumerate(cache.lengths):
            cache.write(s, range(n))
        np.testing.assert_array_equal(cache.attend(q, rows), before)


@given(pair=pairs, which=st.sampled_from([0, 1]), value=st.sampled_from([np.nan, np.inf, -np.inf]), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_vector_that_is_not_finite_is_seen_by_the_rows_that_see_it(pair, which, value, seed):
    """They are NaN; those before it, those whose window is past it, and other sequences keep their bits."""
    rng = np.random.default_rng(seed)
    at = int(rng.integers(126, 139))
    with Harness() as h:
        cache = Cache(h, rng, [200, 50], 1, *pair)
        rows = [(0, p) for p in range(125, 141)] + [(0, at + 41), (1, 49)]
        q = queries(rng, rows, 3, 64)
        options = dict(window=40)
        before = cache.attend(q, rows, **options)
        cache.vectors[which][0][:, at, int(rng.integers(64))] = value
        cache.write(0, range(at, at + 1))
        after = cache.attend(q, rows, **options)
    seen = np.array([s == 0 and p - 40 < at <= p for s, p in rows])
    np.testing.assert_array_equal(after[~seen], before[~seen])
    if not pair[which].is_float:
        assert np.isnan(after[seen]).all()


@given(k=st.sampled_from(PACKED), value=st.sampled_from([np.nan, np.inf]))
def test_a_query_that_is_not_finite_makes_its_own_head_nan(k, value):
    rng = np.random.default_rng(0)
    with Harness(1) as h:
        cache = Cache(h, rng, [40], 1, k, KVCodec("turbo2"))
        rows = [(0, 39), (0, 38)]
        q = queries(rng, rows, 3, 64)
        before = cache.attend(q, rows)
        q[1, 2, 5] = value
        after = cache.attend(q, rows)
    assert np.isnan(after[1, 2]).all()
    after[1, 2] = before[1, 2]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("k", PACKED[:4], ids=lambda c: c.name)
def test_the_largest_sums_of_the_longest_keys_do_not_overflow(k):
    """512 elements, all queries' integers the largest, all codes at an end of the codebook."""
    with Harness(1) as h:
        cache = Cache(h, np.random.default_rng(0), [3], 1, k, KVCodec("affine8"), (512, 16))
        ones = np.where(np.arange(512) % 2, 1.0, -1.0).astype(np.float32)
        key = turboquant.rotate_back(ones, turboquant.K_SEED) if k.is_turbo else ones
        q = np.stack([key, -key])[None].astype(np.float32)
        codes, scales = layout(cache.planes[0], cache.words[0])
        block = cache.tables[0, 0]
        if k.is_turbo:
            ends = (ones > 0).astype(np.uint8) * ((1 << k.bits) - 1)
            codes[block, 0, :3] = turboquant.pack(ends, k.bits)
            scales[block, 0, :3, 0] = [0.0, 0.25, 0.5]
            unit = INTEGERS[k.bits][-1] / (FACTORS[k.bits] * np.sqrt(512))
            scores = np.outer([1, -1], np.array([0.0, 0.25, 0.5]) * unit * 512 * 512**-0.5)
        else:
            codes.view(np.uint32)[block, 0, :3] = np.where(ones > 0, 255, 0).astype(np.uint8).view(np.uint32)
            scales[block, 0, :3, :, 0], scales[block, 0, :3, :, 1] = (np.array([0.0, 0.25, 0.5]) / 256)[:, None], 0.0
            scores = np.outer([1, -1], np.array([0.0, 0.25, 0.5]) * 255 / 256 * 256 * 512**-0.5)
        got = cache.attend(q, [(0, 2)])[0]
        weights = np.exp(scores - scores.max(1, keepdims=True))
        want = weights / weights.sum(1, keepdims=True) @ decoded(cache.vectors[1][0], KVCodec("affine8"), 0)[0]
    np.testing.assert_allclose(got, want, atol=2e-3)


MEMORY = """
import resource, sys
import numpy as np
from test_attention_packed import Cache, queries
from harness import Harness
from metalstep.kernels.kv_codec import KVCodec
rng = np.random.default_rng(0)
with Harness(2) as h:
    cache = Cache(h, rng, [40000], 1, KVCodec("turbo4"), KVCodec("turbo2"))
    kept = [h.put(words) for words in cache.words]
    put, planes = h.put, dict(zip(map(id, cache.words), kept))
    h.put = lambda array, *dtype: planes[id(array)] if id(array) in planes else put(array, *dtype)
    for first in (0, 100):  # the second time, all that does not depend on the context is there
        rows = [(0, p) for p in range(first, first + 200)]
        q = queries(rng, rows, 3, 64)
        cache.attend(q, rows), cache.attend(q[:1], rows[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = [(0, p) for p in range(39800, 40000)]
    cache.attend(q, rows), cache.attend(q[:1], rows[:1])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_context():
    """Nothing is unpacked to memory but what registers hold: 40,000 keys of a head would be 10 MB in float32."""
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * (1 if sys.platform == "darwin" else 1024) < 2 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k_codec=17), "k_codec is 17"),
        (dict(v_codec=params.MS_KV_AFFINE8 | params.MS_KV_WIDE_SCALES), "v_codec is 88"),
        (dict(head_dim=72), "head_dim is 72"),
        (dict(head_dim=144), "head_dim is 144"),  # 16 * 9: no Hadamard matrix
        (dict(value_dim=1024), "value_dim is 1024"),
        (dict(k_scales=0), "k_scales is 0"),
        (dict(v_codec=params.MS_KV_FLOAT16), "v_scales is 256"),
    ],
)
def test_malformed_launches_are_refused_when_the_plan_is_made(change, message):
    fields = dict(
        num_q_heads=2, num_kv_heads=1, head_dim=64, value_dim=64, block_size=16, k_codec=params.MS_KV_TURBO4,
        v_codec=params.MS_KV_TURBO2, k_scales=512, v_scales=256, q_row_stride=128, scale=1.0,
    )
    with Harness() as h:
        buffers = [h.empty((64,)) for _ in range(10)]
        launch = Launch("attention", buffers, params.pack("MSAttentionParams", **fields | change), (1, 1, 1), (1, 1, 1))
        with pytest.raises(ValueError, match=message):
            h.run([launch], 1)
