"""kv_write: where each key and value of a row lands in the planes, rounded as MLX rounds, and that nothing else changes."""
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import launch_of, own_buffers

from metalstep.kernels import kv_write, params, row_program
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.program import Program

CODES = {"float32": params.MS_FLOAT32, "float16": params.MS_FLOAT16, "bfloat16": params.MS_BFLOAT16}
UNTOUCHED = {"float32": 0x7FC01234, "float16": 0x7E12, "bfloat16": 0x7FE1}  # a NaN that no rounding makes


def bits_of(x, dtype):
    """x rounded to `dtype`, as bits."""
    rounded = mx.array(x).astype(getattr(mx, dtype))
    return np.array(rounded.view(mx.uint32 if dtype == "float32" else mx.uint16))


def planes(blocks, heads, key_dim, value_dim, block_size, dtype):
    """Bits of untouched planes: keys [block, head, key_dim, block_size], values [block, head, block_size, value_dim]."""
    word = np.uint32 if dtype == "float32" else np.uint16
    shapes = (blocks, heads, key_dim, block_size), (blocks, heads, block_size, value_dim)
    return [np.full(shape, UNTOUCHED[dtype], word) for shape in shapes]


def write(h, keys, values, slots, before, block_size, dtype):
    """keys [rows, heads, key_dim], values [rows, heads, value_dim] into copies of the planes; their bits after it."""
    program, first = Program(), params.MS_SLOT_FIRST
    rows, heads = keys.shape[:2]
    regs = [
        program.load(first + i, a[0].size, rows=params.MS_ROW_SELF, row_stride=a[0].size)
        for i, a in enumerate((keys, values))
    ]
    kv_write.emit(program, *regs, first + 2, first + 3, heads, block_size, KVCodec(dtype), KVCodec(dtype))
    with own_buffers(h):
        after = [h.put(plane) for plane in before]
        step = h.step(rows, slots=slots)
        h.run(row_program.launches(program, step, [h.put(keys), h.put(values), *after], params.MS_ROWS_TOKENS, rows), rows)
        return [h.get(buffer, plane.dtype) for buffer, plane in zip(after, before, strict=True)]


@given(
    dtype=st.sampled_from(list(CODES)), heads=st.integers(1, 3), key_dim=st.sampled_from([1, 15, 16, 33, 64, 97]),
    value_dim=st.sampled_from([1, 16, 33, 64]), block_size=st.sampled_from([1, 8, 16, 32]), rows=st.integers(1, 9),
    threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80)
def test_rows_land_in_their_places_and_nothing_else_changes(
    by_threads, dtype, heads, key_dim, value_dim, block_size, rows, threads, seed
):
    rng = np.random.default_rng(seed)
    blocks = 12
    keys, values = (rng.standard_normal((rows, heads, dim)).astype(np.float32) for dim in (key_dim, value_dim))
    slots = rng.permutation(blocks * block_size)[:rows]
    slots[rng.random(rows) < 0.2] = -1  # not written
    before = planes(blocks, heads, key_dim, value_dim, block_size, dtype)
    want_k, want_v = (plane.copy() for plane in before)
    for key, value, slot in zip(bits_of(keys, dtype), bits_of(values, dtype), slots, strict=True):
        if slot >= 0:
            want_k[slot // block_size, :, :, slot % block_size] = key
            want_v[slot // block_size, :, slot % block_size] = value
    got = write(by_threads[threads], keys, values, slots.tolist(), before, block_size, dtype)
    np.testing.assert_array_equal(got[0], want_k)
    np.testing.assert_array_equal(got[1], want_v)


@pytest.mark.parametrize("dtype", CODES)
def test_edges_round_as_in_mlx(by_threads, dtype):
    """Overflow, subnormal numbers, halves of a unit and infinities, as keys and as values."""
    edges = [0.0, -0.0, np.inf, -np.inf, 65504, 65519.9, 65520, -65520, 6e-8, 2.98e-8, 2**-25, 1e-45, 3.4e38, 1 + 2**-11, 1 + 2**-8]
    x = np.array(edges, np.float32).reshape(1, 1, -1)
    before = planes(1, 1, x.size, x.size, 4, dtype)
    keys, values = write(by_threads[1], x, x, [2], before, 4, dtype)
    np.testing.assert_array_equal(keys[0, 0, :, 2], bits_of(x, dtype).ravel())
    np.testing.assert_array_equal(values[0, 0, 2], bits_of(x, dtype).ravel())


@pytest.mark.parametrize("slot", [-1, -17, -(2**31)])
def test_a_negative_slot_is_not_written(by_threads, slot):
    before = planes(2, 1, 16, 16, 8, "float16")
    row = np.ones((1, 1, 16), np.float32)
    for plane, untouched in zip(write(by_threads[1], row, row, [slot], before, 8, "float16"), before, strict=True):
        np.testing.assert_array_equal(plane, untouched)


FIRST = params.MS_SLOT_FIRST
GOOD = dict(op=params.MS_OP_KV_WRITE, a=0, b=32, n=32, slot=FIRST, slot2=FIRST + 1, dtype=0, dims=[2, 16, 16, 8])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(slot=7), "slot 7 of"),
        (dict(slot2=2**32 - 1), "slot 4294967295 of"),
        (dict(dtype=params.MS_INT32), "the cache has no codec 3"),
        (dict(n=31), "31 keys of 2 heads of 16"),
        (dict(a=33), "a is 33 [+] 32, past the 64"),
        (dict(b=40), "b is 40 [+] 32, past the 64"),
        (dict(b=params.MS_NONE), "operand b is absent"),
        (dict(dims=[0, 16, 16, 8]), "must not be 0"),
        (dict(dims=[2, 16, 16, 0]), "must not be 0"),
        (dict(dims=[2, 16, 0, 8]), "must not be 0"),
        (dict(dims=[2, 16, 2**31, 8]), "b is 32 [+] 4294967296"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(by_threads, changes, why):
    h = by_threads[1]
    h.device.create_plan([launch_of(h, GOOD)], 1, 1).close()
    with pytest.raises(ValueError, match=f"instruction 0 .*{why}"):
        h.device.create_plan([launch_of(h, GOOD | changes)], 1, 1)
