"""A device whose memory the host does not see, made of one whose memory it sees: what an engine does on such a GPU, without a GPU.

Runs, writes and copies wait in a queue until somebody waits for a run behind them or reads, as late as a device may do them. So whoever
looks at results too early sees old ones, and whoever changes memory that a queued run has yet to read changes what it computes. Views of
the device's own memory are refused, and so are runs that are queued while a change of the step's arrays has not been sent.
"""
from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike

from metalstep import model, served_model
from metalstep.kernels.launch import Buffer, Launch
from metalstep.kernels.native import NativeDevice, NativePlan
from metalstep.plan.mirror import Mirror


class SplitDevice(NativeDevice):
    """writes: bytes of each write. reads: how many there were. See above."""

    def __init__(self, session: Any, kind: str):
        super().__init__(session, kind)
        self.unified = False
        self.writes: list[int] = []
        self.reads = 0
        self.mirrors: weakref.WeakSet[Mirror] = weakref.WeakSet()
        self._queue: deque[tuple[int, Callable[[], None]]] = deque()  # ticket of a run, 0 of anything else
        self._tickets = 0
        self._order = threading.RLock()

    def write_bytes(self, handle: int, array: np.ndarray, offset: int) -> None:
        kept = np.array(array, order="C")
        self.writes.append(kept.nbytes)
        self._later(lambda: super(SplitDevice, self).write_bytes(handle, kept, offset))

    def read_bytes(self, handle: int, dtype: DTypeLike, shape: Sequence[int], offset: int) -> np.ndarray:
        with self._order:
            self.reads += 1
            self.finish()
            return super().read_bytes(handle, dtype, shape, offset)

    def copy(self, source: Buffer, target: Buffer) -> None:
        self._later(lambda: super(SplitDevice, self).copy(source, target))

    def create_plan(self, launches: Sequence[Launch], max_tokens: int, max_sampled: int) -> Any:
        return SplitPlan(self, super().create_plan(launches, max_tokens, max_sampled), reads=bool(launches))

    def destroy_buffer(self, handle: int) -> None:
        self.finish()
        super().destroy_buffer(handle)

    def close(self) -> None:
        if self._session is not None:
            self.finish()
        super().close()

    def finish(self, ticket: int | None = None) -> None:
        """Do what was queued up to a run; None: all of it."""
        with self._order:
            while self._queue and (ticket is None or self._queue[0][0] <= ticket):
                number, work = self._queue.popleft()
                work()
                if number and number == ticket:
                    return

    def _later(self, work: Callable[[], None], *, run: bool = False) -> int:
        with self._order:
            self._tickets += run
            self._queue.append((self._tickets if run else 0, work))
            return self._tickets


class SplitPlan:
    """A NativePlan whose runs wait in the device's queue."""

    def __init__(self, device: SplitDevice, plan: NativePlan, *, reads: bool):
        self._device, self._plan, self._reads = device, plan, reads

    def run(self, steps: int = 1) -> int:
        is_sent = not self._reads or all(mirror.is_sent for mirror in self._device.mirrors)
        assert is_sent, "a run is queued before a change that it may need"
        return self._device._later(lambda: self._plan.wait(self._plan.run(steps)), run=True)

    def wait(self, ticket: int, timeout: float | None = None) -> None:
        self._device.finish(ticket)

    def profile(self) -> list[int]:
        self._device.finish()
        return self._plan.profile()

    def limit_threads(self, threads: int) -> None:
        self._device.finish()
        self._plan.limit_threads(threads)

    def close(self) -> None:
        self._device.finish()
        self._plan.close()


@contextmanager
def split_devices() -> Iterator[None]:
    """Whatever is loaded meanwhile lies on a SplitDevice."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (model, served_model):
            patch.setattr(module, "NativeDevice", SplitDevice)
        made = Mirror.__init__

        def make(self: Mirror, device: NativeDevice, *args: Any) -> None:
            made(self, device, *args)
            if isinstance(device, SplitDevice):
                device.mirrors.add(self)

        patch.setattr(Mirror, "__init__", make)
        yield


@pytest.fixture(scope="module", autouse=True)
def split_memory() -> Iterator[None]:
    """Import it into a module of tests: all that they load lies on a SplitDevice."""
    with split_devices():
        yield
