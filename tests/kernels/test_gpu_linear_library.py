"""linear for many rows: weights as float16 matrices, products of them, epilogues behind them; the product is library_gemm's own kernel."""
from dataclasses import replace

import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_linears import BITS, DTYPES, F32, Weight, dense_bits, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.kernels import elementwise, linear, params
from metalstep.kernels.gpu import linear_dequantise, linear_library
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Input, Norm, Segment
from metalstep.kernels.program import Program

ROUNDING = 2.0**-11  # of a weight to float16, relative
GUARD = 8  # elements around what is written


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def formats(h, rng, n, k):
    """A weight of every format that a linear reads, with groups that divide k."""
    groups = [g for g in (32, 64, 128) if k % g == 0]
    affine = [Weight(h, rng, n, k, bits, groups[i % len(groups)], list(DTYPES)[i % 3]) for i, bits in enumerate(BITS)]
    dense = [Weight(h, rng, n, k, dense_bits(dtype), 0, dtype) for dtype in DTYPES]
    return [*affine, *(Weight(h, rng, n, k, mode) for mode in linear.FLOATS), *dense]


@pytest.mark.parametrize(("n", "k"), [(4, 32), (13, 128), (77, 384)])
def test_matrices_are_the_weights_rounded_to_float16(h, n, k):
    """All formats at once, which is more than a launch binds, and nothing around the matrices."""
    weights = formats(h, np.random.default_rng(n), n, k)
    out = h.put(np.full((len(weights), GUARD + n * k + GUARD), np.nan, np.float16))
    row = out.shape[1] * 2
    places = [Buffer(out.handle, i * row + GUARD * 2, (n, k), "float16") for i in range(len(weights))]
    launches = linear_dequantise.launches([(w.packed, place) for w, place in zip(weights, places, strict=True)])
    assert len(launches) == 2
    h.run(launches, 1)
    got = h.get(out, np.float16)
    assert np.isnan(got[:, :GUARD]).all() and np.isnan(got[:, -GUARD:]).all()
    for values, w in zip(got[:, GUARD:-GUARD].astype(np.float64), weights, strict=True):
        limit = ROUNDING * np.abs(w.exact) + 1e-6 * w.magnitude + 2.0**-25
        assert (np.abs(values.reshape(n, k) - w.exact) <= limit).all()


def run(h, x, segments, buffers, max_rows, rows=None):
    """The launches for x in a larger float16 matrix whose rows behind the step's last are NaN."""
    rows = rows or len(x)
    wide = np.full((max_rows, x.shape[1] + 8), np.nan, np.float16)
    wide[:rows, 8:] = x[:rows]
    source = Input(h.put(wide), 8, wide.shape[1])
    assert linear_library.takes(source, segments, params.MS_ROWS_TOKENS)

    def scratch(nbytes):
        return h.put(np.full(nbytes, 0xFF, np.uint8))  # NaN, as float16 and as float32

    launches = linear_library.launches(source, segments, h.step(rows), buffers, max_rows, scratch)
    h.run(launches, max_rows)
    return launches


def kinds(launches):
    return [launch.kernel.removesuffix(launch.kernel[-17:]) if "linear" in launch.kernel else launch.kernel for launch in launches]


def exact(x, w):
    """The product, and what rounding weights to float16 and sums of float32 change in it at most."""
    wide = x.astype(np.float64)
    return wide @ w.exact.T, np.abs(wide) @ (ROUNDING * np.abs(w.exact) + 2e-6 * w.magnitude + 2.0**-25).T


def half(rng, *shape):
    return rng.standard_normal(shape).astype(np.float16)


@pytest.mark.parametrize("rows", [1, 15, 16])
def test_products_are_stored_where_the_epilogue_wants_them(h, rows):
    """q, k and v as they are used: a product each, straight to its place. Rows behind the step's may hold anything."""
    rng = np.random.default_rng(rows)
    weights = [Weight(h, rng, n, 64, 4, 32) for n in (24, 8, 12)]
    x, outs = half(rng, rows, 64), [h.empty((16, w.n)) for w in weights]
    slot = linear.first_buffer_slot([[w.packed] for w in weights])
    segments = [Segment([w.packed], plain(w, slot + i)) for i, w in enumerate(weights)]
    launches = run(h, x, segments, outs, 16)
    assert kinds(launches) == ["linear_dequantise", *["library_gemm"] * 3]
    assert [launch.barrier for launch in launches] == [False, True, True, True]
    for w, out in zip(weights, outs, strict=True):
        want, limit = exact(x, w)
        assert (np.abs(h.get(out)[:rows] - want) <= limit).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("first", ["product", "residual"])
def test_a_residual_is_added_by_the_product_itself(h, in_place, first):
    rng = np.random.default_rng(2)
    w, x, residual = Weight(h, rng, 20, 96, 6, 32), half(rng, 9, 96), rng.standard_normal((12, 20)).astype(np.float32)
    before, out = h.put(residual), h.empty((12, 20))
    slot = linear.first_buffer_slot([[w.packed]])
    program = Program(epilogue=True)
    operands = [program.register(20), program.load(slot, 20, rows=params.MS_ROW_SELF, row_stride=20)]
    total = program.register(20)
    program.emit(params.MS_OP_ADD, total, *(operands if first == "product" else operands[::-1]), n=20)
    program.store(total, slot if in_place else slot + 1, row_stride=20)
    launches = run(h, x, [Segment([w.packed], program)], [before, out], 12)
    assert kinds(launches) == ["linear_dequantise", "library_gemm"]
    want, limit = exact(x, w)
    got = h.get(before if in_place else out)[:9]
    assert (np.abs(got - residual[:9] - want) <= limit + 1e-6).all()


def gated(segment_slot, n, dtype=params.MS_FLOAT32, stride=None):
    program = Program(epilogue=True)
    gate, up = program.register(n), program.register(n)
    y = elementwise.emit(program, "Sigmoid", (), [gate], [F32], F32, n)
    y = elementwise.emit(program, "Multiply", (), [gate, y], [F32] * 2, F32, n)
    y = elementwise.emit(program, "Multiply", (), [y, up], [F32] * 2, F32, n)
    program.store(y, segment_slot, row_stride=stride or n, dtype=dtype)
    return program


@pytest.mark.parametrize("pieces", ["whole", "pieces"])
@pytest.mark.parametrize("kind", ["packed", "matrices", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gate_and_up_meet_behind_their_products(h, monkeypatch, pieces, kind, dtype):
    """In one product or two, in columns that memory allows, for a result that is the next linear's x."""
    rng = np.random.default_rng(3)
    n, k, rows, max_rows = 36, 64, 11, 13
    if pieces == "pieces":
        monkeypatch.setattr(linear_library, "PIECE", 1536)
        monkeypatch.setattr(linear_library, "PIECE_COLUMNS", 4)
    makes = {"packed": lambda: Weight(h, rng, n, k, 4, 64), "matrices": lambda: Weight(h, rng, n, k, 16, 0, "half")}
    gate, up = (makes["packed" if kind == "mixed" and i else "matrices" if kind == "mixed" else kind]() for i in range(2))
    x = half(rng, rows, k)
    out = h.put(np.full((max_rows, n), np.nan, dtype))
    slot = linear.first_buffer_slot([[gate.packed, up.packed]])
    code = params.MS_FLOAT16 if dtype == "float16" else params.MS_FLOAT32
    launches = run(h, x, [Segment([gate.packed, up.packed], gated(slot, n, code))], [out], max_rows)
    each = ["linear_dequantise"] * (kind != "matrices") + ["library_gemm"] * (1 if kind == "packed" else 2) + ["linear_finish"]
    assert kinds(launches)[: len(each)] == each
    assert len(launches) == len(each) if pieces == "whole" else len(launches) >= 2 * len(each)
    (g, g_limit), (u, u_limit) = exact(x, gate), exact(x, up)
    silu = g / (1 + np.exp(-g))
    limit = 1.1 * g_limit * (np.abs(u) + u_limit) + np.abs(silu) * u_limit + 1e-6 * (1 + np.abs(silu * u))
    limit += ROUNDING * np.abs(silu * u) * (dtype == "float16")
    got = h.get(out, np.dtype(dtype)).astype(np.float64)
    assert (np.abs(got[:rows] - silu * u) <= limit).all()
    assert np.isnan(got[rows:]).all()


def test_equal_columns_do_not_depend_on_the_pieces(h, monkeypatch):
    rng = np.random.default_rng(4)
    gate, up, x = Weight(h, rng, 40, 32, 4, 32), Weight(h, rng, 40, 32, 4, 32), half(rng, 5, 32)
    slot = linear.first_buffer_slot([[gate.packed, up.packed]])
    segment, got = Segment([gate.packed, up.packed], gated(slot, 40)), []
    for piece in (1 << 20, 2 * 8 * 32 * 2):
        monkeypatch.setattr(linear_library, "PIECE", piece)
        monkeypatch.setattr(linear_library, "PIECE_COLUMNS", 8)
        out = h.empty((5, 40))
        run(h, x, [segment], [out], 5)
        got.append(h.get(out))
    np.testing.assert_array_equal(*got)


def test_biases_of_any_type_and_place_are_added_behind_the_product(h):
    """Two segments, one with a bias that lies at no multiple of four elements and a result of bfloat16 that does not either."""
    rng = np.random.default_rng(5)
    first, second, x = Weight(h, rng, 16, 32, 8, 32), Weight(h, rng, 20, 32, 4, 32), half(rng, 7, 32)
    biases = rng.standard_normal(40).astype(np.float16)
    outs = [h.empty((7, 16)), h.put(np.full((7, 25), 0x7FC0, np.uint16), "bfloat16")]
    slot = linear.first_buffer_slot([[first.packed], [second.packed]])
    segments = []
    for i, (w, at, dtype) in enumerate([(first, 4, params.MS_FLOAT32), (second, 3, params.MS_BFLOAT16)]):
        program = Program(epilogue=True)
        product = program.register(w.n)
        bias = program.load(slot, w.n, rows=params.MS_ROW_SAME, offset=at, dtype=params.MS_FLOAT16)
        total = program.register(w.n)
        program.emit(params.MS_OP_ADD, total, product, bias, n=w.n)
        program.store(total, slot + 1 + i, offset=0 if i == 0 else 5, row_stride=16 if i == 0 else 25, dtype=dtype)
        segments.append(Segment([w.packed], program))
    run(h, x, segments, [h.put(biases), *outs], 7)
    for w, at, got in [
        (first, 4, h.get(outs[0])),
        (second, 3, (h.get(outs[1], np.uint16).astype(np.uint32) << 16).view(np.float32)[:, 5:]),
    ]:
        want, limit = exact(x, w)
        want = want + biases[at : at + w.n]
        assert (np.abs(got - want) <= limit + 1e-6 + (2.0**-8 * np.abs(want) if w is second else 0)).all()


def test_results_that_float16_does_not_hold_become_its_largest_number(h):
    rng = np.random.default_rng(6)
    w, x = Weight(h, rng, 8, 32, 16, 0, "half"), (half(rng, 4, 32) * np.float16(2e4))
    out = h.put(np.full((4, 8), np.nan, np.float16))
    slot = linear.first_buffer_slot([[w.packed]])
    program = Program(epilogue=True)
    program.store(program.register(8), slot, row_stride=8, dtype=params.MS_FLOAT16)
    run(h, x, [Segment([w.packed], program)], [out], 4)
    want, limit = exact(x, w)
    got = h.get(out, np.float16).astype(np.float64)
    assert (np.abs(want) > 70000).any()
    assert (np.abs(got - want.clip(-65504, 65504)) <= limit + ROUNDING * np.abs(want)).all()


@settings(max_examples=12, deadline=None)
@given(quads=st.integers(1, 20), groups=st.integers(1, 5), rows=st.integers(1, 20), bits=st.sampled_from(BITS))
def test_a_product_agrees_with_float64_for_any_sizes(h, quads, groups, rows, bits):
    n, rng = 4 * quads, np.random.default_rng(quads)
    w, x = Weight(h, rng, n, 32 * groups, bits, 32), half(rng, rows, 32 * groups)
    out = h.empty((rows, n))
    run(h, x, [Segment([w.packed], plain(w, linear.first_buffer_slot([[w.packed]])))], [out], rows)
    want, limit = exact(x, w)
    assert (np.abs(h.get(out) - want) <= limit).all()


def test_it_takes_only_what_the_library_reads(h):
    rng = np.random.default_rng(7)
    w = Weight(h, rng, 8, 32, 4, 32)
    slot = linear.first_buffer_slot([[w.packed]])
    segments = [Segment([w.packed], plain(w, slot))]
    x = Input(h.put(half(rng, 4, 32)), 0, 32)
    assert linear_library.takes(x, segments, params.MS_ROWS_TOKENS)
    assert not linear_library.takes(x, segments, params.MS_ROWS_SAMPLED)
    assert x.buffer is not None
    for other in (
        replace(x, buffer=replace(x.buffer, dtype="float32")),
        replace(x, norm=Norm(None, 1e-6)),
        replace(x, rows=params.MS_ROW_SAMPLED),
        replace(x, offset=4),
        replace(x, row_stride=36),
        Input(None),
    ):
        assert not linear_library.takes(other, segments, params.MS_ROWS_TOKENS)
    for odd in (Weight(h, rng, 6, 32, 4, 32), Weight(h, rng, 8, 36, 16)):
        program = plain(odd, slot)
        assert not linear_library.takes(x, [Segment([odd.packed], program)], params.MS_ROWS_TOKENS)
    late = plain(w, slot)
    late.store(late.load(slot, 8, rows=params.MS_ROW_SELF, row_stride=8), slot, row_stride=8)
    assert not linear_library.takes(x, [Segment([w.packed], late)], params.MS_ROWS_TOKENS)


def test_a_matrix_for_an_odd_place_is_refused(h):
    w = Weight(h, np.random.default_rng(8), 8, 32, 4, 32)
    with pytest.raises(ValueError, match=r"byte 8, expected multiples of 8 and 16"):
        linear_dequantise.launches([(w.packed, Buffer(1, 8, (8, 32), "float16"))])
