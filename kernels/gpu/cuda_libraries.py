"""Where NVIDIA's shared libraries are that pip has installed: the loader does not look there."""
from __future__ import annotations

import sys
from pathlib import Path


def folders() -> list[Path]:
    """Folders of libraries of the wheels beside this Python, the newest CUDA first (nvidia/cu13/lib, nvidia/cuda_nvrtc/lib)."""
    roots = [Path(entry) / "nvidia" for entry in sys.path if entry]
    return [folder for root in roots for folder in sorted(root.glob("*/lib"), key=_order) if folder.is_dir()]


def _order(folder: Path) -> tuple[bool, int, str]:
    """Wheels of CUDA 13 and later share a folder by its number; those before have one each."""
    name = folder.parent.name
    number = name.removeprefix("cu")
    return (not number.isdecimal(), -int(number) if number.isdecimal() else 0, name)
