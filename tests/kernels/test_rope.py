"""rope: against its reference and exact angles, and the laws of rotations by positions."""
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import launch_of, run

from metalstep.kernels import params, rope

HEAD_DIMS = st.sampled_from([2, 6, 32, 34, 64, 66, 96, 128])
POSITIONS = [0, 1, 2, 77, 4096, 131_071]


def rotate(h, x, positions, dims, *, traditional=False, base=10_000.0, scale=1.0, freqs=None):
    """x [rows, heads, head_dim]."""

    def build(program, register, freqs=None):
        angles = rope.emit_angles(program, dims, base, scale, freqs)
        return rope.emit(program, register, angles, x.shape[2], traditional)

    inputs = [x.reshape(len(x), -1)] + ([] if freqs is None else [freqs])
    return run(h, build, *inputs, positions=positions).reshape(x.shape)


def exact(x, positions, dims, traditional, base, scale, freqs):
    """In float64, and how far float32 may be off: an angle has the rounding of position * scale / freq, of the frequency
    (e to a power of up to ln(base), in float32) and of the product; cos and sin turn it into a share of the elements."""
    half = dims // 2
    freqs = float(base) ** (np.arange(half) / half) if freqs is None else freqs.astype(np.float64)
    angle = (np.asarray(positions, np.float64) * scale)[:, None, None] / freqs
    a, b = (x[..., :dims:2], x[..., 1:dims:2]) if traditional else (x[..., :half], x[..., half:dims])
    a, b, cos, sin = a.astype(np.float64), b.astype(np.float64), np.cos(angle), np.sin(angle)
    out, bound = x.astype(np.float64), np.zeros(x.shape)
    pairs = (slice(0, dims, 2), slice(1, dims, 2)) if traditional else (slice(0, half), slice(half, dims))
    out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
    power = 1 + np.log(max(base or 1.0, 2.0))
    bound[..., pairs[0]] = bound[..., pairs[1]] = (np.abs(a) + np.abs(b)) * (np.abs(angle) * power * 2**-23 + 2**-22)
    return out, bound


@given(
    heads=st.integers(1, 3), head_dim=HEAD_DIMS, part=st.sampled_from([1.0, 0.5, 0.25]), traditional=st.booleans(),
    base=st.sampled_from([10_000.0, 100_000.0, 5e5, 1e6]), scale=st.sampled_from([1.0, 0.5, 0.25]), seed=st.integers(0, 99),
    given_freqs=st.booleans(),
)  # fmt: skip
@settings(max_examples=60)
def test_rotations_agree_with_the_reference(h, heads, head_dim, part, traditional, base, scale, seed, given_freqs):
    rng = np.random.default_rng(seed)
    dims = max(2, int(head_dim * part) // 2 * 2)
    positions = POSITIONS + rng.integers(0, 9999, 2).tolist()
    x = rng.standard_normal((len(positions), heads, head_dim)).astype(np.float32)
    freqs = np.sort(rng.uniform(1, 1e5, dims // 2)).astype(np.float32) if given_freqs else None
    want, bound = exact(x, positions, dims, traditional, base, scale, freqs)
    options = dict(traditional=traditional, base=base, scale=scale)
    got = rotate(h, x, positions, dims, freqs=freqs, **options)
    assert (np.abs(got - want) <= bound).all()
    arguments = mx.array(x), mx.array(positions), dims, traditional, base, scale
    reference = np.array(rope.reference(*arguments, None if freqs is None else mx.array(freqs)))
    assert (np.abs(got - reference) <= 2 * bound).all()
    np.testing.assert_array_equal(got[..., dims:], x[..., dims:])


@pytest.mark.parametrize("traditional", [False, True])
def test_rotations_mean_what_mlx_means(h, traditional):
    x = np.random.default_rng(0).standard_normal((6, 3, 64)).astype(np.float32)
    positions = [0, 1, 5, 100, 1000, 1001]
    got = rotate(h, x, positions, 48, traditional=traditional, base=5e5, scale=0.5)
    _, bound = exact(x, positions, 48, traditional, 5e5, 0.5, None)
    for row, position, own, limit in zip(x, positions, got, bound, strict=True):
        theirs = mx.fast.rope(mx.array(row)[:, None], 48, traditional=traditional, base=5e5, scale=0.5, offset=position)
        assert (np.abs(np.array(theirs)[:, 0] - own) <= 4 * limit).all()  # MLX's sine and cosine are coarser


@given(head_dim=HEAD_DIMS, traditional=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_position_0_turns_nothing(h, head_dim, traditional, seed):
    x = (np.random.default_rng(seed).standard_normal((2, 2, head_dim)) * 1e3).astype(np.float32)
    np.testing.assert_array_equal(rotate(h, x, [0, 0], head_dim, traditional=traditional), x)


@given(
    traditional=st.booleans(), distance=st.integers(0, 3000), at=st.integers(0, 3000), seed=st.integers(0, 99)
)
@example(traditional=False, distance=1, at=131_070, seed=0)
@settings(max_examples=30)
def test_dot_products_depend_on_the_distance_of_positions_alone(h, traditional, distance, at, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 1, 64)).astype(np.float32)

    def score(start):
        x = np.concatenate([q, k])
        turned = rotate(h, x, [start + distance, start], 64, traditional=traditional)
        bound = np.abs(exact(x, [start + distance, start], 64, traditional, 10_000.0, 1.0, None)[1])
        return float((turned[0] * turned[1]).sum(dtype=np.float64)), float((bound * np.abs(turned[::-1])).sum())

    (here, error), (there, other_error) = score(at), score(0)
    assert abs(here - there) <= error + other_error


@given(position=st.integers(0, 131_071), traditional=st.booleans())
@settings(max_examples=20)
def test_lengths_stay(h, position, traditional):
    x = np.random.default_rng(position).standard_normal((1, 2, 96)).astype(np.float32)
    got = rotate(h, x, [position], 96, traditional=traditional)
    np.testing.assert_allclose((got.astype(np.float64) ** 2).sum(2), (x.astype(np.float64) ** 2).sum(2), rtol=1e-6)


@given(traditional=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_rows_do_not_see_each_other(h, traditional, seed):
    rng = np.random.default_rng(seed)
    x, positions = rng.standard_normal((9, 3, 66)).astype(np.float32), rng.integers(0, 10_000, 9)
    together = rotate(h, x, positions, 34, traditional=traditional)
    for i in range(9):
        alone = rotate(h, x[i : i + 1], positions[i : i + 1], 34, traditional=traditional)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize("traditional", [False, True])
def test_a_rotation_may_take_its_operands_place(h, traditional):
    x = np.random.default_rng(1).standard_normal((3, 2, 66)).astype(np.float32)

    def in_place(program, register):
        angles = rope.emit_angles(program, 34, 10_000.0, 1.0, None)
        dims = [17, int(traditional), 0, 0]
        program.emit(params.MS_OP_ROPE, register, register, angles, n=register.size, inner=66, dims=dims)
        return register

    got = run(h, in_place, x.reshape(3, -1), positions=[1, 2, 3]).reshape(x.shape)
    np.testing.assert_array_equal(got, rotate(h, x, [1, 2, 3], 34, traditional=traditional))


ROTATION = dict(op=params.MS_OP_ROPE, dst=16, a=16, b=0, n=16, inner=8, dims=[4, 0, 0, 0])
ANGLES = dict(op=params.MS_OP_ROPE_ANGLES, dst=0, b=params.MS_NONE, n=8, imm0=1e4, imm1=1.0)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (ROTATION | dict(dims=[5, 0, 0, 0]), r"rotates 2 \* 5 elements of heads of 8"),
        (ROTATION | dict(dims=[0, 0, 0, 0]), r"rotates 2 \* 0 elements"),
        (ROTATION | dict(dims=[2**31, 0, 0, 0]), "rotates"),
        (ROTATION | dict(inner=3), "16 elements are no whole spans of 3"),
        (ROTATION | dict(inner=0), "no whole spans of 0"),
        (ROTATION | dict(b=57), "b is 57 [+] 8, past the 64"),
        (ROTATION | dict(b=30), "dst 16 overlaps operand b"),
        (ROTATION | dict(a=20), "dst 16 overlaps operand a"),
        (ANGLES | dict(imm0=0.0), "base 0 is not positive"),
        (ANGLES | dict(imm0=float("nan")), "base nan is not positive"),
        (ANGLES | dict(n=33), "dst is 0 [+] 80, past the 64"),
        (ANGLES | dict(b=12), "dst 0 overlaps operand b at 12"),
        (ANGLES | dict(b=60), "b is 60 [+] 8"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(h, fields, why):
    h.device.create_plan([launch_of(h, ROTATION, ANGLES)], 1, 1).close()
    with pytest.raises(ValueError, match=f"instruction 0 .*{why}"):
        h.device.create_plan([launch_of(h, fields)], 1, 1)
