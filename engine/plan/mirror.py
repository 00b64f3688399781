"""Host memory that a device's buffer follows: the one way in which the host changes what a step reads."""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from metalstep.kernels.native import DeviceBuffer, NativeDevice

GAP = 16 << 10  # bytes between two changes that are sent sooner than a copy of their own begins


class Mirror:
    """The first `nbytes` of `owner`, for the host to read and, through `edit`, to change.

    Where the host sees the device's memory, this is that memory and `send` does nothing. Elsewhere it is host memory that the device's
    follows: `send` copies what was changed, in the order of the device's queue, so runs that were queued before do not see it.
    What the device itself writes does not come back.
    quiet: bytes that the device never writes: there, what lies between two changes may be sent along.
    """

    def __init__(self, device: NativeDevice, owner: DeviceBuffer, nbytes: int, quiet: range):
        self._owner, self._quiet = owner, quiet
        self._sends = not device.unified
        self._bytes: np.ndarray = np.zeros(nbytes, np.uint8) if self._sends else owner.numpy(np.uint8, (nbytes,))
        self._address: int = self._bytes.__array_interface__["data"][0]
        self._changed: list[tuple[int, int]] = []  # first byte, end

    def view(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int) -> Any:
        """An array for reading; `edit` of any part of it is for writing."""
        array = self.writable(dtype, shape, offset)
        array.flags.writeable = False
        return array

    def writable(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int) -> Any:
        """An array for whoever says `changed` behind each write."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return self._bytes[offset : offset + size].view(dtype).reshape(shape)

    def edit(self, part: np.ndarray) -> Any:
        """The same elements as `part`, a contiguous part of a view, to be written before the next `send`.

        Raises: ValueError for another array.
        """
        nbytes = part.nbytes
        at = part.__array_interface__["data"][0] - self._address
        if not nbytes:
            return part.copy()
        if at < 0 or at + nbytes > self._bytes.size or not part.flags.c_contiguous:
            raise ValueError(f"an array of {nbytes} bytes that is no contiguous part of these {self._bytes.size}")
        self.changed(at, at + nbytes)
        return self._bytes[at : at + nbytes].view(part.dtype).reshape(part.shape)

    def changed(self, first: int, end: int) -> None:
        """Have `send` copy the bytes from `first` to `end`."""
        if self._sends:
            self._changed.append((first, end))

    @property
    def is_sent(self) -> bool:
        """Whether the device has every change."""
        return not self._changed

    def send(self) -> None:
        """Let the device's memory follow. Before a run is queued that reads what was changed."""
        if not self._changed:
            return
        for first, end in self._merged():
            self._owner.write(self._bytes[first:end], first)
        self._changed.clear()

    def _merged(self) -> list[tuple[int, int]]:
        merged: list[tuple[int, int]] = []
        for first, end in sorted(self._changed):
            before, last = merged[-1] if merged else (0, -1)
            near = first <= last or (first - last <= GAP and self._quiet.start <= before and end <= self._quiet.stop)
            if merged and near:
                merged[-1] = before, max(last, end)
            else:
                merged.append((first, end))
        return merged
