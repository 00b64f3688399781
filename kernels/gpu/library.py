"""The source texts that a GPU must compile before a plan can name its kernels."""
from __future__ import annotations

from collections.abc import Sequence

from metalstep.kernels.launch import Launch
from metalstep.kernels.metal_source import metal_source


def sources(launches: Sequence[Launch], compiled: set[str]) -> list[str]:
    """One text per set of families with all kernels of `launches` that are not in `compiled`, which they join."""
    texts: dict[tuple[str, ...], list[str]] = {}
    for launch in launches:
        if launch.code is not None and launch.kernel not in compiled:
            compiled.add(launch.kernel)
            texts.setdefault(launch.code.families, []).append(launch.code.text)
    return ["\n".join([metal_source(*families), '#line 1 "generated"', *parts, ""]) for families, parts in texts.items()]
