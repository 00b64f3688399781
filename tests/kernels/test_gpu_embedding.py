"""embedding on a GPU: rows of every packed format, in MLX's own layout, and the caller's own rows among them."""
import mlx.core as mx
import numpy as np
import pytest
from gpu_harness import GpuHarness
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import own_buffers
from test_embedding import AFFINE, CODES, quantised, some_table, stored
from test_linear import codes

from metalstep.kernels import embedding, linear, params
from metalstep.kernels.gpu import row_program
from metalstep.kernels.program import Program

FIRST = params.MS_SLOT_FIRST


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def prepared(h, packed, ids, own=None):
    """The launch of a lookup and the buffer of its rows [len(ids) + 1, k]."""
    program, out = Program(), h.empty((len(ids) + 1, packed.k))
    planes = [plane for plane in (packed.scales, packed.biases) if plane is not None]
    fields = packed.k, packed.n, packed.bits, packed.group_size, packed.dtype
    row = embedding.emit(program, FIRST, *fields, FIRST + 1, *range(FIRST + 3, FIRST + 3 + len(planes)))
    program.store(row, FIRST + 2, row_stride=packed.k)
    step = h.step(len(ids), ids=ids, embeddings=own)
    buffers = [packed.buffer, step.embeddings, out, *planes]
    return row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, len(ids) + 1), out


def looked_up(h, packed, ids, own=None):
    """Rows `ids` of the table, those below 0 of `own`; [len(ids), k]."""
    launches, out = prepared(h, packed, ids, own)
    h.run(launches, len(ids) + 1)
    assert np.isnan(h.get(out)[-1]).all()
    return h.get(out)[:-1]


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_quantised_rows_are_mlxs(h, dtype):
    """Every width and group in one plan. Two float32 roundings (scale * q, + bias) of numbers up to 8."""
    ids = [36, 0, 15, 16, 31, 35, 16]
    with own_buffers(h):
        tables = [quantised(h, np.random.default_rng(bits * group), 37, 3 * group, bits, group, dtype) for bits, group in AFFINE]
        made = [prepared(h, packed, ids) for packed, _ in tables]
        h.run([launch for launches, _ in made for launch in launches], len(ids) + 1)
        for (_, table), (_, out) in zip(tables, made, strict=True):
            want = np.array(embedding.reference(mx.array(ids), table))
            np.testing.assert_allclose(h.get(out)[:-1], want, rtol=0, atol=8 * 2**-24)


def test_rows_of_floats_are_mlxs_bit_for_bit(h):
    """Every code of an element under every code of a scale, NaN as NaN."""
    for mode in linear.FLOATS:
        words, scales, values = codes(mode)
        ids = list(range(len(values)))
        with own_buffers(h):
            bits, group, dtype = linear.FLOATS[mode]
            fields = dict(bits=bits, group_size=group, dtype=dtype, n=values.shape[0], k=values.shape[1])
            np.testing.assert_array_equal(looked_up(h, h.pack(words, scales=scales, **fields), ids), values)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_dense_rows_are_copied_bit_for_bit(h, dtype):
    """Every sort of number that the format has."""
    for width in (1, 33, 97, 1536):
        table = mx.array(np.random.default_rng(width).standard_normal((21, width)).astype(np.float32)).astype(dtype)
        table[3, 0], table[17, 0], table[20, -1] = mx.inf, -0.0, 6e-8
        bits = 32 if dtype == mx.float32 else 16
        with own_buffers(h):
            packed = h.pack(stored(table), bits=bits, group_size=0, dtype=CODES[dtype], n=21, k=width)
            ids = [20, 3, 17, 0, 16, 3]
            got, want = looked_up(h, packed, ids), np.array(embedding.reference(mx.array(ids), table).astype(mx.float32))
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


FORMATS = [(4, 32), (6, 64), (32, 0)]


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_what_is_no_token_has_no_embedding(h, bits, group):
    """NaN, which sampling reports, in its own row alone."""
    ids = [5, 40, 39, 47, 48, 2**31 - 1, 7]
    with own_buffers(h):
        packed, table = some_table(h, np.random.default_rng(1), 40, 128, bits, group)
        got, some = looked_up(h, packed, ids), looked_up(h, packed, [5, 39, 7])
    bad = np.array(ids) >= 40
    assert np.isnan(got[bad]).all()
    np.testing.assert_array_equal(got[~bad], some)
    np.testing.assert_allclose(some, np.array(table)[[5, 39, 7]], rtol=0, atol=8 * 2**-24)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@given(ids=st.lists(st.integers(-9, 39), min_size=1, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=10)
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
    own = np.random.default_rng(width).standard_normal((3, width)).astype(np.float32)
    with own_buffers(h):
        packed, _ = some_table(h, np.random.default_rng(0), 2, width, 32, 0)
        np.testing.assert_array_equal(looked_up(h, packed, [-3, -1, -2], own), own[[2, 0, 1]])


def test_rows_do_not_see_each_other(h):
    ids = np.random.default_rng(2).integers(-5, 50, 13).tolist()
    own = np.random.default_rng(4).standard_normal((5, 192)).astype(np.float32)
    with own_buffers(h):
        packed, _ = quantised(h, np.random.default_rng(3), 50, 192, 3, 64, mx.bfloat16)
        together = looked_up(h, packed, ids, own)
        alone = [looked_up(h, packed, [i], own)[0] for i in ids]
    np.testing.assert_array_equal(together, alone)


def test_a_row_far_into_a_table_is_found(h):
    """Row times width passes 2^32 elements in a large vocabulary: places are 64 bits wide."""
    k, n = 4096, 1_100_000
    program = Program()
    row = embedding.emit(program, FIRST, k, n, 32, 0, params.MS_FLOAT32, FIRST + 1)
    program.store(row, FIRST + 2, row_stride=k)
    step = h.step(1, ids=[n - 1])
    (launch,) = row_program.launches(program, step, [h.empty((1,)), step.embeddings, h.empty((1, k))], params.MS_ROWS_TOKENS, 1)
    assert f"ulong(max(token, 0)) * {k}" in launch.code.text
