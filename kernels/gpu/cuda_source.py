"""Metal source as CUDA C++: the same text behind a header that stands for Metal's standard library (metal/cuda/).

Changed is what C++ has no word for: attributes go, a kernel becomes a device function, `MS_INSTANCE` and every kernel that is no
template become entry points whose parameters' types the compiler deduces, and threadgroup variables become shared memory.
"""
from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources

KERNEL = re.compile(r"(?:\[\[\s*kernel\b([^\]]*)\]\]|\bkernel\b)\s*void\s+(\w+)\s*\(")
THREADS = re.compile(r"max_total_threads_per_threadgroup\((\d+)\)")
ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*\]\]")
VARIABLE = re.compile(r"(?<=[;{}])(\s*)threadgroup\s+((?:[\w:<>, ]|\n)+?\w\s*(?:\[[^;]*\])?);")
INSTANCE = re.compile(r"^[ \t]*MS_INSTANCE\s*\(", re.MULTILINE)
BLANK = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_[^\n]*$", re.MULTILINE)
DIALECT = re.compile(r'#line 1 "ms_dialect\.h"\n.*?#endif\n(?=#line)', re.DOTALL)


@dataclass(frozen=True)
class _Kernel:
    name: str
    attributes: list[tuple[str, str]]  # name, argument
    template: bool
    threads: str  # in a threadgroup at most: registers are divided among them

    def entry(self, host: str, function: str) -> str:
        """A kernel that CUDA finds by the name `host`."""
        buffers = 1 + max((int(argument) for name, argument in self.attributes if name == "buffer"), default=-1)
        formal = ", ".join(f"void* __restrict__ b{i}" for i in range(buffers))
        listed = ", ".join(f"cu_at_buffer<{argument}>" if name == "buffer" else f"cu_at_{name}" for name, argument in self.attributes)
        given = ", ".join(f"b{i}" for i in range(buffers))
        return (
            f'extern "C" __global__ void __launch_bounds__({self.threads}) {host}({formal}) '
            f"{{ void* const b[] = {{{given}}}; cu_entry<&{function}, cu_list<{listed}>>::call(b); }}"
        )


def translate(source: str) -> str:
    """CUDA C++ for NVRTC (-std=c++17 -default-device) of a Metal source whose quoted includes are inlined.

    Raises: ValueError for a kernel whose parameter has no attribute.
    """
    source = INCLUDE.sub("", DIALECT.sub(lambda _: _header("ms_dialect.h") + "\n", source))
    code = BLANK.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    edits: list[tuple[int, int, str]] = []
    kernels: dict[str, _Kernel] = {}
    for found in KERNEL.finditer(code):
        end = _closing(code, found.end() - 1, "(", ")")
        attributes = []
        for parameter in _split(code[found.end() : end]):
            attribute = ATTRIBUTE.search(parameter)
            if attribute is None:
                raise ValueError(f"cuda: parameter `{' '.join(parameter.split())}` of kernel {found[2]} has no attribute")
            attributes.append((attribute[1], attribute[2] or ""))
        threads = THREADS.search(found[1] or "")
        template = code[: found.start()].rstrip().endswith(">")
        kernel = _Kernel(found[2], attributes, template, threads[1] if threads else "1024")
        kernels[kernel.name] = kernel
        own = kernel.name if kernel.template else f"ms_body_{kernel.name}"
        edits.append((found.start(), found.end(), f"void {own}("))
        edits += [(found.end() + a.start(), found.end() + a.end(), "") for a in ATTRIBUTE.finditer(code[found.end() : end])]
        body = code.index("{", end)
        last = _closing(code, body, "{", "}")
        for variable in VARIABLE.finditer(code[: last + 1], body):
            edits.append((variable.end(1), variable.start(2), "__shared__ __align__(16) "))
        if not kernel.template:
            edits.append((last + 1, last + 1, " " + kernel.entry(kernel.name, own)))
    for found in INSTANCE.finditer(code):
        end = _closing(code, found.end() - 1, "(", ")")
        host, function = code[found.end() : end].split(",", 1)
        name = function.strip().split("<", 1)[0]
        edits.append((found.start(), end + 1, kernels[name].entry(host.strip(), function.strip())))
    return _header("metal_stdlib.h") + "\n" + _applied(source, edits)


@functools.cache
def _header(name: str) -> str:
    text = (resources.files("metalstep.metal") / "cuda" / name).read_text(encoding="utf-8")
    return f'#line 1 "cuda/{name}"\n{text}'


def _applied(source: str, edits: list[tuple[int, int, str]]) -> str:
    parts, at = [], 0
    for start, end, text in sorted(edits):
        parts += [source[at:start], text, "\n" * source.count("\n", start, end)]  # line numbers stay
        at = end
    return "".join([*parts, source[at:]])


def _closing(text: str, start: int, opening: str, closing: str) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i
    raise ValueError(f"cuda: an unbalanced {opening}")


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, first = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "<([{") - (c in ">)]}")
        if c == "," and depth == 0:
            parts.append(text[first:i])
            first = i + 1
    return [*parts, text[first:]] if text.strip() else []
