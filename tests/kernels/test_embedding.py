"""embedding: rows of every packed format against MLX's dequantised ones, and the caller's own rows among them."""
import mlx.core as mx
import numpy as np
import pytest
from harness import Harness
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import launch_of, own_buffers

from metalstep.kernels import embedding, params, row_program
from metalstep.kernels.program import Program

AFFINE = [(bits, group) for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
CODES = {mx.float16: params.MS_FLOAT16, mx.bfloat16: params.MS_BFLOAT16, mx.float32: params.MS_FLOAT32}


def stored(array):
    """As numpy holds it: bfloat16 by its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def looked_up(h, packed, ids, own=None):
    """Rows `ids` of the packed table, those below 0 of `own`; [len(ids), k]."""
    program, out, first = Program(), h.empty((len(ids), packed.k)), params.MS_SLOT_FIRST
    fields = packed.k, packed.n, packed.bits, packed.group_size, packed.dtype
    row = embedding.emit(program, first, *fields, embeddings_slot=first + 1)
    program.store(row, first + 2, row_stride=packed.k)
    step = h.step(len(ids), ids=ids, embeddings=own)
    buffers = [packed.buffer, step.embeddings, out]
    h.run(row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, len(ids)), len(ids))
    return h.get(out)


def quantised(h, rng, n, k, bits, group, dtype):
    """A packed table and its float64 values."""
    values = mx.array(rng.standard_normal((n, k)).astype(np.float32)).astype(dtype)
    words, scales, biases = mx.quantize(values, group_size=group, bits=bits)
    wide = [a.astype(mx.float32) for a in (scales, biases)]
    table = mx.dequantize(words, *wide, group_size=group, bits=bits)
    fields = dict(bits=bits, group_size=group, dtype=CODES[dtype], n=n, k=k)
    return h.pack(np.array(words), **fields, scales=stored(scales), biases=stored(biases)), table


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(("bits", "group"), AFFINE)
def test_quantised_rows_are_mlxs(h, bits, group, dtype):
    """37 rows: panels have 16, the last one is not full. Two float32 roundings (scale * q, + bias) of numbers up to 8."""
    with own_buffers(h):
        packed, table = quantised(h, np.random.default_rng(bits * group), 37, 3 * group, bits, group, dtype)
        ids = [36, 0, 15, 16, 31, 32, 16]
        want = np.array(embedding.reference(mx.array(ids), table))
        np.testing.assert_allclose(looked_up(h, packed, ids), want, rtol=0, atol=8 * 2**-24)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 63, 97, 576])
def test_dense_rows_are_copied_bit_for_bit(h, dtype, width):
    """Every sort of number that the format has."""
    table = mx.array(np.random.default_rng(width).standard_normal((21, width)).astype(np.float32)).astype(dtype)
    table[3, 0], table[17, 0], table[20, -1] = mx.inf, -0.0, 6e-8
    bits = 32 if dtype == mx.float32 else 16
    with own_buffers(h):
        packed = h.pack(stored(table), bits=bits, group_size=0, dtype=CODES[dtype], n=21, k=width)
        ids = [20, 3, 17, 0, 16, 3]
        got, want = looked_up(h, packed, ids), np.array(embedding.reference(mx.array(ids), table).astype(mx.float32))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def some_table(h, rng, n, k, bits, group):
    """A packed table, dense float32 if group is 0, and its values."""
    if group:
        return quantised(h, rng, n, k, bits, group, mx.float16)
    table = rng.standard_normal((n, k)).astype(np.float32)
    return h.pack(table, bits=32, group_size=0, dtype=params.MS_FLOAT32, n=n, k=k), mx.array(table)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (6, 64), (32, 0)])
def test_what_is_no_token_has_no_embedding(h, bits, group):
    """NaN, which sampling reports, in its own row alone; 40 and 47 are padding of the last panel, but no rows."""
    ids = [5, 40, 39, 47, 48, 2**31 - 1, 7]
    with own_buffers(h):
        packed, table = some_table(h, np.random.default_rng(1), 40, 128, bits, group)
        got = looked_up(h, packed, ids)
        some = looked_up(h, packed, [5, 39, 7])
    bad = np.array(ids) >= 40
    assert np.isnan(got[bad]).all()
    np.testing.assert_array_equal(got[~bad], some)
    np.testing.assert_allclose(some, np.array(table)[[5, 39, 7]], rtol=0, atol=8 * 2**-24)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (6, 64), (32, 0)])
@given(ids=st.lists(st.integers(-9, 39), min_size=1, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_rows_of_the_callers_own_are_copied_bit_for_bit_among_tokens(h, bits, group, ids, seed):
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((9, 128)).astype(np.float32)
    own[0, 0], own[8, 127], own[4, 63] = np.inf, np.nan, -0.0
    with own_buffers(h):
        packed, table = some_table(h, rng, 40, 128, bits, group)
        got = looked_up(h, packed, ids, own)
    mine = np.array(ids) < 0
    want = np.array(embedding.reference(mx.array(ids), table, mx.array(own)))
    np.testing.assert_array_equal(got[mine].view(np.uint32), own[[-(i + 1) for i in ids if i < 0]].view(np.uint32))
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * 2**-24)


@pytest.mark.parametrize("width", [1, 33, 63, 97])
def test_own_rows_of_any_width_end_where_they_end(h, width):
    """The last row too: nothing behind it is read into it, and the row before it is not."""
    own = np.random.default_rng(width).standard_normal((3, width)).astype(np.float32)
    with own_buffers(h):
        packed, _ = some_table(h, np.random.default_rng(0), 2, width, 32, 0)
        np.testing.assert_array_equal(looked_up(h, packed, [-3, -1, -2], own), own[[2, 0, 1]])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_do_not_see_each_other(threads):
    ids = np.random.default_rng(2).integers(-5, 50, 23).tolist()
    own = np.random.default_rng(4).standard_normal((5, 192)).astype(np.float32)
    with Harness(threads) as h:
        packed, _ = quantised(h, np.random.default_rng(3), 50, 192, 3, 64, mx.bfloat16)
        together = looked_up(h, packed, ids, own)
        alone = [looked_up(h, packed, [i], own)[0] for i in ids]
    np.testing.assert_array_equal(together, alone)


FIRST = params.MS_SLOT_FIRST
GOOD = dict(op=params.MS_OP_EMBEDDING, dst=0, n=64, slot=FIRST, slot2=FIRST + 1, dims=[4, 32, params.MS_FLOAT16, 37])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(slot=7), "slot 7 of a launch with 7 bindings"),
        (dict(slot2=8), "slot 8 of a launch with 7 bindings"),
        (dict(n=48), "k is not a multiple of the group size"),
        (dict(n=96), "dst is 0 [+] 96, past the 64"),
        (dict(dims=[7, 32, 1, 37]), "bits are not 1, 2, 3, 4, 5, 6, 8"),
        (dict(dims=[4, 16, 1, 37]), "the group size is not 32, 64 or 128"),
        (dict(dims=[4, 0, 1, 37]), "the group size is not 32, 64 or 128"),
        (dict(dims=[4, 32, params.MS_E4M3, 37]), "e8m0 scales are of 4 or 8 bits in groups of 32, e4m3 scales of 4 bits in groups of 16"),
        (dict(dims=[6, 32, params.MS_E8M0, 37]), "e8m0 scales are of 4 or 8 bits in groups of 32, e4m3 scales of 4 bits in groups of 16"),
        (dict(dims=[4, 32, 3, 37]), "scales are not float32, float16 or bfloat16"),
        (dict(dims=[16, 32, 1, 37]), "a dense weight has a group size"),
        (dict(dims=[32, 0, 1, 37]), "neither 16 bits of float16 or bfloat16 nor 32 of float32"),
        (dict(dims=[4, 32, 1, 0]), "a weight has no elements"),
        (dict(imm=2), "takes no scalar operands"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(h, changes, why):
    h.device.create_plan([launch_of(h, GOOD)], 1, 1).close()
    with pytest.raises(ValueError, match=f"instruction 0 .*{why}"):
        h.device.create_plan([launch_of(h, GOOD | changes)], 1, 1)
