"""Packed KV writes of a GPU's row programs: codes and scales as kernels/turboquant.py has them, where they belong, and nowhere else."""
import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_programs import scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import launch_of as host_launch
from programs import own_buffers
from turbo_cases import DIMS, GOLDEN, KINDS, SCALES, awkward

from metalstep.kernels import kv_write, params, rms_norm, rope, turboquant
from metalstep.kernels import row_program as host_row_program
from metalstep.kernels.gpu import row_program
from metalstep.kernels.gpu.row_nests import VECTORS
from metalstep.kernels.kv_codec import KVCodec, hadamard_base
from metalstep.kernels.launch import KernelCode, Launch
from metalstep.kernels.program import Program
from metalstep.kernels.turboquant import K_SEED, V_SEED

POISON = np.uint16(0xBEEF)
BLOCKS = 3
F16, AFFINE = KVCodec("float16"), KVCodec("affine8")
TURBO = [KVCodec(f"turbo{bits}", norm, scale) for bits in (2, 3, 4) for norm in ("float16", "float32") for scale in SCALES]
ALL = [*TURBO, AFFINE]
ALL_DIMS = [dim for dim in range(16, 513, 16) if hadamard_base(dim) is not None]


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


class Write:
    """One KV_WRITE: keys and values [rows, heads, dim], which codecs, and where each row goes."""

    def __init__(self, keys, values, k_codec, v_codec, slots=None, block_size=4):
        self.data, self.codecs = (np.float32(keys), np.float32(values)), (k_codec, v_codec)
        self.rows, self.heads = keys.shape[:2]
        self.block_size = block_size
        self.slots = np.arange(self.rows) if slots is None else np.asarray(slots)
        self.sizes = [self.vectors * codec.vector_bytes(x.shape[2]) for codec, x in zip(self.codecs, self.data, strict=True)]  # bytes

    @property
    def vectors(self):
        return BLOCKS * self.heads * self.block_size

    def scales_at(self, which):
        return self.codecs[which].scales_at(self.sizes[which], self.data[which].shape[2])

    def emit(self, program, keys, values, k_slot, v_slot):
        kv_write.emit(
            program, keys, values, k_slot, v_slot, self.heads, self.block_size, *self.codecs, self.scales_at(0), self.scales_at(1)
        )

    def planes(self):
        return [np.full(size // 2, POISON) for size in self.sizes]

    def read(self, which, plane):
        """What the plane, of half words, holds of each written row: codes [rows, heads, words] and scales as turboquant.encode's.

        Asserts that everything else is as it was.
        """
        codec, dim, left = self.codecs[which], self.data[which].shape[2], plane.copy()
        shape, at = (BLOCKS, self.heads, self.block_size), 2 * self.scales_at(which) or plane.size
        codes, scales = left[:at].reshape(*shape, -1), left[at:].reshape(BLOCKS, self.heads, -1, self.block_size, self.scale_halves(which))
        scales = np.moveaxis(scales, 3, 2)  # [block, head, place, step and least of each group or one, halves]
        places = [(slot // self.block_size, slot % self.block_size) for slot in self.slots if slot >= 0]
        found = [np.array([part[block, :, place] for block, place in places]) for part in (codes, scales)]
        for block, place in places:
            codes[block, :, place], scales[block, :, place] = POISON, POISON
        np.testing.assert_array_equal(left, np.full_like(left, POISON))
        words = found[0].view(np.uint32).reshape(-1, self.heads, codec.words(dim))
        if codec.is_float:
            return words, np.zeros((*words.shape[:2], 0), np.float16)
        of_scales = (-1, self.heads, 1) if codec.is_turbo else (-1, self.heads, codec.groups(dim), 2)
        return words, found[1].view(codec.norm_dtype).reshape(of_scales)

    def scale_halves(self, which):
        return 2 if self.codecs[which].is_turbo and self.codecs[which].norm_dtype == "float32" else 1


def run_all(h, writes):
    """For each write: (codes, scales) of keys and of values, from one plan."""
    with own_buffers(h):
        launches, planes = [], []
        most = max(write.rows for write in writes)
        for write in writes:
            program, first = Program(), params.MS_SLOT_FIRST
            sizes = [x[0].size for x in write.data]
            registers = [program.load(first + i, size, rows=params.MS_ROW_SELF, row_stride=size) for i, size in enumerate(sizes)]
            write.emit(program, *registers, first + 2, first + 3)
            planes.append([h.put(plane) for plane in write.planes()])
            buffers = [*map(h.put, write.data), *planes[-1]]
            step = h.step(write.rows, slots=write.slots)
            needed = scratch(h, program, most, buffers)
            launches += row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, most, scratch=needed)
        h.run(launches, most)
        got = [[h.get(plane, np.uint16) for plane in pair] for pair in planes]
    return [[write.read(i, plane) for i, plane in enumerate(pair)] for write, pair in zip(writes, got, strict=True)]


def assert_encoded(got, x, codec, seed):
    """Words are the reference's but where an element lies on a boundary to its rounding; scales are to theirs."""
    codes, scales = got
    want_codes, want_scales = turboquant.encode(x, codec, seed)
    assert scales.dtype == want_scales.dtype and scales.shape == want_scales.shape
    dim = x.shape[-1]
    if codec.is_turbo:
        a, b = (turboquant.unpack(words, codec.bits, dim) for words in (codes, want_codes))
        with np.errstate(all="ignore"):
            distance = np.abs(turboquant.unit(x, seed)[..., None] - turboquant.codebook(codec.bits, dim)[1]).min(-1)
        assert ((a == b) | (distance < 1e-5)).all()
        np.testing.assert_array_equal(codes[..., -1] >> (dim * codec.bits % 32 or 32), 0)  # padding
        same = (a == b).all(-1)
        np.testing.assert_array_equal(np.isnan(scales), np.isnan(want_scales))
        close = np.nan_to_num(scales[same].astype(np.float64)), np.nan_to_num(want_scales[same].astype(np.float64))
        ulp = 2.0**-10 if codec.norm_dtype == "float16" else 2.0**-21
        np.testing.assert_allclose(*close, rtol=ulp, atol=2.0**-24)
    else:
        np.testing.assert_array_equal(np.where(np.isnan(scales), 0x7E00, scales.view(np.uint16)), want_scales.view(np.uint16))
        np.testing.assert_array_equal(codes, want_codes)


def assert_written(write, got):
    written = write.slots >= 0
    for each, x, codec, seed in zip(got, write.data, write.codecs, (K_SEED, V_SEED), strict=True):
        assert_encoded(each, x[written], codec, seed)


def normal(rng, *shape):
    return (rng.standard_normal(shape) * np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))).astype(np.float32)


# ---- against the reference --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", DIMS)
def test_codes_and_scales_are_the_reference_s(h, dim):
    """Every codec, scale and dtype of scales, as keys and as values, which differ in their seeds."""
    rng = np.random.default_rng(dim)
    writes = [
        Write(normal(rng, 3, 2, dim), normal(rng, 3, 2, dim), k_codec, v_codec)
        for k_codec, v_codec in zip(ALL, [*ALL[7:], *ALL[:7]], strict=True)
    ]
    for write, got in zip(writes, run_all(h, writes), strict=True):
        assert_written(write, got)


def test_golden_vectors_have_their_codes_and_scales_bit_for_bit(h):
    writes = [
        Write(golden.x[None, None], np.zeros((1, 1, 64)), KVCodec(f"turbo{golden.bits}", scale=scale), F16)
        for golden in GOLDEN for scale in SCALES
    ]  # fmt: skip
    wanted = [(golden.codes, golden.gamma[scale]) for golden in GOLDEN for scale in SCALES]
    for ((codes, scales), _), (words, gamma) in zip(run_all(h, writes), wanted, strict=True):
        np.testing.assert_array_equal(codes[0, 0], words)
        assert scales.view(np.uint16).ravel().tolist() == [gamma]


def test_every_size_of_a_vector_is_encoded(h):
    """Hadamard matrices of 1, 12, 20 and 28 blocks, half a simdgroup, words that are not full; affine8 in groups of 64, 32 and 16."""
    rng = np.random.default_rng(1)
    writes = [Write(normal(rng, 2, 2, dim), normal(rng, 2, 2, dim), KVCodec("turbo3"), AFFINE) for dim in ALL_DIMS]
    writes += [Write(normal(rng, 2, 1, 64), normal(rng, 2, 1, dim), F16, AFFINE) for dim in (144, 176, 208, 496)]  # of no Hadamard matrix
    for write, got in zip(writes, run_all(h, writes), strict=True):
        assert_written(write, got)


SHAPES = [  # heads, key dim, value dim, block_size, rows
    (1, 64, 256, 1, 3), (5, 128, 64, 8, 4), (16, 80, 96, 16, 2), (40, 128, 128, 4, 2), (40, 64, 512, 2, 1), (3, 512, 16, 4, 3),
]  # fmt: skip


def test_heads_blocks_and_codecs_of_all_sorts_land_in_their_places(h):
    """Floats beside codes, keys and values of different sizes, more heads than simdgroups or than their memory holds, rows not written."""
    rng, writes = np.random.default_rng(2), []
    for at, (heads, key_dim, value_dim, block_size, rows) in enumerate(SHAPES):
        slots = rng.permutation(BLOCKS * block_size)[:rows]
        if rows > 2:
            slots[1] = -1 - at
        pairs = [(F16, ALL[at]), (ALL[-1 - at], KVCodec("bfloat16")), (ALL[3 * at], ALL[3 * at + 2])]
        writes += [
            Write(normal(rng, rows, heads, key_dim), normal(rng, rows, heads, value_dim), *pair, slots, block_size) for pair in pairs
        ]
    for write, got in zip(writes, run_all(h, writes), strict=True):
        assert_written(write, got)


def test_rows_that_are_not_written_leave_the_cache_as_it_was(h):
    rng = np.random.default_rng(3)
    writes = [Write(normal(rng, 2, 3, 128), normal(rng, 2, 3, 128), codec, codec, [-1, -(2**31)]) for codec in (ALL[0], AFFINE)]
    for got in run_all(h, writes):
        assert all(codes.size == 0 for codes, _ in got)


# ---- vectors that are special ------------------------------------------------------------------------------------------------
def special(dim):
    """Zero, smallest, one-hot, constant, with a large offset, largest."""
    tiny = np.zeros(dim)
    tiny[3] = 1e-16  # its square is less than 2^-100
    x = np.stack([
        np.zeros(dim), tiny, np.eye(dim)[dim - 1] * 5, np.eye(dim)[0] * -1e-3, np.full(dim, 2.5), np.full(dim, -0.0), np.full(dim, 6e4),
        np.linspace(599, 601, dim), np.linspace(-1e6, 1e6, dim),
    ])  # fmt: skip
    return x.astype(np.float32)


def broken(dim):
    """NaN, infinities, and what overflows, one element or all."""
    x = np.ones((7, dim), np.float32)
    x[0, 5], x[1, dim - 1], x[2, 0], x[3], x[4], x[5], x[6] = np.nan, np.inf, -np.inf, np.nan, np.inf, 3e38, -3e38
    return x


def test_special_vectors_are_encoded_as_the_reference_does(h):
    writes = []
    for dim in (64, 80, 256):
        x = np.stack([special(dim), special(dim)[::-1]], 1)
        writes += [Write(x, x[:, ::-1], codec, codec) for codec in (TURBO[0], TURBO[8], TURBO[13], AFFINE)]
    for write, got in zip(writes, run_all(h, writes), strict=True):
        assert_written(write, got)
        for at, (codes, scales) in enumerate(got):
            if write.codecs[0].is_turbo:  # zero, and what counts as zero
                assert np.isfinite(scales).all()
                assert not codes[:2, at].any() and not scales[:2, at].any()


def test_an_element_on_a_boundary_belongs_to_the_cell_below(h):
    """What rotates to one element alone is exactly 0, a boundary, in all others."""
    codecs = [KVCodec(name) for name in ("turbo2", "turbo3", "turbo4")]
    for dim in (64, 80, 128):
        x = [np.stack([turboquant.hadamard(np.eye(dim)[[0, 5]], True) * turboquant.signs(dim, seed)], 1) for seed in (K_SEED, V_SEED)]
        writes = [Write(*x, codec, codec, [0, 1]) for codec in codecs]
        for codec, got in zip(codecs, run_all(h, writes), strict=True):
            for codes, _ in got:
                index = turboquant.unpack(codes[:, 0], codec.bits, dim)
                for row, one in zip(index, (0, 5), strict=True):
                    assert row[one] == (1 << codec.bits) - 1
                    assert (np.delete(row, one) == (1 << codec.bits - 1) - 1).all()


def test_a_vector_that_is_not_finite_has_scales_of_nan_and_no_codes_and_its_neighbours_do_not_see_it(h):
    writes = []
    for dim in (64, 112, 256):
        x = np.stack([broken(dim), np.tile(np.float32(np.arange(dim) - 9), (7, 1))], 1)
        writes += [Write(x, x[:, ::-1], codec, codec) for codec in (TURBO[1], TURBO[9], TURBO[17], AFFINE)]
    for write, got in zip(writes, run_all(h, writes), strict=True):
        assert_written(write, got)
        for at, (codes, scales) in enumerate(got):
            bad, good = (scales[:, at].astype(np.float32), scales[:, 1 - at].astype(np.float32))
            assert np.isnan(bad).all() and not codes[:, at].any()
            assert np.isfinite(good).all() and codes[:, 1 - at].any()
            np.testing.assert_array_equal(codes[:, 1 - at], codes[:1, 1 - at].repeat(7, 0))


# ---- laws ---------------------------------------------------------------------------------------------------------------------
ROWS = 4
pairs = st.sampled_from([(TURBO[4], TURBO[9]), (TURBO[14], TURBO[2]), (AFFINE, TURBO[6])])


@given(pair=pairs, dim=st.sampled_from([96, 128]), kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=4), seed=st.integers(0, 999),
       power=st.integers(-6, 6))  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_a_vector_s_code_depends_on_nothing_but_itself_and_scales_with_it(h, pair, dim, kinds, seed, power):
    """Rows in another order, alone, and times a power of two: the same words; scales times that power."""
    rng = np.random.default_rng(seed)
    x = np.stack([[awkward(kind, dim, rng) for _ in range(2)] for kind in kinds])
    order = rng.permutation(ROWS)
    factor = np.float32(2.0**power)
    sorts = [(x, 0), (x[order], 3), (x[1:2], 7), (x * factor, 1)]
    writes = [Write(each, each, *pair, np.arange(len(each)) + first) for each, first in sorts]
    whole, shuffled, alone, scaled = run_all(h, writes)
    for which, codec in enumerate(pair):
        for a, b, c in zip(whole[which], shuffled[which], alone[which], strict=True):
            np.testing.assert_array_equal(a[order], b)
            np.testing.assert_array_equal(a[1:2], c)
        if codec.is_turbo:
            np.testing.assert_array_equal(scaled[which][0], whole[which][0])
            np.testing.assert_array_equal(scaled[which][1], whole[which][1] * scaled[which][1].dtype.type(factor))
        close = turboquant.decode(*whole[which], codec, dim, (K_SEED, V_SEED)[which])
        if codec is AFFINE:  # half a step of 255, and what float16 rounds of a scale and of a bias
            span, largest = np.ptp(x, axis=-1, keepdims=True), np.abs(x).max(axis=-1, keepdims=True)
            assert (np.abs(close - x) <= span / 510 + 3 * 2.0**-11 * largest).all()
        else:
            assert (np.linalg.norm(close - x, axis=-1) <= 1.01 * np.linalg.norm(x, axis=-1)).all()


def test_a_gpu_and_the_host_device_write_the_same_codes(h, host):
    rng = np.random.default_rng(5)
    for dim in (80, 128):
        writes = [Write(normal(rng, 3, 2, dim), normal(rng, 3, 2, dim), *pair) for pair in ((TURBO[0], TURBO[10]), (AFFINE, TURBO[17]))]
        for write, got in zip(writes, run_all(h, writes), strict=True):
            program, first = Program(), params.MS_SLOT_FIRST
            registers = [program.load(first + i, 2 * dim, rows=params.MS_ROW_SELF, row_stride=2 * dim) for i in range(2)]
            write.emit(program, *registers, first + 2, first + 3)
            with own_buffers(host):
                planes = [host.put(plane) for plane in write.planes()]
                buffers = [*map(host.put, write.data), *planes]
                step = host.step(3, slots=write.slots)
                host.run(host_row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, 3), 3)
                k_plane, v_plane = (host.get(plane, np.uint16) for plane in planes)
            words = k_plane[: 2 * write.scales_at(0)].view(np.uint32)  # of keys a word of all places of a block lies together
            words[:] = words.reshape(-1, write.codecs[0].words(dim), write.block_size).swapaxes(1, 2).ravel()
            for which, plane in enumerate((k_plane, v_plane)):
                codes, scales = write.read(which, plane)
                codec = write.codecs[which]
                assert_encoded(got[which], write.data[which], codec, (K_SEED, V_SEED)[which])
                differing = turboquant.unpack(codes, codec.bits, dim) != turboquant.unpack(got[which][0], codec.bits, dim)
                assert differing.mean() < 1e-3
                close = scales.astype(np.float32), got[which][1].astype(np.float32)
                np.testing.assert_allclose(*close, rtol=1e-2 if differing.any() else 2**-10)


# ---- in a row program -----------------------------------------------------------------------------------------------------
def layer(dim, heads, kv_heads, k_codec, v_codec, blocks, centred=False):
    """Norms, rotations, keys stored as they are written to the cache; its launch's buffers are made by `buffers`."""
    program, first, width = Program(), params.MS_SLOT_FIRST, (heads + 2 * kv_heads) * dim
    row = program.load(first, width, rows=params.MS_ROW_SELF, row_stride=width)
    angles = rope.emit_angles(program, dim, 1e6, 1.0, None)
    q, k, v = row.part(0, heads * dim), row.part(heads * dim, kv_heads * dim), row.part((heads + kv_heads) * dim, kv_heads * dim)
    weight = program.load(first + 1, dim, rows=params.MS_ROW_SAME)
    q, k = (rope.emit(program, rms_norm.emit(program, x, weight, 1e-6, dim), angles, dim, False) for x in (q, k))
    program.store(q, first + 2, row_stride=heads * dim)
    if centred:
        mean, less = program.load(first + 6, kv_heads * dim, rows=params.MS_ROW_SAME), program.register(k.size)
        program.emit(params.MS_OP_SUB, less, k, mean, n=k.size)
        k = less
    program.store(k, first + 3, row_stride=kv_heads * dim)
    scales = [blocks * 4 * kv_heads * codec.words(dim) for codec in (k_codec, v_codec)]
    kv_write.emit(program, k, v, first + 4, first + 5, kv_heads, 4, k_codec, v_codec, *scales)
    return program


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "centred"), [(64, 14, 2, True), (128, 4, 4, False), (80, 8, 2, False), (256, 4, 1, True)]
)
def test_normed_and_rotated_keys_are_encoded_in_the_same_launch(h, dim, heads, kv_heads, centred):
    rng, rows, k_codec, v_codec = np.random.default_rng(7), 3, KVCodec("turbo4"), KVCodec("turbo2")
    program = layer(dim, heads, kv_heads, k_codec, v_codec, BLOCKS, centred)
    qkv = normal(rng, rows, (heads + 2 * kv_heads) * dim)
    values = qkv[:, -kv_heads * dim :].reshape(rows, kv_heads, dim)
    write = Write(np.zeros_like(values), values, k_codec, v_codec, [5, -1, 2])
    with own_buffers(h):
        planes = [h.put(plane) for plane in write.planes()]
        outs = [h.empty((rows, heads * dim)), h.empty((rows, kv_heads * dim))]
        mean = normal(rng, kv_heads * dim)
        buffers = [h.put(qkv), h.put(np.linspace(0.5, 1.5, dim, dtype=np.float32)), *outs, *planes, h.put(mean)]
        step = h.step(rows, positions=[5, 0, 900], slots=write.slots)
        given_scratch = scratch(h, program, rows, buffers)
        (launch,) = row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, rows, scratch=given_scratch)
        h.run([launch], rows)
        write.data = h.get(outs[1]).reshape(values.shape), values
        got = [write.read(i, h.get(plane, np.uint16)) for i, plane in enumerate(planes)]
    assert np.isfinite(write.data[0]).all() and launch.code.text.count("ms_encode<") == 2
    assert_written(write, got)


def launch_of(h, program, *extra):
    step, buffers = h.step(1), [h.empty((4096,)) for _ in range(7)]
    return row_program.launches(program, step, buffers, params.MS_ROWS_TOKENS, 1, scratch=h.empty((1 << 17,)))[0]


def test_a_larger_cache_needs_no_other_kernel(h):
    """Where scales begin is data."""
    codecs = KVCodec("turbo4"), KVCodec("turbo2")
    small, large = (launch_of(h, layer(128, 8, 2, *codecs, blocks)) for blocks in (3, 3000))
    assert small.kernel == large.kernel and small.constants != large.constants
    assert launch_of(h, layer(128, 8, 2, F16, F16, 0)).constants == b""


def test_a_simdgroup_s_vectors_fit_the_threadgroup_s_memory(h):
    for dim, kv_heads in ((128, 8), (128, 40), (256, 32), (512, 16)):
        text = launch_of(h, layer(dim, kv_heads, kv_heads, KVCodec("turbo4"), KVCodec("turbo4"), 1)).code.text
        sizes = [int(line.split("[")[1].split("]")[0]) for line in text.splitlines() if line.startswith("  threadgroup float ")]
        assert 4 * sum(sizes) <= 32768
        vectors = next(line for line in text.splitlines() if "float vectors[" in line)
        assert int(vectors.split("[")[1].split("]")[0]) <= VECTORS


GOOD = dict(
    op=params.MS_OP_KV_WRITE, a=0, b=32, n=32, slot=params.MS_SLOT_FIRST, slot2=params.MS_SLOT_FIRST + 1, dims=[2, 16, 16, 4],
    dtype=params.MS_KV_TURBO3, inner=params.MS_KV_AFFINE8, offset=3 * 8 * 2, row_stride=3 * 8 * 4, imm=params.MS_KV_SCALE_RAW,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(dtype=17), "the cache has no codec 17"),
        (dict(inner=params.MS_KV_AFFINE8 | params.MS_KV_WIDE_SCALES), "the cache has no codec 88"),
        (dict(n=18, dims=[2, 9, 16, 4]), "codec 19 does not take vectors of 9"),
        (dict(dims=[2, 16, 8, 4]), "codec 24 does not take vectors of 8"),
        (dict(n=36, dims=[1, 36, 32, 4]), "codec 19 does not take vectors of 36"),
        (dict(offset=0), "scales at 0 are not behind blocks of 8 vectors of 2 words"),
        (dict(row_stride=16), "scales at 16 are not behind blocks of 8 vectors of 4 words"),
        (dict(inner=params.MS_KV_FLOAT16), "scales at 96 of a plane of floats"),
        (dict(imm=3), "imm 3 is no ms_kv_scales"),
        (dict(imm=16), "imm 16 is no ms_kv_scales"),
    ],
)
def test_instructions_that_do_not_fit_are_refused_in_the_host_device_s_words(h, host, changes, why):
    buffers, rows = [h.empty((64,)), h.empty((64,))], params.MS_ROWS_TOKENS
    row_program.launches(Program(registers=64, instructions=[GOOD]), h.step(0), buffers, rows, 1)
    with pytest.raises(ValueError, match=rf"row_program: instruction 0 \(op 12\): {why}"):
        row_program.launches(Program(registers=64, instructions=[GOOD | changes]), h.step(0), buffers, rows, 1)
    host.device.create_plan([host_launch(host, GOOD)], 1, 1).close()
    with pytest.raises(ValueError, match=rf"instruction 0 \(op 12\): {why}"):
        host.device.create_plan([host_launch(host, GOOD | changes)], 1, 1)


# ---- the functions of kv_codec.h that other kernels call ------------------------------------------------------------------
FUNCTIONS = """
[[kernel]] void codec_{name}(device const float* given [[buffer(0)]], device uint* plane [[buffer(1)]], device float* out [[buffer(2)]],
                      uint row [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {{
  threadgroup float x[{dim}];
  for (uint i = lane; i < {dim}; i += 32) x[i] = given[row * {dim} + i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  {body}
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = lane; i < {dim}; i += 32) out[row * {dim} + i] = {result};
}}
"""


def functions(h, cases, x, words=64):
    """For each (name, dim, body, result): out [rows, dim], and the plane of `words` for each row."""
    with own_buffers(h):
        launches, outs = [], []
        for name, dim, body, result in cases:
            own = x[dim]
            planes, out = h.put(np.zeros(len(own) * words, np.uint32)), h.empty(own.shape)
            code = KernelCode(("row_program",), FUNCTIONS.format(name=name, dim=dim, body=body, result=result))
            launches.append(Launch(f"codec_{name}", [h.put(own), planes, out], b"", (len(own), 1, 1), (32, 1, 1), code=code))
            outs.append((out, planes))
        h.run(launches, 1)
        return [(h.get(out), h.get(planes, np.uint32)) for out, planes in outs]


def test_rotations_are_the_reference_s_and_undo_each_other(h):
    x = {dim: normal(np.random.default_rng(dim), 2, dim) for dim in ALL_DIMS}
    cases = [(f"forth{dim}", dim, f"ms_rotate<{dim}>(x, 42, lane);", "x[i]") for dim in ALL_DIMS]
    cases += [
        (f"back{dim}", dim, f"ms_rotate<{dim}>(x, ms_kv_seeds[1], lane);\n  ms_rotate_back<{dim}>(x, 43, lane);", "x[i]")
        for dim in ALL_DIMS
    ]
    for (name, dim, *_), (got, _) in zip(cases, functions(h, cases, x), strict=True):
        want = turboquant.rotate(x[dim], K_SEED) if name.startswith("forth") else x[dim]
        assert (np.abs(got - want) <= 4e-6 * np.linalg.norm(x[dim], axis=-1, keepdims=True)).all(), dim


@pytest.mark.parametrize("codec", [TURBO[0], TURBO[8], TURBO[12], AFFINE], ids=lambda codec: codec.name)
def test_codes_are_read_back_one_by_one_and_by_fours_and_what_is_left_is_what_they_mean(h, codec):
    dims = (16, 80, 128)
    x = {dim: normal(np.random.default_rng(dim), 3, dim) for dim in dims}
    cases = []
    for dim in dims:
        encode = f"const float factor = ms_encode<{codec.code}, {codec.scale_code}, {dim}, true>("
        encode += f"x, 42, plane, {3 * codec.words(dim)}, 0, 3, row, lane);"
        words = f"plane + row * {codec.words(dim)}"
        one, bits = f"float(ms_code<{codec.bits}, {dim}>({words}, int(i)))", codec.bits
        by_fours = f"float(ms_code_of4<{bits}>(ms_codes4<{bits}>({words}, int(i / 4)), int(i % 4)))"
        wait = "simdgroup_barrier(mem_flags::mem_device);"
        cases += [
            (f"{what}{dim}_{codec.code}", dim, encode + wait, result)
            for what, result in (("value", "factor * x[i]"), ("one", one), ("four", by_fours))
        ]
    for (name, dim, *_), (got, planes) in zip(cases, functions(h, cases, x, 140), strict=True):
        words = 3 * codec.words(dim)
        codes = turboquant.unpack(planes[:words].reshape(3, -1), codec.bits, dim)
        if not name.startswith("value"):
            np.testing.assert_array_equal(got, codes)
            continue
        scales = planes[words:].view(codec.norm_dtype)
        if codec.is_turbo:
            want = turboquant.codebook(codec.bits, dim)[0][codes] * scales[:3, None].astype(np.float32)
        else:
            grouped = scales[: 6 * codec.groups(dim)].reshape(-1, 2, 3).astype(np.float32)  # group, step or least, row
            step, low = (np.repeat(grouped[:, i].T, dim // codec.groups(dim), 1) for i in range(2))
            want = low + codes * step
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
