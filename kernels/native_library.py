"""The native launcher's shared library: where it is, and its calls with statuses as exceptions."""
from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from metalstep.kernels import params
from metalstep.kernels.params import ffi

NAME = "libmetalstep.dylib" if sys.platform == "darwin" else "libmetalstep.so"
EXCEPTIONS: dict[int, type[Exception]] = {
    params.MS_ERROR_ARGUMENT: ValueError,
    params.MS_ERROR_DEVICE: RuntimeError,
    params.MS_ERROR_MEMORY: MemoryError,
    params.MS_ERROR_TIMEOUT: TimeoutError,
}


class NativeUnavailable(RuntimeError):
    """There is no launcher that this process can use; the message says why and what to do."""


class KernelError(RuntimeError):
    """The device's compiler does not take a kernel; the message is its own text."""


def library_path() -> Path:
    """Where the launcher is: METALSTEP_LIBRARY, else the installed package, else this checkout's build.

    Raises: NativeUnavailable listing where it is not.
    """
    named = os.environ.get("METALSTEP_LIBRARY")
    places = [Path(named)] if named else [
        Path(str(resources.files("metalstep"))) / "lib" / NAME,
        Path(__file__).resolve().parents[1] / "swift_kernels" / ".build" / "release" / NAME,
    ]  # fmt: skip
    for place in places:
        if place.is_file():
            return place
    listed = ", ".join(str(place) for place in places)
    what = "METALSTEP_LIBRARY names no file" if named else "the native launcher is not built"
    raise NativeUnavailable(f"{what}: looked for {listed}; run `make build` in a checkout, or install a wheel")


@functools.cache
def loaded() -> Any:
    """The library, of this version of the ABI. Raises: NativeUnavailable."""
    path = library_path()
    try:
        library = ffi.dlopen(str(path))
        version = library.ms_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{path} cannot be loaded: {error}; run `make build`") from error
    if version != params.MS_ABI_VERSION:
        raise NativeUnavailable(
            f"{path} has ABI version {version} and this metalstep expects {params.MS_ABI_VERSION}; rebuild it: `make build`"
        )
    return library


def call(function: Callable[..., int], *args: Any) -> None:
    """Raises: the exception of the status; ValueError for a number that its parameter cannot hold."""
    try:
        code = function(*args)
    except OverflowError as error:
        raise ValueError(f"a number does not fit its C type: {error}") from None
    if code:
        fail(code)


def compile_by(function: Callable[..., int], *args: Any) -> None:
    """As call, of a function that compiles. Raises: KernelError."""
    try:
        call(function, *args)
    except RuntimeError as error:
        raise KernelError(str(error)) from None


def fail(code: int) -> None:
    """Raises: the exception of a status, with this thread's last message."""
    raise EXCEPTIONS.get(code, RuntimeError)(last_error())


def last_error() -> str:
    """What the last call of this thread that failed has said."""
    return ffi.string(loaded().ms_last_error()).decode(errors="replace")
