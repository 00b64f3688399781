"""The part of `metalstep doctor` that looks for an NVIDIA GPU, and for what it takes to use it."""
from __future__ import annotations

import ctypes.util
import os
import re
from pathlib import Path

from metalstep.finding import OK, WARN, Finding
from metalstep.kernels.gpu import cuda_libraries

DRIVER = Path("/proc/driver/nvidia")
COMPILER = "libnvrtc.so"
NEEDS = "pip install nvidia-cuda-nvrtc (driver 580 or later) or nvidia-cuda-nvrtc-cu12, or set METALSTEP_NVRTC to libnvrtc.so"
DEVICE_HINT = "metalstep runs on it with --device cuda"


def has_gpu(driver: Path = DRIVER) -> bool:
    """Whether there is an NVIDIA GPU, or a driver for one. driver: the kernel module's folder."""
    return driver.is_dir() or Path("/dev/nvidiactl").exists() or bool(os.environ.get("METALSTEP_CUDA_DRIVER"))


def cuda(driver: Path = DRIVER, folders: list[Path] | None = None) -> Finding:
    """The driver, the GPUs that it has and the compiler of their kernels. Whether they work, the checks of the device say."""
    version, gpus, compiler = driver_version(driver), gpu_names(driver), compiler_file(folders)
    facts = {"driver": version, "gpus": gpus, "nvrtc": None if compiler is None else Path(compiler).name}
    if not has_gpu(driver):
        return Finding("cuda", OK, "no NVIDIA GPU; only --device cuda needs one", facts=facts)
    found = f"driver {version or 'of unknown version'}, {', '.join(gpus) or 'no GPU that it names'}"
    if compiler is None:
        return Finding("cuda", WARN, f"{found}; no NVIDIA compiler (NVRTC), which --device cuda needs", NEEDS, facts)
    return Finding("cuda", OK, f"{found}, {Path(compiler).name}; {DEVICE_HINT}", facts=facts)


def driver_version(driver: Path = DRIVER) -> str | None:
    """Of the kernel module."""
    try:
        match = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", (driver / "version").read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[1] if match else None


def gpu_names(driver: Path = DRIVER) -> list[str]:
    """By the order of their places on the bus."""
    names = []
    for file in sorted(driver.glob("gpus/*/information")):
        match = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        names.append(match[1] if match else "a GPU without a name")
    return names


def compiler_file(folders: list[Path] | None = None) -> str | None:
    """A library of NVRTC where the launcher looks first: METALSTEP_NVRTC, the loader's places, the folders of NVIDIA's wheels."""
    if chosen := os.environ.get("METALSTEP_NVRTC"):
        return chosen if Path(chosen).is_file() else None
    if (found := ctypes.util.find_library("nvrtc")) is not None:
        return found
    for folder in cuda_libraries.folders() if folders is None else folders:
        for file in sorted(folder.glob(f"{COMPILER}.*")):
            return str(file)
    places = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "lib64"]
    return next((str(file) for place in places for file in sorted(place.glob(f"{COMPILER}*"))), None)
