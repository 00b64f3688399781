"""A file mapped read-only into memory."""
from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np

from metalstep.checkpoint.errors import CheckpointError

_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


class MappedFile:
    """`path`, mapped whole. Nothing is read until a page is touched.

    data: the mapping, indexed in bytes. size: bytes.
    Raises: CheckpointError for a path that is missing, unreadable, empty or no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise CheckpointError(f"{self.path}: the file is empty; download or convert it again")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror or error}); check the path") from error
        self._view: np.ndarray | None = np.frombuffer(self.data, np.uint8)

    def array(self, start: int, end: int) -> np.ndarray:
        """Bytes [start, end) as uint8, without a copy. Do not keep it: the file cannot be unmapped while it lives."""
        return self._open_view()[start:end]

    def address(self, start: int) -> int:
        """Where byte `start` lies in memory; valid until close."""
        return int(self._open_view().ctypes.data) + start

    def drop_pages(self, start: int, end: int) -> None:
        """Let go of the whole pages inside [start, end): they are read again from the file when touched again."""
        self._open_view()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if _DONTNEED is not None and last > first:
            self.data.madvise(_DONTNEED, first, last - first)

    def _open_view(self) -> np.ndarray:
        if self._view is None:
            raise CheckpointError(f"{self.path}: the checkpoint is closed; open it again to read its weights")
        return self._view

    def close(self) -> None:
        """Unmap; more than once is fine. Addresses given out before dangle."""
        self._view = None
        with contextlib.suppress(BufferError):  # an array() is still alive somewhere; the mapping goes with it
            self.data.close()
