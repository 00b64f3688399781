"""Every .metal file type-checks on the Metal branch of the dialect header, with address spaces that clang enforces.

The simulator cannot see these mistakes: for it all memory is one. Apple's compiler refuses them.
"""
from importlib import resources

import pytest
from address_spaces import CLANG, messages

from metalstep.kernels.metal_source import metal_source

KERNELS = sorted(
    path.name.removesuffix(".metal") for path in resources.files("metalstep.metal").iterdir() if path.name.endswith(".metal")
)
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"

pytestmark = pytest.mark.skipif(CLANG is None, reason="no clang++: put it on PATH or set METALSTEP_CLANG")


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_type_checks_with_address_spaces(name):
    assert messages(metal_source(name)) == ""


@pytest.mark.parametrize(
    "body",
    [
        "float* p = a; o[0] = p[0];",  # the address space is lost
        "threadgroup float t[32]; \n device float* q = t; o[0] = q[0];",  # threadgroup memory as device memory
        "o[0] = of_thread(a);",  # a function without an address space
        "a[0] = 1.0f;",  # a write through const
        "n = 2;",  # a write to constant memory
        "device const int* q = &n; o[0] = float(q[0]);",  # constant memory as device memory
        "threadgroup float* p = o; p[0] = 1.0f;",  # device memory as threadgroup memory
    ],
)
def test_a_mistaken_address_space_is_seen(body):
    """The check checks: each of these is one line away from a kernel that passes."""
    kernel = """
      inline float of_thread(thread const float* p) { return p[0]; }
      kernel void k(device const float* a [[buffer(0)]], device float* o [[buffer(1)]], constant int& n [[buffer(2)]]) {
        BODY
      }"""
    assert messages(HEAD + kernel.replace("BODY", "o[0] = a[n];")) == ""
    assert "error:" in messages(HEAD + kernel.replace("BODY", "\n" + body))


def test_messages_name_the_file_and_line_that_was_written():
    source = metal_source("add_rms_norm").replace("sum = simd_sum(sum);", "sum = simd_sum(summ);", 1)
    lines = resources.files("metalstep.metal").joinpath("add_rms_norm.metal").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "sum = simd_sum(sum);" in text)
    assert f"add_rms_norm.metal:{line}:" in messages(source)


def test_a_source_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"metal/no_such_op\.metal does not exist"):
        metal_source("no_such_op")
