"""Products of matrices by NVIDIA's library in a CUDA device's plans, on a driver and a library that are not there (fake_cublas.c)."""
from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_fake import COMPILER, Fake, build, floats, launch, opened, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metalstep.kernels import params
from metalstep.kernels.launch import Buffer, Launch

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's GPUs are for Linux"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler: put clang or cc on PATH"),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The driver, and the library of products."""
    folder = tmp_path_factory.mktemp("fake")
    made, source = folder / "libfake_cublas.so", Path(__file__).with_name("fake_cublas.c")
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([str(COMPILER), *options, "-o", str(made), str(source), "-lm"], check=True)
    return build(folder), made


@pytest.fixture
def fake(libraries, tmp_path, monkeypatch):
    driver, products = libraries
    fake = Fake(driver, tmp_path, monkeypatch)
    monkeypatch.setenv("METALSTEP_CUBLAS", str(products))
    yield fake
    gc.collect()
    assert fake.log("no context") == []
    assert set(fake.log("cublas closed")) <= {"cublas closed: 0 left"}


def put(device, array):
    owner = device.create_buffer(max(array.nbytes, 16), shared=False)
    owner.write(array)
    return Buffer(owner.handle, 0, array.shape, str(array.dtype))


def product(x, weight, out, added=None, workspace=None, *, rows, n, k, strides=None, **fields):
    """A launch; strides: of x, added and out."""
    x_stride, c_stride, d_stride = strides or (k, n, n)
    sizes = dict(rows=rows, n=n, k=k, x_row_stride=x_stride, c_row_stride=c_stride, d_row_stride=d_stride, workspace_bytes=workspace.nbytes)
    constants = params.pack("MSGpuLibraryGemmParams", **sizes, add=added is not None, **fields)
    return Launch("library_gemm", [x, weight, added or out, out, workspace], constants, (1, 1, 1), (1, 1, 1), True)


def run(device, launches):
    plan = device.create_plan(launches, 1, 1)
    try:
        plan.wait(plan.run(1))
    finally:
        plan.close()


@given(rows=st.integers(1, 5), n=st.integers(1, 5), k=st.integers(1, 6), margins=st.tuples(*[st.integers(0, 3)] * 3), adds=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_product_is_that_of_the_matrices_in_their_buffers(cuda, rows, n, k, margins, adds):
    """Rows of any stride; what is between them stays. `added` is read only where it is asked for."""
    rng = np.random.default_rng(rows * n * k)
    x, weight = rng.standard_normal((rows, k + margins[0])).astype(np.float16), rng.standard_normal((n, k)).astype(np.float16)
    added, out = np.full((rows, n + margins[1]), np.nan, np.float32), np.full((rows, n + margins[2]), -7, np.float32)
    if adds:
        added[:, :n] = rng.standard_normal((rows, n))
    buffers = [put(cuda, a) for a in (x, weight, out, added)]
    workspace = put(cuda, np.zeros(64, np.uint8))
    run(
        cuda,
        [
            product(
                *buffers[:3], buffers[3] if adds else None, workspace, rows=rows, n=n, k=k,
                strides=(k + margins[0], n + margins[1], n + margins[2]),
            )
        ],
    )  # fmt: skip
    got = cuda.read(buffers[2], np.float32, out.shape)
    want = x[:, :k].astype(np.float64) @ weight.astype(np.float64).T + (added[:, :n] if adds else 0)
    np.testing.assert_allclose(got[:, :n], want, atol=1e-4)
    assert (got[:, n:] == -7).all()


def test_each_replay_multiplies_what_the_buffers_hold_then(cuda):
    x, weight = put(cuda, np.ones((1, 4), np.float16)), put(cuda, np.ones((2, 4), np.float16))
    out, workspace = put(cuda, np.zeros((1, 2), np.float32)), put(cuda, np.zeros(64, np.uint8))
    plan = cuda.create_plan([product(x, weight, out, workspace=workspace, rows=1, n=2, k=4)], 1, 1)
    for value in (1, 3):
        cuda.write(x, np.full((1, 4), value, np.float16))
        plan.wait(plan.run(1))
        np.testing.assert_array_equal(cuda.read(out, np.float32, (1, 2)), 4 * value)
    assert len(plan.profile()) == 1


def test_no_kernel_begins_before_a_product_has_ended(fake, cuda):
    """One may begin while the kernel before it runs, as long as that is a kernel."""
    y, x = floats(cuda), put(cuda, np.ones((1, 4), np.float16))
    out, workspace = put(cuda, np.zeros((1, 4), np.float32)), put(cuda, np.zeros(64, np.uint8))
    multiply = product(x, put(cuda, np.ones((4, 4), np.float16)), out, workspace=workspace, rows=1, n=4, k=4)
    run(cuda, [launch("add", y, by=1), launch("add", y, by=1), multiply, launch("scale", y, by=2), launch("scale", y, by=2)])
    early = [line.endswith(" early") for line in fake.log("launch")]
    assert early == [False, True, False, True]
    np.testing.assert_array_equal(read(cuda, y), 8)
    np.testing.assert_array_equal(cuda.read(out, np.float32, (1, 4)), 4)


def test_addresses_need_no_more_than_16_bytes_of_alignment(fake, cuda):
    matrix = put(cuda, np.zeros((4, 8), np.float16))
    out, workspace = put(cuda, np.zeros((4, 4), np.float32)), put(cuda, np.zeros(64, np.uint8))
    run(cuda, [product(matrix, matrix, out, workspace=workspace, rows=4, n=4, k=8)])
    assert fake.log("way") == ["way: aligned to 16 16 16 16"]


def test_what_the_library_refuses_is_an_error_with_its_text(fake, cuda):
    matrix = put(cuda, np.zeros((4, 4), np.float16))
    out, workspace = put(cuda, np.zeros((4, 4), np.float32)), put(cuda, np.zeros(64, np.uint8))
    launched = product(matrix, matrix, out, workspace=workspace, rows=4, n=4, k=4)
    fake.options(way=0)
    with pytest.raises(RuntimeError, match="cuBLAS: no way to multiply 4 rows of 4 by 4 outputs"):
        cuda.create_plan([launched], 1, 1)
    fake.options(matmul=14)
    with pytest.raises(RuntimeError, match="cuBLAS: cublasLtMatmul: an internal operation failed"):
        cuda.create_plan([launched], 1, 1)
    fake.options()
    run(cuda, [launched])


@pytest.mark.parametrize("part", ["constants", "bindings"])
def test_a_launch_that_is_no_product_is_refused(cuda, part):
    matrix = put(cuda, np.zeros((4, 4), np.float16))
    launched = product(matrix, matrix, matrix, workspace=matrix, rows=4, n=4, k=4)
    setattr(launched, part, getattr(launched, part)[:-1])
    with pytest.raises(ValueError, match=r"library_gemm: \d+ bytes of constants and \d bindings, expected 32 and 5"):
        cuda.create_plan([launched], 1, 1)


def test_a_library_that_is_another_is_refused(libraries, fake, monkeypatch, tmp_path):
    """With what it lacks, or the loader's own text, and what to do."""
    monkeypatch.setenv("METALSTEP_CUBLAS", str(libraries[0]))
    with opened() as device, pytest.raises(ValueError, match=r"cuBLAS: \S*libfake_cuda\.so has no cublasLtCreate.*too old"):
        device.kernel("library_gemm")
    monkeypatch.setenv("METALSTEP_CUBLAS", str(tmp_path / "nowhere.so"))
    with opened() as device, pytest.raises(ValueError, match=r"nowhere\.so: cannot open .*; looked in 1 places.*METALSTEP_CUBLAS"):
        device.kernel("library_gemm")


def test_a_plan_outlives_nothing_of_the_library(fake):
    """A device that is closed with a plan in use, and a plan that is closed behind its device."""
    device = opened()
    matrix = put(device, np.zeros((4, 4), np.float16))
    out, workspace = put(device, np.zeros((4, 4), np.float32)), put(device, np.zeros(64, np.uint8))
    plan = device.create_plan([product(matrix, matrix, out, workspace=workspace, rows=4, n=4, k=4)], 1, 1)
    plan.run(1)
    device.close()
    plan.close()
    del device, plan, matrix, out, workspace
    gc.collect()
    assert fake.log("cublas closed") == ["cublas closed: 0 left"]
