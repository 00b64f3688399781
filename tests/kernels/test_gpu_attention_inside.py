"""Attention on a GPU with norms, rotation and cache write inside: as rms_norm, rope and kv_write before it would have it."""
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from gpu_attention import loaded
from gpu_attention_layer import KEY_ERROR, KEY_ROUNDING, Layer
from gpu_harness import GpuHarness
from harness import Harness
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.kernels import kv_write, params, rms_norm, rope, row_program
from metalstep.kernels.gpu.attention import Rows
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Norm
from metalstep.kernels.program import Program

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
        kv_write.emit(program, k, v, first + 2, first + 3, heads, 16, KVCodec(dtype), KVCodec(dtype))
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
