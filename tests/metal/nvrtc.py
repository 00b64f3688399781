"""NVIDIA's run-time compiler from its wheels: CUDA C++ to machine code, on a machine without a GPU."""
from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

ARCHITECTURE = "sm_90"


@functools.cache
def _places() -> tuple[Path, list[Path]]:
    """The library and the folders of its headers. Raises: FileNotFoundError where the wheels are not installed."""
    for folder in map(Path, sys.path):
        root = folder / "nvidia" / "cu13"
        for library in sorted((root / "lib").glob("libnvrtc.so.*")):
            if ".alt" not in library.name:
                return library, [root / "include", root / "include" / "cccl"]
    raise FileNotFoundError("no libnvrtc: pip install 'metalstep[test]' brings nvidia-cuda-nvrtc")


def compile_cuda(source: str) -> tuple[bytes, str]:
    """(cubin, empty when it did not compile; the compiler's log)."""
    path, folders = _places()
    nvrtc = ctypes.CDLL(str(path))
    options = [f"-arch={ARCHITECTURE}", "-std=c++17", "-default-device", *(f"-I{folder}" for folder in folders)]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.value.decode(errors="replace")
        if failed:
            return b"", text
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw, text
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
