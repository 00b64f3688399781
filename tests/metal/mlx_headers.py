"""MLX's Metal kernels, from the headers of the macOS wheel of `mlx-metal`, as one source text each.

The wheel is fetched once into build/mlx-metal; its version is that of the installed mlx, whose results the kernels must give.
"""
from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "mlx-metal" / version("mlx")
KERNELS = "mlx/backend/metal/kernels"
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def folder() -> Path:
    """Where the headers are. Raises: subprocess.CalledProcessError with pip's words when the wheel cannot be had."""
    include = FOLDER / "mlx" / "include"
    if not include.exists():
        release = version("mlx").split(".post")[0]
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as made:  # tests run side by side: who is second finds a whole folder
            wheel = f"mlx-metal>={release},<{release}.1"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--dest={made}"]
            subprocess.run([*pip, "--platform=macosx_14_0_arm64", wheel], check=True)
            (file,) = Path(made).glob("*.whl")
            headers = Path(made) / "headers"
            with zipfile.ZipFile(file) as archive:
                wanted = [name for name in archive.namelist() if name.startswith("mlx/include/") and name.endswith(".h")]
                archive.extractall(headers, wanted)
            with contextlib.suppress(OSError):  # another one was faster
                headers.rename(FOLDER)
    return include


def names() -> list[str]:
    """Every kernel header, relative to the folder of them all."""
    root = folder() / KERNELS
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.h"))


def source(headers: Sequence[str], instances: str = "", constants: Mapping[int, object] | None = None) -> str:
    """`headers` with all that they include, each once, then `instances`. constants: values of function constants by index."""
    root, seen = folder(), {f"{KERNELS}/bf16_math.h"}  # of the compiler's own names

    def inlined(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = re.sub(r"^\s*#\s*(include\s*<metal\w*>|pragma once)\s*$", "", (root / name).read_text(), flags=re.MULTILINE)
        return re.sub(r'^\s*#\s*include\s*"(mlx/[^"]+)"\s*$', lambda m: inlined(m.group(1)), text, flags=re.MULTILINE)

    given = "".join(f"#pragma metalstep function_constant({i}) {str(v).lower()}\n" for i, v in (constants or {}).items())
    return HEAD + given + "\n".join(inlined(f"{KERNELS}/{name}") for name in ("utils.h", *headers)) + "\n" + instances
