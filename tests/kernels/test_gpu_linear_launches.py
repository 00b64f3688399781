"""linear on a GPU: which launches share a kernel, that every shape of the tables fits, and what is refused."""
import numpy as np
import pytest
from gpu_harness import GpuHarness
from gpu_linears import Weight, plain

from metalstep.kernels import linear, params
from metalstep.kernels.gpu import linear as gpu_linear
from metalstep.kernels.gpu.linear_tables import KINDS, table
from metalstep.kernels.gpu.linear_tuning import Matvec
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import Input, Norm, PackedWeight, Segment
from metalstep.kernels.program import Program


@pytest.fixture(scope="module")
def h():
    with GpuHarness() as harness:
        yield harness


def test_sizes_and_strides_are_parameters_and_structure_is_not(h):
    """Layers that differ in n, k (by whole steps) and places share a kernel."""
    rng = np.random.default_rng(9)

    def kernel(n, k, bits, max_rows=1, stride=None):
        w = Weight(h, rng, n, k, bits, 32)
        slot = linear.first_buffer_slot([[w]])
        segments = [Segment([w.packed], plain(w, slot, row_stride=stride))]
        return gpu_linear.launches(Input(h.empty((1, k)), 0, k), segments, h.step(1), [h.empty((1, n))], 0, max_rows)[0].kernel

    assert kernel(16, 4096, 4) == kernel(40, 8192, 4, stride=99)
    assert len({kernel(16, 64, 4), kernel(16, 64, 8), kernel(16, 64, 4, max_rows=2), kernel(16, 64, 4, max_rows=9)}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_of_the_tables_fits_a_threadgroup(h, kind):
    """32 KB and 1024 threads, for a segment of one weight, of two, and of both; a matvec's lanes hold its results."""
    rng = np.random.default_rng(10)
    w = Weight(h, rng, 16, 64, 4, 32)
    for outputs in (1, 10**6):
        for max_rows in (*range(1, 70), 1000):
            shape = table(kind).entry(outputs, 64, max_rows).shape
            for parts in (1, 2, 3):
                wide = [PackedWeight(w.packed.buffer, outputs, 64, 4, 32, w.packed.dtype, w.packed.scales, w.packed.biases)] * parts
                program = Program(epilogue=True, registers=parts)
                x = Input(h.empty((1, 64)), 0, 64)
                [launch] = gpu_linear.launches(x, [Segment(wide, program)], h.step(1), [], 0, max_rows, tuning=table(kind))
                assert launch.threads[0] <= 1024
            if isinstance(shape, Matvec):
                assert shape.rows * max_rows <= 32


def attempt(h, weights=None, x=None, program=None, buffers=(), **more):
    """Makes the launches of one segment of good weights, or of what is given instead."""
    if weights is None:
        weights = [Weight(h, np.random.default_rng(0), 16, 64, 4, 32).packed]
    program = program or Program(epilogue=True, registers=len(weights))
    return gpu_linear.launches(x or Input(h.empty((1, 64)), 0, 64), [Segment(weights, program)], h.step(1), list(buffers), 0, 1, **more)


def test_weights_of_other_inputs_or_outputs_are_refused(h):
    rng = np.random.default_rng(0)
    a, b, c = (Weight(h, rng, n, k, 4, 32).packed for n, k in ((16, 64), (16, 96), (24, 64)))
    with pytest.raises(ValueError, match="k = 64 and 96; they must read the same input"):
        attempt(h, [a, b])
    with pytest.raises(ValueError, match=r"n = \[16, 24\]; they must agree"):
        attempt(h, [a, c])
    with pytest.raises(ValueError, match="no weights"):
        attempt(h, [])


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "k"),
    [
        (7, 32, params.MS_FLOAT16, 64),
        (4, 16, params.MS_FLOAT16, 64),
        (4, 64, params.MS_FLOAT16, 96),
        (4, 32, params.MS_INT32, 64),
        (16, 0, params.MS_FLOAT32, 64),
        (32, 0, params.MS_FLOAT16, 64),
        (16, 32, params.MS_FLOAT16, 64),
    ],
)
def test_a_weight_that_no_kernel_multiplies_is_refused(h, bits, group, dtype, k):
    buffer = h.empty((16, k))
    with pytest.raises(ValueError, match=rf"no kernel reads a weight of k={k}, bits={bits}, group_size={group}, dtype={dtype}"):
        attempt(h, [PackedWeight(buffer, 16, k, bits, group, dtype, buffer, buffer)])


def test_a_weight_out_of_place_is_refused(h):
    buffer = h.empty((64, 64))

    def at(offset):
        return Buffer(buffer.handle, offset, (16, 64), "uint8")

    with pytest.raises(ValueError, match="words start at byte 2 of their buffer, expected a multiple of 4"):
        attempt(h, [PackedWeight(at(2), 16, 64, 4, 32, params.MS_FLOAT16, at(0), at(0))])
    with pytest.raises(ValueError, match="scales or biases start at byte 1"):
        attempt(h, [PackedWeight(at(0), 16, 64, 4, 32, params.MS_FLOAT16, at(0), at(1))])
    with pytest.raises(ValueError, match="elements start at byte 2 of their buffer, expected a multiple of 4"):
        attempt(h, [PackedWeight(at(2), 16, 64, 32, 0, params.MS_FLOAT32)])
    with pytest.raises(ValueError, match="4 bits without scales or biases"):
        attempt(h, [PackedWeight(at(0), 16, 64, 4, 32, params.MS_FLOAT16)])
    with pytest.raises(ValueError, match="x is uint8 at byte 0, expected float32"):
        attempt(h, x=Input(at(0), 0, 64))
    with pytest.raises(ValueError, match="the norm's weight is float32 at byte 2, expected float32 at a multiple of 4"):
        attempt(h, x=Input(buffer, 0, 64, norm=Norm(Buffer(buffer.handle, 2, (64,), "float32"), 1e-5)))


def test_what_only_the_host_device_runs_is_refused(h):
    prologue = Program()
    row = prologue.load(6, 64, rows=params.MS_ROW_SELF, row_stride=64)
    with pytest.raises(NotImplementedError, match="a GPU runs no prologue"):
        attempt(h, x=Input(None, prologue=prologue, result=row))
    program = Program(epilogue=True)
    program.emit(params.MS_OP_SOFTMAX, program.register(16), program.register(16), n=16, inner=16)
    with pytest.raises(NotImplementedError, match="only LOAD, STORE and elementwise ones run on a column"):
        attempt(h, program=program)


def test_an_epilogue_that_misses_its_buffers_is_refused(h):
    program = Program(epilogue=True)
    program.store(program.register(16), 7, row_stride=16)
    with pytest.raises(ValueError, match="names slot 7; its buffers have 6 to 6"):
        attempt(h, program=program, buffers=[h.empty((1, 16))])
    program = Program(epilogue=True)
    program.emit(params.MS_OP_STORE, None, program.register(16), n=16, slot=6, rows=params.MS_ROW_SAME)
    with pytest.raises(ValueError, match="the same for every row"):
        attempt(h, program=program, buffers=[h.empty((1, 16))])


def test_more_than_metal_takes_is_refused(h):
    rng = np.random.default_rng(0)
    weights = [Weight(h, rng, 16, 64, 4, 32).packed for _ in range(10)]
    with pytest.raises(NotImplementedError, match="32 buffers and the constants are more than the 31 that a Metal kernel takes"):
        attempt(h, weights)
    one = Weight(h, rng, 16, 64, 4, 32).packed
    segments = [Segment([one] * 9, Program(epilogue=True, registers=9))]
    with pytest.raises(NotImplementedError, match=r"a segment of 9 weights takes .* bytes of threadgroup memory, at most 32768"):
        gpu_linear.launches(Input(h.empty((1, 64)), 0, 64), segments, h.step(1), [], 0, 32)
