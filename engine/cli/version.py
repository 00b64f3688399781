"""Versions of everything that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version

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
