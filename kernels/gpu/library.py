"""The source texts that a GPU must compile before a plan can name its kernels."""
from __future__ import annotations

from collections.abc import Collection, Sequence

from metalstep.kernels.gpu import cuda_source
from metalstep.kernels.launch import Launch
from metalstep.kernels.metal_source import metal_source

ROOM = 64  # bytes: constants that a pointer shows have a multiple of it, so that few texts differ
BUILT_IN = ("library_gemm",)  # kernels that the launcher has on CUDA


def sources(launches: Sequence[Launch], compiled: Collection[str]) -> list[tuple[str, list[str]]]:
    """One text per set of families with all kernels of `launches` that are not in `compiled`, and their names."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for launch in launches:
        if launch.code is not None and launch.kernel not in compiled:
            found.setdefault(launch.code.families, {})[launch.kernel] = launch.code.text
    return [
        ("\n".join([metal_source(*families), '#line 1 "generated"', *texts.values(), ""]), list(texts)) for families, texts in found.items()
    ]


def cuda_sources(launches: Sequence[Launch], compiled: Collection[str]) -> dict[str, str]:
    """CUDA C++ of each kernel of `launches` that is not in `compiled`, by its name."""
    found: dict[str, Launch] = {}
    for launch in launches:
        if launch.code is not None and launch.kernel not in compiled:
            before = found.get(launch.kernel)
            if before is None or len(before.constants) < len(launch.constants):
                found[launch.kernel] = launch
    texts = {}
    for kernel, launch in found.items():
        assert launch.code is not None
        source = metal_source(*launch.code.families) + cuda_source.GENERATED + launch.code.text + "\n"
        texts[kernel] = cuda_source.translate(source, max(ROOM, -len(launch.constants) // ROOM * -ROOM))
    return texts
