"""Metal source as CUDA: what the compiler makes of constants, waits, half arithmetic and limits of threads."""
import re
import sys

import pytest
from nvrtc import compile_cuda, ptx

from metalstep.kernels.gpu.cuda_source import translate
from metalstep.kernels.metal_source import metal_source

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA's compiler does not exist for this system")
HEAD = "#include <metal_stdlib>\nusing namespace metal;\nstruct Params { uint n; float by; uint more[3]; };\n"
DIALECT = metal_source("add_rms_norm").partition('#line 1 "ms_dialect.h"')[2].partition("#line")[0]
PLAIN = """kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant Params& p [[buffer(2)]],
  uint i [[thread_position_in_grid]]) { if (i < p.n) y[i] = x[i] * p.by; }
"""


def parameters(text: str, kernel: str = "k") -> list[int]:
    """Bytes of an entry's parameters."""
    listed = re.search(rf"\.entry {kernel}\((.*?)\)", text, re.DOTALL)
    assert listed is not None
    return [int(size or 8) for size in re.findall(r"\.param [^,\n]*?_\d+(?:\[(\d+)\])?,?\n", listed[1] + "\n")]


def with_dialect(kernel: str) -> str:
    """A kernel behind the dialect's header, as `metal_source` writes it."""
    return f'#include <metal_stdlib>\nusing namespace metal;\n#line 1 "ms_dialect.h"\n{DIALECT}#line 1 "k.metal"\n{HEAD}{kernel}'


def test_constants_are_a_parameter_by_value():
    text = ptx(translate(HEAD + PLAIN))
    assert parameters(text) == [8, 8, 20]
    assert len(re.findall(r"ld\.param\.[uf]32", text)) == 2, "they are not read through memory"


@pytest.mark.parametrize("nbytes", [64, 1024])
def test_constants_behind_a_pointer_have_the_room_that_is_asked_for(nbytes):
    kernel = """kernel void k(device float* y [[buffer(0)]], constant Params* p [[buffer(1)]], uint i [[thread_position_in_grid]]) {
      constant float* values = (constant float*)(p + 1);
      y[i] = values[i % p->n]; }"""
    assert parameters(ptx(translate(HEAD + kernel, nbytes))) == [8, nbytes]


def test_a_constant_buffer_in_front_of_others_is_memory():
    kernel = "kernel void k(constant Params& p [[buffer(0)]], device float* y [[buffer(1)]]) { y[0] = p.by; }"
    assert parameters(ptx(translate(HEAD + kernel))) == [8, 8]


def test_places_may_be_left_out_and_in_any_order():
    kernel = "kernel void k(device int* y [[buffer(3)]], uint i [[thread_position_in_grid]], device int* x [[buffer(1)]]) { y[i] = x[i]; }"
    assert parameters(ptx(translate(HEAD + kernel))) == [8, 8, 8, 8]


def order(text: str) -> list[str]:
    """Waits, launches and accesses of memory, as they come."""
    return re.findall(r"griddepcontrol\.\w+|ld\.global|st\.global|ld\.u|ld\.f|st\.f", text)


def test_a_kernel_waits_before_it_reads_and_then_lets_the_next_begin():
    assert order(ptx(translate(HEAD + PLAIN))) == ["griddepcontrol.wait", "griddepcontrol.launch_dependents", "ld.global", "st.global"]


@pytest.mark.parametrize(
    "before, wait",
    [
        ("", "MS_WAIT_PREVIOUS(x); MS_LAUNCH_NEXT;"),
        ("#define READY(p) \\\n  MS_WAIT_PREVIOUS(p)\n", "READY(x); MS_LAUNCH_NEXT;"),
        ("inline device const float* ready(device const float* p) { MS_WAIT_PREVIOUS(p); MS_LAUNCH_NEXT; return p; }\n"
         "template <typename T> inline T* twice(T* p) { return ready(p); }\n", "x = twice(x);"),
    ],
    ids=["itself", "by a macro", "by a function of a function"],
)  # fmt: skip
def test_a_kernel_that_waits_by_itself_reads_its_weights_before(before, wait):
    kernel = f"""{before}kernel void k(device const float* w [[buffer(0)]], device const float* x [[buffer(1)]],
      device float* y [[buffer(2)]], uint i [[thread_position_in_grid]]) {{
      const float weight = w[i];
      {wait}
      y[i] = weight * x[i]; }}"""
    text = order(ptx(translate(with_dialect(kernel))))
    assert text == ["ld.global", "griddepcontrol.wait", "griddepcontrol.launch_dependents", "ld.global", "st.global"]


def test_a_comment_is_no_wait():
    kernel = PLAIN.replace("{ if", "{ /* MS_WAIT_PREVIOUS */ // MS_WAIT_PREVIOUS\n if")
    assert order(ptx(translate(HEAD + kernel)))[0] == "griddepcontrol.wait"


def test_gpus_that_begin_no_launch_early_do_not_wait():
    assert "griddepcontrol" not in ptx(translate(with_dialect(PLAIN)), "compute_80")


def test_two_halves_are_computed_at_once():
    kernel = """kernel void k(device const half2* x [[buffer(0)]], device half2* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
      y[i] = fma(x[i], x[i + 1], x[i + 2]) * x[i + 3] + x[i + 4] - half2(half(2.0f)); }"""
    text = ptx(translate(HEAD + kernel))
    assert re.findall(r"\w+(?:\.rn)?\.f16x2", text) == ["fma.rn.f16x2", "mul.f16x2", "add.f16x2", "sub.f16x2"]
    assert "ld.global.u32" in text and "ld.global.u16" not in text


@pytest.mark.parametrize("threads, expected", [(None, 1024), ("96", 96), ("(N + 1) * 32", 128)])
def test_threads_in_a_threadgroup_may_be_an_expression_of_template_arguments(threads, expected):
    attribute = f", max_total_threads_per_threadgroup({threads})" if threads else ""
    kernel = f"""template <typename T, int N>
      [[kernel{attribute}]] void k(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {{ y[i] = T(N); }}
      MS_INSTANCE(k_half_3, k<half, 3>)"""
    assert re.search(r"\.maxntid (\d+)", ptx(translate(HEAD + kernel)))[1] == str(expected)


def test_a_parameter_without_an_attribute_is_refused():
    with pytest.raises(ValueError, match="parameter `uint i` of kernel k has no attribute"):
        translate(HEAD + PLAIN.replace(" [[thread_position_in_grid]]", ""))


def test_lines_stay_where_they_were():
    source = HEAD + PLAIN.replace("p.by", "p.by_what")
    _, log = compile_cuda(translate(source))
    line = 1 + source[: source.index("p.by_what")].count("\n")
    assert f"kernels.metal({line}): error" in log
