"""The CUDA driver and compiler of fake_cuda.c, built and opened."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import DeviceBuffer, NativeDevice

COMPILER = shutil.which(os.environ.get("METALSTEP_CLANG", "clang").replace("clang++", "clang")) or shutil.which("cc")
COUNT = 64
SOURCE = """#include <metal_stdlib>
using namespace metal;
// fake: add 8 4
kernel void add(device float* y [[buffer(0)]], constant float& by [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i] += by; }
// fake: scale 8 4
kernel void scale(device float* y [[buffer(0)]], constant float& by [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i] *= by; }
// fake: fault 8
kernel void fault(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i << 60] = 1; }
"""


def build(folder: Path) -> Path:
    """The shared library, which is driver and compiler in one."""
    made = folder / "libfake_cuda.so"
    source = Path(__file__).with_name("fake_cuda.c")
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([str(COMPILER), *flags, "-o", str(made), str(source)], check=True)
    return made


class Fake:
    """What a test tells the fake and reads of it."""

    def __init__(self, library: Path, folder: Path, monkeypatch):
        self._monkeypatch, self._log = monkeypatch, folder / "cuda.log"
        monkeypatch.setenv("METALSTEP_CUDA_DRIVER", str(library))
        monkeypatch.setenv("METALSTEP_NVRTC", str(library))
        monkeypatch.setenv("METALSTEP_CUBLAS", str(folder / "none.so"))
        monkeypatch.setenv("METALSTEP_CACHE", str(folder / "cache"))
        monkeypatch.setenv("METALSTEP_FAKE_CUDA_LOG", str(self._log))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.options()

    def options(self, **numbers: int) -> None:
        """Options of fake_cuda.c from now on; those that are not given are as at the start."""
        self._monkeypatch.setenv("METALSTEP_FAKE_CUDA", " ".join(f"{name}={number}" for name, number in numbers.items()))

    def log(self, start: str = "") -> list[str]:
        """Lines that begin so."""
        return [line for line in self._log.read_text().splitlines() if line.startswith(start)] if self._log.exists() else []


def opened(name: str = "cuda") -> NativeDevice:
    device = NativeDevice.open(name)
    device.add_library(SOURCE)
    return device


def floats(device: NativeDevice, values: np.ndarray | float = 0.0, *, shared: bool = False) -> Buffer:
    """A buffer of COUNT float32."""
    owner = device.create_buffer(4 * COUNT, shared=shared)
    owner.write(np.full(COUNT, values, np.float32))
    return region(owner)


def region(owner: DeviceBuffer, offset: int = 0, count: int = COUNT) -> Buffer:
    return Buffer(owner.handle, offset, (count,), "float32")


def read(device: NativeDevice, buffer: Buffer) -> np.ndarray:
    return device.read(buffer, np.float32, buffer.shape)


def launch(name: str, *bindings: Buffer, by: float | None = None, grid: tuple[int, int, int] = (1, 1, 1)) -> Launch:
    constants = b"" if by is None else np.float32(by).tobytes()
    return Launch(name, list(bindings), constants, grid, (COUNT, 1, 1), True)
