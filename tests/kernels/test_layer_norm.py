"""layer_norm: against its reference, and that a row's scale and shift and other rows do not matter."""
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import launch_of, run

from metalstep.kernels import layer_norm, params

WIDTHS = [1, 33, 63, 64, 97, 576]


def norm(h, x, width, weight=None, bias=None, eps=1e-5):
    inputs = [array for array in (weight, bias) if array is not None]

    def build(program, x, *registers):
        left = iter(registers)
        operands = [None if array is None else next(left) for array in (weight, bias)]
        return layer_norm.emit(program, x, *operands, eps, width)

    return run(h, build, x, *inputs)


def rows_of(seed, width, spans=2, rows=3, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((rows, spans * width)) + shift).astype(np.float32)


@given(
    width=st.sampled_from(WIDTHS), spans=st.integers(1, 3), weighted=st.booleans(), biased=st.booleans(),
    shift=st.sampled_from([0.0, 3.0, 1000.0]), seed=st.integers(0, 99),
)  # fmt: skip
@example(width=33, spans=1, weighted=False, biased=True, shift=0.0, seed=0)  # a bias and no weight
@settings(max_examples=50)
def test_results_agree_with_the_reference(h, width, spans, weighted, biased, shift, seed):
    x = rows_of(seed, width, spans, shift=shift)
    weight = np.linspace(-2, 2, width, dtype=np.float32) if weighted else None
    bias = np.linspace(3, -1, width, dtype=np.float32) if biased else None
    wide = x.astype(np.float64).reshape(3, spans, width)
    deviation = wide.std(2, keepdims=True)
    eps = 1e-5
    exact = (wide - wide.mean(2, keepdims=True)) / np.sqrt(deviation**2 + eps)
    # The mean is rounded to a float32 of its size, and what it is off by comes out divided by the deviation.
    of_mean = 4 * 2**-24 * np.abs(wide).max(2, keepdims=True) / np.sqrt(deviation**2 + eps)
    bound = 2e-6 * np.abs(exact) + of_mean
    if weighted:
        exact, bound = exact * weight, bound * np.abs(weight)
    if biased:
        exact, bound = exact + bias, bound + 2**-23 * np.abs(bias)
    got = norm(h, x, width, weight, bias, eps).reshape(wide.shape)
    assert (np.abs(got - exact) <= bound + 1e-38).all()
    arrays = [None if a is None else mx.array(a) for a in (weight, bias)]
    reference = np.array(layer_norm.reference(mx.array(x.reshape(wide.shape)), *arrays, eps))
    of_reference = (1 + width / 16) * of_mean * (np.abs(weight).max() if weighted else 1)  # MLX adds up one by one
    assert (np.abs(got - reference) <= 2 * bound + of_reference + 1e-38).all()


@given(width=st.sampled_from(WIDTHS[1:]), power=st.integers(-20, 20), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_scaling_a_row_by_a_power_of_two_leaves_its_norm(h, width, power, seed):
    """Without eps the norm knows no unit: the same bits come out."""
    x = rows_of(seed, width)
    np.testing.assert_array_equal(norm(h, x * np.float32(2.0**power), width, eps=0), norm(h, x, width, eps=0))


@given(width=st.sampled_from(WIDTHS), shift=st.integers(-64, 64), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_shifting_a_row_leaves_its_norm(h, width, shift, seed):
    """Elements are whole numbers, so that the shifted row is exact; the mean's rounding remains (as above)."""
    x = np.round(rows_of(seed, width) * 100).astype(np.float32)
    got, want = norm(h, x + np.float32(shift), width, eps=1.0), norm(h, x, width, eps=1.0)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-4 if width == 1 else 2e-6)


def test_a_row_of_one_value_becomes_the_bias(h):
    for width in WIDTHS:
        bias = np.linspace(3, -1, width, dtype=np.float32)
        x = np.full((1, width), 2.0, np.float32)
        np.testing.assert_array_equal(norm(h, x, width, bias, bias)[0], bias)


@given(width=st.sampled_from(WIDTHS), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_rows_and_spans_do_not_see_each_other(h, width, seed):
    x, weight = rows_of(seed, width), np.linspace(-2, 2, width, dtype=np.float32)
    together = norm(h, x, width, weight, weight)
    np.testing.assert_array_equal(norm(h, x.reshape(-1, width), width, weight, weight).reshape(x.shape), together)
    np.testing.assert_array_equal(norm(h, x[2:], width, weight, weight), together[2:])


def test_an_element_that_is_not_finite_shows_in_its_span_alone(h):
    x = rows_of(0, 33)
    clean = norm(h, x, 33)
    x[1, 40] = np.inf
    got = norm(h, x, 33)
    assert np.isnan(got[1, 33:]).any() and not np.isfinite(got[1, 40])
    np.testing.assert_array_equal(np.delete(got.reshape(-1, 33), 3, 0), np.delete(clean.reshape(-1, 33), 3, 0))


GOOD = dict(op=params.MS_OP_LAYER_NORM, dst=0, a=16, b=32, c=48, n=16, inner=8)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(inner=5), "16 elements are no whole spans of 5"),
        (dict(inner=0), "no whole spans of 0"),
        (dict(a=params.MS_NONE), "operand a is absent"),
        (dict(a=2**32 - 1), "past the 64"),
        (dict(b=57), "b is 57 [+] 8"),
        (dict(c=57), "c is 57 [+] 8"),
        (dict(c=9), "dst 0 overlaps operand c at 9"),
        (dict(imm=4), "takes no scalar operands"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(h, changes, why):
    h.device.create_plan([launch_of(h, GOOD)], 1, 1).close()
    with pytest.raises(ValueError, match=f"instruction 0 .*{why}"):
        h.device.create_plan([launch_of(h, GOOD | changes)], 1, 1)
