"""Versions of everything that a result depends on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import metalstep
from metalstep.kernels import params
from metalstep.kernels.native import NativeDevice, NativeUnavailable


def versions() -> dict[str, str]:
    """metalstep, mlx, mlx-lm, Python, the launcher's C ABI and the instruction set of the host device."""
    rows = {
        "metalstep": metalstep.__version__,
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "python": platform.python_version(),
        "abi": str(params.MS_ABI_VERSION),
    }
    try:
        device = NativeDevice.open("host", 0)
    except NativeUnavailable as error:
        return {**rows, "native": f"not available: {error}"}
    info = device.info
    device.close()
    return {**rows, "isa": f"{info.isa}, {info.threads} threads"}


def git_commit() -> str | None:
    """Of the checkout that this is run from, with a + where files differ from it; None for an installed package."""
    top = Path(metalstep.__file__).resolve().parents[1]
    if not (top / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(top)]
        commit = subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if commit.returncode else commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
