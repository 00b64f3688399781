"""Where a picture is written: the kinds of files, refused before anything is measured."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def check_plot(path: str) -> None:
    """Before anything is measured. Raises: ValueError for a file name of another kind, or a folder that is not there; RuntimeError for a
    PNG without matplotlib."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png"):
        raise ValueError(f"--plot {path}: expected a name that ends in .svg or .png")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {Path(path).parent}; make it first")
    if suffix == ".png" and find_spec("matplotlib") is None:
        raise RuntimeError(f"--plot {path}: a PNG needs matplotlib, which is not installed; name a .svg file, or `pip install matplotlib`")


def is_svg(path: str) -> bool:
    return Path(path).suffix.lower() == ".svg"
