"""linear on a GPU: what epilogues compute, load and store, and that a row's bits do not depend on its batch."""
import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_linears import F32, VARIANTS, Weight, bound
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.kernels import elementwise, linear, params
from metalstep.kernels.gpu import linear as gpu_linear
from metalstep.kernels.linear import Input, Norm, Segment
from metalstep.kernels.program import Program


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("formats", ["equal", "different"])
def test_gate_and_up_meet_in_the_epilogue_and_other_segments_share_the_launch(h, variant, formats):
    """silu(gate) * up + residual, a projection with bias, and a softcapped one, of different n."""
    rng = np.random.default_rng(4)
    k, max_rows = 96, VARIANTS[variant]
    rows = max(1, max_rows - 1)
    gate, up = (Weight(h, rng, 50, k, bits, 32) for bits in ((4, 4) if formats == "equal" else (4, 6)))
    other, head = Weight(h, rng, 19, k, 4, 32), Weight(h, rng, 33, k, 16, 0, "bfloat")
    x, residual = (rng.standard_normal((rows, width)).astype(np.float32) for width in (k, 50))
    bias = rng.standard_normal(19).astype(np.float16)
    slot = linear.first_buffer_slot([[gate, up], [other], [head]])
    mlp = Program(epilogue=True)
    a, b = mlp.register(50), mlp.register(50)
    s = elementwise.emit(mlp, "Sigmoid", (), [a], [F32], F32, 50)
    y = elementwise.emit(mlp, "Multiply", (), [a, s], [F32] * 2, F32, 50)
    y = elementwise.emit(mlp, "Multiply", (), [y, b], [F32] * 2, F32, 50)
    r = mlp.load(slot, 50, rows=params.MS_ROW_SELF, row_stride=50)
    y = elementwise.emit(mlp, "Add", (), [y, r], [F32] * 2, F32, 50)
    mlp.store(y, slot + 1, row_stride=50)
    mlp.store(a, slot + 2, offset=3, row_stride=60)
    biased = Program(epilogue=True)
    y = biased.register(19)
    r = biased.load(slot + 3, 19, rows=params.MS_ROW_SAME, dtype=params.MS_FLOAT16)
    y = elementwise.emit(biased, "Add", (), [y, r], [F32] * 2, F32, 19)
    biased.store(y, slot + 4, row_stride=19)
    capped = Program(epilogue=True)
    y = elementwise.emit(capped, "Divide", (), [capped.register(33), 3.0], [F32] * 2, F32, 33)
    y = elementwise.emit(capped, "Tanh", (), [y], [F32], F32, 33)
    y = elementwise.emit(capped, "Multiply", (), [y, 3.0], [F32] * 2, F32, 33)
    capped.store(y, slot + 5, row_stride=33)
    outs = [h.put(np.full((max_rows, width), np.nan, np.float32)) for width in (50, 60, 19, 33)]
    buffers = [h.put(residual), outs[0], outs[1], h.put(bias), outs[2], outs[3]]
    segments = [Segment([gate.packed, up.packed], mlp), Segment([other.packed], biased), Segment([head.packed], capped)]
    h.run(gpu_linear.launches(Input(h.put(x), 0, k), segments, h.step(rows), buffers, 0, max_rows), max_rows)
    wide = x.astype(np.float64)
    g, u, o, c = (wide @ w.exact.T for w in (gate, up, other, head))
    silu = g / (1 + np.exp(-g))
    # The derivatives of silu, tanh and the products carry the bounds of the sums on; one more for the functions' own rounding.
    limit = 1.1 * bound(x, gate) * np.abs(u) + np.abs(silu) * bound(x, up) + 1e-6 * (1 + np.abs(silu * u))
    got = [h.get(out) for out in outs]
    assert all(np.isnan(out[rows:]).all() for out in got)
    assert (np.abs(got[0][:rows] - silu * u - residual) <= limit).all()
    assert (np.abs(got[1][:rows, 3:53] - g) <= bound(x, gate)).all()
    assert np.isnan(got[1][:rows, :3]).all() and np.isnan(got[1][:rows, 53:]).all()
    assert (np.abs(got[2][:rows] - o - bias) <= bound(x, other) + 1e-6 * np.abs(o)).all()
    assert (np.abs(got[3][:rows] - 3 * np.tanh(c / 3)) <= bound(x, head) + 2e-6).all()


@pytest.mark.parametrize("max_rows", [2, 12, 40])
def test_an_epilogue_adds_in_place_and_reads_back_what_it_stored(h, max_rows):
    """residual += product, for sampled rows of tokens too; a load behind a store sees it."""
    rng = np.random.default_rng(5)
    w = Weight(h, rng, 21, 64, 8, 64)
    x, before, other = (rng.standard_normal((max_rows, width)).astype(np.float32) for width in (64, 21, 21))
    sampled = rng.permutation(max_rows)[: max_rows - 1]
    slot = linear.first_buffer_slot([[w]])
    program = Program(epilogue=True)
    product = program.register(21)
    old = program.load(slot, 21, rows=params.MS_ROW_SELF, row_stride=21)
    token = program.load(slot + 1, 21, rows=params.MS_ROW_SAMPLED, row_stride=21)
    y = elementwise.emit(program, "Add", (), [product, old], [F32] * 2, F32, 21)
    program.store(y, slot, row_stride=21)
    again = program.load(slot, 21, rows=params.MS_ROW_SELF, row_stride=21)
    y = elementwise.emit(program, "Multiply", (), [again, 2.0], [F32] * 2, F32, 21)
    y = elementwise.emit(program, "Subtract", (), [y, token], [F32] * 2, F32, 21)
    program.store(y, slot + 2, row_stride=21, dtype=params.MS_FLOAT16)
    inout, out = h.put(before), h.put(np.full((max_rows, 21), np.nan, np.float16))
    source = Input(h.put(x), 0, 64, params.MS_ROW_SAMPLED)
    step = h.step(max_rows, sampled=sampled)
    buffers = [inout, h.put(other), out]
    h.run(gpu_linear.launches(source, [Segment([w.packed], program)], step, buffers, params.MS_ROWS_SAMPLED, max_rows), max_rows)
    rows = len(sampled)
    got = h.get(inout)
    exact = x[sampled] @ w.exact.T + before[:rows]
    assert (np.abs(got[:rows] - exact) <= bound(x[sampled], w) + 1e-6 * np.abs(exact)).all()
    np.testing.assert_array_equal(got[rows:], before[rows:])
    doubled = (2 * got[:rows] - other[sampled]).astype(np.float16)
    np.testing.assert_allclose(h.get(out, np.float16)[:rows], doubled, rtol=1e-3, atol=1e-3)  # float16 has 11 bits
    assert np.isnan(h.get(out, np.float16)[rows:]).all()


def fused(h, x, w, max_rows, invariant):
    """norm(x) · Wᵀ * 0.7 + x's first columns: an epilogue that a compiler may contract."""
    slot = linear.first_buffer_slot([[w]])
    program = Program(epilogue=True)
    product = program.register(w.n)
    y = elementwise.emit(program, "Multiply", (), [product, 0.7], [F32] * 2, F32, w.n)
    y = elementwise.emit(program, "Add", (), [y, program.load(slot, w.n, rows=params.MS_ROW_SELF, row_stride=w.k)], [F32] * 2, F32, w.n)
    program.store(y, slot + 1, row_stride=w.n)
    source, out = h.put(x), h.empty((len(x), w.n))
    launches = gpu_linear.launches(
        Input(source, 0, w.k, norm=Norm(None, 1e-6)), [Segment([w.packed], program)], h.step(len(x)), [source, out], 0, max_rows,
        invariant=invariant,
    )
    h.run(launches, max_rows)
    return h.get(out)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 32), (16, 0)])
@given(rows=st.integers(1, 37), room=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_an_invariant_row_is_the_same_bits_in_any_batch_of_any_plan(h, bits, group, rows, room, seed):
    rng = np.random.default_rng(seed)
    w = Weight(h, rng, 21, 96, bits, group)
    x = rng.standard_normal((rows, 96)).astype(np.float32)
    together = fused(h, x, w, rows + room, True)
    alone = np.concatenate([fused(h, row[None], w, 1, True) for row in x])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("max_rows", [4, 8, 32, 70])
def test_a_row_is_the_same_bits_in_any_batch_of_a_plan(h, max_rows):
    rng = np.random.default_rng(6)
    w = Weight(h, rng, 21, 96, 5, 32)
    x = rng.standard_normal((max_rows, 96)).astype(np.float32)
    together = fused(h, x, w, max_rows, False)
    order = rng.permutation(max_rows)[: max(1, max_rows - 2)]
    np.testing.assert_array_equal(fused(h, x[order], w, max_rows, False), together[order])
