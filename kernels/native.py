"""The native launcher from Python: devices, their buffers, plans and tickets, over the C ABI of metal/metalstep.h.

Calls release the GIL and may come from any thread. Memory is never unmapped under a numpy view: a closed device gives up
everything at once except the buffers that views still show, and those when the last view is gone.
"""
from __future__ import annotations

import functools
import math
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from metalstep.kernels import params
from metalstep.kernels.gpu import library
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.params import ffi

NAME = "libmetalstep.dylib" if sys.platform == "darwin" else "libmetalstep.so"
CONSTANTS_ALIGN = 16  # bytes: Metal wants the start of constants aligned for the largest vector in them
LONGEST_WAIT = 2**63 - 1  # ns, 292 years
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


@dataclass(frozen=True)
class DeviceInfo:
    """MSDeviceInfo as the device was opened. isa and threads are the host device's; memory_bytes: what buffers may take,
    0 when unknown (NativeDevice.memory_left says what is left)."""

    name: str
    isa: str
    threads: int
    memory_bytes: int


@dataclass(frozen=True)
class DeviceBuffer:
    """A buffer of a device; `handle` names it in launches. It lives until it or its device is closed."""

    handle: int
    nbytes: int
    device: NativeDevice

    def numpy(self, dtype: DTypeLike, shape: Sequence[int], offset: int = 0) -> np.ndarray:
        """A view of the bytes from `offset` on, writable unless they are wrapped. Raises: ValueError beyond the end."""
        return self.device.view(self.handle, dtype, shape, offset)

    def close(self) -> None:
        """Free it, once no plan and no view uses it."""
        self.device.destroy_buffer(self.handle)


class NativeDevice:
    """An open device. Close it, or use it in a `with` statement; it closes by itself when nothing refers to it.

    kind: the name that it was opened by; info.name is the machine's own.
    """

    def __init__(self, session: _Session, kind: str):
        self.kind = kind
        self._session: _Session | None = session
        self._memory: dict[int, _Memory] = {}
        self._kernels: dict[str, int] = {}
        self._compiled: set[str] = set()  # kernels of launches with code
        self._plans: weakref.WeakSet[NativePlan] = weakref.WeakSet()
        self.info = session.info()
        _DEVICES.add(self)

    @classmethod
    def open(cls, name: str = "host", threads: int = 0) -> NativeDevice:
        """Open "host"; "metal", Apple's GPU; or "metal-sim", the same shaders on the CPU, slowly, where there is no Metal.

        threads: of the host's pool; 0 takes METALSTEP_THREADS or what the machine has.
        Raises: NativeUnavailable without a launcher; ValueError for a name or a count that does not fit; RuntimeError
        where the machine lacks the device.
        """
        out = ffi.new("void **")
        _call(_library().ms_device_open, name.encode(), threads, out)
        return cls(_Session(out[0]), name)

    def create_buffer(self, nbytes: int) -> DeviceBuffer:
        """Zeroed memory, committed when it is first written. Raises: MemoryError; ValueError for a negative size."""
        session, out = self._open_session(), ffi.new("int32_t *")
        _call(session.library.ms_buffer_create, session.pointer, nbytes, out)
        self._memory[out[0]] = _Memory(session, out[0], nbytes)
        return DeviceBuffer(out[0], nbytes, self)

    def wrap_buffer(self, address: int, nbytes: int, keep: object) -> DeviceBuffer:
        """Memory that is there already, e.g. a mapped file, as a buffer without a copy. Launches and views only read it.

        address: a multiple of the page (wrap the whole mapping and use offsets); the last page is whole, as a mapping's is.
        keep: what owns the memory; it is held until the buffer is closed and no view, plan or run uses it.
        Raises: MemoryError where the device cannot take it: copy it then; ValueError for an address or size that does
        not fit.
        """
        session, out = self._open_session(), ffi.new("int32_t *")
        _call(session.library.ms_buffer_wrap, session.pointer, ffi.cast("void *", address), nbytes, out)
        self._memory[out[0]] = _Memory(session, out[0], nbytes, keep, is_read_only=True)
        return DeviceBuffer(out[0], nbytes, self)

    def memory_left(self) -> int:
        """Bytes that buffers may still take; 0 when unknown. The host device says what the machine has in all."""
        return self._open_session().info().memory_bytes

    def destroy_buffer(self, handle: int) -> None:
        """See DeviceBuffer.close; a second time does nothing."""
        self._memory.pop(handle, None)

    def view(self, handle: int, dtype: DTypeLike, shape: Sequence[int], offset: int = 0) -> np.ndarray:
        """See DeviceBuffer.numpy."""
        self._open_session()
        if handle not in self._memory:
            raise ValueError(f"buffer {handle} does not exist on this device; it may have been closed")
        return self._memory[handle].view(np.dtype(dtype), tuple(shape), offset)

    def numpy(self, buffer: Buffer, dtype: DTypeLike, shape: Sequence[int]) -> np.ndarray:
        """A view of a region, seen as `dtype` and `shape`, writable unless it is wrapped memory.

        Raises: ValueError beyond the buffer's end.
        """
        return self.view(buffer.handle, dtype, shape, buffer.offset)

    def create_plan(self, launches: Sequence[Launch], max_tokens: int, max_sampled: int) -> NativePlan:
        """Resolve `launches` for steps of up to max_tokens rows, max_sampled of them sampled.

        Raises: ValueError naming the launch whose kernel, bindings or constants do not fit.
        """
        for source, kernels in library.sources(launches, self._compiled):
            self.add_library(source)
            self._compiled.update(kernels)  # not before: it may fail, or be interrupted
        return NativePlan(self, self._open_session(), launches, max_tokens, max_sampled)

    def kernel(self, name: str) -> int:
        """The device's id of a kernel. Raises: ValueError listing those that exist; KernelError."""
        if name not in self._kernels:
            session, out = self._open_session(), ffi.new("int32_t *")
            _compile(session.library.ms_kernel_find, session.pointer, name.encode(), out)
            self._kernels[name] = out[0]
        return self._kernels[name]

    def add_library(self, source: str) -> None:
        """Compile a GPU's kernels; quoted includes are inlined already. Raises: KernelError with the compiler's text."""
        session = self._open_session()
        _compile(session.library.ms_library_add, session.pointer, source.encode())

    def weight_bytes(self, n: int, k: int, bits: int, group_size: int, dtype: int) -> int:
        """Bytes that a packed weight takes. Raises: ValueError for a combination that cannot be packed."""
        try:
            nbytes = self._open_session().library.ms_weight_bytes(n, k, bits, group_size, dtype)
        except OverflowError as error:
            raise ValueError(f"weight: {error}") from None
        if not nbytes:
            raise ValueError(_last_error())
        return int(nbytes)

    def pack_weight(
        self,
        owner: DeviceBuffer,
        offset: int,
        *,
        format: int,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        dtype: int,
        data: int,
        scales: int | None = None,
        biases: int | None = None,
        row_order: int | None = None,
    ) -> None:
        """Write a weight in the device's layout to `owner` from byte `offset` on; the fields are MSWeightSource's.

        data, scales, biases, row_order: addresses, read during the call only. Raises: ValueError for what does not fit.
        """
        session, source = self._open_session(), ffi.new("MSWeightSource *")
        try:
            source.format, source.n, source.k, source.bits = format, n, k, bits
            source.group_size, source.dtype = group_size, dtype
        except OverflowError as error:
            raise ValueError(f"weight: {error}") from None
        addresses = {"data": data, "scales": scales, "biases": biases}
        for name, address in addresses.items():
            setattr(source, name, ffi.cast("void *", address or 0))
        source.row_order = ffi.cast("int32_t *", row_order or 0)
        _call(session.library.ms_weight_pack, session.pointer, source, owner.handle, offset)

    def close(self) -> None:
        """Close its plans and free its buffers; more than once is fine. Views stay valid."""
        for plan in list(self._plans):
            plan.close()
        self._memory.clear()
        self._session = None

    def __enter__(self) -> NativeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_session(self) -> _Session:
        if self._session is None:
            raise ValueError("the device is closed; open it again")
        return self._session

    def _abandon(self) -> None:
        """In a forked child: the device's threads do not exist here, so no native call may touch it."""
        for plan in list(self._plans):
            plan._abandon()
        if self._session is not None:
            self._session.abandon()
            self._session = None


class NativePlan:
    """Launches on a device, resolved once. It keeps its device open."""

    def __init__(
        self, device: NativeDevice, session: _Session, launches: Sequence[Launch], max_tokens: int, max_sampled: int
    ):
        self._handle, self._device_handle = ffi.NULL, ffi.NULL
        native = ffi.new("MSLaunch[]", len(launches))
        binds: list[tuple[int, int, int]] = []
        constants = bytearray()
        for launch, entry in zip(launches, native, strict=True):
            entry.kernel = device.kernel(launch.kernel)
            entry.barrier = launch.barrier
            try:
                entry.grid, entry.threads = launch.grid, launch.threads
            except (OverflowError, IndexError) as error:
                where = f"grid {launch.grid} or threads {launch.threads} of {launch.kernel}"
                raise ValueError(f"plan: {where}: {error}") from None
            entry.bind_first, entry.binds = len(binds), len(launch.bindings)
            binds += [(buffer.handle, 0, buffer.offset) for buffer in launch.bindings]
            entry.const_first, entry.const_bytes = len(constants), len(launch.constants)
            constants += launch.constants + bytes(-len(launch.constants) % CONSTANTS_ALIGN)
        try:
            native_binds = ffi.new("MSBind[]", binds)
        except OverflowError as error:
            raise ValueError(f"plan: a binding's buffer or offset: {error}") from None
        library, out, owned = session.library, ffi.new("void **"), bytes(constants)
        _call(
            library.ms_plan_create, session.pointer, native, len(launches), native_binds, len(binds), ffi.from_buffer(owned),
            len(owned), max_tokens, max_sampled, out,
        )  # fmt: skip
        self._launches = len(launches)
        self._handle, self._device_handle = out[0], session.pointer
        self._run, self._wait, self._profile = library.ms_plan_run, library.ms_ticket_wait, library.ms_plan_profile
        self._limit_threads = library.ms_plan_limit_threads
        kept = [device._memory[handle].keep for handle in {bind[0] for bind in binds} if handle in device._memory]
        self._uses: _Uses | None = _Uses(session, [keep for keep in kept if keep is not None])
        self._destroy = weakref.finalize(self, self._uses.end, library.ms_plan_destroy, self._handle)
        self._destroy.atexit = False  # the process's end frees it
        self._device: NativeDevice | None = device
        device._plans.add(self)

    def run(self, steps: int = 1) -> int:
        """Queue `steps` runs and return their ticket at once. Raises: ValueError for a closed plan or a bad count."""
        ticket = ffi.new("uint64_t *")
        try:
            code = self._run(self._handle, steps, ticket)
        except OverflowError:
            raise ValueError(f"run: steps is {steps}, expected a small positive number") from None
        if code:
            _fail(code)
        if uses := self._uses:
            uses.ticket = max(uses.ticket, ticket[0])
        return ticket[0]

    def wait(self, ticket: int, timeout: float | None = None) -> None:
        """Return when the ticket's runs, and all before them on this device, are done. timeout: seconds; None: no limit.

        Raises: TimeoutError, after which the ticket is still valid; RuntimeError with the device's text; ValueError for
        an unknown ticket or a closed plan.
        """
        nanoseconds = -1 if timeout is None else _nanoseconds(timeout)
        try:
            code = self._wait(self._device_handle, ticket, nanoseconds)
        except OverflowError:
            raise ValueError(f"wait: {ticket} is not a ticket") from None
        if code:
            _fail(code)
        # Not looked at before: another thread that closes the device ends this wait, so nothing here may hold it open.
        if (uses := self._uses) and ticket > uses.session.finished:
            uses.session.finish(ticket)

    def limit_threads(self, threads: int) -> None:
        """Let so many of the host device's threads run the plan from now on; elsewhere nothing. Waits for runs under way.

        Raises: ValueError for a count that is not 1 to the device's.
        """
        _call(self._limit_threads, self._handle, threads)

    def profile(self) -> list[int]:
        """Run one step; nanoseconds of each launch, with a barrier behind each."""
        times = ffi.new("uint64_t[]", self._launches)
        _call(self._profile, self._handle, times)
        return list(times)

    def close(self) -> None:
        """Free it; runs in progress finish. More than once is fine."""
        self._destroy()
        self._abandon()

    def _abandon(self) -> None:
        self._destroy.detach()
        self._handle = self._device_handle = ffi.NULL
        self._uses = None
        self._device = None


class _Session:
    """The native device, closed when the last of the Python device, its plans and its views is gone."""

    def __init__(self, pointer: Any):
        self.pointer = pointer
        self.library = _library()
        self.finished = 0  # the highest ticket that was waited for
        self._retired: list[tuple[int, list[object]]] = []  # of destroyed plans: the last ticket, owners of wrapped memory
        self._close = weakref.finalize(self, self.library.ms_device_close, pointer)
        self._close.atexit = False  # views may outlive every other exit handler; the process's end frees it

    def info(self) -> DeviceInfo:
        info = ffi.new("MSDeviceInfo *")
        _call(self.library.ms_device_info, self.pointer, info)
        name, isa = (ffi.string(text).decode() for text in (info.name, info.isa))
        return DeviceInfo(name, isa, info.threads, info.memory_bytes)

    def finish(self, ticket: int) -> None:
        """The ticket, and with it all before it, has been waited for."""
        self.finished = ticket
        if self._retired:
            self._retired = [entry for entry in self._retired if entry[0] > ticket]

    def retire(self, ticket: int, keeps: list[object]) -> None:
        """Hold what a destroyed plan's runs read until they are known to be done, at the latest until the device closes."""
        if keeps and ticket > self.finished:
            self._retired.append((ticket, keeps))

    def abandon(self) -> None:
        self.pointer = ffi.NULL
        self._close.detach()


class _Uses:
    """What a plan's runs need beyond the launcher's own memory."""

    def __init__(self, session: _Session, keeps: list[object]):
        self.session = session
        self.keeps = keeps  # the owners of wrapped buffers that it binds
        self.ticket = 0  # of the last run

    def end(self, destroy: Callable[[Any], None], plan: Any) -> None:
        destroy(plan)
        self.session.retire(self.ticket, self.keeps)


class _Memory:
    """The memory of one buffer, destroyed when neither its device nor a view refers to it. keep: the owner of wrapped memory."""

    def __init__(
        self, session: _Session, handle: int, nbytes: int, keep: object = None, is_read_only: bool = False
    ):
        self.keep = keep
        self._is_read_only = is_read_only
        self._session = session
        self._nbytes = nbytes
        self._address = int(ffi.cast("uintptr_t", session.library.ms_buffer_contents(session.pointer, handle)))
        self._handle = handle

    def view(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if offset < 0 or min(shape, default=0) < 0 or offset + size > self._nbytes:
            raise ValueError(
                f"a view of {dtype} {shape} from byte {offset} on does not fit into buffer {self._handle}, which has "
                f"{self._nbytes} bytes"
            )
        region = _Region(self, self._address + offset, size, self._is_read_only)
        return np.asarray(region).view(dtype).reshape(shape)

    def __del__(self) -> None:
        if self._session.pointer != ffi.NULL:
            self._session.library.ms_buffer_destroy(self._session.pointer, self._handle)


class _Region:
    """Bytes that numpy views without a copy; the view's base is this object, which keeps the memory."""

    def __init__(self, memory: _Memory, address: int, nbytes: int, is_read_only: bool):
        self._memory = memory
        data = (address, is_read_only)
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": data}


_DEVICES: weakref.WeakSet[NativeDevice] = weakref.WeakSet()


def _after_fork() -> None:
    for device in list(_DEVICES):
        device._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
def _library() -> Any:
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


def _call(function: Callable[..., int], *args: Any) -> None:
    try:
        code = function(*args)
    except OverflowError as error:
        raise ValueError(f"a number does not fit its C type: {error}") from None
    if code:
        _fail(code)


def _compile(function: Callable[..., int], *args: Any) -> None:
    try:
        _call(function, *args)
    except RuntimeError as error:
        raise KernelError(str(error)) from None


def _fail(code: int) -> None:
    raise EXCEPTIONS.get(code, RuntimeError)(_last_error())


def _last_error() -> str:
    return ffi.string(_library().ms_last_error()).decode(errors="replace")


def _nanoseconds(seconds: float) -> int:
    if not seconds >= 0:
        raise ValueError(f"timeout is {seconds} s, expected 0 or more, or None for no limit")
    return LONGEST_WAIT if seconds > LONGEST_WAIT / 1e9 else min(int(seconds * 1e9), LONGEST_WAIT)
