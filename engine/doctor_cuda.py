"""The part of `metalstep doctor` that looks for an NVIDIA GPU, and for what it takes to use it."""
from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

from metalstep.finding import OK, SLOW, WARN, Finding
from metalstep.kernels.gpu import cuda_libraries
from metalstep.kernels.native import NativeDevice

DRIVER = Path("/proc/driver/nvidia")
LIBRARIES = {  # files, the first that there is
    "nvrtc": ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"),
    "cublasLt": ("libcublasLt.so.13", "libcublasLt.so.12"),
}
TOOLKIT = "/usr/local/cuda"
NEEDS = "pip install nvidia-cuda-nvrtc (driver 580 or later) or nvidia-cuda-nvrtc-cu12, or set METALSTEP_NVRTC to libnvrtc.so"
DEVICE_HINT = "metalstep runs on it with --device cuda"
WITHOUT_PRODUCTS = "long prompts run on metalstep's own kernels, slower"


def has_gpu(driver: Path = DRIVER) -> bool:
    """Whether there is an NVIDIA GPU, or a driver for one. driver: the kernel module's folder."""
    return driver.is_dir() or Path("/dev/nvidiactl").exists() or bool(os.environ.get("METALSTEP_CUDA_DRIVER"))


def refusal(device: str) -> str | None:
    """Why a device does not open, in the launcher's words; None where it does."""
    try:
        NativeDevice.open(device).close()
    except (ValueError, RuntimeError, MemoryError, TimeoutError) as error:
        return str(error)
    return None


def cuda(driver: Path = DRIVER, folders: list[Path] | None = None) -> Finding:
    """The driver, the GPUs that it has, the compiler of their kernels and the library of products. Why the device does not open, the
    check of the device says."""
    version, gpus = driver_version(driver), gpu_names(driver)
    facts: dict[str, Any] = {"driver": version, "gpus": gpus}
    if not has_gpu(driver):
        return Finding("cuda", OK, "no NVIDIA GPU; only --device cuda needs one", facts=facts)
    compiler, no_compiler = find_library("nvrtc", "METALSTEP_NVRTC", "nvrtcVersion", folders)
    products, no_products = find_library("cublasLt", "METALSTEP_CUBLAS", "cublasLtMatmul", folders)
    facts |= {"nvrtc": named(compiler), "cublas": named(products)}
    refused = refusal("cuda")
    if refused is not None and version is None and not gpus:
        found = "no driver of NVIDIA's is loaded"
    else:
        found = f"driver {version or 'of unknown version'}, {', '.join(gpus) or 'no GPU that it names'}"
    found += f", cuBLAS {products}" if products else f", no cuBLAS (libcublasLt){no_products}: {WITHOUT_PRODUCTS}"
    if compiler is None:
        hint = "set METALSTEP_NVRTC to the path of libnvrtc.so, or unset it" if no_compiler else NEEDS
        return Finding("cuda", WARN, f"{found}; no NVIDIA compiler (NVRTC), which --device cuda needs{no_compiler}", hint, facts)
    found += f"; compiler {compiler}"
    if refused is not None:
        return Finding("cuda", WARN, f"{found}; the device does not open", "see device cuda above", facts)
    if no_products:
        hint = "set METALSTEP_CUBLAS to libcublasLt.so of CUDA 12 or later, or unset it"
        return Finding("cuda", WARN, f"{found}; {DEVICE_HINT}", hint, facts)
    return Finding("cuda", OK, f"{found}; {DEVICE_HINT}", facts=facts)


def without_products(folders: list[Path] | None = None) -> Finding | None:
    """What a GPU without NVIDIA's library of products would gain by it; None where there is nothing."""
    if not has_gpu() or refusal("cuda") is not None or find_library("cublasLt", "METALSTEP_CUBLAS", "cublasLtMatmul", folders)[0]:
        return None
    hint = "pip install nvidia-cublas, or set METALSTEP_CUBLAS to libcublasLt.so of CUDA 12 or later"
    return Finding("cublas", SLOW, f"no cuBLAS (libcublasLt): {WITHOUT_PRODUCTS}", hint)


def named(library: str | None) -> str | None:
    return None if library is None else Path(library).name


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


def find_library(name: str, variable: str, symbol: str, folders: list[Path] | None = None) -> tuple[str | None, str]:
    """(the first of NVIDIA's libraries of that name that opens, what is wrong with the one that `variable` names, or empty).

    Looked for where the launcher looks: `variable`, the loader's places, the folders of NVIDIA's wheels, a toolkit's. symbol: a function
    by which it is known.
    """
    if chosen := os.environ.get(variable):
        wrong = fault(chosen, symbol)
        return (chosen, "") if wrong is None else (None, f" ({variable} is {chosen!r}: {wrong})")
    chosen_toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")] if name == "nvrtc" else []
    toolkits = [Path(folder) / "lib64" for folder in (*chosen_toolkits, TOOLKIT) if folder]
    places = [*(cuda_libraries.folders() if folders is None else folders), *toolkits]
    paths = [*LIBRARIES[name], *(str(place / file) for place in places for file in LIBRARIES[name])]
    return next((path for path in paths if fault(path, symbol) is None), None), ""


def fault(path: str, symbol: str) -> str | None:
    """Why a file is not the library that is wanted; None where it is."""
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return str(error)
    return None if hasattr(library, symbol) else f"it has no {symbol}"
