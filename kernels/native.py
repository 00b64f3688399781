"""The native launcher from Python: devices, their buffers, plans and tickets, over the C ABI of metal/metalstep.h.

Calls release the GIL and may come from any thread. Memory is never unmapped under a numpy view: a closed device gives up
everything at once except the buffers that views still show, and those when the last view is gone.
"""
from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from metalstep.kernels import native_library, params
from metalstep.kernels.gpu import cuda_libraries, cuda_source, library
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native_library import KernelError, NativeUnavailable, library_path
from metalstep.kernels.native_session import DeviceInfo, Memory, PlanUses, Session, disown
from metalstep.kernels.params import ffi

__all__ = ["DeviceBuffer", "DeviceInfo", "KernelError", "NativeDevice", "NativePlan", "NativeUnavailable", "library_path"]

CONSTANTS_ALIGN = 16  # bytes: Metal wants the start of constants aligned for the largest vector in them
LONGEST_WAIT = 2**63 - 1  # ns, 292 years


@dataclass(frozen=True)
class DeviceBuffer:
    """A buffer of a device; `handle` names it in launches. It lives until it or its device is closed.

    shared: the host sees it; else it is the device's own memory, which only write, read and the device's copy reach.
    """

    handle: int
    nbytes: int
    device: NativeDevice
    shared: bool = True

    def numpy(self, dtype: DTypeLike, shape: Sequence[int], offset: int = 0) -> np.ndarray:
        """A view of the bytes from `offset` on, writable unless they are wrapped.

        Raises: ValueError beyond the end, and where the host does not see it.
        """
        return self.device.view(self.handle, dtype, shape, offset)

    def write(self, array: np.ndarray, offset: int = 0) -> None:
        """Copy an array's bytes to those from `offset` on. See NativeDevice.write."""
        self.device.write_bytes(self.handle, array, offset)

    def read(self, dtype: DTypeLike, shape: Sequence[int], offset: int = 0) -> np.ndarray:
        """A copy of the bytes from `offset` on. See NativeDevice.read."""
        return self.device.read_bytes(self.handle, dtype, shape, offset)

    def close(self) -> None:
        """Free it, once no plan and no view uses it."""
        self.device.destroy_buffer(self.handle)


class NativeDevice:
    """An open device. Close it, or use it in a `with` statement; it closes by itself when nothing refers to it.

    kind: the name that it was opened by; info.name is the machine's own.
    """

    def __init__(self, session: Session, kind: str):
        self.kind = kind
        self._session: Session | None = session
        self._memory: dict[int, Memory] = {}
        self._kernels: dict[str, int] = {}
        self._compiled = set(library.BUILT_IN) if _is_cuda(kind) else set()  # kernels of launches with code
        self._plans: weakref.WeakSet[NativePlan] = weakref.WeakSet()
        self.info = session.info()
        self.unified = self.info.unified
        _DEVICES.add(self)

    @classmethod
    def open(cls, name: str = "host", threads: int = 0) -> NativeDevice:
        """Open "host"; "metal", Apple's GPU; "metal-sim", the same shaders on the CPU, slowly, where there is no Metal; or
        "cuda", or "cuda:1" and so on, an NVIDIA GPU by its number among those that the process sees.

        threads: of the host's pool; 0 takes METALSTEP_THREADS or what the machine has.
        Raises: NativeUnavailable without a launcher; ValueError for a name or a count that does not fit; RuntimeError
        where the machine lacks the device.
        """
        if _is_cuda(name):
            for folder in cuda_libraries.folders():
                native_library.call(native_library.loaded().ms_folder_add, os.fsencode(folder))
        return cls(Session.open(name.encode(), threads), name)

    def create_buffer(self, nbytes: int, *, shared: bool = True) -> DeviceBuffer:
        """Zeroed memory; unified memory is committed when it is first written.

        shared: seen by the host too; where memory is not unified it is the host's, pinned, and slow for the device's kernels.
        Raises: MemoryError; ValueError for a negative size.
        """
        session, out = self._open_session(), ffi.new("int32_t *")
        memory = params.MS_MEMORY_SHARED if shared else params.MS_MEMORY_DEVICE
        native_library.call(session.library.ms_buffer_create, session.pointer, nbytes, memory, out)
        visible = shared or self.unified
        self._memory[out[0]] = Memory(session, out[0], nbytes, is_visible=visible)
        return DeviceBuffer(out[0], nbytes, self, visible)

    def wrap_buffer(self, address: int, nbytes: int, keep: object) -> DeviceBuffer:
        """Memory that is there already, e.g. a mapped file, as a buffer without a copy. Launches and views only read it.

        address: a multiple of the page (wrap the whole mapping and use offsets); the last page is whole, as a mapping's is.
        keep: what owns the memory; it is held until the buffer is closed and no view, plan or run uses it.
        Raises: MemoryError where the device cannot take it: copy it then; ValueError for an address or size that does
        not fit.
        """
        session, out = self._open_session(), ffi.new("int32_t *")
        native_library.call(session.library.ms_buffer_wrap, session.pointer, ffi.cast("void *", address), nbytes, out)
        self._memory[out[0]] = Memory(session, out[0], nbytes, keep, is_read_only=True)
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

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy an array's bytes to a region's start; the array may be reused at once.

        Runs queued before still see the old bytes and runs queued after the new ones, unless memory is unified: there the
        caller sees to it that no run in flight uses them. Raises: ValueError for more bytes than the buffer has.
        """
        self.write_bytes(buffer.handle, array, buffer.offset)

    def read(self, buffer: Buffer, dtype: DTypeLike, shape: Sequence[int]) -> np.ndarray:
        """A copy of a region, seen as `dtype` and `shape`, after all runs queued before (unified memory: as it is now).

        Raises: ValueError beyond the buffer's end; RuntimeError when a run has failed.
        """
        return self.read_bytes(buffer.handle, dtype, shape, buffer.offset)

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a region to another of as many bytes, in the order of runs as write. Raises: ValueError."""
        if source.nbytes != target.nbytes:
            raise ValueError(f"copy: the source has {source.nbytes} bytes and the target {target.nbytes}, expected as many")
        session = self._open_session()
        native_library.call(
            session.library.ms_buffer_copy, session.pointer, source.handle, source.offset, target.handle, target.offset, source.nbytes
        )

    def write_bytes(self, handle: int, array: np.ndarray, offset: int) -> None:
        """See DeviceBuffer.write."""
        session, data = self._open_session(), np.ascontiguousarray(array)
        native_library.call(session.library.ms_buffer_write, session.pointer, handle, offset, ffi.from_buffer(data), data.nbytes)

    def read_bytes(self, handle: int, dtype: DTypeLike, shape: Sequence[int], offset: int) -> np.ndarray:
        """See DeviceBuffer.read."""
        session, data = self._open_session(), np.empty(tuple(shape), dtype)
        native_library.call(session.library.ms_buffer_read, session.pointer, handle, offset, ffi.from_buffer(data), data.nbytes)
        return data

    def create_plan(self, launches: Sequence[Launch], max_tokens: int, max_sampled: int) -> NativePlan:
        """Resolve `launches` for steps of up to max_tokens rows, max_sampled of them sampled.

        Raises: ValueError naming the launch whose kernel, bindings or constants do not fit.
        """
        if _is_cuda(self.kind):
            self._compile_for_cuda(launches)
        else:
            for source, kernels in library.sources(launches, self._compiled):
                self.add_library(source)
                self._compiled.update(kernels)  # not before: it may fail, or be interrupted
        return NativePlan(self, self._open_session(), launches, max_tokens, max_sampled)

    def kernel(self, name: str) -> int:
        """The device's id of a kernel. Raises: ValueError listing those that exist; KernelError."""
        if name not in self._kernels:
            session, out = self._open_session(), ffi.new("int32_t *")
            native_library.compile_by(session.library.ms_kernel_find, session.pointer, name.encode(), out)
            self._kernels[name] = out[0]
        return self._kernels[name]

    def add_library(self, source: str) -> None:
        """Compile a GPU's kernels; quoted includes are inlined already. Raises: KernelError with the compiler's text."""
        self._add_source(cuda_source.translate(source) if _is_cuda(self.kind) else source)

    def _add_source(self, text: str) -> None:
        session = self._open_session()
        native_library.compile_by(session.library.ms_library_add, session.pointer, text.encode())

    def _compile_for_cuda(self, launches: Sequence[Launch]) -> None:
        """Each kernel by itself, side by side: NVIDIA's compiler uses one thread, and what it makes is kept by the kernel."""
        sources = library.cuda_sources(launches, self._compiled)
        if not sources:
            return
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        with ThreadPoolExecutor(min(len(sources), allowed)) as threads:
            for kernel, _ in zip(sources, threads.map(self._add_source, sources.values()), strict=True):
                self._compiled.add(kernel)

    def weight_bytes(self, n: int, k: int, bits: int, group_size: int, dtype: int) -> int:
        """Bytes that a packed weight takes. Raises: ValueError for a combination that cannot be packed."""
        try:
            nbytes = self._open_session().library.ms_weight_bytes(n, k, bits, group_size, dtype)
        except OverflowError as error:
            raise ValueError(f"weight: {error}") from None
        if not nbytes:
            raise ValueError(native_library.last_error())
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
        native_library.call(session.library.ms_weight_pack, session.pointer, source, owner.handle, offset)

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

    def _open_session(self) -> Session:
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
        self, device: NativeDevice, session: Session, launches: Sequence[Launch], max_tokens: int, max_sampled: int
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
        native_library.call(
            library.ms_plan_create, session.pointer, native, len(launches), native_binds, len(binds), ffi.from_buffer(owned),
            len(owned), max_tokens, max_sampled, out,
        )  # fmt: skip
        self._launches = len(launches)
        self._handle, self._device_handle = out[0], session.pointer
        self._run, self._wait, self._profile = library.ms_plan_run, library.ms_ticket_wait, library.ms_plan_profile
        self._limit_threads = library.ms_plan_limit_threads
        kept = [device._memory[handle].keep for handle in {bind[0] for bind in binds} if handle in device._memory]
        self._uses: PlanUses | None = PlanUses(session, [keep for keep in kept if keep is not None])
        self._destroy = weakref.finalize(self, self._uses.end, library.ms_plan_destroy, self._handle)
        self._destroy.atexit = False  # the process's end frees it
        self._session: Session | None = session
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
            native_library.fail(code)
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
            native_library.fail(code)
        # Not looked at before: another thread that closes the device ends this wait, so nothing here may hold it open.
        if (session := self._session) and ticket > session.finished:
            session.finish(ticket)

    def limit_threads(self, threads: int) -> None:
        """Let so many of the host device's threads run the plan from now on; elsewhere nothing. Waits for runs under way.

        Raises: ValueError for a count that is not 1 to the device's.
        """
        native_library.call(self._limit_threads, self._handle, threads)

    def profile(self) -> list[int]:
        """Run one step; nanoseconds of each launch, with a barrier behind each."""
        times = ffi.new("uint64_t[]", self._launches)
        native_library.call(self._profile, self._handle, times)
        return list(times)

    def close(self) -> None:
        """Free it; runs in progress finish. More than once is fine."""
        self._destroy()
        self._abandon()

    def _abandon(self) -> None:
        self._destroy.detach()
        self._handle = self._device_handle = ffi.NULL
        self._uses = None
        self._session = self._device = None


_DEVICES: weakref.WeakSet[NativeDevice] = weakref.WeakSet()


def _after_fork() -> None:
    disown()
    for device in list(_DEVICES):
        device._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _is_cuda(kind: str) -> bool:
    return kind.partition(":")[0] == "cuda"


def _nanoseconds(seconds: float) -> int:
    if not seconds >= 0:
        raise ValueError(f"timeout is {seconds} s, expected 0 or more, or None for no limit")
    return LONGEST_WAIT if seconds > LONGEST_WAIT / 1e9 else min(int(seconds * 1e9), LONGEST_WAIT)
