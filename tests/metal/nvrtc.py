"""NVIDIA's run-time compiler from its wheels: CUDA C++ to machine code, on a machine without a GPU."""
from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path

ARCHITECTURE = "sm_90"


@functools.cache
def _library() -> ctypes.CDLL:
    """Raises: FileNotFoundError where the wheels are not installed."""
    for folder in map(Path, sys.path):
        for library in sorted((folder / "nvidia" / "cu13" / "lib").glob("libnvrtc.so.*")):
            if ".alt" not in library.name:
                return ctypes.CDLL(str(library))
    raise FileNotFoundError("no libnvrtc: pip install 'metalstep[test]' brings nvidia-cuda-nvrtc")


def compile_cuda(source: str) -> tuple[bytes, str]:
    """(cubin, empty when it did not compile; the compiler's log). The compiler is given no headers."""
    return _compiled(source, ARCHITECTURE, "CUBIN")


def ptx(source: str, architecture: str = "compute_90") -> str:
    """What the compiler makes of a source before it is machine code. Raises: ValueError with the compiler's log."""
    text, log = _compiled(source, architecture, "PTX")
    if not text:
        raise ValueError(log)
    return text.rstrip(b"\0").decode()


def spilled(source: str) -> int:
    """Bytes that kernels of a source keep in memory for want of registers. Raises: ValueError with the compiler's log."""
    cubin, log = _compiled(source, ARCHITECTURE, "CUBIN", "--ptxas-options=-v")
    if not cubin:
        raise ValueError(log)
    found = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    assert found, log
    return sum(found)


def _compiled(source: str, architecture: str, what: str, *others: str) -> tuple[bytes, str]:
    nvrtc = _library()
    options = [f"-arch={architecture}", "-std=c++17", "-default-device", *others]
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
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, code)
        return code.raw, text
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
