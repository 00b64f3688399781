"""row_program: strided copies, reductions and row addressing against numpy, on rows that do not see each other."""
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from programs import launch_of, own_buffers, run

from metalstep.kernels import params, rms_norm, row_program
from metalstep.kernels.program import Program, merge_axes

COMBINE = {
    params.MS_ASSIGN: None, params.MS_SUM: np.add, params.MS_PROD: np.multiply, params.MS_MAX: np.maximum,
    params.MS_MIN: np.minimum,
}  # fmt: skip
SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -2.5, np.nan, np.inf, -np.inf])
ROWS = params.MS_ROWS_TOKENS


# ---- strided copies -----------------------------------------------------------------------------------------------------
@st.composite
def strided(draw):
    """(elements of the strided side, offset, dims, strides): every place that they name lies inside."""
    dims = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    strides = draw(st.lists(st.integers(-40, 40), min_size=len(dims), max_size=len(dims)))
    reaches = [(d - 1) * s for d, s in zip(dims, strides, strict=True)]
    offset = draw(st.integers(0, 9)) - sum(min(r, 0) for r in reaches)
    size = offset + sum(max(r, 0) for r in reaches) + draw(st.integers(1, 9))
    return size, offset, dims, strides


def places(offset, dims, strides):
    """The index of each element, in the order of the axes."""
    index = np.indices(dims).reshape(len(dims), -1)
    return offset + np.array(strides) @ index


@given(shape=strided(), seed=st.integers(0, 99))
@example(shape=(24, 0, [4, 6], [6, 1]), seed=0)  # contiguous: one axis
@example(shape=(24, 23, [4, 6], [-6, -1]), seed=0)  # backwards
@example(shape=(8, 3, [2, 3, 4, 5], [0, 0, 0, 0]), seed=0)  # broadcast
@settings(max_examples=80)
def test_a_gather_is_numpys_strided_view(h, shape, seed):
    size, offset, dims, strides = shape
    x = np.random.default_rng(seed).standard_normal((2, size)).astype(np.float32)

    def build(program, register):
        out = program.register(int(np.prod(dims)))
        program.strided(params.MS_OP_GATHER, out, register, offset, dims, strides, params.MS_ASSIGN)
        return out

    np.testing.assert_array_equal(run(h, build, x), x[:, places(offset, dims, strides)])


@given(shape=strided(), combine=st.sampled_from(list(COMBINE)), seed=st.integers(0, 99), special=st.booleans())
@example(shape=(24, 0, [4, 6], [1, 4]), combine=params.MS_ASSIGN, seed=0, special=False)  # a transposition
@example(shape=(8, 3, [2, 3], [0, 0]), combine=params.MS_SUM, seed=0, special=False)  # all into one place
@settings(max_examples=80)
def test_a_scatter_combines_in_order_and_leaves_the_rest(h, shape, combine, seed, special):
    size, offset, dims, strides = shape
    rng = np.random.default_rng(seed)
    count = int(np.prod(dims))
    old, x = (rng.standard_normal((2, n)).astype(np.float32) for n in (size, count))
    if special:
        x[:, rng.integers(count)] = rng.choice([np.nan, np.inf, -np.inf])

    def build(program, into, source):
        program.strided(params.MS_OP_SCATTER, into, source, offset, dims, strides, combine)
        return into

    want, index = old.copy(), places(offset, dims, strides)
    for to, values in zip(want, x, strict=True):
        with np.errstate(invalid="ignore"):
            if COMBINE[combine]:
                COMBINE[combine].at(to, index, values)
            else:
                to[index] = values  # a place named twice keeps the last
    np.testing.assert_array_equal(run(h, build, old, x), want)


def test_axes_that_follow_each_other_are_one():
    assert merge_axes([4, 1, 6], [6, 99, 1]) == [(24, 1)]
    assert merge_axes([2, 3, 4], [24, 4, 1]) == [(2, 24), (12, 1)]
    assert merge_axes([1, 1], [5, 7]) == []
    program = Program()
    with pytest.raises(NotImplementedError, match="over 5 axes"):
        program.strided(params.MS_OP_GATHER, program.register(32), program.register(999), 0, [2] * 5, [100, 40, 15, 6, 1], 0)


# ---- reductions and softmax -----------------------------------------------------------------------------------------------
def reduction(how, width):
    def build(program, register):
        out = program.register(register.size // width)
        program.emit(params.MS_OP_REDUCE, out, register, n=out.size, inner=width, dims=[how, 0, 0, 0])
        return out

    return build


@pytest.mark.parametrize("width", [1, 15, 16, 33, 63, 64, 97, 576])
@pytest.mark.parametrize("how", [c for c in COMBINE if c != params.MS_ASSIGN])
def test_reductions_over_the_last_axis_agree_with_numpy(h, width, how):
    x = np.random.default_rng(width).uniform(-2, 2, (2, 3 * width)).astype(np.float32)
    spans = x.reshape(2, 3, width)
    got = run(h, reduction(how, width), x)
    if how == params.MS_SUM:  # in any order: the rounding of as many terms, which is of either sign
        error = np.abs(got - spans.sum(2, dtype=np.float64))
        assert (error <= 2**-24 * np.sqrt(width) * 2 * np.abs(spans).sum(2)).all()
    elif how == params.MS_PROD:
        np.testing.assert_array_equal(got, np.multiply.accumulate(spans, 2)[..., -1])
    else:
        np.testing.assert_array_equal(got, COMBINE[how].reduce(spans, 2))


@given(x=arrays.arrays(np.float32, (1, 66), elements=SPECIAL), how=st.sampled_from([params.MS_MAX, params.MS_MIN]))
@settings(max_examples=25)
def test_the_largest_of_elements_with_a_nan_is_nan(h, x, how):
    np.testing.assert_array_equal(run(h, reduction(how, 33), x), COMBINE[how].reduce(x.reshape(1, 2, 33), 2))


def softmax(width):
    def build(program, register):
        out = program.register(register.size)
        return program.emit(params.MS_OP_SOFTMAX, out, register, n=register.size, inner=width)

    return build


@given(
    width=st.sampled_from([1, 15, 16, 33, 63, 97, 576]),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e30]),
    masked=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=50)
def test_softmax_agrees_with_float64_and_masked_elements_have_no_weight(h, width, spread, masked, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, 2 * width)) * spread).astype(np.float32)
    spans = x.reshape(2, 2, width)
    spans[..., : min(masked, width - 1)] = -np.inf
    e = np.exp(spans.astype(np.float64) - spans.max(2, keepdims=True))
    got = run(h, softmax(width), x).reshape(spans.shape)
    # The exponents, up to 104, are differences of float32 logits: exact in float64 only. Then 2 ulp of exp, a sum, a quotient.
    np.testing.assert_allclose(got, e / e.sum(2, keepdims=True), rtol=104 * 2**-24 if spread == 30 else 1e-6, atol=2**-126)
    assert (got[spans == -np.inf] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_softmax_of_what_is_not_finite_is_nan_in_its_span_alone(h, value):
    x = np.ones((1, 66), np.float32)
    clean = run(h, softmax(33), x)
    x[0, 40] = value
    got = run(h, softmax(33), x)
    assert np.isnan(got[0, 33:]).any() and not np.isfinite(got[0, 40])
    np.testing.assert_array_equal(got[0, :33], clean[0, :33])
    x[0, 33:] = -np.inf
    assert np.isnan(run(h, softmax(33), x)[0, 33:]).all()


# ---- buffers ----------------------------------------------------------------------------------------------------------------
@given(
    rows=st.integers(1, 5), offset=st.integers(0, 20), size=st.integers(1, 40), gap=st.integers(0, 9), data=st.data()
)
@settings(max_examples=40)
def test_loads_and_stores_find_their_rows(h, rows, offset, size, gap, data):
    """SAME, SELF and SAMPLED, with offsets and rows wider than what is copied; nothing else is touched."""
    address = data.draw(st.sampled_from([params.MS_ROW_SAME, params.MS_ROW_SELF, params.MS_ROW_SAMPLED]))
    tokens = 7
    sampled = data.draw(st.permutations(range(tokens)))[:rows]
    stride = size + gap
    source = np.arange(offset + tokens * stride, dtype=np.float32)
    program, first = Program(), params.MS_SLOT_FIRST
    register = program.load(first, size, rows=address, offset=offset, row_stride=stride)
    program.store(register, first + 1, offset=3, row_stride=size + 5)
    by_sampled = dict(slot=first + 2, rows=params.MS_ROW_SAMPLED, offset=1, row_stride=stride)
    program.emit(params.MS_OP_STORE, None, register, n=size, **by_sampled)
    with own_buffers(h):
        out, spread = h.empty((3 + rows * (size + 5),)), h.empty((1 + tokens * stride,))
        step = h.step(tokens, sampled=sampled)
        buffers = [h.put(source), out, spread]
        h.run(row_program.launches(program, step, buffers, params.MS_ROWS_SAMPLED, rows), tokens, rows)
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
    program, first = Program(), params.MS_SLOT_FIRST
    register = program.load(first, source.size, rows=params.MS_ROW_SAME, dtype=dtype)
    program.store(register, first + 1, row_stride=source.size, dtype=out_dtype)
    with own_buffers(h):
        buffers = [h.put(source), h.put(out)]
        h.run(row_program.launches(program, h.step(1), buffers, ROWS, 1), 1)
        return h.get(buffers[1], out.dtype)


@pytest.mark.parametrize("width", [1, 15, 16, 33])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_all_16_bit_floats_are_loaded_and_stored_as_they_are(h, name, width):
    """A width at a time; the element behind the last is not touched."""
    dtype = {"float16": params.MS_FLOAT16, "bfloat16": params.MS_BFLOAT16}[name]
    bits = np.arange(2**16, dtype=np.uint16)
    wide = np.array(mx.array(bits).view(getattr(mx, name)).astype(mx.float32))
    for at in [*range(0, 2**16 - width, 2**16 // 97), 2**16 - width]:
        some = bits[at : at + width]
        got = copied(h, some, dtype, np.full(width + 1, np.nan, np.float32), params.MS_FLOAT32)
        np.testing.assert_array_equal(got, np.append(wide[at : at + width], np.float32(np.nan)))
        number = ~np.isnan(wide[at : at + width])
        back = copied(h, wide[at : at + width], params.MS_FLOAT32, np.full(width + 1, 0x1234, np.uint16), dtype)
        np.testing.assert_array_equal(back[:width][number], some[number])
        assert np.isnan(np.array(mx.array(back[:width]).view(getattr(mx, name)).astype(mx.float32)))[~number].all()
        assert back[width] == 0x1234


def test_integers_are_loaded_rounded_and_stored_saturated(h):
    whole = np.array([0, 1, -1, 2**24, 2**24 + 1, -(2**31), 2**31 - 1] * 3, np.int32)
    got = copied(h, whole, params.MS_INT32, np.full(21, np.nan, np.float32), params.MS_FLOAT32)
    np.testing.assert_array_equal(got, whole.astype(np.float32))
    x = np.array([0.9, -0.9, -7.5, 2.0**31, 1e30, -np.inf, np.inf, np.nan, -(2.0**31), 16777216], np.float32)
    got = copied(h, x, params.MS_FLOAT32, np.zeros(10, np.int32), params.MS_INT32)
    np.testing.assert_array_equal(got, [0, 0, -7, 2**31 - 1, 2**31 - 1, -(2**31), 2**31 - 1, 0, -(2**31), 2**24])


# ---- rows -------------------------------------------------------------------------------------------------------------------
def chain(width):
    """Norm, softmax, a transposition and a sum: an instruction of each sort with a sum in it."""

    def build(program, x, weight):
        y = rms_norm.emit(program, x, weight, 1e-5, width)
        y = program.emit(params.MS_OP_SOFTMAX, program.register(y.size), y, n=y.size, inner=width)
        turned = program.register(y.size)
        program.strided(params.MS_OP_GATHER, turned, y, 0, [width, 2], [1, width], params.MS_ASSIGN)
        return program.emit(params.MS_OP_LOGADDEXP, program.register(y.size), turned, x, n=y.size)

    return build


@given(rows=st.integers(1, 40), threads=st.integers(1, 3), width=st.sampled_from([1, 33, 97]), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_a_row_is_the_same_bits_alone_and_in_any_batch(by_threads, rows, threads, width, seed):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((rows, 2 * width)).astype(np.float32), rng.standard_normal(width).astype(np.float32)
    together = run(by_threads[threads], chain(width), x, weight)
    order = rng.permutation(rows)
    np.testing.assert_array_equal(run(by_threads[2], chain(width), x[order], weight), together[order])
    for i in rng.integers(0, rows, 4):
        np.testing.assert_array_equal(run(by_threads[1], chain(width), x[i : i + 1], weight), together[i : i + 1])


@pytest.mark.parametrize("counted", [params.MS_ROWS_TOKENS, params.MS_ROWS_SAMPLED])
def test_how_many_rows_run_is_data(by_threads, counted):
    """One plan for 9 rows writes as many as the step says, step after step."""
    h = by_threads[3]
    program, first = Program(), params.MS_SLOT_FIRST
    register = program.load(first, 3, rows=params.MS_ROW_SELF, row_stride=3)
    program.store(register, first + 1, row_stride=3)
    x = np.arange(27, dtype=np.float32).reshape(9, 3)
    step, out = h.step(9), h.empty((9, 3))
    counts, written = h.device.numpy(step.step, np.uint32, (4,)), h.device.numpy(out, np.float32, (9, 3))
    plan = h.device.create_plan(row_program.launches(program, step, [h.put(x), out], counted, 9), 9, 9)
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


# ---- refusals ---------------------------------------------------------------------------------------------------------------
FIRST = params.MS_SLOT_FIRST
REFUSED = [
    (dict(op=params.MS_OP_LOAD, dst=0, n=4, slot=7), "slot 7 of a launch with 7 bindings"),
    (dict(op=params.MS_OP_LOAD, dst=0, n=4, slot=FIRST, dtype=4), "dtype 4 is unknown"),
    (dict(op=params.MS_OP_LOAD, dst=0, n=4, slot=FIRST, rows=3), "rows 3 is unknown"),
    (dict(op=params.MS_OP_LOAD, dst=60, n=16, slot=FIRST), "dst is 60"),
    (dict(op=params.MS_OP_LOAD, dst=0, n=4, slot=FIRST, imm=1), "takes no scalar operands"),
    (dict(op=params.MS_OP_STORE, a=0, n=4, slot=FIRST, rows=params.MS_ROW_SAME), "every row would store to the same place"),
    (dict(op=params.MS_OP_STORE, a=61, n=4, slot=FIRST, rows=params.MS_ROW_SELF), "a is 61"),
    (dict(op=params.MS_OP_STORE, a=params.MS_NONE, n=4, slot=FIRST, rows=params.MS_ROW_SELF), "operand a is absent"),
    (dict(op=params.MS_OP_GATHER, dst=0, a=16, n=4, dims=[1, 1, 1, 5]), "dims do not multiply to 4"),
    (dict(op=params.MS_OP_GATHER, dst=0, a=16, n=4, dims=[1, 1, 1, 3]), "dims multiply to 3, n is 4"),
    (dict(op=params.MS_OP_GATHER, dst=0, a=16, n=4, dims=[1, 0, 1, 4]), "dims do not multiply to 4"),
    (dict(op=params.MS_OP_GATHER, dst=0, a=16, n=4, dims=[1, 1, 1, 4], strides=[0, 0, 0, -1]), "elements -3 to 0"),
    (dict(op=params.MS_OP_GATHER, dst=0, a=16, n=4, dims=[1, 1, 1, 4], strides=[0, 0, 0, 16]), "elements 0 to 48"),
    (dict(op=params.MS_OP_GATHER, dst=0, a=16, n=1, dims=[1] * 4, offset=2**32 - 1), "leave the scratch row"),
    (dict(op=params.MS_OP_SCATTER, dst=16, a=0, n=4, dims=[1, 1, 1, 4], inner=5), "ms_combine 5 is unknown"),
    (dict(op=params.MS_OP_SCATTER, dst=61, a=0, n=4, dims=[1, 1, 1, 4], strides=[0, 0, 0, 1]), "elements 0 to 3"),
    (dict(op=params.MS_OP_SOFTMAX, dst=0, a=16, n=16, inner=5), "16 elements are no whole spans of 5"),
    (dict(op=params.MS_OP_SOFTMAX, dst=0, a=16, n=16, inner=0), "no whole spans of 0"),
    (dict(op=params.MS_OP_REDUCE, dst=0, a=16, n=4, inner=0, dims=[1, 0, 0, 0]), "inner is 0"),
    (dict(op=params.MS_OP_REDUCE, dst=0, a=16, n=4, inner=13, dims=[1, 0, 0, 0]), "a is 16 [+] 52"),
    (dict(op=params.MS_OP_REDUCE, dst=0, a=16, n=4, inner=2, dims=[0, 0, 0, 0]), "reduction 0 is unknown"),
    (dict(op=0, dst=0, a=16, n=4), "unknown"),
    (dict(op=params.MS_OP_KV_WRITE + 1, dst=0, a=16, n=4), "unknown"),
]


@pytest.mark.parametrize(("fields", "why"), REFUSED)
def test_instructions_that_do_not_fit_are_refused(h, fields, why):
    with pytest.raises(ValueError, match=rf"launch 0 \(row_program\): .*instruction 1 \(op {fields['op']}\): .*{why}"):
        h.device.create_plan([launch_of(h, dict(op=params.MS_OP_COPY, a=0, dst=16, n=1), fields)], 1, 1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(rows=2), "rows is neither"),
        (dict(instrs=2), "bytes of constants, expected 212 for 2 instructions"),
        (dict(instrs=2**32 - 1), "bytes of constants"),
        (dict(registers=0), "past the 0 of the scratch row"),
    ],
)
def test_constants_that_do_not_fit_are_refused(h, changes, why):
    instruction = dict(op=params.MS_OP_COPY, a=0, dst=16, n=1)
    with pytest.raises(ValueError, match=why):
        h.device.create_plan([launch_of(h, instruction, **changes)], 1, 1)
    launch = launch_of(h, instruction)
    launch.constants = launch.constants[:8]
    with pytest.raises(ValueError, match="shorter than MSRowProgramParams"):
        h.device.create_plan([launch], 1, 1)
    launch = launch_of(h, instruction)
    launch.bindings = launch.bindings[:4]
    with pytest.raises(ValueError, match="fewer bindings than the step's own"):
        h.device.create_plan([launch], 1, 1)


SMALL = st.integers(0, 40) | st.sampled_from([63, 64, 65, 240, 255, 256, 257])
WILD = st.sampled_from([params.MS_NONE, 2**31 - 1, 2**31, 2**32 - 16, 2**32 - 1]) | st.integers(0, 2**32 - 1)
WORD = st.one_of(SMALL, SMALL, SMALL, WILD)
FLOAT = st.floats(width=32)
OPS = st.integers(0, 100) | WILD
FIELDS = {
    **dict.fromkeys(("dst", "a", "b", "c", "n", "inner", "offset", "row_stride"), WORD),
    **dict.fromkeys(("imm0", "imm1", "imm2"), FLOAT),
    **dict.fromkeys(("imm", "slot", "slot2", "dtype", "rows"), st.integers(0, 8) | WILD),
    "dims": st.lists(st.integers(0, 5) | st.sampled_from([16, 32, 64]) | WORD, min_size=4, max_size=4),
    "strides": st.lists(st.integers(-9, 9) | st.integers(-(2**31), 2**31 - 1), min_size=4, max_size=4),
}
BUFFERS = {params.MS_OP_LOAD, params.MS_OP_STORE, params.MS_OP_EMBEDDING, params.MS_OP_KV_WRITE}


@given(instructions=st.lists(st.fixed_dictionaries({"op": OPS}, optional=FIELDS), min_size=1, max_size=4))
@settings(max_examples=400)
def test_any_instruction_is_refused_or_runs(h, instructions):
    """What a buffer holds is the caller's to know: programs that touch one run on no rows, the others on one."""
    with own_buffers(h):
        launch = launch_of(h, *instructions, registers=256)
        try:
            plan = h.device.create_plan([launch], 1, 1)
        except ValueError as error:
            assert "row_program: instruction" in str(error)
            return
        if not BUFFERS & {instruction["op"] for instruction in instructions}:
            h.device.numpy(launch.bindings[0], np.uint32, (4,))[:] = 1
        plan.wait(plan.run(1))
        plan.close()


@pytest.mark.parametrize("op", range(1, params.MS_OP_SELECT + 1))
@given(data=st.data())
@settings(max_examples=12)
def test_each_opcode_is_refused_or_runs(h, op, data):
    """As above, nearer to what fits: every operand inside the scratch row, spans that divide."""
    inner = data.draw(st.integers(1, 8))
    fields = dict(
        op=op, dst=data.draw(st.integers(0, 4)) * 16, a=data.draw(st.integers(4, 250)), b=data.draw(st.integers(100, 250)),
        c=data.draw(st.just(200) | WORD), n=inner * data.draw(st.integers(1, 8)), inner=inner, slot=FIRST, imm0=10.0,
        dims=data.draw(st.permutations([data.draw(st.integers(0, 8)), 1, 1, 2])), strides=[1, 2, 3, data.draw(st.integers(-9, 9))],
    )  # fmt: skip
    test_any_instruction_is_refused_or_runs.hypothesis.inner_test(h, [fields])
