"""Metal source as CUDA C++: the same text behind a header that stands for Metal's standard library (metal/cuda/).

Changed is what C++ has no word for: attributes go, a kernel becomes a device function, `MS_INSTANCE` and every kernel that is no
template become entry points whose parameters' types the compiler deduces, and threadgroup variables become shared memory.

A kernel's last buffer, if it is in the constant address space, is its launch's constants: they are a parameter by value. A launch may
begin while the one before it still runs: a kernel that does not say where it waits for that (MS_WAIT_PREVIOUS) waits at its entry.
"""
from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources

KERNEL = re.compile(r"(?:\[\[\s*kernel\b([^\]]*)\]\]|\bkernel\b)\s*void\s+(\w+)\s*\(")
THREADS = re.compile(r"max_total_threads_per_threadgroup\s*\(")
ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*\]\]")
VARIABLE = re.compile(r"(?<=[;{}])(\s*)threadgroup\s+((?:[\w:<>, ]|\n)+?\w\s*(?:\[[^;]*\])?);")
INSTANCE = re.compile(r"^[ \t]*MS_INSTANCE\s*\(", re.MULTILINE)
BLANK = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_[^\n]*$", re.MULTILINE)
WAIT = "MS_WAIT_PREVIOUS"
FUNCTION = re.compile(r"\b(?!(?:if|for|while|switch)\b)(\w+)\s*\([^;{}]*\)\s*\{")
MACRO = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)((?:\\\n|[^\n])*)", re.MULTILINE)
WORD = re.compile(r"\w+")
PARENTHESES = re.compile(r"[()]")
BRACES = re.compile(r"[{}]")
GENERATED = '\n#line 1 "generated"\n'  # behind what was written
CONSTANT_BYTES = 1024  # room for constants that a pointer shows, where it is not said how many they are
DIALECT = re.compile(r'#line 1 "ms_dialect\.h"\n.*?#endif\n(?=#line)', re.DOTALL)


@dataclass(frozen=True)
class _Kernel:
    name: str
    attributes: list[tuple[str, str]]  # name, argument
    parameters: str | None  # of its template
    threads: str  # in a threadgroup at most, of its template's parameters: registers are divided among them
    has_constants: bool  # its last buffer is in the constant address space
    waits: bool  # by itself

    def entry(self, host: str, function: str, constant_bytes: int) -> str:
        """A kernel that CUDA finds by the name `host`."""
        slots = {int(argument): i for i, (name, argument) in enumerate(self.attributes) if name == "buffer"}
        last = max(slots, default=-1)
        buffers = [f"b{i}" for i in range(last + (not self.has_constants))]
        # What the wait makes of a pointer is another pointer, of which the compiler knows nothing.
        formal = [f"void* {'__restrict__ ' if self.waits else ''}{name}" for name in buffers]
        given = list(buffers)
        if self.has_constants:
            formal.append(f"const __grid_constant__ typename cu_constants<decltype(&{function}), {slots[last]}, {constant_bytes}>::type c")
            given.append("(void*)&c")
        listed = ", ".join(f"cu_at_buffer<{argument}>" if name == "buffer" else f"cu_at_{name}" for name, argument in self.attributes)
        threads = self.threads if self.parameters is None else f"cu_threads_{function.strip()}"
        wait = "" if self.waits else f"cu_wait({', '.join(buffers)}); "
        table = f"void* const b[] = {{{', '.join(given)}}}; " if given else "void* const* const b = nullptr; "
        return (
            f'extern "C" __global__ void __launch_bounds__({threads}) {host}({", ".join(formal)}) '
            f"{{ {wait}{table}cu_entry<&{function}, cu_list<{listed}>>::call(b); }}"
        )


def translate(source: str, constant_bytes: int = CONSTANT_BYTES) -> str:
    """CUDA C++ for NVRTC (-std=c++17 -default-device, no headers) of a Metal source whose quoted includes are inlined.

    constant_bytes: room for the constants of launches of kernels that take them by pointer. What stands in front of a line `GENERATED`
    is remembered: many kernels have it in common.
    Raises: ValueError for a kernel whose parameter has no attribute.
    """
    written, line, generated = source.partition(GENERATED)
    common = _translated(written, constant_bytes)
    if not line:
        return common.text
    return common.text + line + _Piece(generated, constant_bytes, common).text


@functools.lru_cache(maxsize=32)
def _translated(source: str, constant_bytes: int) -> _Piece:
    source = INCLUDE.sub("", DIALECT.sub(lambda _: _header("ms_dialect.h") + "\n", source))
    piece = _Piece(source, constant_bytes, None)
    piece.text = _header("metal_stdlib.h") + '\n#line 1 "kernels.metal"\n' + piece.text
    return piece


class _Piece:
    """A source, translated, behind another one. kernels: by their names; waiting: words by which a kernel waits for the launch before
    it, the macro and the functions and macros that use it."""

    def __init__(self, source: str, constant_bytes: int, before: _Piece | None):
        self.kernels: dict[str, _Kernel] = dict(before.kernels) if before else {}
        self._constant_bytes = constant_bytes
        self._edits: list[tuple[int, int, str]] = []
        self._code = BLANK.sub(_blank, source)
        self._blocks = _blocks(self._code)
        known = before.waiting if before else frozenset({WAIT})
        self.waiting: frozenset[str] = _waiting(self._code, self._blocks, known)
        for found in KERNEL.finditer(self._code):
            self._kernel(found)
        for found in INSTANCE.finditer(self._code):
            end = _closing(self._code, found.end() - 1, PARENTHESES)
            host, function = self._code[found.end() : end].split(",", 1)
            kernel = self.kernels[function.strip().split("<", 1)[0]]
            self._edits.append((found.start(), end + 1, kernel.entry(host.strip(), function.strip(), constant_bytes)))
        self.text = _applied(source, self._edits)

    def _kernel(self, found: re.Match[str]) -> None:
        code, edits, name = self._code, self._edits, found[2]
        end = _closing(code, found.end() - 1, PARENTHESES)
        attributes, constants = [], {}
        for parameter in _split(code[found.end() : end]):
            attribute = ATTRIBUTE.search(parameter)
            if attribute is None:
                raise ValueError(f"cuda: parameter `{' '.join(parameter.split())}` of kernel {name} has no attribute")
            attributes.append((attribute[1], attribute[2] or ""))
            if attribute[1] == "buffer":
                constants[int(attribute[2])] = "constant" in WORD.findall(parameter)
        body = code.index("{", end)
        last = self._blocks[body]
        start, parameters = _template(code, found.start())
        kernel = _Kernel(
            name,
            attributes,
            parameters,
            _threads(found[1] or ""),
            has_constants=bool(constants) and constants[max(constants)],
            waits=not self.waiting.isdisjoint(WORD.findall(code[body:last])),
        )
        self.kernels[name] = kernel
        own = f"ms_body_{name}" if parameters is None else name
        if parameters is None:
            edits.append((last + 1, last + 1, " " + kernel.entry(name, own, self._constant_bytes)))
        else:
            edits.append((start, start, f"template <{parameters}> constexpr int cu_threads_{name} = {kernel.threads}; "))
        edits.append((found.start(), found.end(), f"void {own}("))
        edits += [(found.end() + a.start(), found.end() + a.end(), "") for a in ATTRIBUTE.finditer(code[found.end() : end])]
        for variable in VARIABLE.finditer(code, body, last + 1):
            edits.append((variable.end(1), variable.start(2), "__shared__ __align__(16) "))


def _blank(found: re.Match[str]) -> str:
    text = found[0]
    return re.sub(r"[^\n]", " ", text) if "\n" in text else " " * len(text)


def _blocks(code: str) -> dict[int, int]:
    """Where each brace closes, by where it opens. Raises: ValueError for one that does not."""
    found, open_ = {}, []
    for brace in BRACES.finditer(code):
        if brace[0] == "{":
            open_.append(brace.start())
        elif open_:
            found[open_.pop()] = brace.start()
    if open_:
        raise ValueError("cuda: an unbalanced {")
    return found


def _waiting(code: str, blocks: dict[int, int], known: frozenset[str]) -> frozenset[str]:
    """`known`, and the functions and macros that use one of them."""
    if not any(name in code for name in known):
        return known
    users = [(found[1], found.start(2), found.end(2)) for found in MACRO.finditer(code) if found[1] != WAIT]
    users += [(found[1], found.end(), blocks[found.end() - 1]) for found in FUNCTION.finditer(code)]
    names, new = set(known), set(known)
    while new:
        places = [found.start() for name in new for found in re.finditer(rf"\b{name}\b", code)]
        new = {name for name, start, end in users if any(start <= at < end for at in places)} - names
        names |= new
    return frozenset(names)


def _template(code: str, kernel: int) -> tuple[int, str | None]:
    """Where the template begins that a kernel at this place is, and its parameters; None: it is none."""
    end = len(code[:kernel].rstrip())
    if not code[:end].endswith(">"):
        return kernel, None
    start, depth = end - 1, 1
    while depth:
        start -= 1
        depth += (code[start] == ">") - (code[start] == "<")
    return code.rindex("template", 0, start), code[start + 1 : end - 1]


def _threads(attribute: str) -> str:
    """max_total_threads_per_threadgroup in a kernel's attribute; without it as many as there can be."""
    found = THREADS.search(attribute)
    return attribute[found.end() : _closing(attribute, found.end() - 1, PARENTHESES)] if found else "1024"


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


def _closing(text: str, start: int, brackets: re.Pattern[str]) -> int:
    """Where the bracket at `start` closes."""
    opening, depth = text[start], 0
    for found in brackets.finditer(text, start):
        depth += 1 if found[0] == opening else -1
        if depth == 0:
            return found.start()
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
