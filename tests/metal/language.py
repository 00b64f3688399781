"""Rules of the Metal language that a C++ compiler does not know: sections of the Metal Shading Language Specification 3.1."""
from __future__ import annotations

import re
from collections.abc import Iterator

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# 1.5.4: what C++ has and Metal has not; 2.1: there is no double; and words of Metal's that are names in C++.
WORDS = (
    "asm catch co_await delete double dynamic_cast export fragment goto main mesh new noexcept object_data patch ray_data"
    " register std stitchable thread_local throw try typeid vertex virtual visible wchar_t"
)  # fmt: skip
WORD = re.compile(rf"\b({'|'.join(WORDS.split())})\b")
LAMBDA = re.compile(r"\[\s*[&=]?\s*\]\s*[({]|\[\s*[&=]\s*[,\]]")
DERIVED = re.compile(r"\b(?:struct|class)\s+\w+\s*:")
# 4.2: a variable of the program is in constant memory.
SCALAR = "float|half|bfloat|bool|(?:u?(?:char|short|int|long))"
GLOBAL = re.compile(rf"^(?:(?:static|const|constexpr|inline)\s+)*(?:{SCALAR})[234]?\s+\w+(?:\[[^;()]*\])?\s*=", re.MULTILINE)
KERNEL = re.compile(r"\[\[\s*kernel\b[^\n]*?\]\]\s*void\s+(\w+)\s*\(|\bkernel\s+void\s+(\w+)\s*\(")
ATTRIBUTE = re.compile(r"([\w:<>*& ]+?)\s*[*&]?\s*\b\w+\s*\[\[(\w+)(?:\((\d+)\))?\]\]")
# 5.1.3: what a kernel may say of itself. A compiler passes over an attribute that it does not know.
OTHER_KERNEL = re.compile(r"\[\[\s*(?!kernel(?:, max_total_threads_per_threadgroup\([^\n]+?\))?\]\])kernel\b[^\n]*?\]\]")
# 5.2.3.6: positions and sizes have as many components, all of a kernel's.
POSITIONS = {
    "thread_position_in_grid", "threads_per_grid", "thread_position_in_threadgroup", "threads_per_threadgroup",
    "threadgroup_position_in_grid", "dispatch_threads_per_threadgroup", "threadgroups_per_grid",
}  # fmt: skip
INDICES = {
    "thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
}  # fmt: skip
MAX_BUFFERS = 31


def breaches(source: str) -> list[str]:
    """What `source` does that Metal 3.1 does not take, a line each; none where it keeps to the rules."""
    text = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), source)
    found = [f"{what} {match[0].strip()!r}" for what, pattern in _PATTERNS.items() for match in pattern.finditer(text)]
    seen: set[str] = set()
    for name, parameters in kernels(text):
        found += [f"kernel {name}: {breach}" for breach in _parameters(parameters)]
        if name in seen:  # 1.5.1
            found.append(f"kernel {name}: overloaded")
        seen.add(name)
    return found


_PATTERNS = {
    "not in Metal:": WORD, "a lambda:": LAMBDA, "a derived class:": DERIVED, "a global outside constant memory:": GLOBAL,
    "other attributes of a kernel:": OTHER_KERNEL,
}  # fmt: skip


def kernels(text: str) -> Iterator[tuple[str, str]]:
    """Name and parameter list of each kernel of a text without comments."""
    for match in KERNEL.finditer(text):
        depth, at = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
        yield match[1] or match[2], text[match.end() : at - 1]


def _parameters(parameters: str) -> Iterator[str]:
    attributes = [(m[1].split()[-1], m[2], m[3]) for m in ATTRIBUTE.finditer(parameters)]
    positions = {kind[-1] if kind[-1].isdigit() else "1" for kind, name, _ in attributes if name in POSITIONS}
    if len(positions) > 1:
        yield f"positions of {' and '.join(sorted(positions))} components"
    for kind, name, _ in attributes:
        if name not in POSITIONS | INDICES | {"buffer"}:
            yield f"{name} is in no table of this check"
        elif name != "buffer" and not re.fullmatch(r"u(int|short)[23]?" if name in POSITIONS else r"u(int|short)", kind):
            yield f"{name} is no {kind}"
    slots = [int(index) for _, name, index in attributes if name == "buffer"]
    if len(set(slots)) < len(slots) or max(slots, default=0) >= MAX_BUFFERS:
        yield f"buffers {slots}: each once, and below {MAX_BUFFERS}"
