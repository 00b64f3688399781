"""Elementwise instructions on a GPU: the same values as the host's tests ask for, every opcode in one plan."""
import itertools
import math
import sys

import mlx.core as mx
import numpy as np
import pytest
from gpu_device import KIND
from gpu_harness import GpuHarness
from gpu_programs import Case, run_all
from programs import ulps
from test_elementwise import APPROXIMATE, EDGES, EXACT, LARGEST, PAIRS, arity

from metalstep.kernels import elementwise, params
from metalstep.kernels.gpu import expressions

F32 = mx.float32
RANDOM = np.random.default_rng(0)
NUMBERS = np.concatenate([EDGES, RANDOM.uniform(-100, 100, 400), RANDOM.standard_normal(400), RANDOM.standard_normal(100) * 1e-3])
NUMBERS = NUMBERS.astype(np.float32)
DENSE = np.concatenate([np.linspace(-2, 2, 4001), np.geomspace(1e-38, 1e38, 3001), -np.geomspace(1e-38, 1e38, 3001)]).astype(np.float32)


def operation(op, args, count, result=F32, dtypes=None):
    def build(program, *registers):
        return elementwise.emit(program, op, args, registers, dtypes or [F32] * count, result, registers[0].size)

    return build


def operands_of(count):
    """All edges with all edges, and numbers of every size."""
    if count == 1:
        return (np.concatenate([EDGES, DENSE]),)
    pairs = RANDOM.choice(NUMBERS, (2, 1000))
    return tuple(np.concatenate([a, b]).astype(np.float32) for a, b in zip(PAIRS, pairs, strict=True))


KEYS = [(op, ()) for op in EXACT] + list(APPROXIMATE) + [("LogAddExp", ())]
GIVEN = {key: operands_of(arity(key[0])) for key in KEYS}


@pytest.fixture(scope="module")
def results():
    """By primitive and arguments, over GIVEN."""
    with GpuHarness() as h:
        cases = [Case(operation(*key, arity(key[0])), [x[None] for x in GIVEN[key]]) for key in KEYS]
        return dict(zip(KEYS, (result[0] for result in run_all(h, cases, 1)), strict=True))


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def test_every_opcode_has_an_expression():
    opcodes = {getattr(params, name) for name in params._constants if name.startswith("MS_OP_")}
    assert set(expressions.EXPRESSIONS) == {op for op in opcodes if op >= params.MS_OP_COPY}


@pytest.mark.parametrize("op", EXACT)
def test_exact_operations_are_the_bits_of_mlx(results, op):
    want = np.array(EXACT[op](*(mx.array(x) for x in GIVEN[op, ()])).astype(F32))
    np.testing.assert_array_equal(results[op, ()], want)


@pytest.mark.parametrize("op", ["Abs", "Ceil", "Copy", "Floor", "Negative", "Round", "Multiply", "Divide"])
def test_zeros_keep_their_sign(results, op):
    want = np.array(EXACT[op](*(mx.array(x) for x in GIVEN[op, ()])))
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(results[op, ()][number]), np.signbit(want[number]))


# In units in the last place. What expressions.h computes itself is as close as the host device's; the library's functions are the C
# library's in the simulator, and on a Mac as close as the Metal specification's table of precise functions promises.
APPLE = {"Cos": 4, "Exp": 4, "Sin": 4, "Tanh": 5, "Log": 4, "ArcTan2": 6, "Power": 16, "Sigmoid": 6, "Erf": 6}


@pytest.mark.parametrize("key", APPROXIMATE, ids=lambda key: key[0] + "".join(f"-{a}" for a in key[1]))
def test_functions_are_as_close_to_the_exact_value_as_on_the_host(results, key):
    function, _, limit = APPROXIMATE[key]
    limit = APPLE.get(key[0], limit) if sys.platform == "darwin" else limit
    with np.errstate(all="ignore"):
        exact = function(*(x.astype(np.float64) for x in GIVEN[key]))
    got = results[key]
    distance = ulps(got, exact)
    if key[0] == "Sigmoid":  # e^-x is infinite where the result is subnormal: it is 0 then
        distance[np.abs(got - exact) < 2**-126] = 0
    worst = int(distance.argmax())
    assert distance[worst] <= limit, f"{key}{[float(x[worst]) for x in GIVEN[key]]} is {got[worst]}, not {exact[worst]}"


def test_logaddexp_is_exact_in_the_unit_of_its_operands(results):
    """Near 0 the result is a difference of numbers of the operands' size (or of 1), and keeps their digits."""
    pair, got = GIVEN["LogAddExp", ()], results["LogAddExp", ()]
    with np.errstate(all="ignore"):
        exact = np.logaddexp(*(x.astype(np.float64) for x in pair))
        unit = np.spacing(np.maximum(np.fmax(*np.abs(pair)), 1).clip(max=LARGEST))
        near = np.abs(got - exact) <= 2 * unit.astype(np.float64)
    same = (got == exact.astype(np.float32)) | (np.isnan(got) & np.isnan(exact))
    assert (near | same).all(), [x[~(near | same)] for x in (*pair, got)]


def test_powers_of_negative_bases_have_the_sign_of_odd_exponents(h):
    bases, exponents = (x.ravel() for x in np.meshgrid([-0.0, 0.0, -1.5, -50.0, -2.0, 7.25], np.arange(-12, 13)))
    bases, exponents = bases.astype(np.float32), exponents.astype(np.float32)
    scalars = [2.0, 3.0, 0.0, -1.0, -3.0, 0.5]
    cases = [Case(operation("Power", (), 2), [bases[None], exponents[None]])]
    cases += [Case(power(scalar), [bases[None]]) for scalar in scalars]
    general, *by_scalar = run_all(h, cases, 1)
    with np.errstate(all="ignore"):
        assert ulps(general[0], bases.astype(np.float64) ** exponents).max() <= 2
        for scalar, got in zip(scalars, by_scalar, strict=True):
            assert ulps(got[0], np.power(bases.astype(np.float64), scalar)).max() <= 2


def power(scalar):
    return lambda program, x: elementwise.emit(program, "Power", (), [x, scalar], [F32, F32], F32, x.size)


def test_a_scalar_in_any_place_is_a_register_full_of_it(h):
    """All opcodes, all places, scalars of every sort; a program of scalars alone gives rows of one value."""
    cases, wants = [], []
    ops = ("Subtract", "Power", "Less", "Select")
    for op, places in [(name, p) for name in ops for p in itertools.product([0, 1], repeat=arity(name))]:
        for value in (0.375, -2.0, np.inf, -0.0, np.nan):
            columns = [np.round(RANDOM.standard_normal(5) * 2).astype(np.float32)[None] for _ in places]
            full = [np.full((1, 5), value, np.float32) if scalar else x for scalar, x in zip(places, columns, strict=True)]
            cases.append(Case(scalars(op, places, value), columns))
            wants.append(Case(operation(op, (), len(places)), full))
    want = run_all(h, wants, 1)
    for got, expected in zip(run_all(h, cases, 1), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def scalars(op, places, value):
    def build(program, *registers):
        operands = [value if scalar else x for scalar, x in zip(places, registers, strict=True)]
        return elementwise.emit(program, op, (), operands, [F32] * len(places), F32, 5)

    return build


BITS = {
    "around the largest float16": (np.arange(64, dtype=np.uint32) << 12) + 0x477FE000,
    "around its subnormal numbers": (np.arange(64, dtype=np.uint32) << 19) + 0x33000000,
    "halves of a unit": np.arange(64, dtype=np.uint32) * 0x800 + 0x3F800000,
    "to infinity and NaN": np.arange(64, dtype=np.uint32) * 0x400 + 0x7F7F0000,
    "any": RANDOM.integers(0, 2**32, 2000, dtype=np.uint32),
}


def test_casts_round_as_mlx_does(h):
    x = np.concatenate(list(BITS.values())).view(np.float32)
    dtypes = [mx.float16, mx.bfloat16, mx.bool_, F32]
    for dtype, got in zip(dtypes, run_all(h, [Case(operation("AsType", (), 1, dtype), [x[None]]) for dtype in dtypes], 1), strict=True):
        np.testing.assert_array_equal(got[0], np.array(mx.array(x).astype(dtype).astype(F32)))
        if dtype != mx.bool_:
            signed = ~np.isnan(x) if KIND == "nvidia" else np.full(x.shape, True)  # NVIDIA's conversions drop a NaN's sign
            np.testing.assert_array_equal(np.signbit(got[0])[..., signed], np.signbit(x)[signed])


def test_casts_to_integers_cut_fractions(h):
    x = np.concatenate([RANDOM.uniform(-(2.0**24), 2.0**24, 99), [0.9, -0.9, 2.5, -7.0]]).astype(np.float32)
    (got,) = run_all(h, [Case(operation("AsType", (), 1, mx.int32), [x[None]])], 1)
    np.testing.assert_array_equal(got[0], np.array(mx.array(x).astype(mx.int32)))


def test_floor_division_and_remainder_have_pythons_signs(h):
    x, y = RANDOM.integers(-(2**24), 2**24, (2, 200))
    y[y == 0] = 7
    x = np.concatenate([x, [-7, 2**24 - 1, 7, -8]]).astype(np.float32)
    y = np.concatenate([y, [2, 2**23, -2, 2]]).astype(np.float32)
    pair = [x[None], y[None]]
    quotient, remainder, whole = run_all(
        h,
        [
            Case(operation("FloorDivide", (), 2), pair),
            Case(operation("Remainder", (), 2), pair),
            Case(operation("Divide", (), 2, dtypes=[mx.int32, mx.int32]), pair),
        ],
        1,
    )
    want = [divmod(int(a), int(b)) for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(np.stack([quotient[0], remainder[0]], 1), want)
    np.testing.assert_array_equal(whole, quotient)


# ---- text ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [*EDGES[:16], 0.1, 1 / 3, 1e-45, 1.17549435e-38, LARGEST, 16777216.0, 1e30])
def test_literals_are_exact(value):
    text = expressions.literal(value)
    assert text.endswith("f") and ("." in text or "e" in text)
    assert np.float32(text[:-1]).view(np.uint32) == np.float32(value).view(np.uint32)


def test_literals_beyond_float32_are_what_it_rounds_to():
    assert expressions.literal(math.inf) == expressions.literal(1e39) == "as_type<float>(0x7f800000u)"
    assert expressions.literal(-1e39) == "as_type<float>(0xff800000u)"
    assert expressions.literal(math.nan) == "as_type<float>(0x7fc00000u)"


def test_operands_are_kept_together():
    assert expressions.expression(params.MS_OP_MUL, ["a + b", "-1.0f"]) == "(a + b) * (-1.0f)"
    assert expressions.expression(params.MS_OP_NOT, ["x"]) == "ms_truth(x == 0.0f)"


def test_what_is_not_elementwise_is_refused():
    with pytest.raises(ValueError, match="opcode 1 is not elementwise"):
        expressions.expression(params.MS_OP_LOAD, ["x"])
    with pytest.raises(ValueError, match=f"opcode {params.MS_OP_ADD} takes 2 operands, not 1"):
        expressions.expression(params.MS_OP_ADD, ["x"])
