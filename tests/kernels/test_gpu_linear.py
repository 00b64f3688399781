"""linear on a GPU: every format in every variant, norms and places of x, against the dequantised product in float64."""
import mmap

import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_linears import BITS, DTYPES, VARIANTS, Weight, bound, check, dense_bits, plain, products, shifted
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_linear import codes, same_codes

from metalstep.kernels import linear, params
from metalstep.kernels.gpu import linear as gpu_linear
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Input, Norm, PackedWeight, Segment


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


# Groups and dtypes such that each is met in each variant and by each width; all pairs are all_instances.
CORE = {(32, "half"), (64, "bfloat"), (128, "float")}
PAIRS = [
    pytest.param(group, dtype, marks=() if (group, dtype) in CORE else pytest.mark.all_instances)
    for group in (32, 64, 128)
    for dtype in DTYPES
]


@pytest.mark.parametrize(("group", "dtype"), PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_affine_products_of_every_width_agree_with_the_reference(h, variant, group, dtype):
    """Seven widths in one launch, each a code path of its own."""
    rng = np.random.default_rng(group)
    k = {32: 160, 64: 192, 128: 384}[group]
    weights = [Weight(h, rng, n, k, bits, group, dtype) for n, bits in zip((8, 17, 1, 40, 9, 33, 64), BITS, strict=True)]
    max_rows = VARIANTS[variant]
    x = rng.standard_normal((max_rows - max_rows // 5, k)).astype(np.float32)
    check(h, x, weights, max_rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_floats_agree_with_the_reference(h, variant):
    """k is no multiple of what 32 lanes read, and for nvfp4 no multiple of 32 either."""
    rng = np.random.default_rng(4)
    rows = VARIANTS[variant] - VARIANTS[variant] // 5
    weights = [Weight(h, rng, n, 160, mode) for n, mode in zip((17, 40, 33), linear.FLOATS, strict=True)]
    check(h, rng.standard_normal((rows, 160)).astype(np.float32), weights, VARIANTS[variant])
    check(h, rng.standard_normal((rows, 48)).astype(np.float32), [Weight(h, rng, 10, 48, "nvfp4", shift=1)], VARIANTS[variant])


@pytest.mark.parametrize("rows", [2, 9])
def test_floats_may_lie_at_any_word(h, rows):
    x = np.random.default_rng(rows).standard_normal((rows, 160)).astype(np.float32)
    got = []
    for shift in (0, 1):
        same = np.random.default_rng(5)
        got.append(products(h, x, [Weight(h, same, 6, 160, mode, shift=shift) for mode in linear.FLOATS]))
    for a, b in zip(*got, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", linear.FLOATS)
def test_every_code_of_an_element_and_of_a_scale_is_what_mlx_makes_of_it(h, mode):
    words, scales, values = codes(mode)
    weight = PackedWeight(h.put(words), *values.shape, *linear.FLOATS[mode], scales=h.put(scales))
    for rows in (1, 8, 32):  # matvec, tiles
        out = h.empty((rows, weight.n))
        segments = [Segment([weight], plain(weight, linear.first_buffer_slot([[weight]])))]
        got = []
        for x in np.eye(32, dtype=np.float32).reshape(-1, rows, 32):
            source = Input(h.put(x), 0, 32)
            h.run(gpu_linear.launches(source, segments, h.step(rows), [out], 0, rows), rows)
            got.append(h.get(out))
            if rows == 1 and len(got) == 16:  # all of e2m1's codes, half of e4m3's
                break
        got = np.concatenate(got).T
        with np.errstate(all="ignore"):
            same_codes(got, scales, values, scaled_first=rows > 1)


@pytest.mark.parametrize("k", [1, 7, 33, 64, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_products_of_any_k_agree_with_the_reference(h, variant, k):
    rng = np.random.default_rng(k)
    weights = [Weight(h, rng, n, k, dense_bits(dtype), 0, dtype) for n, dtype in zip((37, 5, 16), DTYPES, strict=True)]
    max_rows = VARIANTS[variant]
    check(h, rng.standard_normal((max_rows, k)).astype(np.float32), weights)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("variant", ["matvec 1", "tiles 8"])
def test_the_widest_and_the_narrowest_reads_of_a_width_agree(h, variant, bits):
    """k of a group has work for few lanes, k of thousands for all of them at their widest."""
    rng = np.random.default_rng(bits)
    for k in (32, 64, 2080, 4096):
        check(h, rng.standard_normal((VARIANTS[variant], k)).astype(np.float32), [Weight(h, rng, 6, k, bits, 32)])


@given(
    rows=st.integers(1, 130),
    room=st.sampled_from([1, 2, 3, 4, 8, 16, 32, 64, 130]),
    n=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100]),
    k=st.sampled_from([32, 96, 288]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
@example(rows=1, room=130, n=65, k=96, seed=0)
@example(rows=64, room=130, n=65, k=96, seed=0)  # a row tile begins where the rows end
@example(rows=65, room=130, n=64, k=32, seed=0)
def test_a_plan_of_more_rows_computes_the_step_s_and_writes_no_others(h, rows, room, n, k, seed):
    rng = np.random.default_rng(seed)
    rows = min(rows, room)
    check(h, rng.standard_normal((rows, k)).astype(np.float32), [Weight(h, rng, n, k, 4, 32)], room)


def test_outputs_beyond_the_narrow_geometry_take_the_wide_one(h):
    rng = np.random.default_rng(1)
    for n, rows in ((2100, 2), (4100, 6), (4100, 12), (4100, 20), (4100, 40)):
        check(h, rng.standard_normal((rows, 64)).astype(np.float32), [Weight(h, rng, n, 64, 4, 64)])


def test_a_step_without_sampled_rows_writes_nothing(h):
    rng = np.random.default_rng(2)
    for max_rows in (1, 8, 64):
        [got] = products(h, rng.standard_normal((3, 32)).astype(np.float32), [Weight(h, rng, 9, 32, 4, 32)], max_rows, sampled=[])
        assert got.shape == (0, 9)


@given(rows=st.integers(1, 40), room=st.sampled_from([4, 16, 64]), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_sampled_rows_are_read_where_their_tokens_are(h, rows, room, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((50, 64)).astype(np.float32)
    sampled = rng.integers(0, 50, min(rows, room))
    w = Weight(h, rng, 20, 64, 4, 32)
    [got] = products(h, x, [w], room, sampled=sampled)
    assert (np.abs(got - x[sampled] @ w.exact.T) <= bound(x[sampled], w)).all()


@pytest.mark.parametrize("max_rows", [3, 20])
def test_an_x_that_is_the_same_for_every_row_is_read_where_it_is(h, max_rows):
    rng = np.random.default_rng(14)
    w, x, out = Weight(h, rng, 20, 64, 4, 32), rng.standard_normal((1, 70)).astype(np.float32), h.empty((max_rows, 20))
    source = Input(h.put(x), 6, 64, params.MS_ROW_SAME)
    segments = [Segment([w.packed], plain(w, linear.first_buffer_slot([[w]])))]
    h.run(gpu_linear.launches(source, segments, h.step(max_rows), [out], 0, max_rows), max_rows)
    assert (np.abs(h.get(out) - x[:, 6:] @ w.exact.T) <= bound(x[:, 6:], w)).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weighted", [True, False])
def test_a_norm_of_x_is_fused(h, variant, weighted):
    rng = np.random.default_rng(3)
    for k, weights in (
        (96, [Weight(h, rng, 33, 96, 4, 32), Weight(h, rng, 7, 96, 3, 32), Weight(h, rng, 33, 96, 4, 32)]),
        (37, [Weight(h, rng, 18, 37, 16)]),
    ):
        x = rng.standard_normal((VARIANTS[variant], k)).astype(np.float32)
        x[0] *= 1e-3  # eps counts
        g = (1 + 0.1 * rng.standard_normal(k)).astype(np.float32) if weighted else np.ones(k, np.float32)
        norm = Norm(h.put(g) if weighted else None, 1e-5)
        exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * g
        for got, w in zip(products(h, x, weights, norm=norm), weights, strict=True):
            assert (np.abs(got - exact @ w.exact.T) <= bound(exact, w)).all()


@given(shift=st.integers(0, 5), offset=st.integers(0, 5), more=st.integers(0, 5), seed=st.integers(0, 9))
@settings(max_examples=12)
@example(shift=1, offset=3, more=5, seed=0)
@example(shift=4, offset=4, more=4, seed=0)
def test_any_place_of_x_and_weights_will_do(h, shift, offset, more, seed):
    """Wide reads where their places allow them, narrow ones elsewhere: the values are the same bits."""
    rng = np.random.default_rng(seed)
    k = 96
    for rows in (2, 9):
        x = rng.standard_normal((rows, k)).astype(np.float32)
        g = (1 + 0.1 * rng.standard_normal(k)).astype(np.float32)
        padded = np.full((rows, offset + k + more), np.nan, np.float32)
        padded[:, offset : offset + k] = x
        got = []
        for here, source in (
            (0, Input(h.put(x), 0, k, norm=Norm(h.put(g), 1e-5))),
            (shift, Input(shifted(h, padded, shift), offset, offset + k + more, norm=Norm(shifted(h, g, shift), 1e-5))),
        ):
            same = np.random.default_rng(seed)
            weights = [Weight(h, same, 13, k, 4, 32, shift=here), Weight(h, same, 5, k, 6, 32, "float", shift=here)]
            weights.append(Weight(h, same, 5, k, 16, 0, "bfloat", shift=here))
            outs = [h.empty((rows, w.n)) for w in weights]
            slot = linear.first_buffer_slot([[w] for w in weights])
            segments = [Segment([w.packed], plain(w, slot + i)) for i, w in enumerate(weights)]
            h.run(gpu_linear.launches(source, segments, h.step(rows), outs, 0, rows), rows)
            got.append([h.get(out) for out in outs])
        for a, b in zip(*got, strict=True):
            np.testing.assert_array_equal(a, b)


@given(power=st.integers(-60, 60), max_rows=st.sampled_from([1, 4, 16, 70]), bits=st.sampled_from([3, 4, 16]))
@settings(max_examples=20)
def test_a_power_of_two_passes_through(h, power, max_rows, bits):
    rng = np.random.default_rng(bits)
    w = Weight(h, rng, 17, 64, bits, 0 if bits == 16 else 32)
    x = rng.standard_normal((max_rows, 64)).astype(np.float32)
    scale = np.float32(2.0) ** power
    np.testing.assert_array_equal(products(h, x * scale, [w])[0], products(h, x, [w])[0] * scale)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, 65504.0])
@pytest.mark.parametrize("max_rows", [2, 8, 40])
def test_extreme_inputs_stay_finite_and_exact_in_scale(h, max_rows, value):
    rng = np.random.default_rng(7)
    w = Weight(h, rng, 32, 64, 4, 32)
    x = np.full((max_rows, 64), value, np.float32)
    x[1, ::2] *= -1
    [got] = products(h, x, [w])
    assert np.isfinite(got).all()
    assert (np.abs(got - x.astype(np.float64) @ w.exact.T) <= bound(x, w)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("max_rows", [1, 4, 8, 40])
def test_an_input_that_is_not_finite_shows_in_its_row_and_in_no_other(h, max_rows, value):
    rng = np.random.default_rng(8)
    weights = [Weight(h, rng, 20, 100, 32, 0, "float"), Weight(h, rng, 18, 100, 16, 0, "half")]
    x = rng.standard_normal((max_rows, 100)).astype(np.float32)
    clean = products(h, x, weights)
    row = max_rows // 2
    x[row, 99] = value
    for got, before in zip(products(h, x, weights), clean, strict=True):
        assert not np.isfinite(got[row]).any()
        np.testing.assert_array_equal(np.delete(got, row, 0), np.delete(before, row, 0))
    affine = Weight(h, rng, 20, 96, 4, 32)
    [got] = products(h, x[:, 4:], [affine])
    assert not np.isfinite(got[row]).any()
    assert np.isfinite(np.delete(got, row, 0)).all()


def test_a_weight_of_more_elements_than_32_bits_count_is_read_to_its_end(h):
    """The last tile of a head of 2^17 + 8 outputs from 2^15 inputs; all pages but those of its last rows stay untouched."""
    n, k, group = (1 << 17) + 8, 1 << 15, 128
    planes = []
    for size in (k // 4, k // group * 2, k // group * 2):
        memory = mmap.mmap(-1, -(-n * size // mmap.PAGESIZE) * mmap.PAGESIZE)
        planes.append(np.frombuffer(memory, np.uint8)[: n * size].reshape(n, size))
    values = np.random.default_rng(11).integers(0, 4, (8, k))
    packed = (values.reshape(8, -1, 16).astype(np.uint64) << np.arange(0, 32, 2, dtype=np.uint64)).sum(2).astype(np.uint32)
    planes[0][-8:] = packed.view(np.uint8)
    planes[1][-8:] = np.ones((8, k // group), np.float16).view(np.uint8)
    words, scales, biases = (
        Buffer(h.device.wrap_buffer(p.ctypes.data, p.nbytes, p).handle, 0, p.shape, "uint8") for p in planes
    )
    weight = PackedWeight(words, n, k, 2, group, params.MS_FLOAT16, scales, biases)
    slot = linear.first_buffer_slot([[weight]])
    x = np.random.default_rng(12).integers(-4, 5, (9, k)).astype(np.float32)
    for rows in (1, 9):
        out = h.put(np.zeros((rows, n), np.float32))
        [launch] = gpu_linear.launches(Input(h.put(x), 0, k), [Segment([weight], plain(weight, slot))], h.step(rows), [out], 0, rows)
        tiles = launch.grid[0]
        constants = bytearray(launch.constants)
        at = params.size("MSGpuLinearParams")
        constants[at : at + 4] = (2**32 - (tiles - 1)).to_bytes(4, "little")  # the first threadgroup has the last tile
        launch.constants, launch.grid = bytes(constants), (1, launch.grid[1], 1)
        h.run([launch], rows)
        np.testing.assert_array_equal(h.get(out)[:, -4:], x[:rows] @ values[-4:].T.astype(np.float32))
