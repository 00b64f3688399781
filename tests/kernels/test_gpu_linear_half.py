"""linear on half tiles: every format, place of x, norm, split and epilogue, against float64 within what float16 rounds to."""
import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_linears import BITS, DTYPES, Weight, dense_bits, half_bound, plain, products, shifted
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_linear import codes

from metalstep.kernels import elementwise, linear, params
from metalstep.kernels.gpu import linear as gpu_linear
from metalstep.kernels.gpu.linear_candidates import candidates
from metalstep.kernels.gpu.linear_tables import table
from metalstep.kernels.gpu.linear_tuning import HalfTiles
from metalstep.kernels.linear import Input, Norm, PackedWeight, Segment
from metalstep.kernels.program import Program

NVIDIA = table("nvidia")
SHAPES = {
    "direct": HalfTiles(rows=8, strips=2, columns=1, splits=2, words=4, ahead=1),
    "two ahead": HalfTiles(rows=16, strips=2, columns=2, splits=4, words=2, ahead=2),
    "staged": HalfTiles(rows=32, strips=4, columns=2, splits=2, words=2, ahead=1, staged=True),
    "staged, two ahead": HalfTiles(rows=16, strips=2, columns=1, splits=4, words=1, ahead=2, staged=True),
    "wide": HalfTiles(rows=64, strips=2, columns=2, splits=4, words=4, ahead=1),
}


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def check(h, x, weights, shape, max_rows=None, **more):
    """x is rounded to float16 where it is float32."""
    got = products(h, x, weights, max_rows, tuning=NVIDIA, shape=shape, **more)
    for result, w in zip(got, weights, strict=True):
        assert (np.abs(result - x.astype(np.float64) @ w.exact.T) <= half_bound(x, w)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("group", "scale"), [(32, "half"), (64, "bfloat"), (128, "float")])
def test_affine_products_of_every_width_agree_with_the_reference(h, shape, group, scale, dtype):
    rng = np.random.default_rng(group)
    k = {32: 160, 64: 192, 128: 384}[group]
    weights = [Weight(h, rng, n, k, bits, group, scale) for n, bits in zip((8, 17, 1, 40, 9, 33, 64), BITS, strict=True)]
    check(h, rng.standard_normal((shape.rows - 3, k)).astype(dtype), weights, shape, shape.rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_of_floats_and_of_dense_weights_agree_with_the_reference(h, shape, dtype):
    """k is no multiple of what a simdgroup takes at a time; dense ones have any k."""
    rng = np.random.default_rng(4)
    rows = shape.rows - 1
    for k, modes in ((160, linear.FLOATS), (48, ("nvfp4",))):
        weights = [Weight(h, rng, n, k, mode) for n, mode in zip((20, 40, 33), modes, strict=False)]
        check(h, rng.standard_normal((rows, k)).astype(dtype), weights, shape, shape.rows)
    for k in (1, 7, 40, 100):
        weights = [Weight(h, rng, n, k, dense_bits(scale), 0, scale) for n, scale in zip((37, 5, 16), DTYPES, strict=True)]
        check(h, rng.standard_normal((rows, k)).astype(dtype), weights, shape, shape.rows)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_every_code_of_an_element_is_what_mlx_makes_of_it(h, mode):
    """Where float16 has the code, the scale (2^-24 at least) and their product; what is not finite shows."""
    words, scales, values = codes(mode)
    weight = PackedWeight(h.put(words), *values.shape, *linear.FLOATS[mode], scales=h.put(scales))
    segments = [Segment([weight], plain(weight, linear.first_buffer_slot([[weight]])))]
    got = []
    for x in np.eye(32, dtype=np.float32).reshape(-1, 8, 32):
        out = h.empty((8, weight.n))
        h.run(gpu_linear.launches(Input(h.put(x), 0, 32), segments, h.step(8), [out], 0, 8, tuning=NVIDIA), 8)
        got.append(h.get(out))
    got = np.concatenate(got).T
    rows = np.isfinite(values).all(1) & (np.abs(values) < 65504).all(1)  # else a zero of x makes NaN of the row
    assert rows.sum() > len(values) // 20
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(got[rows], values[rows].astype(np.float16).astype(np.float32), rtol=0, atol=2.0**-22)
    assert not np.isfinite(got[~np.isfinite(values).all(1)]).all(1).any()


@given(
    rows=st.integers(1, 70),
    room=st.sampled_from([1, 2, 5, 8, 16, 32, 64, 130]),
    n=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100]),
    k=st.sampled_from([32, 96, 288, 512]),
    bits=st.sampled_from([4, 8, 3]),
    half=st.booleans(),
    choice=st.integers(0, 10**6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
@example(rows=1, room=130, n=65, k=96, bits=4, half=True, choice=0, seed=0)
@example(rows=64, room=130, n=65, k=96, bits=4, half=False, choice=0, seed=0)  # a row tile begins where the rows end
def test_every_candidate_multiplies_and_leaves_planes(h, rows, room, n, k, bits, half, choice, seed):
    """Shapes that tuning may try, with as many planes, in plans with room for more rows than the step has."""
    rng = np.random.default_rng(seed)
    rows = min(rows, room)
    tried = [e for e in candidates("nvidia", n, k, room) if isinstance(e.shape, HalfTiles)]
    entry = tried[choice % len(tried)]
    x = rng.standard_normal((rows, k)).astype(np.float16 if half else np.float32)
    check(h, x, [Weight(h, rng, n, k, bits, 32)], entry.shape, room, planes=entry.planes)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_a_norm_of_x_is_fused(h, shape, weighted, planes):
    rng = np.random.default_rng(3)
    for k, weights in (
        (288, [Weight(h, rng, 33, 288, 4, 32), Weight(h, rng, 7, 288, 3, 32), Weight(h, rng, 33, 288, 4, 32)]),
        (37, [Weight(h, rng, 18, 37, 16)]),
    ):
        x = (30 * rng.standard_normal((shape.rows, k))).astype(np.float32)
        x[0] *= 1e-5  # eps counts
        g = (1 + 0.1 * rng.standard_normal(k)).astype(np.float32) if weighted else np.ones(k, np.float32)
        norm = Norm(h.put(g) if weighted else None, 1e-5)
        exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * g
        got = products(h, x, weights, norm=norm, tuning=NVIDIA, shape=shape, planes=planes)
        for result, w in zip(got, weights, strict=True):
            assert (np.abs(result - exact @ w.exact.T) <= half_bound(exact, w)).all()


@given(rows=st.integers(1, 40), room=st.sampled_from([4, 16, 64]), half=st.booleans(), normed=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_sampled_rows_are_read_where_their_tokens_are(h, rows, room, half, normed, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, 64)).astype(np.float16 if half else np.float32)
    sampled = rng.integers(0, 50, min(rows, room))
    w = Weight(h, rng, 20, 64, 4, 32)
    exact = x[sampled].astype(np.float64)
    norm = Norm(None, 1e-5) if normed else None
    if normed:
        exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5)
    [got] = products(h, x, [w], room, sampled=sampled, norm=norm, tuning=NVIDIA)
    assert (np.abs(got - exact @ w.exact.T) <= half_bound(exact, w)).all()


@given(shift=st.integers(0, 9), offset=st.integers(0, 9), more=st.integers(0, 9), half=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=12)
@example(shift=8, offset=8, more=8, half=True, seed=0)
@example(shift=1, offset=3, more=5, half=True, seed=0)
def test_any_place_of_x_and_weights_will_do(h, shift, offset, more, half, seed):
    """Straight from device memory where places allow it, through threadgroup memory elsewhere: the values are the same bits."""
    rng = np.random.default_rng(seed)
    k = 96
    for rows in (2, 19):
        x = rng.standard_normal((rows, k)).astype(np.float16 if half else np.float32)
        padded = np.full((rows, offset + k + more), np.nan, x.dtype)
        padded[:, offset : offset + k] = x
        got = []
        for here, source in ((0, Input(h.put(x), 0, k)), (shift, Input(shifted(h, padded, shift), offset, offset + k + more))):
            same = np.random.default_rng(seed)
            weights = [Weight(h, same, 13, k, 4, 32, shift=here), Weight(h, same, 5, k, 6, 32, "float", shift=here)]
            weights.append(Weight(h, same, 5, k, 16, 0, "bfloat", shift=here))
            outs = [h.empty((rows, w.n)) for w in weights]
            slot = linear.first_buffer_slot([[w] for w in weights])
            segments = [Segment([w.packed], plain(w, slot + i)) for i, w in enumerate(weights)]
            h.run(gpu_linear.launches(source, segments, h.step(rows), outs, 0, rows, tuning=NVIDIA), rows)
            got.append([h.get(out) for out in outs])
        for a, b in zip(*got, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [3e38, 70000.0, np.inf, np.nan])
@pytest.mark.parametrize("shape", [None, SHAPES["staged"]])
def test_an_input_beyond_float16_is_its_largest_and_one_that_is_not_finite_shows_in_its_row(h, value, shape):
    rng = np.random.default_rng(8)
    w = Weight(h, rng, 20, 96, 16, 0)
    x = rng.standard_normal((12, 96)).astype(np.float32)
    x[5, 95], x[5, 94] = value, -value
    [got] = products(h, x, [w], tuning=NVIDIA, shape=shape)
    if np.isfinite(value):
        bounded = np.clip(x, -65504, 65504)
        assert (np.abs(got - bounded @ w.exact.T) <= half_bound(bounded, w)).all()
    else:
        assert not np.isfinite(got[5]).any() and np.isfinite(np.delete(got, 5, 0)).all()


@pytest.mark.parametrize("rows", [1, 5, 8, 33])
@pytest.mark.parametrize("formats", [(4, 4), (4, 6)])
def test_gate_and_up_meet_in_the_epilogue_and_a_residual_is_added_in_place(h, rows, formats):
    rng = np.random.default_rng(rows)
    k = 96
    gate, up = (Weight(h, rng, 50, k, bits, 32) for bits in formats)
    other = Weight(h, rng, 19, k, 4, 32)
    x, before = (rng.standard_normal((rows, width)).astype(np.float32) for width in (k, 19))
    slot = linear.first_buffer_slot([[gate, up], [other]])
    mlp = Program(epilogue=True)
    a, b = mlp.register(50), mlp.register(50)
    s = elementwise.emit(mlp, "Sigmoid", (), [a], [None], None, 50)
    y = elementwise.emit(mlp, "Multiply", (), [a, s], [None] * 2, None, 50)
    y = elementwise.emit(mlp, "Multiply", (), [y, b], [None] * 2, None, 50)
    mlp.store(y, slot, row_stride=50, dtype=params.MS_FLOAT16)
    add = Program(epilogue=True)
    product = add.register(19)
    old = add.load(slot + 1, 19, rows=params.MS_ROW_SELF, row_stride=19)
    add.store(elementwise.emit(add, "Add", (), [old, product], [None] * 2, None, 19), slot + 1, row_stride=19)
    out, inout = h.put(np.full((rows, 50), np.nan, np.float16)), h.put(before)
    segments = [Segment([gate.packed, up.packed], mlp), Segment([other.packed], add)]
    source = Input(h.put(x), 0, k)
    h.run(gpu_linear.launches(source, segments, h.step(rows), [out, inout], 0, rows, tuning=NVIDIA), rows)
    g, u, o = (x.astype(np.float64) @ w.exact.T for w in (gate, up, other))
    silu = g / (1 + np.exp(-g))
    limit = 1.1 * half_bound(x, gate) * np.abs(u) + np.abs(silu) * half_bound(x, up) + 1e-3 * (1e-3 + np.abs(silu * u))
    assert (np.abs(h.get(out, np.float16) - silu * u) <= limit).all()
    assert (np.abs(h.get(inout) - o - before) <= half_bound(x, other) + 1e-6 * np.abs(before)).all()


def test_a_result_beyond_float16_is_stored_as_its_largest(h):
    w, x = Weight(h, np.random.default_rng(0), 8, 32, 16, 0), np.full((1, 32), 6e4, np.float32)
    program = Program(epilogue=True)
    slot = linear.first_buffer_slot([[w]])
    program.store(program.register(8), slot, row_stride=8, dtype=params.MS_FLOAT16)
    out = h.put(np.zeros((1, 8), np.float16))
    h.run(gpu_linear.launches(Input(h.put(x), 0, 32), [Segment([w.packed], program)], h.step(1), [out], 0, 1, tuning=NVIDIA), 1)
    exact = x @ w.exact.T
    assert (np.abs(exact) > 65504).any()
    np.testing.assert_allclose(h.get(out, np.float16), np.clip(exact, -65504, 65504), rtol=4e-3)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 32), (16, 0)])
@given(rows=st.integers(1, 37), room=st.integers(0, 40), half=st.booleans(), normed=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_an_invariant_row_is_the_same_bits_in_any_batch_of_any_plan(h, bits, group, rows, room, half, normed, seed):
    rng = np.random.default_rng(seed)
    w = Weight(h, rng, 21, 288, bits, group)
    x = rng.standard_normal((rows, 288)).astype(np.float16 if half else np.float32)
    more = dict(norm=Norm(None, 1e-6) if normed else None, invariant=True, tuning=NVIDIA)
    [together] = products(h, x, [w], rows + room, **more)
    alone = np.concatenate([products(h, row[None], [w], 1, **more)[0] for row in x])
    np.testing.assert_array_equal(together, alone)


def test_planes_want_an_epilogue_that_only_stores(h):
    w = Weight(h, np.random.default_rng(0), 8, 32, 4, 32)
    slot = linear.first_buffer_slot([[w]])
    program = Program(epilogue=True)
    program.store(program.register(8), slot, row_stride=8, dtype=params.MS_FLOAT16)
    with pytest.raises(ValueError, match="planes is one STORE of its product as float32"):
        gpu_linear.launches(Input(h.empty((1, 32)), 0, 32), [Segment([w.packed], program)], h.step(1), [], 0, 1, tuning=NVIDIA, planes=2)
    with pytest.raises(ValueError, match="2 planes of Matvec"):
        segments = [Segment([w.packed], plain(w, slot))]
        gpu_linear.launches(Input(h.empty((1, 32)), 0, 32), segments, h.step(1), [h.empty((2, 8))], 0, 1, planes=2)
