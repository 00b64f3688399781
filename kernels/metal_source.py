"""The text of a .metal file as run-time compilers take it: `makeLibrary(source:)` has no include path."""
from __future__ import annotations

import functools
import re
from importlib import resources

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"[^\n]*$', re.MULTILINE)


@functools.cache
def metal_source(*names: str) -> str:
    """`metal/<name>.metal`, one after the other, with their quoted includes, and theirs, where they are first asked for.

    `#line` keeps the compiler's messages about the files that were written. Raises: ValueError for a file that does not
    exist, naming who includes it.
    """
    seen: set[str] = set()
    return "".join(_inlined(f"{name}.metal", (), seen) for name in names)


def _inlined(file: str, includers: tuple[str, ...], seen: set[str]) -> str:
    if file in seen:  # as #pragma once: our headers hold declarations only
        return ""
    seen.add(file)
    path = resources.files("metalstep.metal") / file
    if not path.is_file():
        raise ValueError(f"metal/{file} does not exist" + "".join(f", included by {name}" for name in includers[:1]))
    text = path.read_text(encoding="utf-8")

    def replace(include: re.Match[str]) -> str:
        body = _inlined(include[1], (file, *includers), seen)
        next_line = text.count("\n", 0, include.end()) + 2
        return f'{body.rstrip()}\n#line {next_line} "{file}"'

    return f'#line 1 "{file}"\n' + INCLUDE.sub(replace, text)
