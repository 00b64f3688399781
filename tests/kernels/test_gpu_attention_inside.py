"""Attention on a GPU with norms, rotation and cache write inside: as rms_norm, rope and kv_write before it would have it."""
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from gpu_attention import CODES, Cache, loaded
from gpu_harness import GpuHarness
from harness import Harness
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.kernels import kv_write, params, rms_norm, rope, row_program
from metalstep.kernels.gpu.attention import Inside, Rows
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Norm
from metalstep.kernels.program import Program

# The order of sums in norms and softmax, and of the reference's, all float32; queries are normed to elements of about 1.
TOLERANCE = 1e-5
# Of a key in the cache, whose pairs reach 16: four roundings of such elements, and where it lies next to a rounding boundary of the
# cache's dtype it falls to the other side.
KEY_ERROR = 4 * 16 * 2**-24
KEY_ROUNDING = {"float32": 0, "float16": 2**-10, "bfloat16": 2**-7}
DTYPES = list(KEY_ROUNDING)
COVERING = [(16, 16, 1), (32, 48, 5), (64, 64, 7), (80, 80, 2), (128, 128, 4), (128, 128, 9), (256, 256, 2), (256, 128, 8)]
DIMS = [(16, 16), (24, 24), (32, 32), (48, 48), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
INSTANCES = [pytest.param(*case, DTYPES[i % 3], id=f"{case}-{DTYPES[i % 3]}") for i, case in enumerate(COVERING)] + [
    pytest.param(*dims, group, dtype, marks=pytest.mark.all_instances, id=f"all-{dims}-{group}-{dtype}")
    for dims, group, dtype in product(DIMS, (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16), DTYPES)
]


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


class Layer:
    """Sequences whose newest token is not in the cache yet, and the rows of q, k and v that a linear left of them, side by side."""

    def __init__(self, h, seed, lengths, group, *, dims=None, traditional=False, q_norm="weight", k_norm="weight", v_offset=4, **options):
        rng = np.random.default_rng(seed)
        self.h, self.cache = h, Cache(h, rng, lengths, **options)
        self.head_dim, self.value_dim = self.cache.dims
        self.heads, self.kv_heads = group * self.cache.heads, self.cache.heads
        self.dims, self.traditional = self.head_dim if dims is None else dims, traditional
        self.rows = [(s, n - 1) for s, n in enumerate(lengths)]
        self.slots = [self.cache.slot(s, p) for s, p in self.rows]
        self.forget()
        count, cache = len(lengths), self.cache
        self.q = rng.standard_normal((count, self.heads, self.head_dim)).astype(np.float32)
        self.k = rng.standard_normal((count, self.kv_heads, self.head_dim)).astype(np.float32) * 3
        self.v = np.stack([values[:, -1] for values in cache.values])
        gap = np.full((count, v_offset), np.nan, np.float32)
        parts = [self.q.reshape(count, -1), self.k.reshape(count, -1), gap, self.v.reshape(count, -1)]
        self.row = np.concatenate(parts, axis=1)
        self.row = np.pad(self.row, ((0, 0), (0, -self.row.shape[1] % 4)), constant_values=np.nan)
        self.k_offset, self.v_offset = parts[0].shape[1], sum(part.shape[1] for part in parts[:3])
        self.weights = rng.uniform(0.5, 1.5, (2, self.head_dim)).astype(np.float32)
        self.norms = (q_norm, k_norm)
        freqs = 10000.0 ** (np.arange(self.dims // 2) / max(self.dims // 2, 1))
        angle = (np.array([[p] for _, p in self.rows], np.float32) / freqs.astype(np.float32)).astype(np.float32)
        self.angles = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    def forget(self):
        """The newest positions hold NaN."""
        for s, p in self.rows:
            for plane in (self.cache.k_plane, self.cache.v_plane):
                self.cache.view(plane)[self.cache.tables[s, p // self.cache.block], :, p % self.cache.block] = self.nan
        self.before = self.planes()

    @property
    def nan(self):
        return 0xFFFF if self.cache.dtype == "bfloat16" else np.nan

    def planes(self):
        return [self.cache.view(plane).copy() for plane in (self.cache.k_plane, self.cache.v_plane)]

    def inside(self, row: Buffer, rows) -> Inside:
        stride = self.row.shape[1]
        eps = (1e-6, 1e-2)
        norms = [
            None if kind is None else Norm(self.h.put(weight) if kind == "weight" else None, e)
            for kind, weight, e in zip(self.norms, self.weights, eps, strict=True)
        ]
        angles = self.h.put(self.angles[rows]) if self.dims else None
        return Inside(Rows(row, self.k_offset, stride), Rows(row, self.v_offset, stride), *norms, angles, self.dims, self.traditional)

    def attend(self, rows=None, slots=None, **options):
        """[rows, heads, value_dim] of the step that has only the sequences `rows`."""
        rows = list(range(len(self.rows))) if rows is None else rows
        row = self.h.put(self.row[rows])
        slots = self.slots if slots is None else slots
        return self.cache.attend(
            row, [self.rows[i] for i in rows], num_q_heads=self.heads, q_row_stride=self.row.shape[1], inside=self.inside(row, rows),
            slots=[slots[i] for i in rows], **options,
        )  # fmt: skip

    def prepared(self, x, which):
        """x [rows, heads, head_dim], queries (0) or keys (1), normed and rotated in float64 by the angles' table."""
        kind, x, half = self.norms[which], x.astype(np.float64), self.dims // 2
        if kind is not None:
            x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + (1e-6, 1e-2)[which])
        if kind == "weight":
            x = x * self.weights[which]
        cos, sin = self.angles[:, None, :half], self.angles[:, None, half:]
        pairs = (slice(0, self.dims, 2), slice(1, self.dims, 2)) if self.traditional else (slice(half), slice(half, self.dims))
        first, second = pairs
        turned = x.copy()
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., first] * sin + x[..., second] * cos
        return turned.astype(np.float32)

    def adopt(self):
        """The new keys and values as the planes have them become the cache's own; returns both, [rows, kv_heads, dim]."""
        planes = [loaded(plane, self.cache.dtype) for plane in self.planes()]
        found = []
        for plane, arrays in zip(planes, (self.cache.keys, self.cache.values), strict=True):
            new = [plane[slot // self.cache.block, :, slot % self.cache.block] for slot in self.slots]
            for array, rows in zip(arrays, new, strict=True):
                array[:, -1] = rows
            found.append(np.stack(new))
        return found

    def check(self, **options):
        """A step agrees with the references, and changes the new positions alone."""
        got = self.attend(**options)
        keys, values = self.adopt()
        dtype = self.cache.dtype
        np.testing.assert_allclose(keys, self.prepared(self.k, 1), rtol=KEY_ROUNDING[dtype], atol=KEY_ERROR)
        np.testing.assert_array_equal(values, self.v)  # which the cache's dtype has exactly
        self.check_others()
        known = {name: options[name] for name in ("window", "softcap", "sinks", "windows") if name in options}
        np.testing.assert_allclose(got, self.cache.expected(self.prepared(self.q, 0), self.rows, **known), atol=TOLERANCE)
        return got

    def check_others(self):
        """All but the new positions is as it was, to the bit."""
        for now, before in zip(self.planes(), self.before, strict=True):
            for slot in self.slots:
                now[slot // self.cache.block, :, slot % self.cache.block] = self.nan
            np.testing.assert_array_equal(now.view(np.uint8), before.view(np.uint8))


@pytest.mark.parametrize("head_dim, value_dim, group, dtype", INSTANCES)
def test_ragged_sequences_agree_with_the_references(h, head_dim, value_dim, group, dtype):
    """New positions that begin a sequence, begin and end a block, and lie within one."""
    Layer(h, head_dim, [1, 16, 17, 70], group, head_dim=head_dim, value_dim=value_dim, dtype=dtype).check()


NORMS = st.sampled_from([None, "plain", "weight"])


@given(
    q_norm=NORMS,
    k_norm=NORMS,
    dims=st.sampled_from([0, 2, 16, 30, 32]),
    traditional=st.booleans(),
    group=st.sampled_from([1, 3, 9]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    splits=st.sampled_from([1, 3]),
    window=st.sampled_from([0, 0, 1, 20]),
    own=st.sampled_from([(0, 0), (0, 0), (6, 2), (60, 33)]),
    softcap=st.sampled_from([0.0, 0.7]),
    sinks=st.booleans(),
    block=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_what_is_done_inside_agrees_with_the_references(
    h, q_norm, k_norm, dims, traditional, group, lengths, splits, window, own, softcap, sinks, block, dtype, seed
):
    layer = Layer(h, seed, lengths, group, dims=dims, traditional=traditional, q_norm=q_norm, k_norm=k_norm, block=block, dtype=dtype)
    logits = np.random.default_rng(seed).standard_normal(layer.heads).astype(np.float32) if sinks else None
    layer.check(splits=splits, split_len=32, window=window, windows=[own] * len(lengths), softcap=softcap, sinks=logits)


@given(splits=st.sampled_from([1, 3]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_row_is_the_same_bits_alone_and_in_any_batch(h, splits, dtype, seed):
    lengths = np.random.default_rng(seed).integers(1, 150, 4)
    layer = Layer(h, seed, [int(n) for n in lengths], 3, dtype=dtype)
    pieces = dict(splits=splits, split_len=40)
    together, planes = layer.attend(**pieces), layer.planes()
    layer.forget()
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(layer.attend(order, **pieces), together[order])
    layer.forget()
    np.testing.assert_array_equal(np.concatenate([layer.attend([i], **pieces) for i in range(4)]), together)
    for now, before in zip(layer.planes(), planes, strict=True):
        np.testing.assert_array_equal(now.view(np.uint8), before.view(np.uint8))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_new_position_counts_as_the_cache_holds_it(h, splits, dtype):
    """Attention alone over what the launch wrote, of queries that need nothing inside, gives the same bits."""
    layer = Layer(h, 0, [1, 40, 100], 3, dims=0, q_norm=None, dtype=dtype)
    pieces = dict(splits=splits, split_len=40)
    got = layer.attend(**pieces)
    np.testing.assert_array_equal(layer.cache.attend(layer.q, layer.rows, **pieces), got)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_negative_slot_is_not_written(h, splits):
    """Its row attends to its own key and value all the same, and other rows to theirs."""
    layer = Layer(h, 0, [30, 100], 3)
    pieces = dict(splits=splits, split_len=40)
    whole, planes = layer.attend(**pieces), layer.planes()
    layer.forget()
    got = layer.attend(slots=[-1, layer.slots[1]], **pieces)
    np.testing.assert_array_equal(got, whole)
    block, place = divmod(layer.slots[0], layer.cache.block)
    for now, before, written in zip(layer.planes(), layer.before, planes, strict=True):
        written[block, :, place] = before[block, :, place]
        np.testing.assert_array_equal(now.view(np.uint8), written.view(np.uint8))


def test_a_row_without_a_place_in_the_tables_is_nan_and_still_written(h):
    """As a row program would write it: the slot alone says where."""
    layer = Layer(h, 0, [30, 20], 9)
    layer.rows[0] = (7, 29)
    got = layer.attend(splits=2, split_len=16)
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()
    np.testing.assert_array_equal(layer.adopt()[1], layer.v)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_that_the_step_does_not_have_are_left(h, splits):
    layer = Layer(h, 0, [30, 50], 3)
    got = layer.attend(max_rows=9, splits=splits, split_len=32)
    assert np.isfinite(got[:2]).all() and np.isnan(got[2:]).all()
    layer.check_others()


@pytest.mark.parametrize("traditional, dims", [(False, 32), (True, 32), (False, 20), (True, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_is_as_the_hosts_row_program_leaves_it(h, dtype, traditional, dims):
    """Angles, norm, rotation and write by the instructions themselves; a key's last place may be rounded otherwise."""
    layer = Layer(h, 1, [3, 33, 90], 3, dims=dims, traditional=traditional, dtype=dtype)
    rows, heads, dim = len(layer.rows), layer.kv_heads, layer.head_dim
    with Harness() as host:
        program, first = Program(), params.MS_SLOT_FIRST
        k, v = (program.load(first + i, heads * dim, rows=params.MS_ROW_SELF, row_stride=heads * dim) for i in range(2))
        weight = program.load(first + 4, dim, rows=params.MS_ROW_SAME)
        angles = rope.emit_angles(program, dims, 10000.0, 1.0, None)
        program.store(angles, first + 5, row_stride=dims)
        k = rope.emit(program, rms_norm.emit(program, k, weight, 1e-2, dim), angles, dim, traditional)
        kv_write.emit(program, k, v, first + 2, first + 3, heads, 16, CODES[dtype])
        step = host.step(rows, positions=[p for _, p in layer.rows], slots=list(range(rows)))
        size = (1, heads, dim, 16)
        planes = [host.put(np.zeros(size, layer.before[0].dtype), dtype) for _ in range(2)]
        table = host.empty((rows, dims))
        given_rows = [host.put(a.reshape(rows, -1)) for a in (layer.k, layer.v)]
        buffers = [*given_rows, *planes, host.put(layer.weights[1]), table]
        host.run(row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, rows), rows)
        keys, values = (loaded(host.get(plane, layer.before[0].dtype), dtype) for plane in planes)
        layer.angles = host.get(table)
    layer.attend()
    got_keys, got_values = layer.adopt()
    want = keys[0, :, :, :rows].transpose(2, 0, 1)
    np.testing.assert_allclose(got_keys, want, rtol=KEY_ROUNDING[dtype], atol=KEY_ERROR)
    np.testing.assert_array_equal(got_values, values.reshape(heads, 16, dim)[:, :rows].transpose(1, 0, 2))


def test_the_order_of_threads_does_not_matter(h, monkeypatch):
    layer = Layer(h, 0, [30, 100], 4, head_dim=128, dtype="float16")
    results = []
    for seed in range(6):
        monkeypatch.setenv("METALSTEP_SIM_SEED", str(seed))
        layer.forget()
        results.append([layer.attend(splits=2, split_len=48), *layer.planes()])
    for result in results[1:]:
        for now, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(now, first)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(rope_dims=0), "rope_dims is 0 with angles, expected an even number"),
        (dict(angles=None), "rope_dims is 32 without angles"),
        (dict(rope_dims=34), "rope_dims is 34 with angles"),
        (dict(rope_dims=16), r"angles has shape \(1, 32\), expected \(max_tokens, 16\)"),
        (dict(k=Rows(Buffer(0, 0, (1, 64), "float32"), 0, 60)), "rows of k are 60 elements apart, expected 64 or more"),
        (dict(v=Rows(Buffer(0, 0, (1, 64), "float32"), -4, 64)), "rows of v"),
        (dict(q_norm=Norm(Buffer(0, 0, (16,), "float32"), 1e-6)), r"the weight of q's norm is float32 \(16,\), expected float32 \(32,\)"),
        (dict(k_norm=Norm(Buffer(0, 0, (32,), "float16"), 1e-6)), r"the weight of k's norm is float16"),
        (dict(k_norm=Norm(None, -1.0)), "eps of k's norm is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(h, changes, text):
    layer = Layer(h, 0, [3], 1)
    row = h.put(layer.row)
    inside = replace(layer.inside(row, [0]), **changes)
    with pytest.raises(ValueError, match=text):
        layer.cache.attend(row, layer.rows, num_q_heads=2, slots=layer.slots, inside=inside)
    with pytest.raises(ValueError, match="the mixed variant has neither splits nor anything inside"):
        layer.cache.attend(row, layer.rows, num_q_heads=2, slots=layer.slots, inside=layer.inside(row, [0]), variant="mixed")
