"""The source texts that a GPU must compile before a plan can name its kernels."""
from __future__ import annotations

from collections.abc import Collection, Sequence

from metalstep.kernels.launch import Launch
from metalstep.kernels.metal_source import metal_source


def sources(launches: Sequence[Launch], compiled: Collection[str]) -> list[tuple[str, list[str]]]:
    """One text per set of families with all kernels of `launches` that are not in `compiled`, and their names."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for launch in launches:
        if launch.code is not None and launch.kernel not in compiled:
            found.setdefault(launch.code.families, {})[launch.kernel] = launch.code.text
    return [
        ("\n".join([metal_source(*families), '#line 1 "generated"', *texts.values(), ""]), list(texts)) for families, texts in found.items()
    ]
