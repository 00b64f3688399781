"""rms_norm: against its reference, and that a row's scale and other rows do not matter."""
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from programs import launch_of, run

from metalstep.kernels import params, rms_norm

WIDTHS = st.sampled_from([1, 33, 63, 64, 97, 576])
TOLERANCE = 1e-6  # the order of a float32 sum of squares, a root, a quotient and two products: a few units of 2^-24


@st.composite
def spans(draw, largest=100.0):
    """x [rows, spans * width] and the width."""
    width = draw(WIDTHS)
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)) * width)
    return draw(arrays.arrays(np.float32, shape, elements=st.floats(-largest, largest, width=16))), width


def norm(h, x, width, weight=None, eps=1e-5):
    inputs = [x] if weight is None else [x, weight]
    return run(h, lambda program, x, weight=None: rms_norm.emit(program, x, weight, eps, width), *inputs)


@given(rows=spans(), weighted=st.booleans(), eps=st.sampled_from([1e-5, 1e-6, 1.0]))
@example(rows=(np.zeros((1, 66), np.float32), 33), weighted=True, eps=1e-5)  # eps alone keeps a zero row finite
@example(rows=(np.full((2, 66), 3e4, np.float32), 33), weighted=True, eps=1e-5)  # squares overflow float16: sums must not
@example(rows=(np.full((1, 97), 1e-3, np.float32), 97), weighted=False, eps=1e-6)  # squares vanish in float16
@settings(max_examples=40)
def test_results_agree_with_the_reference(h, rows, weighted, eps):
    x, width = rows
    weight = np.linspace(-2, 2, width, dtype=np.float32) if weighted else None
    given_weight = None if weight is None else mx.array(weight)
    want = rms_norm.reference(mx.array(x.reshape(len(x), -1, width)), given_weight, eps)
    of_reference = width * 2**-26  # MLX adds the squares up one by one: equal ones are all rounded the same way
    got = norm(h, x, width, weight, eps)
    np.testing.assert_allclose(got, np.array(want).reshape(x.shape), rtol=TOLERANCE + of_reference, atol=1e-38)


@given(rows=spans(), power=st.integers(-20, 20))
@settings(max_examples=25)
def test_scaling_a_row_by_a_power_of_two_leaves_its_norm(h, rows, power):
    """Without eps the norm knows no unit: the same bits come out."""
    x, width = np.where(np.abs(rows[0]) < 0.5, 1, rows[0]).astype(np.float32), rows[1]
    np.testing.assert_array_equal(norm(h, x * np.float32(2.0**power), width, eps=0), norm(h, x, width, eps=0))


@given(rows=spans())
@settings(max_examples=20)
def test_the_mean_square_of_a_norm_is_1(h, rows):
    x, width = np.where(np.abs(rows[0]) < 0.5, 1, rows[0]).astype(np.float32), rows[1]
    got = norm(h, x, width, eps=0).astype(np.float64).reshape(len(x), -1, width)
    np.testing.assert_allclose((got**2).mean(2), 1, rtol=2e-6)


@given(rows=spans())
@settings(max_examples=20)
def test_rows_and_spans_do_not_see_each_other(h, rows):
    x, width = rows
    weight = np.linspace(-2, 2, width, dtype=np.float32)
    together = norm(h, x, width, weight)
    alone = norm(h, x.reshape(-1, width), width, weight)
    np.testing.assert_array_equal(alone.reshape(x.shape), together)
    np.testing.assert_array_equal(norm(h, x[:1], width, weight), together[:1])


def test_an_element_that_is_not_finite_shows_in_its_span_alone(h):
    x = np.ones((2, 66), np.float32)
    clean = norm(h, x, 33)
    x[1, 40] = np.nan
    got = norm(h, x, 33)
    assert np.isnan(got[1, 33:]).all()
    np.testing.assert_array_equal(got[0], clean[0])
    np.testing.assert_array_equal(got[1, :33], clean[1, :33])


def test_a_norm_may_take_its_operands_place(h):
    x = np.random.default_rng(0).standard_normal((3, 97)).astype(np.float32)

    def in_place(program, register):
        return program.emit(params.MS_OP_RMS_NORM, register, register, n=97, inner=97, imm0=1e-5)

    np.testing.assert_array_equal(run(h, in_place, x), norm(h, x, 97))


GOOD = dict(op=params.MS_OP_RMS_NORM, dst=0, a=16, b=32, c=params.MS_NONE, n=16, inner=8)


def test_an_rms_norm_has_no_third_operand(h):
    """Whatever stands in its place is not read."""

    def build(program, register):
        out = program.register(register.size)
        program.emit(params.MS_OP_RMS_NORM, out, register, n=33, inner=33, imm0=1e-5)
        program.instructions[-1]["c"] = 2**30
        return out

    x = np.random.default_rng(0).standard_normal((3, 33)).astype(np.float32)
    np.testing.assert_array_equal(run(h, build, x), norm(h, x, 33))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(inner=5), "16 elements are no whole spans of 5"),
        (dict(inner=0), "no whole spans of 0"),
        (dict(a=params.MS_NONE), "operand a is absent"),
        (dict(a=49), "a is 49 [+] 16, past the 64"),
        (dict(a=8), "dst 0 overlaps operand a at 8"),
        (dict(b=57), "b is 57 [+] 8"),
        (dict(b=4), "dst 0 overlaps operand b at 4"),
        (dict(imm=1), "takes no scalar operands"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(h, changes, why):
    h.device.create_plan([launch_of(h, GOOD)], 1, 1).close()
    with pytest.raises(ValueError, match=f"instruction 0 .*{why}"):
        h.device.create_plan([launch_of(h, GOOD | changes)], 1, 1)
