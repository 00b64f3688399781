"""row_program on a GPU: strided copies, reductions, buffers and rows against numpy, and what is refused."""
import random

import mlx.core as mx
import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_programs import KINDS, Case, run, run_all, scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import own_buffers
from test_embedding import GOOD as EMBEDDING
from test_kv_write import GOOD as KV_WRITE
from test_layer_norm import GOOD as LAYER_NORM
from test_rms_norm import GOOD as RMS_NORM
from test_rope import ANGLES, ROTATION
from test_row_program import BUFFERS, COMBINE, REFUSED, chain, places, reduction, softmax, strided

from metalstep.kernels import params, rms_norm
from metalstep.kernels.gpu import row_program
from metalstep.kernels.launch import Buffer
from metalstep.kernels.program import Program

FIRST = params.MS_SLOT_FIRST
ROWS = params.MS_ROWS_TOKENS
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module", params=KINDS)
def h(request):
    with GpuHarness() as harness:
        harness.kind = request.param
        yield harness


# ---- strided copies -----------------------------------------------------------------------------------------------------
SHAPES = [(24, 0, [4, 6], [6, 1]), (24, 23, [4, 6], [-6, -1]), (8, 3, [2, 3, 4, 5], [0, 0, 0, 0])]  # as they are, backwards, broadcast
SHAPES += [(40, 39, [3, 4], [-13, 1 - 4]), (120, 0, [2, 3, 4, 5], [60, 1, 15, 3]), (300, 7, [97], [3]), (1, 0, [1], [5])]


@given(drawn=st.lists(strided(), min_size=15, max_size=15))
@settings(max_examples=2)
def test_a_gather_is_numpys_strided_view(h, drawn):
    shapes = [*SHAPES, *drawn]
    inputs = [RANDOM.standard_normal((2, size)).astype(np.float32) for size, *_ in shapes]
    results = run_all(h, [Case(gathering(shape), [x]) for shape, x in zip(shapes, inputs, strict=True)], 2)
    for (_, offset, dims, strides), x, got in zip(shapes, inputs, results, strict=True):
        np.testing.assert_array_equal(got, x[:, places(offset, dims, strides)])


def gathering(shape):
    _, offset, dims, strides = shape

    def build(program, register):
        out = program.register(int(np.prod(dims)))
        program.strided(params.MS_OP_GATHER, out, register, offset, dims, strides, params.MS_ASSIGN)
        return out

    return build


@given(drawn=st.lists(st.tuples(strided(), st.sampled_from(list(COMBINE)), st.booleans()), min_size=15, max_size=15))
@settings(max_examples=2)
def test_a_scatter_combines_in_order_and_leaves_the_rest(h, drawn):
    cases = [((24, 0, [4, 6], [1, 4]), params.MS_ASSIGN, False), ((8, 3, [2, 3], [0, 0]), params.MS_SUM, False), *drawn]
    cases.append(((188, 40, [3, 2, 4, 5], [16, -37, 11, 20]), params.MS_ASSIGN, True))  # in order, behind what is read by vectors
    olds = [RANDOM.standard_normal((2, shape[0])).astype(np.float32) for shape, *_ in cases]
    xs = [RANDOM.standard_normal((2, int(np.prod(shape[2])))).astype(np.float32) for shape, *_ in cases]
    for x, (_, _, special) in zip(xs, cases, strict=True):
        if special:
            x[:, RANDOM.integers(x.shape[1])] = RANDOM.choice([np.nan, np.inf, -np.inf])
    builds = [Case(scattering(shape, how), [old, x]) for (shape, how, _), old, x in zip(cases, olds, xs, strict=True)]
    for ((_, *shape), how, _), old, x, got in zip(cases, olds, xs, run_all(h, builds, 2), strict=True):
        want = old.copy()
        for to, values in zip(want, x, strict=True):
            with np.errstate(invalid="ignore"):
                if COMBINE[how]:
                    COMBINE[how].at(to, places(*shape), values)
                else:
                    to[places(*shape)] = values  # a place named twice keeps the last
        np.testing.assert_array_equal(got, want)


def scattering(shape, how):
    _, offset, dims, strides = shape

    def build(program, into, source):
        program.strided(params.MS_OP_SCATTER, into, source, offset, dims, strides, how)
        return into

    return build


def test_a_scatter_within_a_register_reads_what_was_there(h):
    """Its source is a part of what it writes: all is read before."""

    def build(program, x):
        whole = program.register(60)
        program.emit(params.MS_OP_COPY, whole, x, n=60)
        program.strided(params.MS_OP_SCATTER, whole, whole.part(0, 30), 30, [30], [1], params.MS_SUM)
        return whole

    x = RANDOM.standard_normal((2, 60)).astype(np.float32)
    want = x.copy()
    want[:, 30:] += x[:, :30]
    np.testing.assert_array_equal(run(h, build, x), want)


# ---- reductions and softmax -----------------------------------------------------------------------------------------------
WIDTHS = [1, 15, 16, 33, 63, 64, 97, 576, 5000]


def test_reductions_over_the_last_axis_agree_with_numpy(h):
    kinds = [how for how in COMBINE if how != params.MS_ASSIGN]
    cases = [(how, width, spans) for how in kinds for width in WIDTHS for spans in ((1, 3, 40) if width < 100 else (2,))]
    xs = [RANDOM.uniform(-1.5, 1.5, (2, spans * width)).astype(np.float32) for _, width, spans in cases]
    results = run_all(h, [Case(reduction(how, width), [x]) for (how, width, _), x in zip(cases, xs, strict=True)], 2)
    for (how, width, count), x, got in zip(cases, xs, results, strict=True):
        spans = x.reshape(2, count, width)
        # Sums and products in any order: the rounding of as many terms, which is of either sign.
        if how == params.MS_SUM:
            error = np.abs(got - spans.sum(2, dtype=np.float64))
            assert (error <= 2**-24 * np.sqrt(width) * 2 * np.abs(spans).sum(2)).all()
        elif how == params.MS_PROD:
            exact = spans.astype(np.float64).prod(2)
            assert (np.abs(got - exact) <= 2**-24 * 2 * width * np.abs(exact) + 2**-126).all()
        else:
            np.testing.assert_array_equal(got, COMBINE[how].reduce(spans, 2))


def test_the_largest_of_elements_with_a_nan_is_nan(h):
    special = np.array([0.0, -0.0, 1.0, -2.5, np.nan, np.inf, -np.inf], np.float32)
    kinds = [params.MS_MAX, params.MS_MIN]
    x = RANDOM.choice(special, (2, 60 * 33), p=[0.2, 0.2, 0.2, 0.2, 0.01, 0.1, 0.09]).astype(np.float32)
    x[1, :330] = np.repeat(np.array([np.inf, -np.inf, np.nan, 0, 1], np.float32), 66)
    for how, got in zip(kinds, run_all(h, [Case(reduction(how, 33), [x]) for how in kinds], 2), strict=True):
        np.testing.assert_array_equal(got, COMBINE[how].reduce(x.reshape(2, 60, 33), 2))


def test_softmax_agrees_with_float64_and_masked_elements_have_no_weight(h):
    cases = [(w, spread, masked) for w in WIDTHS for spread, masked in ((0.0, 0), (1.0, 2), (30.0, 0), (1e30, 3))]
    xs = [(RANDOM.standard_normal((2, 2 * width)) * spread).astype(np.float32) for width, spread, _ in cases]
    for (width, _, masked), x in zip(cases, xs, strict=True):
        x.reshape(2, 2, width)[..., : min(masked, width - 1)] = -np.inf
    results = run_all(h, [Case(softmax(width), [x]) for (width, *_), x in zip(cases, xs, strict=True)], 2)
    for (width, spread, _), x, got in zip(cases, xs, results, strict=True):
        spans = x.reshape(2, 2, width)
        e = np.exp(spans.astype(np.float64) - spans.max(2, keepdims=True))
        # The exponents, up to 104, are differences of float32 logits: exact in float64 only. Then 2 ulp of exp, a sum, a quotient.
        want, rtol = e / e.sum(2, keepdims=True), 104 * 2**-24 if spread == 30 else 1e-6
        np.testing.assert_allclose(got.reshape(spans.shape), want, rtol=rtol, atol=2**-126)
        assert (got.reshape(spans.shape)[spans == -np.inf] == 0).all()


@pytest.mark.parametrize("width", [33, 600])
def test_a_softmax_of_what_is_not_finite_is_nan_in_its_span_alone(h, width):
    clean = np.ones((4, 2 * width), np.float32)
    x = clean.copy()
    x[0, width + 7], x[1, width + 7], x[2, width:] = np.nan, np.inf, -np.inf
    got, want = run_all(h, [Case(softmax(width), [x]), Case(softmax(width), [clean])], 4)
    np.testing.assert_array_equal(got[:, :width], want[:, :width])
    np.testing.assert_array_equal(got[3], want[3])
    assert np.isnan(got[:2, width + 7]).all() and np.isnan(got[2, width:]).all()


# ---- buffers ----------------------------------------------------------------------------------------------------------------
def test_loads_and_stores_find_their_rows(h):
    """SAME, SELF and SAMPLED, with offsets and rows wider than what is copied; nothing else is touched."""
    tokens, sampled, rows = 7, [5, 0, 3], 3
    for address in (params.MS_ROW_SAME, params.MS_ROW_SELF, params.MS_ROW_SAMPLED):
        offset, size, gap = int(RANDOM.integers(20)), int(RANDOM.integers(1, 40)), int(RANDOM.integers(9))
        stride = size + gap
        source = np.arange(offset + tokens * stride, dtype=np.float32)
        program = Program()
        register = program.load(FIRST, size, rows=address, offset=offset, row_stride=stride)
        program.store(register, FIRST + 1, offset=3, row_stride=size + 5)
        by_sampled = dict(slot=FIRST + 2, rows=params.MS_ROW_SAMPLED, offset=1, row_stride=stride)
        program.emit(params.MS_OP_STORE, None, register, n=size, **by_sampled)
        with own_buffers(h):
            out, spread = h.empty((3 + rows * (size + 5),)), h.empty((1 + tokens * stride,))
            step = h.step(tokens, sampled=sampled)
            buffers = [h.put(source), out, spread]
            h.run(row_program.launches(program, step, buffers, params.MS_ROWS_SAMPLED, rows + 2, kind=h.kind), tokens, rows)
            got, got_spread = h.get(out), h.get(spread)
        of_row = {params.MS_ROW_SAME: [0] * rows, params.MS_ROW_SELF: range(rows), params.MS_ROW_SAMPLED: sampled}[address]
        want, want_spread = (np.full(a.shape, np.nan, np.float32) for a in (got, got_spread))
        for row, at in enumerate(of_row):
            values = source[offset + at * stride :][:size]
            want[3 + row * (size + 5) :][:size] = values
            want_spread[1 + sampled[row] * stride :][:size] = values
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got_spread, want_spread)


def copied(h, source, dtype, out, out_dtype):
    """One row of `source` (as dtype) loaded and stored to `out` (as out_dtype)."""
    program = Program()
    register = program.load(FIRST, source.size, rows=params.MS_ROW_SAME, dtype=dtype)
    program.store(register, FIRST + 1, row_stride=source.size, dtype=out_dtype)
    with own_buffers(h):
        buffers = [h.put(source), h.put(out)]
        h.run(row_program.launches(program, h.step(1), buffers, ROWS, 1, kind=h.kind), 1)
        return h.get(buffers[1], out.dtype)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_all_16_bit_floats_are_loaded_and_stored_as_they_are(h, name):
    dtype = {"float16": params.MS_FLOAT16, "bfloat16": params.MS_BFLOAT16}[name]
    bits = np.arange(2**16, dtype=np.uint16)
    wide = np.array(mx.array(bits).view(getattr(mx, name)).astype(mx.float32))
    got = copied(h, bits, dtype, np.full(2**16 + 1, np.nan, np.float32), params.MS_FLOAT32)
    np.testing.assert_array_equal(got, np.append(wide, np.float32(np.nan)))
    back = copied(h, wide, params.MS_FLOAT32, np.full(2**16 + 1, 0x1234, np.uint16), dtype)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(back[:-1][number], bits[number])
    assert np.isnan(np.array(mx.array(back[:-1]).view(getattr(mx, name)).astype(mx.float32)))[~number].all()
    assert back[-1] == 0x1234


def test_integers_are_loaded_rounded_and_stored_saturated(h):
    whole = np.array([0, 1, -1, 2**24, 2**24 + 1, -(2**31), 2**31 - 1] * 3, np.int32)
    got = copied(h, whole, params.MS_INT32, np.full(21, np.nan, np.float32), params.MS_FLOAT32)
    np.testing.assert_array_equal(got, whole.astype(np.float32))
    x = np.array([0.9, -0.9, -7.5, 2.0**31, 1e30, -np.inf, np.inf, np.nan, -(2.0**31), 16777216], np.float32)
    got = copied(h, x, params.MS_FLOAT32, np.zeros(10, np.int32), params.MS_INT32)
    np.testing.assert_array_equal(got, [0, 0, -7, 2**31 - 1, 2**31 - 1, -(2**31), 2**31 - 1, 0, -(2**31), 2**24])


@pytest.mark.parametrize("size", [97, 3000])
@pytest.mark.parametrize("shift", [0, 1])
def test_memory_of_two_slots_may_be_the_same(h, size, shift):
    """A result that takes the place of an input, or lies across it: what was loaded before it is stored is the old."""
    program = Program()
    old = program.load(FIRST, size, rows=params.MS_ROW_SELF, row_stride=size + 1)
    turned = program.register(size)
    program.strided(params.MS_OP_GATHER, turned, old, size - 1, [size], [-1], params.MS_ASSIGN)
    program.store(turned, FIRST + 1, row_stride=size + 1)
    twice = program.register(size)
    program.emit(params.MS_OP_ADD, twice, old, turned, n=size)
    program.store(twice, FIRST + 2, row_stride=size)
    x = RANDOM.standard_normal((3, size + 1)).astype(np.float32)
    with own_buffers(h):
        memory, out = h.put(np.append(x.ravel(), np.float32(0))), h.empty((3, size))
        first = Buffer(memory.handle, 0, x.shape, "float32")
        second = Buffer(memory.handle, 4 * shift, x.shape, "float32")
        buffers = [first, second, out]
        launches = row_program.launches(program, h.step(3), buffers, ROWS, 4, scratch=scratch(h, program, 4), kind=h.kind)
        h.run(launches, 4)
        after = h.device.numpy(second, np.float32, x.shape)
        np.testing.assert_array_equal(after[:, :size], x[:, size - 1 :: -1])
        np.testing.assert_array_equal(h.get(out), x[:, :size] + x[:, size - 1 :: -1])


# ---- planes, halves, vectors ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("address", [params.MS_ROW_SELF, params.MS_ROW_SAMPLED])
@pytest.mark.parametrize(("size", "planes", "gap"), [(4, 2, 0), (33, 3, 0), (64, 8, 4), (640, 4, 0), (1500, 2, 5)])
def test_planes_are_added_up_in_order(h, address, size, planes, gap):
    """And what a part of them is, is the part of their sum."""
    rows, stride = 3, 4 * (size + gap)
    x = RANDOM.standard_normal((planes, 4, size + gap)).astype(np.float32)
    program = Program()
    options = dict(rows=address, row_stride=size + gap, planes=planes, plane_stride=stride)
    program.store(program.load(FIRST, size, **options), FIRST + 1, row_stride=size)
    program.store(program.load(FIRST, size - 1, offset=1, **options), FIRST + 2, row_stride=size)
    sampled = [2, 0, 3]
    with own_buffers(h):
        buffers = [h.put(x), h.empty((rows, size)), h.empty((rows, size))]
        step = h.step(4, sampled=sampled)
        h.run(row_program.launches(program, step, buffers, params.MS_ROWS_SAMPLED, rows, kind=h.kind), 4, rows)
        got, part = h.get(buffers[1]), h.get(buffers[2])
    want = x[0]
    for plane in x[1:]:
        want = want + plane
    want = want[sampled if address == params.MS_ROW_SAMPLED else [0, 1, 2], :size]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(part[:, :-1], want[:, 1:])


def test_planes_that_overlap_are_refused(h):
    program = Program()
    program.store(program.load(FIRST, 64, rows=params.MS_ROW_SELF, row_stride=64, planes=2, plane_stride=63), FIRST + 1, row_stride=64)
    with pytest.raises(ValueError, match="2 planes of 64 elements, each 63 behind the one before"):
        row_program.launches(program, h.step(1), [h.empty((128,)), h.empty((64,))], ROWS, 1, kind=h.kind)


@pytest.mark.parametrize("size", [7, 33, 1024])
def test_finite_numbers_saturate_as_float16_for_nvidia(h, size):
    x = np.resize(np.array([65519, 65520, 1e9, -65520, -3e38, np.inf, -np.inf, np.nan, 0.1, -0.0], np.float32), size)
    got = copied(h, x, params.MS_FLOAT32, np.zeros(size, np.float16), params.MS_FLOAT16)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    if h.kind == "nvidia":
        want = np.where(np.isfinite(x), np.clip(x, -65504, 65504), x).astype(np.float16)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [params.MS_FLOAT32, params.MS_FLOAT16])
@pytest.mark.parametrize("width", [600, 1024, 2560])
def test_where_buffers_begin_changes_no_bit(h, width, dtype):
    """At multiples of 16 bytes, elements are read and written four at a time."""
    x, weight = RANDOM.standard_normal((3, width)).astype(np.float32), RANDOM.standard_normal(width).astype(np.float32)
    kept = []
    for shift in (0, 1, 4):
        program = Program()
        normed = rms_norm.emit(program, program.load(FIRST, width, rows=params.MS_ROW_SELF, row_stride=width),
                               program.load(FIRST + 1, width, rows=params.MS_ROW_SAME), 1e-6, width)  # fmt: skip
        program.store(normed, FIRST + 2, row_stride=width, dtype=dtype)
        with own_buffers(h):
            size, name = (2, "float16") if dtype == params.MS_FLOAT16 else (4, "float32")
            places = [h.put(np.concatenate([np.zeros(shift, np.float32), a.ravel()])) for a in (x, weight)]
            out = h.put(np.zeros(shift + x.size, name))
            buffers = [Buffer(b.handle, 4 * shift, (b.shape[0] - shift,), "float32") for b in places]
            buffers.append(Buffer(out.handle, size * shift, (x.size,), name))
            h.run(row_program.launches(program, h.step(3), buffers, ROWS, 3, kind=h.kind), 3)
            kept.append(h.get(out, np.dtype(name))[shift:])
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[0], kept[2])


# ---- rows -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [1, 33, 97, 1500])
def test_a_row_is_the_same_bits_alone_and_in_any_batch(h, width):
    x, weight = RANDOM.standard_normal((11, 2 * width)).astype(np.float32), RANDOM.standard_normal(width).astype(np.float32)
    together = run(h, chain(width), x, weight, plan_rows=40)
    order = RANDOM.permutation(11)
    np.testing.assert_array_equal(run(h, chain(width), x[order], weight), together[order])
    for i in RANDOM.integers(0, 11, 3):
        np.testing.assert_array_equal(run(h, chain(width), x[i : i + 1], weight), together[i : i + 1])


@pytest.mark.parametrize("counted", [params.MS_ROWS_TOKENS, params.MS_ROWS_SAMPLED])
def test_how_many_rows_run_is_data(h, counted):
    """One plan for 9 rows writes as many as the step says, step after step."""
    program = Program()
    register = program.load(FIRST, 3, rows=params.MS_ROW_SELF, row_stride=3)
    program.store(register, FIRST + 1, row_stride=3)
    x = np.arange(27, dtype=np.float32).reshape(9, 3)
    step, out = h.step(9), h.empty((9, 3))
    counts, written = h.device.numpy(step.step, np.uint32, (4,)), h.device.numpy(out, np.float32, (9, 3))
    plan = h.device.create_plan(row_program.launches(program, step, [h.put(x), out], counted, 9, kind=h.kind), 9, 9)
    for rows in (4, 0, 9, 1, 2):
        counts[:2] = (rows, 9) if counted == params.MS_ROWS_TOKENS else (9, rows)
        written[...] = np.nan
        plan.wait(plan.run(1))
        np.testing.assert_array_equal(written[:rows], x[:rows])
        assert np.isnan(written[rows:]).all()
    plan.close()


def test_instructions_of_a_program_run_in_order(h):
    def build(program, x):
        for scalar in (2.0, 3.0, 4.0):
            program.emit(params.MS_OP_MUL, x, x, scalar, n=x.size)
            program.emit(params.MS_OP_ADD, x, x, 1.0, n=x.size)
        return x

    x = np.arange(33, dtype=np.float32)[None]
    np.testing.assert_array_equal(run(h, build, x), ((x * 2 + 1) * 3 + 1) * 4 + 1)


# ---- memory -----------------------------------------------------------------------------------------------------------------
def turns(count, size):
    """`count` registers that all wait for each other: each is the last one backwards, all are added up in the end."""

    def build(program, x):
        parts = [x]
        for _ in range(count):
            out = program.register(size)
            program.strided(params.MS_OP_GATHER, out, parts[-1], size - 1, [size], [-1], params.MS_ASSIGN)
            program.emit(params.MS_OP_ADD, out, out, 1.0, n=size)
            parts.append(out)
        total = parts[-1]
        for part in parts[-2::-1]:  # across, so that all of them are kept in memory
            out = program.register(size)
            program.strided(params.MS_OP_GATHER, out, part, size - 1, [size], [-1], params.MS_ASSIGN)
            program.emit(params.MS_OP_ADD, out, out, total, n=size)
            total = out
        return total

    return build


@pytest.mark.parametrize(("count", "size", "spilled"), [(2, 1000, False), (5, 2500, True), (2, 9001, True)])
def test_what_threadgroup_memory_cannot_hold_is_kept_in_scratch(h, count, size, spilled):
    """Whole numbers, which are exact in any order; and no row sees another's scratch."""
    program = Program()
    x = program.load(FIRST, size, rows=params.MS_ROW_SELF, row_stride=size)
    program.store(turns(count, size)(program, x), FIRST + 1, row_stride=size)
    apart = [Buffer(-9, 0, (1,), "float32"), Buffer(-8, 0, (1,), "float32")]
    nbytes = row_program.scratch_bytes(program, 4, apart, h.kind)
    assert (nbytes > 0) == spilled and nbytes % (4 * 4) == 0 and row_program.scratch_bytes(program, 8, apart, h.kind) == 2 * nbytes
    assert row_program.scratch_bytes(program, 4, kind=h.kind) >= nbytes
    values = np.arange(3 * size, dtype=np.float32).reshape(3, size) % 1000
    want = values[:, ::-1].copy()  # the sum of all parts, the last one as it is, the others turned
    part, parts = values, [values]
    for _ in range(count):
        part = part[:, ::-1] + 1
        parts.append(part)
    want = parts[-1] + sum(p[:, ::-1] for p in parts[:-1])
    np.testing.assert_array_equal(run(h, turns(count, size), values, plan_rows=4), want)
    if spilled:
        buffers = [h.put(values), h.empty((4, size))]
        with pytest.raises(ValueError, match=f"row_program: 0 bytes of scratch, expected {nbytes} for 4 rows"):
            row_program.launches(program, h.step(3), buffers, ROWS, 4, kind=h.kind)
        with pytest.raises(ValueError, match="row_program: 64 bytes of scratch"):
            row_program.launches(program, h.step(3), buffers, ROWS, 4, scratch=h.empty((16,)), kind=h.kind)


def text(build, *sizes):
    """The kernel's text; inputs are rows of these sizes."""
    program = Program()
    registers = [program.load(FIRST + i, size, rows=params.MS_ROW_SELF, row_stride=size) for i, size in enumerate(sizes)]
    out = build(program, *registers)
    program.store(out, FIRST + len(sizes), row_stride=out.size)
    with GpuHarness() as h:
        buffers = [h.empty((1,)) for _ in range(len(sizes) + 1)]
        return row_program.launches(program, h.step(1), buffers, ROWS, 1)[0].code.text


def test_barriers_are_only_where_elements_cross_threads():
    def chain_of(program, x, y):
        for op in (params.MS_OP_ADD, params.MS_OP_MUL, params.MS_OP_MAX):
            x = program.emit(op, program.register(x.size), x, y, n=x.size)
        return x

    def norm_of_a_sum(program, x, y):
        total = program.emit(params.MS_OP_ADD, program.register(x.size), x, y, n=x.size)
        program.store(total, FIRST, row_stride=x.size)
        return rms_norm.emit(program, total, y, 1e-6, x.size)

    def heads(program, x, angles):
        x = rms_norm.emit(program, x, None, 1e-6, 64)
        out = program.register(x.size)
        return program.emit(params.MS_OP_ROPE, out, x, angles, n=x.size, inner=64, dims=[32, 0, 0, 0])

    elementwise = text(chain_of, 4096, 4096)
    assert "barrier" not in elementwise and "shared" not in elementwise and elementwise.count("for (") == 1
    norm = text(norm_of_a_sum, 4096, 4096)
    assert "_barrier" not in norm and "shared" not in norm and norm.count("ms_span_total") == 1 and norm.count("for (") == 2
    by_simdgroup = text(heads, 1024, 64)
    assert "threadgroup_barrier" not in by_simdgroup and by_simdgroup.count("simdgroup_barrier") == 1
    assert "partial" not in by_simdgroup


def test_one_program_is_one_kernel():
    def build(program, x):
        return program.emit(params.MS_OP_EXP, program.register(x.size), x, n=x.size)

    assert text(build, 33) == text(build, 33) != text(build, 34)


# ---- refusals ---------------------------------------------------------------------------------------------------------------
def launch(h, *instructions, registers=64, rows=ROWS):
    """A launch of these MSInstr fields with two buffers of 64 elements."""
    program = Program(registers=registers, instructions=list(instructions))
    return row_program.launches(program, h.step(0), [h.empty((64,)), h.empty((64,))], rows, 1)


COPY = dict(op=params.MS_OP_COPY, a=0, dst=16, n=1)
OTHERS = [
    (EMBEDDING | dict(slot=7), "slot 7 of a launch with 7 bindings"),
    (EMBEDDING | dict(strides=[5, 9, 0, 0]), "slot 9 of a launch with 7 bindings"),
    (EMBEDDING | dict(n=48), "k is not a multiple of the group size"),
    (EMBEDDING | dict(dims=[7, 32, 1, 37]), "bits are not 1, 2, 3, 4, 5, 6, 8"),
    (EMBEDDING | dict(dims=[4, 0, 1, 37]), "the group size is not 32, 64 or 128"),
    (EMBEDDING | dict(dims=[4, 32, 3, 37]), "scales are not float32, float16 or bfloat16"),
    (EMBEDDING | dict(dims=[16, 32, 1, 37]), "a dense weight has a group size"),
    (EMBEDDING | dict(dims=[32, 0, 1, 37]), "neither 16 bits of float16 or bfloat16 nor 32 of float32"),
    (EMBEDDING | dict(dims=[4, 32, 1, 0]), "a weight has no elements"),
    (EMBEDDING | dict(n=96), "dst is 0 [+] 96, past the 64"),
    (KV_WRITE | dict(slot2=2**32 - 1), "slot 4294967295 of"),
    (KV_WRITE | dict(dtype=params.MS_INT32), "the cache has no codec 3"),
    (KV_WRITE | dict(n=31), "31 keys of 2 heads of 16"),
    (KV_WRITE | dict(dims=[2, 16, 0, 8]), "must not be 0"),
    (KV_WRITE | dict(b=params.MS_NONE), "operand b is absent"),
    (RMS_NORM | dict(inner=5), "16 elements are no whole spans of 5"),
    (RMS_NORM | dict(a=8), "dst 0 overlaps operand a at 8"),
    (LAYER_NORM | dict(c=57), "c is 57 [+] 8"),
    (ROTATION | dict(dims=[5, 0, 0, 0]), r"rotates 2 \* 5 elements of heads of 8"),
    (ROTATION | dict(b=30), "dst 16 overlaps operand b"),
    (ANGLES | dict(imm0=0.0), "base 0 is not positive"),
    (ANGLES | dict(b=12), "dst 0 overlaps operand b at 12"),
    (dict(op=params.MS_OP_LOAD, dst=0, n=4, slot=0), "slot 0 is the step's own"),
    (dict(op=params.MS_OP_STORE, a=0, n=4, slot=2, rows=1), "slot 2 is the step's own"),
    (dict(op=params.MS_OP_ADD, dst=0, a=16, b=params.MS_NONE, n=4), "operand b is absent"),
    (dict(op=params.MS_OP_EXP, dst=63, a=0, n=1), "dst is 63 [+] 16, past the 64"),
    (dict(op=params.MS_OP_EXP, dst=0, a=16, n=0), "n is 0"),
]


@pytest.mark.parametrize(("fields", "why"), [*REFUSED, *OTHERS])
def test_instructions_that_do_not_fit_are_refused(h, fields, why):
    with pytest.raises(ValueError, match=rf"row_program: instruction 1 \(op {fields['op']}\): .*{why}"):
        launch(h, COPY, fields)


def test_more_buffers_than_a_kernel_binds_are_refused(h):
    program = Program()
    register = program.load(FIRST, 4, rows=params.MS_ROW_SAME)
    program.store(register, FIRST + 1, row_stride=4)
    with pytest.raises(ValueError, match="row_program: 32 bindings, expected 31 or fewer; split the program"):
        row_program.launches(program, h.step(1), [h.empty((4,))] * 27, ROWS, 1)


def test_rows_are_tokens_or_sampled(h):
    with pytest.raises(ValueError, match="row_program: rows is 2"):
        launch(h, COPY, rows=2)


SMALL = [*range(41), 63, 64, 65, 240, 255, 256, 257]
WILD = [params.MS_NONE, 2**31 - 1, 2**31, 2**32 - 16, 2**32 - 1]


def instruction(rng):
    """Fields that fit one by one, mostly; together they seldom do."""

    def word(choices):
        return rng.choice(WILD) if rng.random() < 0.03 else rng.choice(choices)

    op = word(range(params.MS_OP_SELECT + 1))
    inner, fields = rng.randint(1, 8), {"op": op}
    fields |= {name: word(SMALL) for name in ("dst", "a", "b", "c", "offset", "row_stride")}
    fields |= {name: word(range(4)) if rng.random() < 0.3 else 0 for name in ("imm", "dtype", "rows")}
    fields |= {"slot": word([FIRST, FIRST + 1]), "slot2": word([FIRST, FIRST + 1]), "inner": word([inner, 0, 3])}
    fields |= {"n": word([inner * rng.randint(1, 8)]), "imm0": rng.choice([10.0, 1e-5, float("nan")])}
    fields["dims"] = rng.choice([[1, 1, 2, 4], [1, 1, 1, fields["n"]], [rng.randint(0, 8) for _ in range(4)]])
    fields["strides"] = [rng.choice([*range(-9, 10), 2**31 - 1, -(2**31)]) for _ in range(4)]
    return fields


def test_any_instruction_is_refused_or_runs(h):
    """What a buffer holds is the caller's to know: programs that touch one run on no rows, the others on one."""
    rng, launches = random.Random(0), []
    with own_buffers(h):
        for _ in range(500):
            instructions = [instruction(rng) for _ in range(rng.randint(1, 3))]
            stored = [*instructions, dict(op=params.MS_OP_STORE, a=0, n=64, slot=FIRST, rows=1)]
            try:
                made = launch(h, *stored, registers=256)
            except ValueError as error:
                assert "row_program: instruction" in str(error)
                continue
            if not BUFFERS & {instruction["op"] for instruction in instructions}:
                h.device.numpy(made[0].bindings[0], np.uint32, (4,))[:] = 1
            launches += made
        assert len(launches) > 30
        h.run(launches, 1)
