"""Logits of a step, handed out without a copy: they stay where the step wrote them until a later step needs the place."""
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice

MOST_KEPT = 128  # copies of a place's rows that a device has memory for; callers that keep more of them have the rest on the host


class Row(Protocol):
    """One row of logits, float32 [vocab], wherever it lies."""

    def numpy(self) -> np.ndarray:
        """The values, for as long as nobody overwrites the place."""

    def copy(self) -> Row:
        """The same in a place of its own."""

    def on_host(self) -> Row:
        """The same in memory that outlives the device."""


class HostRow:
    """Of memory that the host sees."""

    __slots__ = ("_view",)

    def __init__(self, view: np.ndarray):
        self._view = view

    def numpy(self) -> np.ndarray:
        return self._view

    def copy(self) -> HostRow:
        return HostRow(self._view.copy())

    def on_host(self) -> HostRow:
        return self


class DeviceRow:
    """Of memory that the host does not see: a copy stays on the device, in the order of its queue, until somebody reads it."""

    __slots__ = ("__weakref__", "_buffer", "_copies", "_device")

    def __init__(self, device: NativeDevice, buffer: Buffer, copies: CopyPlaces):
        self._device, self._buffer, self._copies = device, buffer, copies

    def numpy(self) -> np.ndarray:
        return self._device.read(self._buffer, np.float32, self._buffer.shape)

    def copy(self) -> Row:
        copied = self._copies.lend(self._buffer)
        if copied is None:
            return self.on_host()
        self._device.copy(self._buffer, copied._buffer)
        return copied

    def on_host(self) -> HostRow:
        return HostRow(self.numpy())


class CopyPlaces:
    """Memory of a device for copies of rows of one size, MOST_KEPT of them: a cache and its plans need the rest.

    A place is free when the copy in it is gone: whatever an interrupt falls into, none is lost, and none is two copies' own.
    """

    def __init__(self, device: NativeDevice):
        self._device = device
        self._places: list[tuple[Buffer, weakref.ref[DeviceRow] | None]] = []
        self._full = False

    def lend(self, row: Buffer) -> DeviceRow | None:
        """A row in a place of its own, as large as `row`; None where there is none."""
        for index, (place, reference) in enumerate(self._places):
            if reference is None or reference() is None:
                return self._lend(index, place)
        if self._full or len(self._places) >= MOST_KEPT:
            return None
        try:
            owner = self._device.create_buffer(row.nbytes, shared=False)
        except MemoryError:
            self._full = True
            return None
        place = replace(row, handle=owner.handle, offset=0)
        self._places.append((place, None))
        return self._lend(len(self._places) - 1, place)

    def _lend(self, index: int, place: Buffer) -> DeviceRow:
        copied = DeviceRow(self._device, place, self)
        self._places[index] = (place, weakref.ref(copied))
        return copied


class Logits:
    """One row of logits, float32 [vocab]. It stays where the step wrote it as long as nothing needs the place."""

    __slots__ = ("__weakref__", "_lent", "_row")

    def __init__(self, row: Row, *, lent: bool = False):
        """lent: the row's place is overwritten by and by; `keep` is called before."""
        self._row = row
        self._lent = lent

    def numpy(self) -> np.ndarray:
        """The values, for reading. From any thread, while another one runs steps."""
        while self._lent:
            row = self._row
            copied = row.numpy().copy()
            if row is self._row:  # so `keep` had not been called, and nothing had been overwritten
                return copied
        return self._row.numpy()

    def keep(self) -> None:
        """The place is about to be overwritten."""
        self._row = self._row.copy()
        self._lent = False

    def outlive_device(self) -> None:
        """The device is about to be closed."""
        self._row = self._row.on_host()
        self._lent = False


class LogitsRing:
    """The places that a plan's steps write logits to in turn. With two, a caller that drops each response before it asks for the one
    after the next never pays for a copy.

    rows: of each place. lent: of rows whose place is nobody's alone, where StepMemory finds them; None: the ring's own.
    """

    def __init__(self, rows: Sequence[Sequence[Row]], lent: list[weakref.ref[Logits]] | None = None):
        self._rows = rows
        self.current = 0
        self._lent: list[list[weakref.ref[Logits]]] = [[] if lent is None else lent for _ in rows]
        self._handed_out: weakref.WeakSet[Logits] = weakref.WeakSet()

    def advance(self) -> int:
        """Move on to the next place, saving what is still held there; returns its number."""
        self.current = (self.current + 1) % len(self._rows)
        lent = self._lent[self.current]
        if lent:
            for reference in lent:
                held = reference()
                if held is not None:
                    held.keep()
            lent.clear()
        return self.current

    def lend(self, row: int, place: int | None = None) -> Logits:
        """A row of the latest step that wrote to a place, to one caller. None: the current one."""
        place = self.current if place is None else place
        logits = Logits(self._rows[place][row], lent=True)
        self._lent[place].append(weakref.ref(logits))
        self._handed_out.add(logits)
        return logits

    def close(self) -> None:
        """What callers hold stays what it is when the device is closed; of a device that has failed, there is nothing left to hold."""
        with contextlib.suppress(RuntimeError, MemoryError):
            for logits in list(self._handed_out):
                logits.outlive_device()


def rows_of(device: NativeDevice, place: Buffer, count: int, vocab_size: int) -> list[Row]:
    """The rows of logits at `place`, float32 [count, vocab_size]."""
    if device.unified:
        return [HostRow(row) for row in device.numpy(place, np.float32, (count, vocab_size))]
    copies = CopyPlaces(device)
    size = 4 * vocab_size
    return [DeviceRow(device, Buffer(place.handle, place.offset + i * size, (vocab_size,), "float32"), copies) for i in range(count)]
