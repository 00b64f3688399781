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
        "ulong big = 1; o[0] = float(simd_sum(big));",  # 64 bits and bool are not exchanged between lanes
        "ulong big = 1; o[0] = float(simd_shuffle_xor(big, ushort(1)));",
        "o[0] = simd_max(n > 0) ? 1.0f : 0.0f;",
        "o[0] = simd_xor(a[n]);",  # bits of a float
        "o[0] = float(simd_sum(bfloat(a[n])));",
        "o[0] = as_type<float>(ulong(n));",  # of another size
        "o[0] = as_type<float>(a[n]);",  # of the same type
        "o[0] = precise::sign(a[n]);",  # no such variant
        "o[0] = float(clz(a[n]));",
        "o[0] = float(max(n, 1u));",  # no overload for two types
        "threadgroup atomic_uint count; threadgroup uint* at = &count; atomic_store_explicit(at, 0u, memory_order_relaxed);",
        "if constexpr (sizeof(float) == 4) o[0] = 1.0f;",  # from C++17 on
        "static_assert(sizeof(float) == 4); o[0] = 1.0f;",
        "if (int m = n; m > 0) o[0] = 1.0f;",
        "auto f = [](float x) { return x; }; o[0] = f(a[n]);",  # what Metal leaves out of C++
        "auto f = [&] { return a[n]; }; o[0] = f();",
        "goto end; end: o[0] = 1.0f;",
        "double d = 1.0f; o[0] = float(d);",
        "struct base { float x; }; struct derived : base { float y; }; derived d; o[0] = d.x;",
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


@pytest.mark.parametrize(
    "parameters",
    [
        "uint3 at [[threadgroup_position_in_grid]], uint size [[threads_per_threadgroup]]",
        "uint2 at [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]]",
        "int row [[threadgroup_position_in_grid]]",
        "uint2 lane [[thread_index_in_simdgroup]]",
        "device float* y [[buffer(1)]]",  # bound already
        "device float* y [[buffer(31)]]",
        "uint id [[thread_index_in_grid]]",
    ],
)
def test_a_parameter_that_metal_refuses_is_seen(parameters):
    kernel = "[[kernel]] void k(device float* x [[buffer(0)]], device float* o [[buffer(1)]], PARAMETERS) { o[0] = x[0]; }"
    good = "uint3 at [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]], ushort lane [[thread_index_in_simdgroup]]"
    assert messages(HEAD + kernel.replace("PARAMETERS", good)) == ""
    assert "error: kernel k:" in messages(HEAD + kernel.replace("PARAMETERS", parameters))


def test_kernels_of_one_name_are_seen():
    kernels = "[[kernel]] void k(device float* x [[buffer(0)]]) {}\n[[kernel]] void NAME(device int* x [[buffer(0)]]) {}\n"
    assert messages(HEAD + kernels.replace("NAME", "other")) == ""
    assert "error: kernel k: overloaded" in messages(HEAD + kernels.replace("NAME", "k"))


THREADS = "[[kernel, max_total_threads_in_threadgroup(64)]] void k(device float* x [[buffer(0)]]) {}"
GLOBALS = ["const float table[2] = {1.0f, 2.0f};", "static int count = 0;"]


@pytest.mark.parametrize("text", [*GLOBALS, "template <auto N> struct s {};", THREADS])
def test_a_mistake_outside_of_kernels_is_seen(text):
    assert messages(HEAD + "constant float table[2] = {1.0f, 2.0f};\n") == ""
    assert "error:" in messages(HEAD + text + "\n")


def test_messages_name_the_file_and_line_that_was_written():
    source = metal_source("add_rms_norm").replace("sum = simd_sum(sum);", "sum = simd_sum(summ);", 1)
    lines = resources.files("metalstep.metal").joinpath("add_rms_norm.metal").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "sum = simd_sum(sum);" in text)
    assert f"add_rms_norm.metal:{line}:" in messages(source)


def test_a_source_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"metal/no_such_op\.metal does not exist"):
        metal_source("no_such_op")
