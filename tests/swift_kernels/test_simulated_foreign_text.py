"""What shaders that are not the project's may hold, beyond the dialect: simulated Metal runs it too."""
import numpy as np
import pytest
from simulated_kernels import COUNT, HEAD, NEEDS, launch, out, run

from metalstep.kernels.native import NativeDevice

pytestmark = NEEDS


@pytest.fixture
def metal():
    with NativeDevice.open("metal-sim") as device:
        yield device


def result(device: NativeDevice, name: str, buffers: int = 1) -> np.ndarray:
    """The first of `buffers` after a launch; the others hold their index."""
    bound = [out(device) for _ in range(buffers)]
    for index, buffer in enumerate(bound[1:], 1):
        device.numpy(buffer, np.float32, buffer.shape)[:] = index
    run(device, launch(name, *bound))
    return device.numpy(bound[0], np.float32, (COUNT,)).copy()


CONSTANTS = """
constant bool has_bias [[function_constant(20)]];
constant int times [[function_constant(21)]];
constant float unused [[function_constant(22)]];
constant bool has_times = is_function_constant_defined(times);
kernel void k(device float* o [[buffer(0)]], device const float* x [[buffer(1)]],
              device const float* bias [[buffer(2), function_constant(has_bias)]], uint i [[thread_position_in_grid]]) {
  o[i] = x[i] * (has_times ? times : 1);
  if (has_bias) o[i] += bias[i];
}
"""


@pytest.mark.parametrize("values, expected", [({20: "true", 21: "7"}, 9), ({20: "false", 21: "-3"}, -3)])
def test_a_text_gives_the_values_of_function_constants(metal, values, expected):
    """Without the condition nothing needs to be bound."""
    given = "".join(f"#pragma metalstep function_constant({index}) {value}\n" for index, value in values.items())
    metal.add_library(HEAD + given + CONSTANTS)
    assert (result(metal, "k", 3 if values[20] == "true" else 2) == expected).all()


def test_a_function_constant_that_is_used_needs_a_value(metal):
    with pytest.raises(RuntimeError, match="function_constant_20_has_no_value"):
        metal.add_library(HEAD + CONSTANTS)


def test_parameters_without_attributes_are_buffers_in_order(metal):
    metal.add_library(
        HEAD
        + """kernel void k(device float* o, constant const float& two [[buffer(2)]], const device float* three, constant float four[4],
               uint i [[thread_position_in_grid]]) { o[i] = two + 10 * three[i] + 100 * four[i % 4]; }"""
    )
    assert (result(metal, "k", 5) == 432).all()


@pytest.mark.parametrize(
    "instance",
    [
        'template [[host_name("k")]] [[kernel]] decltype(fill<float, 3>) fill<float, 3>;',
        'instantiate_kernel("k", fill, float, 3)',
        '#define THREE 3\n instantiate_kernel("k", fill, float, THREE)',
        "MS_INSTANCE(k, fill<float, 3>)",
    ],
)
def test_instances_of_templates(metal, instance):
    kernel = """template <typename T, int N = 2>
    [[kernel, max_total_threads_per_threadgroup(1024)]] void fill(device T* o [[buffer(0)]], uint i [[thread_position_in_grid]]) {
      o[i] = T(N);
    }
    """
    metal.add_library(HEAD + kernel + instance)
    assert (result(metal, "k") == 3).all()


OVERLOADS = """
template <typename T>
struct Reader {
  T at(const device T* p, uint i) { return p[i]; }
  T at(const threadgroup T* p, uint i) { return p[i]; }
  T at(const device T* p) const threadgroup { return p[0]; }
};
METAL_FUNC float twice(const device float* p) { return 2 * p[0]; }
METAL_FUNC float twice(const threadgroup float* p) { return 2 * p[0]; }
namespace other {
METAL_FUNC float twice(const threadgroup float* p) { return 200 * p[0]; }
}
kernel void k(device float* o [[buffer(0)]], device const float* x [[buffer(1)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float t[1];
  if (i == 0) { t[0] = 3; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 1) { t[0] += 0; }
  Reader<float> reader;
  o[i] = reader.at(t, 0) + twice(x) + twice(&t[0]) + other::twice(t);
}
"""


def test_overloads_that_differ_in_their_address_space(metal):
    metal.add_library(HEAD + OVERLOADS)
    assert (result(metal, "k", 2) == 3 + 2 + 6 + 600).all()


@pytest.mark.parametrize(
    "text, message",
    [
        ("kernel void f(", "kernel f is declared without a body"),
        ("[[kernel", "expected `kernel void name"),
        ("constant bool x [[function_constant(", "expected `constant T name"),
        ('template [[host_name("a")]] [[kernel]] void f() {}', r"expected template \[\[host_name"),
        ('instantiate_kernel("a", f, float)', "an instance of f, which is not a kernel"),
        ('kernel void f(device int* x) {}\ninstantiate_kernel("a b", f, int)', "expected an identifier"),
        ("threadgroup", "threadgroup at the end"),
        ("MS_INSTANCE(a", "expected MS_INSTANCE"),
        ("/*", "unterminated"),
    ],
)
def test_broken_texts_are_refused(metal, text, message):
    with pytest.raises(RuntimeError, match=message):
        metal.add_library(HEAD + text)
