"""turboquant: the codecs' laws, which hold for any vector, and vectors whose codes are written down."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turbo_cases import DIMS, GOLDEN, SCALES, TURBO, normal, vectors

from metalstep.kernels import turboquant
from metalstep.kernels.kv_codec import KVCodec, hadamard_base
from metalstep.kernels.turboquant import K_SEED, V_SEED, decode, encode

ALL_DIMS = [dim for dim in range(16, 513, 16) if hadamard_base(dim) is not None]
SIGNS = {
    (64, 42): "3c5d54c6 01923b31",
    (64, 43): "ebc8e1d3 f90c9c94",
    (128, 42): "f42029a1 6c0a68a4 2ff0a01d 02813b92",
    (128, 43): "afea3b91 ad4245a9 df202179 38770f4c",
    (256, 42): "6f3fd894 6505131b 0de74f45 da74b969 a4422c16 679e93fb a740d21d fd0cc0ef",
    (256, 43): "0b48f93e ac78c88d 44081a77 7f8bc9f8 1571d965 907e8470 60ab2e06 9533243c",
}
HALF = 2.0**-11  # float16's rounding, relative
codecs = st.builds(KVCodec, st.sampled_from(TURBO), st.sampled_from(["float16", "float32"]), st.sampled_from(SCALES))


def again(x, codec, seed=K_SEED):
    """x encoded and decoded."""
    return decode(*encode(x, codec, seed), codec, x.shape[-1], seed)


def norm(x):
    return np.sqrt((x.astype(np.float64) ** 2).sum(-1))


# ---- what is written down -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g.dim}-{g.bits}")
def test_golden_vectors_have_their_codes_and_scales_bit_for_bit(golden):
    assert norm(golden.x) == pytest.approx(golden.norm, rel=1e-7)
    np.testing.assert_allclose(turboquant.unit(golden.x, K_SEED)[:4], golden.unit, atol=1e-7)
    for scale in SCALES:
        codes, gamma = encode(golden.x, KVCodec(f"turbo{golden.bits}", scale=scale), K_SEED)
        np.testing.assert_array_equal(codes, golden.codes)
        assert gamma.view(np.uint16).tolist() == [golden.gamma[scale]]
    close = again(golden.x, KVCodec(f"turbo{golden.bits}"))
    assert norm(golden.x - close) ** 2 / norm(golden.x) ** 2 == pytest.approx(golden.distortion, abs=2e-6)


@pytest.mark.parametrize(("dim", "seed"), SIGNS)
def test_signs_are_those_written_down(dim, seed):
    words = turboquant.sign_words(dim, seed)
    assert " ".join(f"{word:08x}" for word in words) == SIGNS[dim, seed]
    np.testing.assert_array_equal(turboquant.signs(dim, seed) < 0, [words[i // 32] >> (i % 32) & 1 for i in range(dim)])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_are_those_of_lloyd_and_max(bits):
    """Each boundary half-way between its centroids, each centroid the mean of its cell, the distortion what is published."""
    dim = 1
    centroids = [-c for c in turboquant.CENTROIDS[bits][::-1]] + [*turboquant.CENTROIDS[bits]]
    positive = [0.0, *turboquant.BOUNDARIES[bits]]
    for i, boundary in enumerate(turboquant.BOUNDARIES[bits]):
        assert boundary == pytest.approx((turboquant.CENTROIDS[bits][i] + turboquant.CENTROIDS[bits][i + 1]) / 2, abs=1e-9)
    density = [math.exp(-b * b / 2) / math.sqrt(2 * math.pi) for b in positive] + [0.0]
    above = [math.erfc(b / math.sqrt(2)) / 2 for b in positive] + [0.0]
    distortion = 1.0
    for i, centroid in enumerate(turboquant.CENTROIDS[bits]):
        mass, moment = above[i] - above[i + 1], density[i] - density[i + 1]
        assert centroid == pytest.approx(moment / mass, abs=1e-9)
        distortion += 2 * (centroid * centroid * mass - 2 * centroid * moment)
    assert distortion == pytest.approx(turboquant.DISTORTIONS[bits], abs=1e-9)
    got, boundaries = turboquant.codebook(bits, dim)
    np.testing.assert_array_equal(got, -got[::-1])
    np.testing.assert_array_equal(boundaries, -boundaries[::-1])
    np.testing.assert_array_equal(got, np.float32(centroids))
    grid = np.linspace(-12, 12, 1_000_001)
    near = np.array(centroids)[np.searchsorted(boundaries.astype(np.float64), grid)]
    quadrature = ((grid - near) ** 2 * np.exp(-grid * grid / 2)).sum() * (grid[1] - grid[0]) / math.sqrt(2 * math.pi)
    assert quadrature == pytest.approx(turboquant.DISTORTIONS[bits], rel=1e-3)


# Bytes of a vector with float16 norms, and of a float32 norm: two more.
@pytest.mark.parametrize(
    ("dim", "sizes"),
    [(64, (34, 26, 18)), (80, (42, 34, 22)), (96, (50, 38, 26)), (128, (66, 50, 34)), (192, (98, 74, 50)), (256, (130, 98, 66))],
)
def test_a_vector_takes_the_bytes_it_is_said_to(dim, sizes):
    x = normal(3, dim)
    named = dict(zip(("turbo4", "turbo3", "turbo2"), sizes, strict=True)) | {"affine8": dim + dim // (64 if dim % 64 == 0 else 16) * 4}
    if dim == 96:
        named["affine8"] = 96 + 3 * 4  # groups of 32
    for name, size in named.items():
        codec = KVCodec(name)
        assert codec.vector_bytes(dim) == size < 2 * dim
        assert sum(a.nbytes for a in encode(x, codec, K_SEED)) == 3 * size
        if codec.is_turbo:
            wide = KVCodec(name, "float32")
            assert wide.vector_bytes(dim) == size + 2 == sum(a[0].nbytes for a in encode(x, wide, K_SEED))


# ---- rotation and words -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", ALL_DIMS)
@pytest.mark.parametrize("seed", [K_SEED, V_SEED])
def test_rotations_are_orthogonal(dim, seed):
    rotation = turboquant.rotate(np.eye(dim, dtype=np.float32), seed).astype(np.float64)  # rows: images of unit vectors
    assert np.abs(rotation @ rotation.T - np.eye(dim)).max() <= 1e-6
    np.testing.assert_allclose(turboquant.rotate_back(np.eye(dim, dtype=np.float32), seed), rotation.T, atol=1e-7)
    assert np.abs(np.abs(rotation) * math.sqrt(dim) - 1).max() <= 1e-6  # a Hadamard matrix, divided


@given(x=vectors(tuple(ALL_DIMS)), seed=st.sampled_from([K_SEED, V_SEED]))
def test_a_rotation_and_back_is_where_it_began(x, seed):
    back = turboquant.rotate_back(turboquant.rotate(x, seed), seed)
    assert np.abs(back - x).max() <= 4e-6 * norm(x)
    assert norm(turboquant.rotate(x, seed)) == pytest.approx(norm(x), rel=1e-6)


@given(bits=st.sampled_from([2, 3, 4, 8]), dim=st.sampled_from([64, 80, 96, 128, 160, 192, 256]), seed=st.integers(0, 99), data=st.data())
def test_words_hold_indices_each_in_its_own_bits(bits, dim, seed, data):
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 2**bits, (2, dim))
    words = turboquant.pack(indices, bits)
    assert words.dtype == np.uint32 and words.shape == (2, -(-dim * bits // 32))
    np.testing.assert_array_equal(turboquant.unpack(words, bits, dim), indices)
    number = [sum(int(word) << 32 * i for i, word in enumerate(row)) for row in words]
    assert number[0] == sum(int(index) << j * bits for j, index in enumerate(indices[0]))  # and so padding is 0
    j = data.draw(st.integers(0, dim - 1))
    indices[0, j] ^= 1 + rng.integers(2**bits - 1)
    changed = number[0] ^ sum(int(word) << 32 * i for i, word in enumerate(turboquant.pack(indices, bits)[0]))
    assert changed and changed >> j * bits << j * bits == changed and changed >> (j + 1) * bits == 0


# ---- any vector ---------------------------------------------------------------------------------------------------------------
@given(x=vectors(), codec=codecs, power=st.integers(-8, 8))
def test_a_power_of_two_scales_the_scale_alone(x, codec, power):
    codes, gamma = encode(x, codec, K_SEED)
    scaled_codes, scaled = encode(x * np.float32(2.0**power), codec, K_SEED)
    np.testing.assert_array_equal(codes, scaled_codes)
    if codec.norm_dtype == "float32" or (min(gamma[0], scaled[0]) > 6.2e-5 and max(gamma[0], scaled[0]) < 65504):
        assert scaled == gamma * scaled.dtype.type(2.0**power)


@given(x=vectors(), codec=codecs)
def test_a_vectors_opposite_has_opposite_indices_and_the_same_scale(x, codec):
    (codes, gamma), (opposite, same) = encode(x, codec, K_SEED), encode(-x, codec, K_SEED)
    y = turboquant.unit(x, K_SEED)
    on_boundary = np.isin(np.abs(y), turboquant.codebook(codec.bits, x.size)[1])
    a, b = (turboquant.unpack(words, codec.bits, x.size) for words in (codes, opposite))
    np.testing.assert_array_equal((a + b)[~on_boundary], 2**codec.bits - 1)
    if not on_boundary[y != 0].any():
        assert gamma == same


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_element_on_a_boundary_has_the_lower_index(bits):
    boundaries = turboquant.codebook(bits, 64)[1]
    y = np.zeros((3, 64), np.float32)
    y[:, : boundaries.size] = [np.nextafter(boundaries, np.float32(-9)), boundaries, np.nextafter(boundaries, np.float32(9))]
    below, at, above = turboquant.quantise(y, bits)[:, : boundaries.size]
    np.testing.assert_array_equal(below, np.arange(boundaries.size))
    np.testing.assert_array_equal(at, below)
    np.testing.assert_array_equal(above, below + 1)


@given(x=vectors(most=6), name=st.sampled_from(TURBO), norm_dtype=st.sampled_from(["float16", "float32"]))
def test_matched_scales_keep_the_norm(x, name, norm_dtype):
    codec = KVCodec(name, norm_dtype)
    gamma = encode(x, codec, K_SEED)[1]
    if 6.2e-5 <= gamma[0] < 65504:
        assert norm(again(x, codec)) / norm(x) == pytest.approx(1, abs=HALF + 2e-6)


@given(x=vectors(most=6), name=st.sampled_from(TURBO), norm_dtype=st.sampled_from(["float16", "float32"]))
def test_unbiased_scales_keep_the_product_with_the_vector(x, name, norm_dtype):
    codec = KVCodec(name, norm_dtype, "unbiased")
    gamma = encode(x, codec, K_SEED)[1]
    if 6.2e-5 <= gamma[0] < 65504:
        product = again(x, codec).astype(np.float64) @ x.astype(np.float64)
        assert product / norm(x) ** 2 == pytest.approx(1, abs=HALF + 2e-6)


@given(name=st.sampled_from(TURBO), dim=st.sampled_from(DIMS), i=st.integers(0, 63), a=st.floats(0.01, 1000), back=st.booleans())
def test_one_element_alone_comes_back(name, dim, i, a, back):
    """All elements of its rotation are equal but for the sign: only the scale is rounded."""
    x = np.zeros(dim, np.float32)
    x[i] = -a if back else a
    assert norm(again(x, KVCodec(name)) - x) <= (HALF + 2e-6) * norm(x)


@given(x=vectors(most=6), name=st.sampled_from(TURBO))
def test_what_was_decoded_encodes_to_the_same_codes(x, name):
    """While no centroid crosses a boundary when its vector's norm is made 1 again."""
    codec = KVCodec(name, "float32")
    codes = encode(x, codec, K_SEED)[0]
    centroids, _ = turboquant.codebook(codec.bits, x.size)
    least, most = {4: (0.8777, 1.1223), 3: (0.769, 1.231), 2: (0.462, 1.538)}[codec.bits]
    if least <= norm(centroids[turboquant.unpack(codes, codec.bits, x.size)]) <= most:
        np.testing.assert_array_equal(encode(again(x, codec), codec, K_SEED)[0], codes)


@given(codec=codecs, dim=st.sampled_from(DIMS), seed=st.integers(0, 99))
def test_attention_may_stay_rotated(codec, dim, seed):
    """A query rotated once scores like the keys decoded; a sum of rotated values, rotated back once, is the sum of the decoded."""
    rng = np.random.default_rng(seed)
    x, query = normal(9, dim, seed), rng.standard_normal(dim).astype(np.float32)
    codes, gamma = encode(x, codec, K_SEED)
    rotated = turboquant.codebook(codec.bits, dim)[0][turboquant.unpack(codes, codec.bits, dim)] * gamma.astype(np.float32)
    close = again(x, codec)
    error = np.abs(rotated @ turboquant.rotate(query, K_SEED) - close @ query)
    assert (error <= 1e-5 * norm(query) * norm(close)).all()
    weights = rng.random(9).astype(np.float32)
    total, want = turboquant.rotate_back(weights @ rotated, K_SEED), weights @ close
    assert norm(total - want) <= 1e-5 * norm(want)


@given(x=vectors((64, 80, 96, 112, 128, 144, 256, 512), least=-20, most=9), shift=st.floats(-3e4, 3e4))
@settings(max_examples=200)
def test_affine8_errs_by_half_a_step(x, shift):
    x = (x + np.float32(shift)) if abs(shift) > 1 else x
    x = np.clip(x, -65504, 65504)
    codec = KVCodec("affine8")
    codes, scales = encode(x, codec, 0)
    step, low = (scales.astype(np.float64)[:, i : i + 1] for i in (0, 1))
    groups = x.reshape(step.size, -1).astype(np.float64)
    close = decode(codes, scales, codec, x.size, 0).reshape(groups.shape)
    assert np.isfinite(scales).all()
    bound = step / 2 + 2.0**-23 * (np.abs(groups) + 255 * step)
    assert (np.abs(close - groups) <= bound).all()
    assert (low <= groups).all() and (groups <= low + 255 * step * (1 + 2.0**-22)).all()
    assert (step <= (groups.max(1, keepdims=True) - low) / 255 * (1 + 2.0**-10) + 2.0**-24).all()  # or the least float16


def test_affine8_has_zeros_and_constants():
    codec = KVCodec("affine8")
    for value in (0.0, -0.0, 1.0, -65504.0, 65504.0, 0.1, 1e-8, -1e-8):
        x = np.full(64, value, np.float32)
        codes, scales = encode(x, codec, 0)
        error = np.abs(decode(codes, scales, codec, 64, 0) - x).max()
        assert np.isfinite(scales).all() and error <= float(scales[0, 0]) / 2 + 2.0**-23 * abs(value)
        if value == float(np.float16(value)):
            assert error == 0 and not codes.any() and scales[0, 0] == 0


# ---- zero, and not finite -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*TURBO, "affine8"])
@pytest.mark.parametrize("norm_dtype", ["float16", "float32"])
def test_zero_is_zero(name, norm_dtype):
    codec = KVCodec(name, norm_dtype)
    for x in (np.zeros(80, np.float32), np.full(80, 1e-18, np.float32)):
        codes, scales = encode(x, codec, K_SEED)
        if codec.is_turbo or not x.any():
            assert not codes.any() and not scales.any() and not again(x, codec).any()


@pytest.mark.parametrize("name", [*TURBO, "affine8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_vector_that_is_not_finite_says_so(name, value):
    """Codes of 0 and scales of NaN, also of squares or scales beyond the range; other vectors know nothing of it."""
    x = normal(3, 128)
    want = encode(x, KVCodec(name), K_SEED)
    x[1, 77] = value
    codes, scales = encode(x, KVCodec(name), K_SEED)
    assert not codes[1].any() and np.isnan(scales[1]).all() and np.isnan(again(x[1], KVCodec(name))).all()
    for got, before in zip((codes, scales), want, strict=True):
        np.testing.assert_array_equal(got[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("scale", SCALES)
def test_norms_beyond_float16_saturate(scale):
    x = normal(1, 64)[0] * np.float32(1e6)
    assert encode(x, KVCodec("turbo4", scale=scale), K_SEED)[1] == np.float16(65504)
    assert encode(x, KVCodec("turbo4", "float32", scale), K_SEED)[1] == pytest.approx(norm(x), rel=0.1)


@given(dtype=st.sampled_from(["float32", "float16", "bfloat16"]), x=vectors((64, 80, 33, 1), most=2))
def test_floats_are_rounded(dtype, x):
    codes, scales = encode(x, KVCodec(dtype), 0)
    assert scales.size == 0
    unit = {"float32": 0, "float16": HALF, "bfloat16": 2.0**-8}[dtype]
    assert (np.abs(decode(codes, scales, KVCodec(dtype), x.size, 0) - x) <= unit * np.abs(x) + 2.0**-25).all()


def test_other_sizes_are_refused():
    for dim in (72, 144, 8, 1024):
        with pytest.raises(ValueError, match=f"turbo4 takes vectors of .*, and these have {dim}"):
            encode(np.ones(dim, np.float32), KVCodec("turbo4"), K_SEED)
    with pytest.raises(ValueError, match="affine8 takes vectors of a multiple of 16 elements from 16 to 512, and these have 72"):
        encode(np.ones(72, np.float32), KVCodec("affine8"), K_SEED)
    with pytest.raises(ValueError, match="no Hadamard matrix of 72"):
        turboquant.rotate(np.ones(72, np.float32), K_SEED)
