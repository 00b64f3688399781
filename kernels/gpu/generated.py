"""Kernels whose text is made for a launch."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from metalstep.kernels.launch import KernelCode


def named(family: str, lines: Iterable[str]) -> tuple[str, KernelCode]:
    """A kernel's name and code. A digest of the text names it: equal texts are one kernel. KERNEL_NAME in it stands for the name."""
    text = "\n".join(lines)
    name = f"{family}_{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    return name, KernelCode((family,), text.replace("KERNEL_NAME", name))


def choose(index: str, first: int, names: Sequence[str]) -> str:
    """An expression: the name at `index` of `names`, counted from `first`."""
    if len(set(names)) == 1:
        return names[0]
    return "".join(f"{index} == {first + i} ? {name} : " for i, name in enumerate(names[:-1])) + names[-1]
