"""linear: every width and group, dense dtypes, prologue and epilogue, against the dequantised product in float64."""
import mlx.core as mx
import numpy as np
import pytest
from harness import Harness
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.kernels import elementwise, linear, params, rms_norm
from metalstep.kernels.linear import Input, Segment
from metalstep.kernels.program import Program

# Activations have 15 bits and a sign under a scale per group: half a step of rounding per element, relative to the group's maximum.
TOLERANCE = {"int16": 4e-5, "int8": 1.2e-2}
AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def affine(rng, n, k, bits, group, dtype=mx.float16):
    """A random quantised weight: MLX's triplet and its dequantised float64 values."""
    values = mx.array(rng.standard_normal((n, k)).astype(np.float32)).astype(dtype)
    words, scales, biases = mx.quantize(values, group_size=group, bits=bits)
    wide = [a.astype(mx.float32) for a in (scales, biases)]
    exact = np.array(mx.dequantize(words, *wide, group_size=group, bits=bits)).astype(np.float64)
    view = mx.uint16 if dtype != mx.float32 else mx.uint32
    return [np.array(words), np.array(scales.view(view)), np.array(biases.view(view))], exact


CODES = {mx.float16: params.MS_FLOAT16, mx.bfloat16: params.MS_BFLOAT16, mx.float32: params.MS_FLOAT32}




def product(h, x, packed, arithmetic="int16", max_rows=None):
    """x [rows, k] times one packed weight, nothing fused."""
    out, program = h.empty((len(x), packed.n)), Program(epilogue=True)
    register = program.register(packed.n)
    program.store(register, linear.first_buffer_slot([[packed]]), row_stride=packed.n)
    launches = linear.launches(
        Input(h.put(x), 0, x.shape[1]), [Segment([packed], program)], h.step(len(x)), [out], 0, len(x), arithmetic
    )
    h.run(launches, max_rows or len(x))
    return h.get(out)


def relative_error(got, exact):
    return np.abs(got - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("arithmetic", ["int16", "int8"])
@pytest.mark.parametrize(("bits", "group"), AFFINE)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_affine_products_agree_with_the_reference(bits, group, dtype, arithmetic):
    rng = np.random.default_rng(bits * group)
    n, k = 49, 2 * group
    (words, scales, biases), exact = affine(rng, n, k, bits, group, dtype)
    x = rng.standard_normal((5, k)).astype(np.float32)
    with Harness() as h:
        packed = h.pack(
            words, bits=bits, group_size=group, dtype=CODES[dtype], n=n, k=k, scales=scales, biases=biases
        )
        got = product(h, x, packed, arithmetic)
    assert relative_error(got, x @ exact.T) < TOLERANCE[arithmetic]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@given(rows=st.integers(1, 9), n=st.sampled_from([1, 15, 16, 17, 33, 97]), k=st.sampled_from([1, 7, 32, 63]))
@settings(max_examples=12, deadline=None)
def test_dense_products_agree_with_the_reference(dtype, rows, n, k):
    rng = np.random.default_rng(n * k)
    weight = mx.array(rng.standard_normal((n, k)).astype(np.float32)).astype(dtype)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    stored = np.array(weight if dtype == mx.float32 else weight.view(mx.uint16))
    with Harness() as h:
        bits = 32 if dtype == mx.float32 else 16
        packed = h.pack(stored, bits=bits, group_size=0, dtype=CODES[dtype], n=n, k=k)
        got = product(h, x, packed)
    exact = x.astype(np.float64) @ np.array(weight.astype(mx.float32)).astype(np.float64).T
    assert np.abs(got - exact).max() <= 1e-5 * max(1.0, np.abs(exact).max())


@given(rows=st.integers(1, 40), threads=st.integers(1, 3), bits=st.sampled_from([3, 4, 8]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_row_is_the_same_bits_alone_and_in_any_batch(rows, threads, bits, seed):
    """One reduction order per row, whatever tile or thread computes it."""
    rng = np.random.default_rng(seed)
    (words, scales, biases), _ = affine(rng, 80, 96, bits, 32)
    x = rng.standard_normal((rows, 96)).astype(np.float32)
    fields = dict(bits=bits, group_size=32, dtype=params.MS_FLOAT16, n=80, k=96, scales=scales, biases=biases)
    with Harness(threads) as h:
        packed = h.pack(words, **fields)
        together = product(h, x, packed)
        alone = np.concatenate([product(h, row[None], packed) for row in x])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, 65504.0])
def test_extreme_inputs_stay_finite_and_exact_in_scale(value):
    rng = np.random.default_rng(1)
    (words, scales, biases), exact = affine(rng, 32, 64, 4, 32)
    x = np.full((2, 64), value, np.float32)
    x[1, ::2] *= -1
    with Harness() as h:
        packed = h.pack(words, bits=4, group_size=32, dtype=params.MS_FLOAT16, n=32, k=64, scales=scales, biases=biases)
        got = product(h, x, packed)
    want = x.astype(np.float64) @ exact.T
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= 4e-5 * max(np.abs(want).max(), 1e-38)


def test_two_weights_meet_in_the_epilogue_behind_a_norm():
    """silu(gate) * up behind an rms_norm of x, plus a residual: the fused form equals the chain in float64."""
    rng = np.random.default_rng(2)
    n, k, rows = 160, 96, 6
    (gate, exact_gate), (up, exact_up) = affine(rng, n, k, 4, 32), affine(rng, n, k, 8, 32)
    x, residual = (rng.standard_normal((rows, width)).astype(np.float32) for width in (k, n))
    weight = (1 + 0.1 * rng.standard_normal(k)).astype(np.float32)
    with Harness() as h:
        parts = [
            h.pack(t[0], bits=bits, group_size=32, dtype=params.MS_FLOAT16, n=n, k=k, scales=t[1], biases=t[2])
            for t, bits in ((gate, 4), (up, 8))
        ]
        first = linear.first_buffer_slot([parts])
        prologue = Program()
        row = prologue.load(first, k, rows=params.MS_ROW_SELF, row_stride=k)
        scale = prologue.load(first + 1, k, rows=params.MS_ROW_SAME)
        result = rms_norm.emit(prologue, row, scale, 1e-5, k)
        epilogue = Program(epilogue=True)
        a, b = epilogue.register(n), epilogue.register(n)
        f32 = mx.float32
        s = elementwise.emit(epilogue, "Sigmoid", (), [a], [f32], f32, n)
        y = elementwise.emit(epilogue, "Multiply", (), [a, s], [f32, f32], f32, n)
        y = elementwise.emit(epilogue, "Multiply", (), [y, b], [f32, f32], f32, n)
        r = epilogue.load(first + 2, n, rows=params.MS_ROW_SELF, row_stride=n)
        y = elementwise.emit(epilogue, "Add", (), [y, r], [f32, f32], f32, n)
        epilogue.store(y, first + 3, row_stride=n)
        out = h.empty((rows, n))
        buffers = [h.put(x), h.put(weight), h.put(residual), out]
        launches = linear.launches(
            Input(None, prologue=prologue, result=result), [Segment(parts, epilogue)], h.step(rows), buffers, 0, rows, "int16"
        )
        h.run(launches, rows)
        got = h.get(out)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight
    g, u = normed @ exact_gate.T, normed @ exact_up.T
    want = g / (1 + np.exp(-g)) * u + residual
    assert relative_error(got, want) < TOLERANCE["int16"]


def test_weights_of_other_inputs_are_refused():
    with Harness() as h:
        weights = [
            h.pack(np.zeros((16, k), np.float32), bits=32, group_size=0, dtype=params.MS_FLOAT32, n=16, k=k) for k in (8, 16)
        ]
        segments = [Segment([w], Program(epilogue=True)) for w in weights]
        with pytest.raises(ValueError, match="k = 8 and 16"):
            linear.launches(Input(h.empty((1, 8)), 0, 8), segments, h.step(1), [], 0, 1, "int16")
        with pytest.raises(ValueError, match="arithmetic 'int4' is unknown"):
            linear.launches(Input(h.empty((1, 8)), 0, 8), segments[:1], h.step(1), [], 0, 1, "int4")
