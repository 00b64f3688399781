"""Norms, rotations and cache writes in a GPU's row programs: the host's references, bounds and laws, many shapes to a plan."""
import mlx.core as mx
import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_programs import KINDS, Case, run, run_all
from programs import own_buffers
from test_kv_write import CODES, UNTOUCHED, bits_of
from test_rope import POSITIONS, exact

from metalstep.kernels import kv_write, layer_norm, params, rms_norm, rope
from metalstep.kernels.gpu import row_program
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.program import Program

RANDOM = np.random.default_rng(0)
SPANS = [(1, 3), (1, 600), (33, 1), (33, 3), (63, 2), (64, 40), (97, 5), (128, 16), (576, 1), (576, 3), (5000, 1), (2500, 2)]


@pytest.fixture(scope="module", params=KINDS)
def h(request):
    with GpuHarness() as harness:
        harness.kind = request.param
        yield harness


# ---- norms ----------------------------------------------------------------------------------------------------------------
def rms(width, eps, weighted=True):
    return lambda program, x, *weight: rms_norm.emit(program, x, weight[0] if weighted else None, eps, width)


def layer(width, eps, biased=True):
    return lambda program, x, weight, *bias: layer_norm.emit(program, x, weight, bias[0] if biased else None, eps, width)


def spread(width, least=-2.0, most=2.0):
    return np.linspace(least, most, width, dtype=np.float32)


def rows_of(width, spans, scale=1.0, shift=0.0, rows=3):
    return (RANDOM.standard_normal((rows, spans * width)) * scale + shift).astype(np.float32)


def test_rms_norms_agree_with_the_reference(h):
    cases = [(width, spans, weighted, eps) for width, spans in SPANS for weighted, eps in ((True, 1e-5), (False, 1.0))]
    xs = [rows_of(width, spans, scale) for (width, spans, *_), scale in zip(cases, np.tile([1.0, 100.0, 1e-3], 20), strict=False)]
    xs[0][0], xs[4][0], xs[6][1] = 0, 3e4, 3e4  # eps alone keeps a zero row finite; squares overflow float16: sums must not
    made = [
        Case(rms(width, eps, weighted), [x, spread(width)] if weighted else [x])
        for (width, _, weighted, eps), x in zip(cases, xs, strict=True)
    ]
    for (width, spans, weighted, eps), x, got in zip(cases, xs, run_all(h, made, 3), strict=True):
        wide = x.reshape(3, spans, width).astype(np.float64)
        want = wide / np.sqrt((wide**2).mean(2, keepdims=True) + eps) * (spread(width) if weighted else 1)
        # The order of a float32 sum of squares, a root, a quotient and two products: a few units of 2^-24.
        np.testing.assert_allclose(got.reshape(wide.shape), want, rtol=1e-6, atol=1e-38)


def test_layer_norms_agree_with_the_reference(h):
    cases = [(width, spans, biased, shift) for width, spans in SPANS for biased, shift in ((True, 0.0), (False, 1000.0))]
    xs = [rows_of(width, spans, shift=shift) for width, spans, _, shift in cases]
    made = [
        Case(layer(width, 1e-5, biased), [x, spread(width), *([spread(width, 3, -1)] if biased else [])])
        for (width, _, biased, _), x in zip(cases, xs, strict=True)
    ]
    for (width, spans, biased, _), x, got in zip(cases, xs, run_all(h, made, 3), strict=True):
        wide = x.reshape(3, spans, width).astype(np.float64)
        deviation = np.sqrt(wide.var(2, keepdims=True) + 1e-5)
        normed = (wide - wide.mean(2, keepdims=True)) / deviation
        # The mean is rounded to a float32 of its size, and what it is off by comes out divided by the deviation.
        bound = 2e-6 * np.abs(normed) + 4 * 2**-24 * np.abs(wide).max(2, keepdims=True) / deviation
        bias = spread(width, 3, -1) if biased else np.zeros(width)
        bound = bound * np.abs(spread(width)) + 2**-23 * np.abs(bias) + 1e-38
        assert (np.abs(got.reshape(wide.shape) - (normed * spread(width) + bias)) <= bound).all()


def test_scaling_by_a_power_of_two_leaves_a_norm(h):
    """Without eps a norm knows no unit: the same bits come out."""
    shapes = [(33, 3), (97, 5), (576, 1), (64, 40)]
    xs = [rows_of(*shape) for shape in shapes]
    made = [Case(rms(width, 0, False), [x * np.float32(scale)]) for scale in (1, 2**-20, 2**18) for (width, _), x in zip(shapes, xs)]  # noqa: B905
    results = run_all(h, made, 3)
    for at in range(len(shapes)):
        for other in (1, 2):
            np.testing.assert_array_equal(results[at + other * len(shapes)], results[at])


def test_a_row_of_one_value_becomes_the_bias(h):
    widths = [1, 33, 97, 576]
    made = [Case(layer(w, 1e-5), [np.full((1, w), 2.0, np.float32), spread(w), spread(w, 3, -1)]) for w in widths]
    for width, got in zip(widths, run_all(h, made, 1), strict=True):
        np.testing.assert_array_equal(got[0], spread(width, 3, -1))


@pytest.mark.parametrize(("width", "spans"), [(33, 3), (64, 40), (600, 3), (97, 1)])
def test_rows_and_spans_do_not_see_each_other(h, width, spans):
    x = rows_of(width, spans)
    for build, inputs in ((rms(width, 1e-5), [spread(width)]), (layer(width, 1e-5), [spread(width)] * 2)):
        together = run(h, build, x, *inputs)
        np.testing.assert_array_equal(run(h, build, x[1:2], *inputs), together[1:2])
        dirty = x.copy()
        dirty[0, :width], dirty[1, -1] = np.nan, np.inf
        got = run(h, build, dirty, *inputs)
        assert np.isnan(got[0, :width]).all() and not np.isfinite(got[1, -1])
        np.testing.assert_array_equal(got[0, width:], together[0, width:])
        np.testing.assert_array_equal(got[1, :-width], together[1, :-width])
        np.testing.assert_array_equal(got[2], together[2])


def test_a_norm_may_take_its_operands_place(h):
    def in_place(program, register):
        return program.emit(params.MS_OP_RMS_NORM, register, register, n=97, inner=97, imm0=1e-5)

    x = rows_of(97, 1)
    np.testing.assert_array_equal(run(h, in_place, x), run(h, rms(97, 1e-5, False), x))


# ---- rotations ------------------------------------------------------------------------------------------------------------
def rotation(head_dim, dims, traditional, base, scale, given_freqs):
    def build(program, register, freqs=None):
        angles = rope.emit_angles(program, dims, base, scale, freqs if given_freqs else None)
        return rope.emit(program, register, angles, head_dim, traditional)

    return build


ROTATIONS = [
    (heads, head_dim, max(2, int(head_dim * part) // 2 * 2), traditional, base, scale, given_freqs)
    for heads, head_dim, part in ((1, 2, 1), (3, 6, 0.5), (5, 34, 1), (2, 64, 0.25), (8, 64, 1), (1, 66, 1), (16, 96, 0.5), (4, 128, 1))
    for traditional, base, scale, given_freqs in ((False, 1e4, 1.0, False), (True, 5e5, 0.25, False), (False, 1e6, 0.5, True))
]


def test_rotations_agree_with_exact_angles(h):
    """Positions to 131,071 at full float32: angles are not read from a table, they are computed."""
    positions = [*POSITIONS, *RANDOM.integers(0, 10**5, 2)]
    xs = [RANDOM.standard_normal((8, heads, head_dim)).astype(np.float32) for heads, head_dim, *_ in ROTATIONS]
    freqs = [np.sort(RANDOM.uniform(1, 1e5, dims // 2)).astype(np.float32) for _, _, dims, *_ in ROTATIONS]
    made = [
        Case(rotation(*shape[1:]), [x.reshape(8, -1), *([freq] if shape[-1] else [])])
        for shape, x, freq in zip(ROTATIONS, xs, freqs, strict=True)
    ]
    results = run_all(h, made, 8, positions=positions)
    for (_, _, dims, traditional, base, scale, given_freqs), x, freq, result in zip(ROTATIONS, xs, freqs, results, strict=True):
        want, bound = exact(x, positions, dims, traditional, base, scale, freq if given_freqs else None)
        got = result.reshape(x.shape)
        assert (np.abs(got - want) <= bound).all()
        np.testing.assert_array_equal(got[..., dims:], x[..., dims:])
        np.testing.assert_array_equal(got[0], x[0])  # position 0 turns nothing


def test_angles_are_those_of_the_host_to_a_rounding(h):
    """Frequencies are float64's, rounded once: an angle of 100,000 positions is off by its own last place, not by the frequency's."""
    positions = [0, 1, 4096, 65_535, 99_999, 131_071]

    def build(program, x):
        return rope.emit_angles(program, 128, 10_000.0, 1.0, None)

    (got,) = run_all(h, [Case(build, [np.zeros((6, 1), np.float32)])], 6, positions=positions)
    frequencies = np.exp(-np.arange(64) * np.log(1e4) / 64).astype(np.float32)
    angles = np.array(positions, np.float32)[:, None] * frequencies
    want = np.concatenate([np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))], 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=2**-23)


@pytest.mark.parametrize("traditional", [False, True])
def test_rotations_in_place_and_of_single_rows_are_the_same_bits(h, traditional):
    x = RANDOM.standard_normal((9, 3 * 66)).astype(np.float32)
    positions = RANDOM.integers(0, 10_000, 9)
    build = rotation(66, 34, traditional, 1e4, 1.0, False)

    def in_place(program, register):
        angles = rope.emit_angles(program, 34, 10_000.0, 1.0, None)
        dims = [17, int(traditional), 0, 0]
        program.emit(params.MS_OP_ROPE, register, register, angles, n=register.size, inner=66, dims=dims)
        return register

    together, replaced = run_all(h, [Case(build, [x]), Case(in_place, [x])], 9, positions=positions)
    np.testing.assert_array_equal(replaced, together)
    for i in (0, 4, 8):
        np.testing.assert_array_equal(run(h, build, x[i : i + 1], positions=positions[i : i + 1])[0], together[i])


@pytest.mark.parametrize("width", [64, 66, 96])
@pytest.mark.parametrize("traditional", [False, True])
def test_a_head_is_normed_and_turned_as_one_after_the_other(h, width, traditional):
    """Between the two only lanes of a simdgroup wait; the same bits as by way of memory."""

    def both(program, x, weight):
        angles = rope.emit_angles(program, width, 1e4, 1.0, None)
        return rope.emit(program, rms_norm.emit(program, x, weight, 1e-6, width), angles, width, traditional)

    x, positions = rows_of(width, 5), [3, 77, 5000]
    normed = run(h, rms(width, 1e-6), x, spread(width))
    turned = run(h, rotation(width, width, traditional, 1e4, 1.0, False), normed, positions=positions)
    np.testing.assert_array_equal(run(h, both, x, spread(width), positions=positions), turned)


# ---- the cache ----------------------------------------------------------------------------------------------------------------
SHAPES = [(1, 1, 1, 1), (1, 64, 64, 16), (2, 33, 16, 8), (3, 15, 97, 32), (8, 128, 64, 16), (5, 16, 16, 1)]  # heads, dims, block_size
BLOCKS = 6


@pytest.mark.parametrize("dtype", CODES)
def test_keys_and_values_land_in_their_places_and_nothing_else_changes(h, dtype):
    """Planes are [block, head, place, dim], keys too. Edges of the dtypes round as in MLX."""
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 65504, 65519.9, 65520, 6e-8, 2.98e-8, 2**-25, 3.4e38, 1 + 2**-11], np.float32)
    rows, word = 5, np.uint32 if dtype == "float32" else np.uint16
    for heads, key_dim, value_dim, block_size in SHAPES:
        keys, values = (RANDOM.standard_normal((rows, heads, dim)).astype(np.float32) for dim in (key_dim, value_dim))
        keys.reshape(rows, -1)[1] = np.resize(edges, heads * key_dim)
        slots = RANDOM.permutation(BLOCKS * block_size)[:rows]
        slots[3:] = [-1, -(2**31)]  # not written
        before = [np.full((BLOCKS, heads, block_size, dim), UNTOUCHED[dtype], word) for dim in (key_dim, value_dim)]
        want = [plane.copy() for plane in before]
        for plane, rounded in zip(want, (bits_of(keys, dtype), bits_of(values, dtype)), strict=True):
            for each, slot in zip(rounded, slots, strict=True):
                if slot >= 0:
                    plane[slot // block_size, :, slot % block_size] = each
        program, first = Program(), params.MS_SLOT_FIRST
        registers = [
            program.load(first + i, a[0].size, rows=params.MS_ROW_SELF, row_stride=a[0].size) for i, a in enumerate((keys, values))
        ]
        kv_write.emit(program, *registers, first + 2, first + 3, heads, block_size, KVCodec(dtype), KVCodec(dtype))
        with own_buffers(h):
            after = [h.put(plane) for plane in before]
            buffers = [h.put(keys), h.put(values), *after]
            h.run(row_program.launches(program, h.step(rows, slots=slots), buffers, params.MS_ROWS_TOKENS, rows + 2, kind=h.kind), rows + 2)
            for buffer, plane in zip(after, want, strict=True):
                np.testing.assert_array_equal(h.get(buffer, word), plane)


# ---- together -----------------------------------------------------------------------------------------------------------------
def test_what_lies_between_two_matmuls_of_a_layer(h):
    """Residual sum, its norm; then q, k and v of one row: norms per head, rotations, and the cache, in one program each."""
    hidden, heads, kv_heads, dim, rows = 320, 4, 2, 64, 3
    positions, slots = [5, 0, 9000], [4, 17, -1]
    qkv = rows_of(1, (heads + 2 * kv_heads) * dim)
    x, residual, weight = rows_of(1, hidden), rows_of(1, hidden), spread(hidden)
    q_weight, k_weight = spread(dim), spread(dim, 0.5, 1.5)
    program, first = Program(), params.MS_SLOT_FIRST
    both = [program.load(first + i, hidden, rows=params.MS_ROW_SELF, row_stride=hidden) for i in range(2)]
    total = program.register(hidden)
    program.emit(params.MS_OP_ADD, total, *both, n=hidden)
    program.store(total, first + 1, row_stride=hidden)  # where the residual was
    normed = rms_norm.emit(program, total, program.load(first + 2, hidden, rows=params.MS_ROW_SAME), 1e-6, hidden)
    program.store(normed, first + 3, row_stride=hidden)
    width = qkv.shape[1]
    row = program.load(first + 4, width, rows=params.MS_ROW_SELF, row_stride=width)
    angles = rope.emit_angles(program, dim, 1e6, 1.0, None)
    q, k = row.part(0, heads * dim), row.part(heads * dim, kv_heads * dim)
    q = rms_norm.emit(program, q, program.load(first + 5, dim, rows=params.MS_ROW_SAME), 1e-6, dim)
    k = rms_norm.emit(program, k, program.load(first + 6, dim, rows=params.MS_ROW_SAME), 1e-6, dim)
    q, k = rope.emit(program, q, angles, dim, False), rope.emit(program, k, angles, dim, False)
    program.store(q, first + 7, row_stride=heads * dim)
    f16 = KVCodec("float16")
    kv_write.emit(program, k, row.part(width - kv_heads * dim, kv_heads * dim), first + 8, first + 9, kv_heads, 16, f16, f16)
    with own_buffers(h):
        planes = [h.put(np.zeros((2, kv_heads, 16, dim), np.float16)) for _ in range(2)]
        inputs = [h.put(a) for a in (x, residual, weight)]
        outs = [h.empty((rows, hidden)), h.empty((rows, heads * dim))]
        buffers = [*inputs, outs[0], h.put(qkv), h.put(q_weight), h.put(k_weight), outs[1], *planes]
        step = h.step(rows, positions=positions, slots=slots)
        launches = row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, rows, kind=h.kind)
        h.run(launches, rows)
        got_total, got_norm, got_q = h.get(inputs[1]), h.get(outs[0]), h.get(outs[1])
        k_plane, v_plane = (h.get(plane, np.float16) for plane in planes)
    assert launches[0].code.text.count("threadgroup_barrier") == 1  # for the angles, which all heads read
    np.testing.assert_array_equal(got_total, x + residual)
    want = rms_norm.reference(mx.array(x + residual), mx.array(weight), 1e-6)
    np.testing.assert_allclose(got_norm, np.array(want), rtol=2e-6, atol=1e-38)

    def turned(part, count, head_weight):
        normed = np.array(rms_norm.reference(mx.array(part.reshape(rows, count, dim)), mx.array(head_weight), 1e-6))
        return exact(normed, positions, dim, False, 1e6, 1.0, None)

    exact_q, bound = turned(qkv[:, : heads * dim], heads, q_weight)
    assert (np.abs(got_q.reshape(exact_q.shape) - exact_q) <= bound + 1e-5).all()
    exact_k, bound = turned(qkv[:, heads * dim : -kv_heads * dim], kv_heads, k_weight)
    for row, slot in enumerate(slots):
        if slot >= 0:
            at = slot // 16, slice(None), slot % 16
            assert (np.abs(k_plane[at] - exact_k[row]) <= bound[row] + 2**-10 * np.abs(exact_k[row]) + 1e-5).all()
            np.testing.assert_array_equal(v_plane[at], qkv[row, -kv_heads * dim :].reshape(kv_heads, dim).astype(np.float16))
    assert (k_plane != 0).any(axis=(1, 3)).sum() == (v_plane != 0).any(axis=(1, 3)).sum() == 2
