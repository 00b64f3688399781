"""kv_write with the cache's codecs: what is stored is what turboquant computes, each vector by itself, and nothing else changes."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_planes import POISON, Plane, agree
from programs import launch_of, own_buffers
from turbo_cases import DIMS, GOLDEN, KINDS, SCALES, awkward, normal

from metalstep.kernels import kv_write, params, row_program
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.program import Program
from metalstep.kernels.turboquant import K_SEED, V_SEED

PACKED = [KVCodec(f"turbo{bits}", dtype, scale) for bits in (2, 3, 4) for dtype in ("float16", "float32") for scale in SCALES]
PACKED += [KVCodec("affine8")]
FLOATS = [KVCodec("float32"), KVCodec("float16"), KVCodec("bfloat16")]
ALL_KINDS = (*KINDS, "zero", "nan", "infinite", "huge", "tiny", "beyond")


def named(codec):
    return f"{codec.name}-{codec.norm_dtype}-{codec.scale}"


def vector(kind, dim, rng):
    """Those of `awkward`, and those that a codec has no good code for."""
    if kind in KINDS:
        return awkward(kind, dim, rng)
    x = awkward("normal", dim, rng)
    if kind in ("nan", "infinite"):
        x[rng.integers(dim)] = {"nan": np.nan, "infinite": rng.choice([np.inf, -np.inf])}[kind]
    return x * np.float32({"zero": 0, "huge": 1e5, "tiny": 1e-7, "beyond": 1e30}.get(kind, 1))


def rows_of(kinds, heads, dim, seed):
    """float32 [rows, heads, dim]."""
    rng = np.random.default_rng(seed)
    return np.stack([[vector(kind, dim, rng) for _ in range(heads)] for kind in kinds])


def write(h, keys, values, slots, k_plane, v_plane, before=None):
    """keys [rows, heads, key_dim], values [rows, heads, value_dim] into planes of `before`, or poisoned ones; their words after it."""
    program, first = Program(), params.MS_SLOT_FIRST
    rows, heads = keys.shape[:2]
    regs = [
        program.load(first + i, a[0].size, rows=params.MS_ROW_SELF, row_stride=a[0].size)
        for i, a in enumerate((keys, values))
    ]
    kv_write.emit(
        program, *regs, first + 2, first + 3, heads, k_plane.block_size, k_plane.codec, v_plane.codec, k_plane.scales_at, v_plane.scales_at
    )
    with own_buffers(h):
        planes = [h.put(words) for words in before or (k_plane.poisoned(), v_plane.poisoned())]
        step = h.step(rows, slots=list(slots))
        h.run(row_program.launches(program, step, [h.put(keys), h.put(values), *planes], params.MS_ROWS_TOKENS, rows), rows)
        return [h.get(buffer, np.uint32) for buffer in planes]


def planes(k_codec, v_codec, heads, key_dim, value_dim, block_size=16, blocks=4):
    return (
        Plane(k_codec, blocks, heads, block_size, key_dim, across=True),
        Plane(v_codec, blocks, heads, block_size, value_dim),
    )


def check(plane, words, x, slots, seed):
    """The plane holds x [rows, heads, dim] in its slots, and is untouched elsewhere."""
    codes, scales = plane.split(words)
    written = np.zeros((plane.blocks, plane.block_size), bool)
    for row, slot in zip(x, slots, strict=True):
        if slot >= 0:
            block, place = divmod(slot, plane.block_size)
            written[block, place] = True
            agree(plane, codes[block, :, place], scales[block, :, place], row, seed)
    untouched = plane.split(plane.poisoned())
    for arrays in zip((codes, scales), untouched, strict=True):
        got, before = (np.moveaxis(a, 1, 2)[~written].view(np.uint8) for a in arrays)
        np.testing.assert_array_equal(got, before)


codecs = st.sampled_from(PACKED + FLOATS)


@given(
    k_codec=codecs, v_codec=codecs, heads=st.integers(1, 3), key_dim=st.sampled_from([*DIMS, 16, 48, 112, 320, 512]),
    value_dim=st.sampled_from([*DIMS, 32, 224]), block_size=st.sampled_from([1, 8, 16, 32]),
    kinds=st.lists(st.sampled_from(ALL_KINDS), min_size=1, max_size=6), threads=st.integers(1, 3), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=150)
def test_rows_are_encoded_in_their_places_and_nothing_else_changes(
    by_threads, k_codec, v_codec, heads, key_dim, value_dim, block_size, kinds, threads, seed
):
    k_plane, v_plane = planes(k_codec, v_codec, heads, key_dim, value_dim, block_size, blocks=8)
    keys, values = rows_of(kinds, heads, key_dim, seed), rows_of(kinds, heads, value_dim, seed + 1)
    rng = np.random.default_rng(seed)
    slots = rng.permutation(8 * block_size)[: len(kinds)]
    slots[rng.random(len(kinds)) < 0.2] = -1  # not written
    k_words, v_words = write(by_threads[threads], keys, values, slots.tolist(), k_plane, v_plane)
    check(k_plane, k_words, keys, slots, K_SEED)
    check(v_plane, v_words, values, slots, V_SEED)


@pytest.mark.parametrize("codec", PACKED, ids=named)
@pytest.mark.parametrize("dim", DIMS)
def test_every_codec_takes_every_head_dim(h, codec, dim):
    k_plane, v_plane = planes(codec, codec, 2, dim, dim)
    keys, values = rows_of(ALL_KINDS, 2, dim, 1), rows_of(ALL_KINDS, 2, dim, 2)
    k_words, v_words = write(h, keys, values, range(len(ALL_KINDS)), k_plane, v_plane)
    check(k_plane, k_words, keys, range(len(ALL_KINDS)), K_SEED)
    check(v_plane, v_words, values, range(len(ALL_KINDS)), V_SEED)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g.dim}-{g.bits}")
@pytest.mark.parametrize("scale", SCALES)
def test_golden_vectors_have_their_codes_and_scales_bit_for_bit(h, golden, scale):
    plane, floats = planes(KVCodec(f"turbo{golden.bits}", scale=scale), FLOATS[0], 1, golden.dim, 16)
    codes, scales = plane.split(write(h, golden.x[None, None], normal(1, 16)[None], [21], plane, floats)[0])
    np.testing.assert_array_equal(codes[1, 0, 5], golden.codes)
    assert scales.view(np.uint16)[1, 0, 5].tolist() == [golden.gamma[scale]]


@pytest.mark.parametrize("rows", [63, 64, 65])
@pytest.mark.parametrize("codec", [KVCodec("turbo4"), KVCodec("turbo3", "float32", "unbiased"), PACKED[0], PACKED[-1]], ids=named)
def test_rows_at_once_have_the_bits_of_rows_one_by_one(by_threads, codec, rows):
    """And of rows that are written again over others, as after a rejected draft."""
    k_plane, v_plane = planes(codec, codec, 2, 80, 64, blocks=5)
    keys, values = normal(rows * 2, 80, 3).reshape(rows, 2, 80), normal(rows * 2, 64, 4).reshape(rows, 2, 64)
    together = write(by_threads[3], keys, values, range(rows), k_plane, v_plane)
    one_by_one, again = None, write(by_threads[1], keys[::-1], values[::-1], range(rows), k_plane, v_plane)
    for i in range(rows):
        one_by_one = write(by_threads[1], keys[i : i + 1], values[i : i + 1], [i], k_plane, v_plane, one_by_one)
    again = write(by_threads[2], keys, values, range(rows), k_plane, v_plane, again)
    for want, *others in zip(together, one_by_one, again, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, want)


@given(codec=st.sampled_from(PACKED), dim=st.sampled_from(DIMS), kind=st.sampled_from(ALL_KINDS), seed=st.integers(0, 99))
def test_a_vector_knows_nothing_of_other_heads_rows_and_blocks(h, codec, dim, kind, seed):
    k_plane, v_plane = planes(codec, codec, 3, dim, dim)
    rng = np.random.default_rng(seed)
    x = rows_of(["normal"] * 5, 3, dim, seed)
    slots = rng.permutation(64)[:5]
    row, head = rng.integers(5), rng.integers(3)
    other = rows_of([kind] * 5, 3, dim, seed + 1)
    other[row, head] = x[row, head]
    moved = (slots + 7) % 64
    before = write(h, x, x[::-1], slots, k_plane, v_plane)
    after = write(h, other, x[::-1], moved, k_plane, v_plane)
    (codes, scales), (codes_after, scales_after) = k_plane.split(before[0]), k_plane.split(after[0])
    (block, place), (block_after, place_after) = divmod(slots[row], 16), divmod(moved[row], 16)
    np.testing.assert_array_equal(codes[block, head, place], codes_after[block_after, head, place_after])
    np.testing.assert_array_equal(scales[block, head, place], scales_after[block_after, head, place_after])
    for got, want in zip(v_plane.split(after[1]), v_plane.split(before[1]), strict=True):  # blocks permuted: values move, no more
        flat_got, flat_want = (np.moveaxis(a, 1, 2).reshape(64, 3, -1) for a in (got, want))
        np.testing.assert_array_equal(flat_got[moved], flat_want[slots])


@given(codec=st.sampled_from(PACKED[:-1]), dim=st.sampled_from(DIMS), power=st.integers(-9, 9), seed=st.integers(0, 99))
def test_a_power_of_two_scales_the_scale_alone(h, codec, dim, power, seed):
    plane, floats = planes(codec, FLOATS[0], 1, dim, 16)
    x = np.stack([normal(1, dim, seed)] * 2)
    x[1] *= np.float32(2.0**power)
    codes, scales = plane.split(write(h, x, normal(2, 16).reshape(2, 1, 16), [0, 1], plane, floats)[0])
    np.testing.assert_array_equal(codes[0, 0, 0], codes[0, 0, 1])
    assert scales[0, 0, 1] == scales[0, 0, 0] * scales.dtype.type(2.0**power)


@pytest.mark.parametrize("codec", PACKED, ids=named)
@pytest.mark.parametrize("kind", ["nan", "infinite", "beyond"])
def test_a_vector_that_is_not_finite_leaves_scales_of_nan(h, codec, kind):
    k_plane, v_plane = planes(codec, codec, 2, 64, 64)
    x = rows_of(["normal", kind], 2, 64, 5)
    for plane, words in zip((k_plane, v_plane), write(h, x, x, [0, 1], k_plane, v_plane), strict=True):
        codes, scales = plane.split(words)
        assert not codes[0, :, 1].any() and np.isnan(scales[0, :, 1]).all()
        assert codes[0, :, 0].any() and np.isfinite(scales[0, :, 0]).all()


def test_a_slot_that_is_negative_is_not_written(h):
    k_plane, v_plane = planes(PACKED[0], PACKED[-1], 1, 64, 64)
    for words in write(h, normal(1, 64)[None], normal(1, 64)[None], [-1], k_plane, v_plane):
        assert (words == POISON).all()


FIRST = params.MS_SLOT_FIRST
GOOD = dict(
    op=params.MS_OP_KV_WRITE, a=0, b=128, n=128, slot=FIRST, slot2=FIRST + 1, dtype=params.MS_KV_TURBO4, inner=params.MS_KV_AFFINE8,
    dims=[2, 64, 64, 8], offset=2 * 8 * 8, row_stride=3 * 2 * 8 * 16, imm=2 + 4 * 1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(dtype=3), "the cache has no codec 3"),
        (dict(dtype=17), "the cache has no codec 17"),
        (dict(inner=21), "the cache has no codec 21"),
        (dict(inner=params.MS_KV_AFFINE8 | params.MS_KV_WIDE_SCALES), "the cache has no codec 88"),
        (dict(dtype=params.MS_FLOAT16 | params.MS_KV_WIDE_SCALES), "the cache has no codec 65"),
        (dict(n=144, dims=[2, 72, 64, 8], b=144), "codec 20 does not take vectors of 72"),
        (dict(n=288, dims=[2, 144, 64, 8], b=288), "codec 20 does not take vectors of 144"),
        (dict(dims=[2, 64, 8, 8]), "codec 24 does not take vectors of 8"),
        (dict(offset=0), "scales at 0 are not behind blocks of 16 vectors of 8 words"),
        (dict(offset=129), "scales at 129 are not behind"),
        (dict(row_stride=2 * 8 * 8), "scales at 128 are not behind blocks of 16 vectors of 16 words"),
        (dict(dims=[2, 64, 64, 2**32 - 1]), "scales at 128 are not behind"),
        (dict(inner=0), "scales at 768 of a plane of floats"),
        (dict(imm=3), "imm 3 is no"),
        (dict(imm=12), "imm 12 is no"),
        (dict(imm=16), "imm 16 is no"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(by_threads, changes, why):
    h = by_threads[1]
    h.device.create_plan([launch_of(h, GOOD, registers=512)], 1, 1).close()
    with pytest.raises(ValueError, match=f"instruction 0 .*{why}"):
        h.device.create_plan([launch_of(h, GOOD | changes, registers=512)], 1, 1)


def test_a_program_names_the_head_dim_that_its_codec_does_not_take():
    program = Program()
    register = program.load(params.MS_SLOT_FIRST, 72, rows=params.MS_ROW_SAME)
    with pytest.raises(ValueError, match=r"turbo2 takes vectors of .*, and these have 72"):
        kv_write.emit(program, register, register, 1, 2, 1, 16, FLOATS[0], KVCodec("turbo2"))
