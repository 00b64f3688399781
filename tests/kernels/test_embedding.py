"""embedding: rows of every packed format against MLX's dequantised ones."""
import mlx.core as mx
import numpy as np
import pytest
from harness import Harness
from programs import launch_of, own_buffers

from metalstep.kernels import embedding, params, row_program
from metalstep.kernels.program import Program

AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
CODES = {mx.float16: params.MS_FLOAT16, mx.bfloat16: params.MS_BFLOAT16, mx.float32: params.MS_FLOAT32}


def stored(array):
    """As numpy holds it: bfloat16 by its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def looked_up(h, packed, ids):
    """Rows `ids` of the packed table, [len(ids), k]."""
    program, out = Program(), h.empty((len(ids), packed.k))
    fields = packed.k, packed.n, packed.bits, packed.group_size, packed.dtype
    row = embedding.emit(program, params.MS_SLOT_FIRST, *fields)
    program.store(row, params.MS_SLOT_FIRST + 1, row_stride=packed.k)
    step = h.step(len(ids), ids=ids)
    h.run(row_program.launches(program, step, [packed.buffer, out], params.MS_ROWS_TOKENS, len(ids)), len(ids))
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


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (6, 64), (32, 0)])
def test_what_is_no_token_has_no_embedding(h, bits, group):
    """NaN, which sampling reports, in its own row alone; 40 and 47 are padding of the last panel, but no rows."""
    rng = np.random.default_rng(1)
    ids = [5, -1, 40, 39, 47, 48, 2**31 - 1, -(2**31), 7]
    with own_buffers(h):
        if group:
            packed, table = quantised(h, rng, 40, 128, bits, group, mx.float16)
        else:
            table = mx.array(rng.standard_normal((40, 128)).astype(np.float32))
            packed = h.pack(np.array(table), bits=32, group_size=0, dtype=params.MS_FLOAT32, n=40, k=128)
        got = looked_up(h, packed, ids)
        some = looked_up(h, packed, [5, 39, 7])
    bad = np.array([not 0 <= i < 40 for i in ids])
    assert np.isnan(got[bad]).all()
    np.testing.assert_array_equal(got[~bad], some)
    np.testing.assert_allclose(some, np.array(table)[[5, 39, 7]], rtol=0, atol=8 * 2**-24)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_do_not_see_each_other(threads):
    ids = np.random.default_rng(2).integers(0, 50, 23).tolist()
    with Harness(threads) as h:
        packed, _ = quantised(h, np.random.default_rng(3), 50, 192, 3, 64, mx.bfloat16)
        together = looked_up(h, packed, ids)
        alone = [looked_up(h, packed, [i])[0] for i in ids]
    np.testing.assert_array_equal(together, alone)


GOOD = dict(op=params.MS_OP_EMBEDDING, dst=0, n=64, slot=params.MS_SLOT_FIRST, dims=[4, 32, params.MS_FLOAT16, 37])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(slot=7), "slot 7 of a launch with 7 bindings"),
        (dict(n=48), "k is not a multiple of the group size"),
        (dict(n=96), "dst is 0 [+] 96, past the 64"),
        (dict(dims=[7, 32, 1, 37]), "bits are not 2, 3, 4, 5, 6, 8"),
        (dict(dims=[4, 16, 1, 37]), "the group size is not 32, 64 or 128"),
        (dict(dims=[4, 0, 1, 37]), "the group size is not 32, 64 or 128"),
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
