"""elementwise: every primitive against MLX where MLX rounds correctly, against float64 where it is the coarser of the two."""
import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from programs import launch_of, run, ulps

from metalstep.kernels import elementwise, params

F32 = mx.float32
LARGEST = np.finfo(np.float32).max
EDGES = np.array(
    [
        *(0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, -1.5, 2.0, -2.0, 2.5, -2.5, 3.0, -3.0, 7.0, -7.0),
        *(np.inf, -np.inf, np.nan, LARGEST, -LARGEST),
        *(1e-45, -1e-45, 1e-38, -1e-38, 2**-126),  # subnormal numbers, and the least that is none
        *(4194303.5, -4194303.5, 8388607.5, -8388607.5, 8388609.0, 16777216.0, 2147483648.0, -2147483648.0, 1e30),
        *(88.7, 88.8, -87.4, -103.9, -104.1, 9.1, -9.1, 0.625, 0.921875, 4.0),  # where exp ends; where tanh and erf switch
    ],
    np.float32,
)
PAIRS = tuple(np.array(list(itertools.product(EDGES, EDGES)), np.float32).T)
NUMBERS = st.floats(width=32) | st.floats(-100, 100, width=32) | st.sampled_from([float(x) for x in EDGES])
WIDTHS = st.sampled_from([1, 15, 16, 33, 63, 97])

# Each of these is one IEEE operation (or a choice, or a test): the same bits as MLX. -0 and 0 are one value here.
EXACT = {
    "Abs": mx.abs, "Ceil": mx.ceil, "Floor": mx.floor, "LogicalNot": mx.logical_not, "Negative": mx.negative,
    "Round": mx.round, "Sign": mx.sign, "Square": mx.square, "StopGradient": mx.stop_gradient, "Copy": mx.stop_gradient,
    "Add": mx.add, "Divide": mx.divide, "Equal": mx.equal, "FloorDivide": mx.floor_divide, "Greater": mx.greater,
    "GreaterEqual": mx.greater_equal, "Less": mx.less, "LessEqual": mx.less_equal, "LogicalAnd": mx.logical_and,
    "LogicalOr": mx.logical_or, "Maximum": mx.maximum, "Minimum": mx.minimum, "Multiply": mx.multiply,
    "NotEqual": mx.not_equal, "Remainder": mx.remainder, "Subtract": mx.subtract,
}  # fmt: skip


def erf(x):
    return np.array([math.erf(v) for v in x])


# Name, arguments: the function in float64, MLX's, and the allowed distance in units in the last place. vec.h promises 2 for
# its own exp, log, tanh and erf (3 for the sigmoid: an exp, a sum and a quotient); 1/sqrt rounds twice; the others are the C
# library's, whose own promise is 2. MLX's vectors are up to 40 units off in exp, sin and cos, so they show the meaning only.
APPROXIMATE = {
    ("Cos", ()): (np.cos, mx.cos, 2),
    ("Erf", ()): (erf, mx.erf, 2),
    ("Exp", ()): (np.exp, mx.exp, 2),
    ("Expm1", ()): (np.expm1, mx.expm1, 2),
    ("Log1p", ()): (np.log1p, mx.log1p, 2),
    ("Sigmoid", ()): (lambda x: 1 / (1 + np.exp(-x)), mx.sigmoid, 3),
    ("Sin", ()): (np.sin, mx.sin, 2),
    ("Tanh", ()): (np.tanh, mx.tanh, 2),
    ("Sqrt", (False,)): (np.sqrt, mx.sqrt, 0.5),
    ("Sqrt", (True,)): (lambda x: 1 / np.sqrt(x), mx.rsqrt, 1.5),
    ("Log", (0,)): (np.log2, mx.log2, 2),
    ("Log", (1,)): (np.log10, mx.log10, 2),
    ("Log", (2,)): (np.log, mx.log, 2),
    ("ArcTan2", ()): (np.arctan2, mx.arctan2, 2),
    ("Power", ()): (np.power, mx.power, 2),
}
IDS = [name + "".join(f"-{a}" for a in args) for name, args in APPROXIMATE]


def apply(h, op, *operands, args=(), dtypes=None, result=F32):
    """`op` over arrays [n], or numbers in the place of some of them."""
    columns = [x for x in operands if isinstance(x, np.ndarray)]

    def build(program, *registers):
        left = iter(registers)
        mixed = [next(left) if isinstance(x, np.ndarray) else x for x in operands]
        return elementwise.emit(program, op, args, mixed, dtypes or [F32] * len(operands), result, columns[0].size)

    return run(h, build, *(x[None] for x in columns))[0]


def arity(op):
    return 3 if op == "Select" else 2 if op in elementwise.BINARY else 1


def with_pairs(test):
    """One or two operands of any numbers and of all edges."""
    numbers = WIDTHS.flatmap(lambda n: arrays.arrays(np.float32, (2, n), elements=NUMBERS).map(tuple))
    return settings(max_examples=25)(example(pair=PAIRS)(given(pair=numbers)(test)))


def test_every_primitive_is_tested_here():
    ours = set(elementwise.UNARY) | set(elementwise.BINARY) | set(elementwise.SPECIAL)
    assert ours == {*EXACT, *(name for name, _ in APPROXIMATE), "LogAddExp", "AsType", "Select"}


@pytest.mark.parametrize("op", EXACT)
@with_pairs
def test_exact_operations_are_the_bits_of_mlx(h, op, pair):
    operands = pair[: arity(op)]
    want = np.array(EXACT[op](*(mx.array(x) for x in operands)).astype(F32))
    np.testing.assert_array_equal(apply(h, op, *operands), want)


@pytest.mark.parametrize("op", ["Abs", "Ceil", "Copy", "Floor", "Negative", "Round", "Multiply", "Divide"])
def test_zeros_keep_their_sign(h, op):
    operands = PAIRS[: arity(op)]
    got, want = apply(h, op, *operands), np.array(EXACT[op](*(mx.array(x) for x in operands)))
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(want[number]))


@pytest.mark.parametrize("key", APPROXIMATE, ids=IDS)
@with_pairs
def test_functions_are_as_close_to_the_exact_value_as_promised(h, key, pair):
    op, args = key
    function, _, limit = APPROXIMATE[key]
    operands = pair[: arity(op)]
    with np.errstate(all="ignore"):
        exact = function(*(x.astype(np.float64) for x in operands))
    got = apply(h, op, *operands, args=args)
    distance = ulps(got, exact)
    if op == "Sigmoid":  # e^-x is infinite where the result is subnormal: it is 0 then
        distance[np.abs(got - exact) < 2**-126] = 0
    worst = int(distance.argmax())
    assert distance[worst] <= limit, f"{op}{[float(x[worst]) for x in operands]} is {got[worst]}, not {exact[worst]}"


@pytest.mark.parametrize("key", APPROXIMATE, ids=IDS)
def test_functions_mean_what_mlx_means(h, key):
    op, args = key
    operands = np.random.default_rng(0).uniform(0.01, 20, (2, 2000)).astype(np.float32)[: arity(op)]
    want = np.array(APPROXIMATE[key][1](*(mx.array(x) for x in operands)))
    np.testing.assert_allclose(apply(h, op, *operands, args=args), want, rtol=1e-5, atol=1e-6)


@given(
    base=st.floats(-50, 50, width=32),
    exponents=arrays.arrays(np.int8, 17, elements=st.integers(-12, 12)),
)
@example(base=-0.0, exponents=np.arange(-8, 9, dtype=np.int8))
@example(base=-np.inf, exponents=np.arange(-8, 9, dtype=np.int8))
@settings(max_examples=25)
def test_powers_of_negative_bases_have_the_sign_of_odd_exponents(h, base, exponents):
    bases, exponents = np.full(17, base, np.float32), exponents.astype(np.float32)
    with np.errstate(all="ignore"):
        exact = np.power(bases.astype(np.float64), exponents)
    assert ulps(apply(h, "Power", bases, exponents), exact).max() <= 2
    for i in (0, 8, 16):  # a scalar exponent: 2 and 3 are products
        assert ulps(apply(h, "Power", bases, float(exponents[i])), exact[[i] * 17]).max() <= 2


@pytest.mark.parametrize("exponent", [2.0, 3.0])
def test_scalar_squares_and_cubes_are_powers(h, exponent):
    with np.errstate(all="ignore"):
        exact = EDGES.astype(np.float64) ** exponent
        got = apply(h, "Power", EDGES, exponent)
        distance = ulps(got, exact)
        distance[np.abs(got - exact) < 2**-126] = 0  # a cube whose square is subnormal keeps the square's digits
    assert distance.max() <= 1.5


@with_pairs
def test_logaddexp_is_exact_in_the_unit_of_its_operands(h, pair):
    """Near 0 the result is a difference of numbers of the operands' size (or of 1), and keeps their digits."""
    with np.errstate(all="ignore"):
        exact = np.logaddexp(*(x.astype(np.float64) for x in pair))
        unit = np.spacing(np.maximum(np.fmax(*np.abs(pair)), 1).clip(max=LARGEST))
        got = apply(h, "LogAddExp", *pair)
        near = np.abs(got - exact) <= 2 * unit.astype(np.float64)
    same = (got == exact.astype(np.float32)) | (np.isnan(got) & np.isnan(exact))
    assert (near | same).all(), [x[~(near | same)] for x in (*pair, got)]


@given(x=st.integers(-(2**24), 2**24), y=st.integers(-(2**24), 2**24).filter(bool), integer=st.booleans())
@example(x=-7, y=2, integer=True)
@example(x=2**24 - 1, y=2**23, integer=True)  # a quotient whose rounding must not reach the next integer
@example(x=7, y=-2, integer=True)
@example(x=-8, y=2, integer=False)
@settings(max_examples=40)
def test_floor_division_and_remainder_have_pythons_signs(h, x, y, integer):
    operands = np.array([x], np.float32), np.array([y], np.float32)
    dtypes = [mx.int32, mx.int32] if integer else None
    quotient = apply(h, "FloorDivide", *operands, dtypes=dtypes)[0]
    remainder = apply(h, "Remainder", *operands, dtypes=dtypes)[0]
    assert (quotient, remainder) == divmod(x, y)
    if integer:
        assert apply(h, "Divide", *operands, dtypes=dtypes)[0] == quotient


@pytest.mark.parametrize("op", [*EXACT, *elementwise.SPECIAL, "LogAddExp", "ArcTan2", "Exp", "Sin", "Tanh", "Erf"])
@pytest.mark.parametrize("n", [1, 33])
def test_a_scalar_in_any_place_is_a_register_full_of_it(h, op, n):
    rng = np.random.default_rng(n)
    args, value = {"Sqrt": (False,), "Log": (2,)}.get(op, ()), 0.375
    columns = [np.round(rng.standard_normal(n) * 2).astype(np.float32) for _ in range(arity(op))]
    for places in itertools.product([False, True], repeat=arity(op)):
        scalars = [value if scalar else x for scalar, x in zip(places, columns, strict=True)]
        full = [np.full(n, value, np.float32) if scalar else x for scalar, x in zip(places, columns, strict=True)]
        if all(places):
            launch = launch_of(h, scalar_instruction(op, args, value))
            h.device.create_plan([launch], 1, 1).close()  # no register at all: it only has to be possible
            continue
        np.testing.assert_array_equal(apply(h, op, *scalars, args=args), apply(h, op, *full, args=args))


def scalar_instruction(op, args, value):
    program = elementwise.Program()
    elementwise.emit(program, op, args, [value] * arity(op), [F32] * arity(op), F32, 1)
    return program.instructions[0]


@given(
    condition=arrays.arrays(np.float32, 35, elements=st.sampled_from([0.0, -0.0, 1.0, -2.0, np.nan, np.inf, 1e-45])),
    values=arrays.arrays(np.float32, (2, 35), elements=NUMBERS),
)
@settings(max_examples=25)
def test_select_takes_the_second_where_the_first_is_not_zero(h, condition, values):
    want = np.where(condition != 0, *values)
    np.testing.assert_array_equal(apply(h, "Select", condition, *values), want)
    np.testing.assert_array_equal(apply(h, "Select", condition, 2.5, values[1]), np.where(condition != 0, 2.5, values[1]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.bool_, mx.float32], ids=str)
@given(bits=arrays.arrays(np.uint32, 64, elements=st.integers(0, 2**32 - 1)))
@example(bits=(np.arange(64, dtype=np.uint32) << 12) + 0x477FE000)  # around the largest float16
@example(bits=(np.arange(64, dtype=np.uint32) << 19) + 0x33000000)  # around its subnormal numbers
@example(bits=np.arange(64, dtype=np.uint32) * 0x800 + 0x3F800000)  # halves of a unit: to even
@example(bits=np.arange(64, dtype=np.uint32) * 0x400 + 0x7F7F0000)  # bfloat16 from its largest to infinity and NaN
@settings(max_examples=40)
def test_casts_round_as_mlx_does(h, dtype, bits):
    x = bits.view(np.float32)
    want = np.array(mx.array(x).astype(dtype).astype(F32))
    got = apply(h, "AsType", x, result=dtype)
    np.testing.assert_array_equal(got, want)
    if dtype != mx.bool_:
        np.testing.assert_array_equal(np.signbit(got), np.signbit(x))


@given(x=arrays.arrays(np.float32, 21, elements=st.floats(-(2.0**24), 2.0**24, width=32)))
@settings(max_examples=20)
def test_casts_to_integers_cut_fractions_and_casts_between_integers_copy(h, x):
    np.testing.assert_array_equal(apply(h, "AsType", x, result=mx.int32), np.array(mx.array(x).astype(mx.int32)))
    whole = np.trunc(x)
    got = apply(h, "AsType", whole, dtypes=[mx.int32], result=mx.int64)
    np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("op", ["Exp", "Sin", "Add", "Power"])
def test_a_result_may_take_its_operands_place(h, op):
    x = np.random.default_rng(1).uniform(0.1, 3, (1, 97)).astype(np.float32)

    def in_place(program, register):
        operands = [register] * arity(op)
        code = {**elementwise.UNARY, **elementwise.BINARY}[op]
        program.emit(code, register, *operands, n=97)
        return register

    np.testing.assert_array_equal(run(h, in_place, x)[0], apply(h, op, *[x[0]] * arity(op)))


def test_a_primitive_without_an_instruction_is_named():
    with pytest.raises(NotImplementedError, match="the primitive ErfInv has no row-program instruction"):
        elementwise.emit(elementwise.Program(), "ErfInv", (), [1.0], [F32], F32, 1)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (dict(op=params.MS_OP_ADD, dst=0, a=16, b=params.MS_NONE, n=4), "operand b is absent"),
        (dict(op=params.MS_OP_ADD, dst=0, a=8, b=32, n=9), "dst 0 overlaps operand a at 8"),
        (dict(op=params.MS_OP_SELECT, dst=0, a=16, b=32, c=61, n=4), "c is 61 [+] 4, past the 64"),
        (dict(op=params.MS_OP_EXP, dst=63, a=0, n=1), "dst is 63 [+] 16, past the 64"),
        (dict(op=params.MS_OP_EXP, dst=0, a=2**32 - 1, n=4), "past the 64"),
        (dict(op=params.MS_OP_EXP, dst=0, a=16, n=0), "n is 0"),
        (dict(op=params.MS_OP_NOT + 1, dst=0, a=16, n=4), "unknown"),
        (dict(op=params.MS_OP_FLOOR_DIV + 1, dst=0, a=16, b=16, n=4), "unknown"),
        (dict(op=2**32 - 1, dst=0, a=16, n=4), "unknown"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(h, fields, why):
    with pytest.raises(ValueError, match=f"instruction 0 .*{why}"):
        h.device.create_plan([launch_of(h, fields)], 1, 1)
