"""What closes a native device, at the last reference and whatever Ctrl-C falls into, and frees its buffers; not at the process's end."""
from __future__ import annotations

import atexit
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalstep.kernels import native_library
from metalstep.kernels.params import ffi


@dataclass(frozen=True)
class DeviceInfo:
    """MSDeviceInfo as the device was opened. isa and threads are the host device's; memory_bytes: what buffers may take,
    0 when unknown (NativeDevice.memory_left says what is left); unified: the host sees all of it."""

    name: str
    isa: str
    threads: int
    memory_bytes: int
    unified: bool = True


class Session:
    """The native device, closed when the last of the Python device, its plans and its views is gone."""

    def __init__(self, pointer: Any):
        self.pointer = pointer
        self.library = native_library.loaded()
        self.finished = 0  # the highest ticket that was waited for
        self._retired: list[tuple[int, list[object]]] = []  # of destroyed plans: the last ticket, owners of wrapped memory
        _OPEN[weakref.ref(self, _OPEN.pop)] = ffi.gc(pointer, self.library.ms_device_close)

    @classmethod
    def open(cls, name: bytes, threads: int) -> Session:
        """Raises: as NativeDevice.open."""
        # CPython raises KeyboardInterrupt right behind a call, where nobody has the new device yet: what is left in its place is closed by
        # the thread's next open.
        library, place = native_library.loaded(), _OPENING.setdefault(threading.get_ident(), ffi.new("void **"))
        library.ms_device_close(place[0])
        native_library.call(library.ms_device_open, name, threads, place)
        session = cls(place[0])
        place[0] = ffi.NULL
        return session

    def info(self) -> DeviceInfo:
        info = ffi.new("MSDeviceInfo *")
        native_library.call(self.library.ms_device_info, self.pointer, info)
        name, isa = (ffi.string(text).decode() for text in (info.name, info.isa))
        return DeviceInfo(name, isa, info.threads, info.memory_bytes, bool(info.unified))

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


class PlanUses:
    """What a plan's runs need beyond the launcher's own memory."""

    def __init__(self, session: Session, keeps: list[object]):
        self._session = weakref.ref(session)  # a finalizer that an interrupt cut short is never let go, and must not keep the device open
        self.keeps = keeps  # the owners of wrapped buffers that it binds
        self.ticket = 0  # of the last run

    def end(self, destroy: Callable[[Any], None], plan: Any) -> None:
        destroy(plan)
        if (session := self._session()) is not None:
            session.retire(self.ticket, self.keeps)


class Memory:
    """The memory of one buffer, destroyed when neither its device nor a view refers to it. keep: the owner of wrapped memory."""

    _session: Session | None = None  # an interrupt in __init__ leaves what __del__ gets

    def __init__(
        self,
        session: Session,
        handle: int,
        nbytes: int,
        keep: object = None,
        *,
        is_read_only: bool = False,
        is_visible: bool = True,
    ):
        self._handle = handle
        self._session = session
        self.keep = keep
        self._is_read_only = is_read_only
        self._nbytes = nbytes
        contents = session.library.ms_buffer_contents(session.pointer, handle) if is_visible else ffi.NULL
        self._address = int(ffi.cast("uintptr_t", contents))
        self._is_visible = is_visible

    def view(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        if not self._is_visible:
            raise ValueError(
                f"buffer {self._handle} is the device's own memory, which the host does not see: read and write it, or "
                "create it with shared=True"
            )
        size = math.prod(shape) * dtype.itemsize
        if offset < 0 or min(shape, default=0) < 0 or offset + size > self._nbytes:
            raise ValueError(
                f"a view of {dtype} {shape} from byte {offset} on does not fit into buffer {self._handle}, which has "
                f"{self._nbytes} bytes"
            )
        region = _Region(self, self._address + offset, size, self._is_read_only)
        return np.asarray(region).view(dtype).reshape(shape)

    def __del__(self) -> None:
        if self._session is not None and self._session.pointer != ffi.NULL:
            self._session.library.ms_buffer_destroy(self._session.pointer, self._handle)


class _Region:
    """Bytes that numpy views without a copy; the view's base is this object, which keeps the memory."""

    def __init__(self, memory: Memory, address: int, nbytes: int, is_read_only: bool):
        self._memory = memory
        data = (address, is_read_only)
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": data}


_OPENING: dict[int, Any] = {}  # by thread
# What is open, by its session: when that is gone the dictionary's own `pop` is called, and what it drops is closed by C. weakref.finalize
# runs bytecodes, and Python prints and forgets a KeyboardInterrupt among them.
_OPEN: dict[weakref.ref[Session], Any] = {}


def disown() -> None:
    """From now on no device is closed when it is collected, as in a forked child."""
    for pointer in list(_OPEN.values()):
        ffi.gc(pointer, None)
    _OPENING.clear()


atexit.register(disown)  # views may outlive every other exit handler; the process's end frees it
