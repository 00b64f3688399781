"""linear: every width and group, dense dtypes, prologue and epilogue, against the dequantised product in float64."""
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from harness import Harness
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.kernels import elementwise, embedding, linear, params, rms_norm, row_program
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Input, PackedWeight, Segment
from metalstep.kernels.program import Program

# The fused forms: activations have 15 bits and a sign (or 7) under a scale per group, relative to the largest result.
TOLERANCE = {"int16": 4e-5, "int8": 1.2e-2}
LIMIT = {"int16": 32639, "int8": 127}  # the largest integer of an activation
EXACT = 1e-6  # 8-bit floats: sums of float32 products
AFFINE = [(bits, group) for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
CODES = {mx.float16: params.MS_FLOAT16, mx.bfloat16: params.MS_BFLOAT16, mx.float32: params.MS_FLOAT32}


def affine(rng, n, k, bits, group, dtype=mx.float16):
    """A random quantised weight: MLX's triplet and its dequantised float64 values."""
    values = mx.array(rng.standard_normal((n, k)).astype(np.float32)).astype(dtype)
    words, scales, biases = mx.quantize(values, group_size=group, bits=bits)
    wide = [a.astype(mx.float32) for a in (scales, biases)]
    exact = np.array(mx.dequantize(words, *wide, group_size=group, bits=bits)).astype(np.float64)
    view = mx.uint16 if dtype != mx.float32 else mx.uint32
    return [np.array(words), np.array(scales.view(view)), np.array(biases.view(view))], exact


def floats(rng, n, k, mode):
    """A random weight of a mode of linear.FLOATS: its fields and arrays for Harness.pack, and its values in float64."""
    bits, group, dtype = linear.FLOATS[mode]
    words, scales = mx.quantize(mx.array(rng.standard_normal((n, k)).astype(np.float32)), mode=mode)
    exact = np.array(mx.dequantize(words, scales, mode=mode, dtype=mx.float32)).astype(np.float64)
    return dict(weight=np.array(words), scales=np.array(scales), bits=bits, group_size=group, dtype=dtype, n=n, k=k), exact


def floats_bound(x, exact, mode, arithmetic):
    """As rounding_bound; 8-bit floats are multiplied as float32 in either arithmetic."""
    if mode == "mxfp8":
        return EXACT * np.abs(x).astype(np.float64) @ np.abs(exact).T
    return rounding_bound(x.astype(np.float64), exact, linear.FLOATS[mode][1], arithmetic)


def rounding_bound(x, exact, group, arithmetic):
    """What each product may be off by: six standard deviations of activations rounded to their group's step, independently of
    each other, and the rounding of float32 sums of 2 * k / group terms that cancel at most 128-fold."""
    steps = np.abs(x).reshape(len(x), -1, group).max(2) / LIMIT[arithmetic]
    weights = (exact**2).reshape(len(exact), -1, group).sum(2)
    return 6 * np.sqrt(steps**2 @ weights.T / 12) + 1e-6 * np.abs(x) @ np.abs(exact).T


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
    n, k = 49, 3 * group
    (words, scales, biases), exact = affine(rng, n, k, bits, group, dtype)
    x = rng.standard_normal((11, k)).astype(np.float32)
    with Harness() as h:
        packed = h.pack(
            words, bits=bits, group_size=group, dtype=CODES[dtype], n=n, k=k, scales=scales, biases=biases
        )
        for rows in (1, 4, 11):  # a thread for itself, its limit, all threads together
            got = product(h, x[:rows], packed, arithmetic)
            assert (np.abs(got - x[:rows] @ exact.T) <= rounding_bound(x[:rows], exact, group, arithmetic)).all()


@pytest.mark.parametrize("arithmetic", ["int16", "int8"])
@pytest.mark.parametrize(("mode", "k"), [("mxfp4", 32), ("mxfp4", 288), ("nvfp4", 48), ("nvfp4", 160), ("mxfp8", 32), ("mxfp8", 288)])
def test_products_of_floats_agree_with_the_reference(mode, k, arithmetic):
    """k of one group, and of more than a line of scales, which is not full."""
    rng = np.random.default_rng(k)
    fields, exact = floats(rng, 50, k, mode)
    x = rng.standard_normal((19, k)).astype(np.float32)
    with Harness() as h:
        packed = h.pack(**fields)
        for rows in (1, 4, 19):
            got = product(h, x[:rows], packed, arithmetic)
            assert (np.abs(got - x[:rows] @ exact.T) <= floats_bound(x[:rows], exact, mode, arithmetic)).all()


def codes(mode):
    """A weight [.., 32] with every element code under every scale code: words, scales, and what MLX makes of them (float32)."""
    bits, group, _ = linear.FLOATS[mode]
    elements = np.arange(256 if bits == 8 else 32).reshape(-1, 32) % (1 << bits)
    packed = elements if bits == 8 else elements[:, 0::2] | elements[:, 1::2] << 4
    words = np.tile(packed.astype(np.uint8).view(np.uint32), (256, 1))
    scales = np.arange(256, dtype=np.uint8)[:, None].repeat(len(elements), 0).repeat(32 // group, 1)
    values = mx.dequantize(mx.array(words), mx.array(scales), mode=mode, dtype=mx.float32)
    return words, scales, np.array(values)


def same_codes(products, scales, values, *, scaled_first=False):
    """products [rows, up to 32]: of each value with 1 and of its row's others with 0, which is NaN where one of those is not finite.

    scaled_first: values are scaled before they are multiplied, so that one that overflows is infinite by then.
    """
    broken = np.isnan(values).any(1) | (scales[:, 0] == 255)
    if scaled_first:
        broken |= np.isinf(values).any(1)
    values = values[:, : products.shape[1]]
    np.testing.assert_allclose(products[~broken], values[~broken], rtol=2e-7, atol=2.0**-149)
    assert not (np.isfinite(products) & ~np.isfinite(values)).any()


@pytest.mark.parametrize("mode", linear.FLOATS)
def test_every_code_of_an_element_and_of_a_scale_is_what_mlx_makes_of_it(mode):
    """Unit vectors pick the elements out. Scales are from 2^-127 to infinity, or from 2^-9 to 448, either sign, and NaN."""
    words, scales, values = codes(mode)
    (n, k), (bits, group, dtype) = values.shape, linear.FLOATS[mode]
    with Harness() as h, np.errstate(all="ignore"):
        packed = h.pack(words, scales=scales, bits=bits, group_size=group, dtype=dtype, n=n, k=k)
        same_codes(product(h, np.eye(k, dtype=np.float32), packed).T, scales, values)
        program, out, first = Program(), h.empty((n, k)), params.MS_SLOT_FIRST
        program.store(embedding.emit(program, first, k, n, bits, group, dtype, embeddings_slot=first + 1), first + 2, row_stride=k)
        step = h.step(n, ids=range(n))
        h.run(row_program.launches(program, step, [packed.buffer, step.embeddings, out], params.MS_ROWS_TOKENS, n), n)
        np.testing.assert_array_equal(h.get(out), values)


@pytest.mark.parametrize("mode", linear.FLOATS)
@given(rows=st.integers(1, 40), threads=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_a_row_of_products_with_floats_is_the_same_bits_alone_and_in_any_batch(mode, rows, threads, seed):
    rng = np.random.default_rng(seed)
    fields, _ = floats(rng, 80, 96, mode)
    x = rng.standard_normal((rows, 96)).astype(np.float32)
    with Harness(threads) as h:
        packed = h.pack(**fields)
        together = product(h, x, packed)
        alone = np.concatenate([product(h, row[None], packed) for row in x])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("mode", linear.FLOATS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, np.nan, np.inf])
def test_extreme_inputs_of_floats_stay_in_their_row(mode, value):
    rng = np.random.default_rng(1)
    fields, exact = floats(rng, 32, 64, mode)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    with Harness() as h:
        packed = h.pack(**fields)
        clean = product(h, x, packed)
        x[2, 33:] = value
        got = product(h, x, packed)
    np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(clean, 2, 0))
    if np.isfinite(value):
        assert (np.abs(got[2] - x[2] @ exact.T) <= floats_bound(x, exact, mode, "int16")[2]).all()
    else:
        assert not np.isfinite(got[2]).any()


@pytest.mark.parametrize(("bits", "group"), [*AFFINE, (16, 0), (32, 0)])
def test_an_embedding_reads_the_rows_that_a_product_multiplies(bits, group):
    """The head's panels are the embedding's table: every row of it comes back as MLX dequantises it."""
    rng = np.random.default_rng(bits + group)
    n, k = 37, 128
    if group:
        (words, scales, biases), exact = affine(rng, n, k, bits, group, mx.float16)
        pointers, dtype = dict(scales=scales, biases=biases), params.MS_FLOAT16
    else:
        words, pointers = rng.standard_normal((n, k)).astype(np.float32 if bits == 32 else np.float16), {}
        exact, dtype = words.astype(np.float64), params.MS_FLOAT32 if bits == 32 else params.MS_FLOAT16
    ids = [36, 0, 15, 16, 31]
    with Harness() as h:
        packed = h.pack(words, bits=bits, group_size=group, dtype=dtype, n=n, k=k, **pointers)
        program, out = Program(), h.empty((len(ids), k))
        first = params.MS_SLOT_FIRST
        row = embedding.emit(program, first, k, n, bits, group, dtype, embeddings_slot=first + 1)
        program.store(row, first + 2, row_stride=k)
        step = h.step(len(ids), ids=ids)
        buffers = [packed.buffer, step.embeddings, out]
        h.run(row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, len(ids)), len(ids))
        np.testing.assert_allclose(h.get(out), exact[ids], rtol=1e-6, atol=1e-6)


def gguf_blocks(rng, n, k, kind):
    """Blocks as a GGUF file has them, uint8 [n, k / 32, bytes], and their values, written as the format's rule reads."""
    groups = k // 32
    d = rng.uniform(0.001, 0.1, (n, groups, 1)).astype(np.float16) * rng.choice([-1, 1], (n, groups, 1)).astype(np.float16)
    d[0, 0] = 6e-8  # the least float16
    m = rng.standard_normal((n, groups, 1)).astype(np.float16)
    if kind == "q8_0":
        q = rng.integers(-128, 128, (n, groups, 32), np.int8)
        return np.concatenate([d.view(np.uint8), q.view(np.uint8)], 2), d.astype(np.float64) * q
    q = rng.integers(0, 16, (n, groups, 32), np.uint8)
    packed = q[..., :16] | q[..., 16:] << 4
    if kind == "q4_0":
        return np.concatenate([d.view(np.uint8), packed], 2), d.astype(np.float64) * (q.astype(int) - 8)
    return np.concatenate([d.view(np.uint8), m.view(np.uint8), packed], 2), d.astype(np.float64) * q + m


GGUF = {
    "q4_0": (params.MS_WEIGHT_GGUF_Q4_0, 4),
    "q4_1": (params.MS_WEIGHT_GGUF_Q4_1, 4),
    "q8_0": (params.MS_WEIGHT_GGUF_Q8_0, 8),
}


def pack_gguf(h, blocks, kind, n, k, order=None):
    fmt, bits = GGUF[kind]
    nbytes = h.device.weight_bytes(n, k, bits, 32, params.MS_FLOAT16)
    owner = h.device.create_buffer(nbytes)
    h.device.pack_weight(
        owner,
        0,
        format=fmt,
        n=n,
        k=k,
        bits=bits,
        group_size=32,
        dtype=params.MS_FLOAT16,
        data=blocks.ctypes.data,
        row_order=None if order is None else order.ctypes.data,
    )
    return PackedWeight(Buffer(owner.handle, 0, (nbytes,), "uint8"), n, k, bits, 32, params.MS_FLOAT16)


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_blocks_are_multiplied_as_the_file_means_them_in_any_row_order(kind):
    rng = np.random.default_rng(3)
    n, k = 70, 96
    blocks, exact = gguf_blocks(rng, n, k, kind)
    x = rng.standard_normal((3, k)).astype(np.float32)
    order = rng.permutation(n).astype(np.int32)[:50]
    with Harness() as h:
        whole = product(h, x, pack_gguf(h, blocks, kind, n, k))
        some = product(h, x, pack_gguf(h, blocks, kind, len(order), k, order))
    assert (np.abs(whole - x @ exact.reshape(n, k).T) <= rounding_bound(x, exact.reshape(n, k), 32, "int16")).all()
    np.testing.assert_array_equal(some, whole[:, order])


@pytest.mark.parametrize(("kind", "scale"), [("q8_0", 512), ("q4_0", 8192), ("q8_0", np.inf), ("q4_0", np.nan)])
def test_a_block_scale_that_float16_cannot_keep_is_refused(kind, scale):
    blocks, _ = gguf_blocks(np.random.default_rng(4), 20, 64, kind)
    blocks[18, 1, :2] = np.array([scale], np.float16).view(np.uint8)
    with Harness() as h, pytest.raises(ValueError, match=r"row 18 has a block scale d whose bias .* is beyond float16"):
        pack_gguf(h, blocks, kind, 20, 64)


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


@pytest.mark.parametrize("arithmetic", ["int16", "int8"])
@given(bits=st.sampled_from([4, 8]), group=st.sampled_from([32, 64, 128]), groups=st.integers(1, 5), more=st.integers(1, 6))
@settings(max_examples=12, deadline=None)
def test_inputs_of_zero_behind_a_row_change_no_bit(arithmetic, bits, group, groups, more):
    """Groups are rounded one by one and added in order, however many of them are quantised together."""
    rng = np.random.default_rng(groups * group + more)
    n, k, longer = 32, groups * group, (groups + more) * group
    (words, scales, biases), _ = affine(rng, n, longer, bits, group)
    x = rng.standard_normal((2, longer)).astype(np.float32)
    x[:, k:] = 0
    fields = dict(bits=bits, group_size=group, dtype=params.MS_FLOAT16, n=n)
    with Harness() as h:
        whole = h.pack(words, k=longer, scales=scales, biases=biases, **fields)
        short = h.pack(words[:, : k * bits // 32], k=k, scales=scales[:, :groups], biases=biases[:, :groups], **fields)
        np.testing.assert_array_equal(product(h, x, whole, arithmetic), product(h, x[:, :k], short, arithmetic))


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (32, 0)])
def test_an_input_that_is_not_finite_shows_in_its_row_and_in_no_other(bits, group, value):
    rng = np.random.default_rng(5)
    n, k = 48, 128
    x = rng.standard_normal((6, k)).astype(np.float32)
    with Harness() as h:
        if group:
            (words, scales, biases), _ = affine(rng, n, k, bits, group)
            packed = h.pack(
                words, bits=bits, group_size=group, dtype=params.MS_FLOAT16, n=n, k=k, scales=scales, biases=biases
            )
        else:
            dense = rng.standard_normal((n, k)).astype(np.float32)
            packed = h.pack(dense, bits=bits, group_size=0, dtype=params.MS_FLOAT32, n=n, k=k)
        clean = product(h, x, packed)
        x[2, 77] = value
        got = product(h, x, packed)
    assert not np.isfinite(got[2]).any()
    np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(clean, 2, 0))


@given(rows=st.integers(1, 150), threads=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_segments_of_different_widths_share_a_launch_and_read_sampled_rows(rows, threads):
    """q, k and v of different n, bits and groups in one launch give what a launch each gives, row by row."""
    rng = np.random.default_rng(rows)
    k, tokens = 128, 200
    x = rng.standard_normal((tokens, k)).astype(np.float32)
    sampled = rng.integers(0, tokens, rows)
    with Harness(threads) as h:
        weights = []
        for n, bits, group in ((144, 4, 32), (50, 6, 64), (7, 8, 32)):
            (words, scales, biases), _ = affine(rng, n, k, bits, group)
            fields = dict(bits=bits, group_size=group, dtype=params.MS_FLOAT16, n=n, k=k, scales=scales, biases=biases)
            weights.append(h.pack(words, **fields))
        weights += [h.pack(**floats(rng, n, k, mode)[0]) for n, mode in ((40, "mxfp4"), (33, "nvfp4"), (18, "mxfp8"))]
        first = linear.first_buffer_slot([[w] for w in weights])
        outs, segments = [h.empty((rows, w.n)) for w in weights], []
        for i, w in enumerate(weights):
            program = Program(epilogue=True)
            program.store(program.register(w.n), first + i, row_stride=w.n)
            segments.append(Segment([w], program))
        source = Input(h.put(x), 0, k, params.MS_ROW_SAMPLED)
        step = h.step(tokens, sampled=sampled)
        launches = linear.launches(source, segments, step, outs, params.MS_ROWS_SAMPLED, rows, "int16")
        h.run(launches, tokens, rows)
        for out, w in zip(outs, weights, strict=True):
            np.testing.assert_array_equal(h.get(out), product(h, x[sampled], w))


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


@given(rows=st.integers(1, 140), threads=st.integers(1, 4), n=st.sampled_from([7, 16, 130, 720]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_an_epilogue_treats_each_row_as_it_would_alone(rows, threads, n, seed):
    """Rows of a chunk share the instructions of tanh(a) * b + residual, not a bit of their results."""
    rng = np.random.default_rng(seed)
    k = 64
    x, residual = (rng.standard_normal((rows, width)).astype(np.float32) for width in (k, n))
    with Harness(threads) as h:
        parts = []
        for bits in (4, 6):
            (words, scales, biases), _ = affine(rng, n, k, bits, 32)
            fields = dict(bits=bits, group_size=32, dtype=params.MS_FLOAT16, n=n, k=k, scales=scales, biases=biases)
            parts.append(h.pack(words, **fields))
        first, f32 = linear.first_buffer_slot([parts]), mx.float32
        epilogue = Program(epilogue=True)
        a, b = epilogue.register(n), epilogue.register(n)
        y = elementwise.emit(epilogue, "Tanh", (), [a], [f32], f32, n)
        y = elementwise.emit(epilogue, "Multiply", (), [y, b], [f32, f32], f32, n)
        r = epilogue.load(first, n, rows=params.MS_ROW_SELF, row_stride=n)
        y = elementwise.emit(epilogue, "Add", (), [y, r], [f32, f32], f32, n)
        epilogue.store(y, first + 1, row_stride=n)

        def fused(some):
            out = h.empty((some.stop - some.start, n))
            buffers = [h.put(residual[some]), out]
            step, source = h.step(out.shape[0]), Input(h.put(x[some]), 0, k)
            h.run(linear.launches(source, [Segment(parts, epilogue)], step, buffers, 0, out.shape[0], "int16"), out.shape[0])
            return h.get(out)

        together = fused(slice(0, rows))
        alone = np.concatenate([fused(slice(row, row + 1)) for row in range(rows)])
    np.testing.assert_array_equal(together, alone)


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


def test_a_prologue_that_writes_is_refused():
    """Every thread runs the prologue: a store in it would race."""
    with Harness() as h:
        w = h.pack(np.zeros((16, 8), np.float32), bits=32, group_size=0, dtype=params.MS_FLOAT32, n=16, k=8)
        first = linear.first_buffer_slot([[w]])
        prologue, epilogue = Program(), Program(epilogue=True)
        row = prologue.load(first, 8, rows=params.MS_ROW_SELF, row_stride=8)
        prologue.store(row, first, row_stride=8)
        epilogue.store(epilogue.register(16), first + 1, row_stride=16)
        source, segments = Input(None, prologue=prologue, result=row), [Segment([w], epilogue)]
        buffers = [h.empty((1, 8)), h.empty((1, 16))]
        with pytest.raises(ValueError, match="instruction 1 of the prologue writes a buffer"):
            h.run(linear.launches(source, segments, h.step(1), buffers, 0, 1, "int16"), 1)


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "k"),
    [
        (7, 32, params.MS_FLOAT16, 64),
        (4, 16, params.MS_FLOAT16, 64),
        (4, 64, params.MS_FLOAT16, 96),
        (4, 32, params.MS_INT32, 64),
        (16, 0, params.MS_FLOAT32, 64),
    ],
)
def test_a_weight_that_no_kernel_multiplies_is_refused(bits, group, dtype, k):
    with Harness() as h, pytest.raises(ValueError, match=rf"k={k}, bits={bits}, group_size={group}.* cannot be packed"):
        h.pack(np.zeros((16, k), np.float32), bits=bits, group_size=group, dtype=dtype, n=16, k=k)


# Word of the constants of a launch with one part and one segment, what is written there, and the refusal.
DAMAGE = {
    "rows": (0, 2, "rows is 2, not an ms_rows"),
    "k": (1, 96, "k is not a multiple of the group size"),
    "no parts": (2, 0, "0 parts and 1 segments"),
    "more parts": (2, 1 << 30, "do not hold"),
    "prologue": (4, 3, "the prologue has 3 instructions"),
    "x's slot": (7, 99, "x is in slot 99 of"),
    "arithmetic": (11, 2, "arithmetic is 2, not an ms_arithmetic"),
    "weight's slot": (12, 99, "part 0 is in slot 99 of"),
    "bits": (14, 9, "bits are not"),
    "scales of a byte": (16, params.MS_E4M3, "e8m0 scales are of 4 or 8 bits in groups of 32, e4m3 scales of 4 bits in groups of 16"),
    "segment's parts": (17, 1, "segment 0 has parts"),
    "segment's instructions": (20, 2, "segment 0 has instructions"),
    "registers": (21, 0, "segment 0 has 0 registers for the products of 1 parts"),
    "many registers": (21, 1 << 20, "at most 4096 are supported"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_constants_that_do_not_fit_are_refused_when_the_plan_is_made(name):
    word, value, why = DAMAGE[name]
    rng = np.random.default_rng(6)
    (words, scales, biases), _ = affine(rng, 16, 128, 4, 64)
    fields = dict(bits=4, group_size=64, dtype=params.MS_FLOAT16, n=16, k=128, scales=scales, biases=biases)
    with Harness() as h:
        w = h.pack(words, **fields)
        program = Program(epilogue=True)
        program.store(program.register(16), linear.first_buffer_slot([[w]]), row_stride=16)
        source, out = Input(h.empty((1, 128)), 0, 128), h.empty((1, 16))
        [launch] = linear.launches(source, [Segment([w], program)], h.step(1), [out], 0, 1, "int16")
        constants = np.frombuffer(launch.constants, np.uint32).copy()
        constants[word] = value
        with pytest.raises(ValueError, match=why):
            h.run([replace(launch, constants=constants.tobytes())], 1)
