"""Has clang type-check Metal source with address spaces that it enforces: what Apple's compiler would refuse, it refuses too."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from language import breaches

CLANG = shutil.which(os.environ.get("METALSTEP_CLANG", "clang++"))
DECLARATIONS = Path(__file__).parent / "lint"  # <metal_stdlib>
FLAGS = [
    "-x", "c++", "-std=c++14", "-fsyntax-only", "-D__METAL_VERSION__=310", f"-I{DECLARATIONS}",
    "-Wall", "-Werror", "-Wno-unknown-attributes", "-Wno-unused", "-Wno-unknown-pragmas",
]  # fmt: skip
SCALARS = "float|half|bfloat|int|uint|short|ushort|char|uchar|long|ulong|bool"
VECTOR = re.compile(rf"(?<![\w<])((?:{SCALARS})[234]|vec<\w+, ?[234]>)\(")
VARIABLE = re.compile(r"^(\s*)(threadgroup\s[\w<>:, ]+\w(?:\[[^;]*\])*;)", re.MULTILINE)


def messages(source: str) -> str:
    """What is wrong with `source`: breaches of the language's rules, and what clang says of it as C++14, which Metal before 4 is based on.

    Three things that only Apple's compiler takes are put into C++ first: attributes of an explicit instantiation, threadgroup variables,
    which are static in everything but name, and constructors of built-in vectors.
    """
    broken = "".join(f"error: {breach}\n" for breach in breaches(source))
    source = source.replace("template [[host_name(#name)]] [[kernel]]", "template")
    source = VARIABLE.sub(r"\1static \2", source)
    source = VECTOR.sub(r"lint_make<\1>(", source)
    return broken + subprocess.run([str(CLANG), *FLAGS, "-"], input=source, capture_output=True, text=True).stderr
