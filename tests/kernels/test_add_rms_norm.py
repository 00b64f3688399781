"""add_rms_norm: against its reference, on the host device and on Metal (simulated where there is none)."""
import os
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
from gpu_harness import DEVICE as GPU
from harness import Harness
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from metalstep.kernels import add_rms_norm
from metalstep.kernels.launch import Buffer
from metalstep.kernels.metal_source import metal_source

HAS_METAL = sys.platform == "darwin" or shutil.which(os.environ.get("METALSTEP_CLANG", "clang++")) is not None
METAL = pytest.mark.skipif(not HAS_METAL, reason="simulated Metal needs clang++: put it on PATH or set METALSTEP_CLANG")
CASES = [
    pytest.param((device, dtype), marks=[METAL] if device == "metal" else [], id=f"{device}-{dtype}")
    for device, kernels in add_rms_norm.KERNELS.items()
    for dtype in kernels
]
# float32: the order of the sum and the last bits of rsqrt. The others: a result next to a rounding boundary falls to the
# other side, one unit in the last place.
TOLERANCE = {"float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-7}
SMALLEST = {"float32": 1e-38, "float16": 2**-24, "bfloat16": 1e-38}  # steps of subnormal results
AWKWARD = [1, 33, 63, 97, 256, 257, 1000]


class Op:
    """The op on one device in one dtype, with float32 arrays in and out."""

    def __init__(self, device: str, dtype: str):
        self.name, self.dtype = device, dtype
        self.harness = Harness(device=GPU if device == "metal" else device)
        if device == "metal":
            self.harness.device.add_library(metal_source("add_rms_norm"))

    def __call__(self, x, residual, weight, eps=1e-5):
        """(out, new residual). out starts as NaN."""
        out = np.full(x.shape, np.nan, np.float32)
        buffers = [self.harness.put(self.stored(a), self.dtype) for a in (x, residual, weight, out)]
        self.harness.run(add_rms_norm.launches(*buffers, eps, self.name), max(len(x), 1))
        results = [self.loaded(self.harness.get(b, self.storage)) for b in (buffers[3], buffers[1])]
        for buffer in buffers:
            self.harness.device.destroy_buffer(buffer.handle)
        return results

    @property
    def storage(self):
        return np.dtype({"bfloat16": "uint16"}.get(self.dtype, self.dtype))

    def stored(self, array):
        rounded = mx.array(array).astype(getattr(mx, self.dtype))
        return np.array(rounded.view(mx.uint16) if self.dtype == "bfloat16" else rounded)

    def loaded(self, array):
        if self.dtype == "bfloat16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)

    def reference(self, x, residual, weight, eps):
        inputs = [mx.array(a).astype(getattr(mx, self.dtype)) for a in (x, residual, weight)]
        return [np.array(a.astype(mx.float32)) for a in add_rms_norm.reference(*inputs, eps)]


@pytest.fixture(scope="module", params=CASES)
def op(request):
    device, dtype = request.param
    op = Op(device, dtype)
    yield op
    op.harness.device.close()


@st.composite
def rows(draw, largest=100.0):
    """x and residual [tokens, hidden_size]."""
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from(AWKWARD)))
    elements = st.floats(-largest, largest, width=16)
    return tuple(draw(arrays.arrays(np.float32, shape, elements=elements)) for _ in range(2))


def weights(hidden_size):
    return np.linspace(-2, 2, hidden_size, dtype=np.float32)


@given(rows=rows())
@example(rows=(np.zeros((1, 1), np.float32),) * 2)  # eps alone keeps a zero row finite
@example(rows=(np.full((2, 33), 3e4, np.float32),) * 2)  # squares overflow float16: sums must not
@example(rows=(np.full((1, 97), 1e-3, np.float32),) * 2)  # squares vanish in float16
@settings(max_examples=25, deadline=None)
def test_results_agree_with_the_reference(op, rows):
    x, residual = rows
    weight = weights(x.shape[1])
    out, new_residual = op(x, residual, weight)
    expected, expected_residual = op.reference(x, residual, weight, 1e-5)
    np.testing.assert_array_equal(new_residual, expected_residual)
    of_reference = x.shape[1] * 2**-26  # MLX adds the squares up one by one: equal ones are all rounded the same way
    np.testing.assert_allclose(out, expected, rtol=TOLERANCE[op.dtype] + of_reference, atol=SMALLEST[op.dtype])


@pytest.mark.parametrize("hidden_size", AWKWARD)
def test_random_rows_of_awkward_sizes_agree_with_the_reference(op, hidden_size):
    rng = np.random.default_rng(hidden_size)
    x, residual = rng.standard_normal((2, 3, hidden_size)).astype(np.float32)
    weight = rng.standard_normal(hidden_size).astype(np.float32)
    out, new_residual = op(x, residual, weight)
    expected, expected_residual = op.reference(x, residual, weight, 1e-5)
    np.testing.assert_array_equal(new_residual, expected_residual)
    np.testing.assert_allclose(out, expected, rtol=TOLERANCE[op.dtype], atol=SMALLEST[op.dtype])


@given(rows=rows())
@settings(max_examples=15, deadline=None)
def test_rows_do_not_see_each_other(op, rows):
    """A batch gives, bit for bit, what each of its rows gives alone."""
    weight = weights(rows[0].shape[1])
    together = op(*rows, weight)
    alone = [op(x[None], residual[None], weight) for x, residual in zip(*rows, strict=True)]
    for i in range(2):
        np.testing.assert_array_equal(together[i], np.concatenate([row[i] for row in alone]))


@given(rows=rows(), power=st.integers(-4, 4))
@settings(max_examples=15, deadline=None)
def test_scaling_a_row_by_a_power_of_two_leaves_its_norm(op, rows, power):
    """Without eps the norm knows no unit: the same bits come out, and the residual is scaled."""
    x, residual = (np.where(np.abs(a) < 0.5, 1, a) for a in rows)  # away from zero rows and from subnormal numbers
    residual = np.abs(residual) * np.sign(x)  # and from sums that cancel
    factor = np.float32(2.0**power)
    out, new_residual = op(x, residual, weights(x.shape[1]), eps=0.0)
    scaled_out, scaled_residual = op(x * factor, residual * factor, weights(x.shape[1]), eps=0.0)
    np.testing.assert_array_equal(scaled_out, out)
    np.testing.assert_array_equal(scaled_residual, new_residual * factor)


@given(rows=rows())
@settings(max_examples=10, deadline=None)
def test_x_and_residual_may_be_exchanged(op, rows):
    weight = weights(rows[0].shape[1])
    for one, other in zip(op(*rows, weight), op(*reversed(rows), weight), strict=True):
        np.testing.assert_array_equal(one, other)


@METAL
@pytest.mark.skipif(sys.platform == "darwin", reason="a GPU takes threads in the order it likes")
@pytest.mark.parametrize("hidden_size", [33, 1000])
def test_the_order_of_threads_does_not_matter(monkeypatch, hidden_size):
    op = Op("metal", "float32")
    rng = np.random.default_rng(0)
    x, residual = rng.standard_normal((2, 3, hidden_size)).astype(np.float32)
    results = []
    for seed in range(4):
        monkeypatch.setenv("METALSTEP_SIM_SEED", str(seed))
        results.append(op(x, residual, weights(hidden_size)))
    op.harness.device.close()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def region(shape, dtype="float32"):
    return Buffer(0, 0, shape, dtype)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"x": region((64,))}, r"add_rms_norm: x has shape \(64,\), expected \(tokens, hidden_size\)"),
        ({"x": region((2, 0))}, r"hidden_size of 1 or more"),
        ({"residual": region((3, 64))}, r"residual has shape \(3, 64\), expected \(2, 64\) \(x's shape\)"),
        ({"weight": region((32,))}, r"weight has shape \(32,\), expected \(64,\) \(x's last axis\)"),
        ({"out": region((2, 32))}, r"out has shape \(2, 32\), expected \(2, 64\) \(x's shape\)"),
        ({"x": region((2, 64), "float16")}, r"x is float16, expected float32"),
        ({"weight": region((64,), "bfloat16")}, r"weight is bfloat16, expected float32"),
        ({"x": region((2, 64), "int32"), "device": "metal"}, r"x is int32, expected float32 or float16 or bfloat16"),
        ({"eps": -1.0}, r"eps is -1.0, expected a finite number, 0 or more"),
        ({"eps": float("nan")}, r"eps is nan"),
        ({"device": "cuda"}, r"device is 'cuda', expected host or metal"),
    ],
)
def test_what_does_not_fit_is_refused(changes, text):
    whole = region((2, 64))
    arguments = {"x": whole, "residual": whole, "weight": region((64,)), "out": whole, "eps": 1e-5}
    with pytest.raises(ValueError, match=text):
        add_rms_norm.launches(**arguments | changes)


def test_no_rows_are_no_launch():
    assert add_rms_norm.launches(region((0, 8)), region((0, 8)), region((8,)), region((0, 8)), 1e-5) == []
