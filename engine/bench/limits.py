"""What this machine's processors read and compute at most, measured by kernels/limits.py: the roof over the kernels' own speeds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalstep.kernels import limits, params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice, NativePlan

MEMORY_BYTES = 256 << 20  # beyond any last cache that a few cores share
PARTS = 8  # of it, timed one by one: so short that some of them are not interrupted
CACHE_BYTES = 256 << 10  # of a thread: within the second-level cache, beyond the first
CACHE_ROUNDS, COMPUTE_ROUNDS = 500, 10_000  # some milliseconds each
SAMPLES = 3  # of a probe each time
ARITHMETIC = {"fma": "fp32", "dot_int16": "int16", "dot_int8": "int8"}  # name of a probe: of a case's arithmetic


@dataclass(frozen=True)
class Roof:
    """The limits of one number of threads. read: GB/s from memory; cache: GB/s from the second-level cache; gmac_s: 10^9 multiply-adds
    a second by arithmetic: fp32, int16, int8 (products of a weight byte with an activation of so many bits)."""

    read: float
    cache: float
    gmac_s: dict[str, float]

    def seconds(self, streamed: int, nbytes: int, macs: int, arithmetic: str | None) -> dict[str, float]:
        """The least time of a case by each limit: streamed bytes come from memory, all nbytes through the second-level cache, macs are
        computed."""
        times = {"memory": streamed / self.read / 1e9, "cache": nbytes / self.cache / 1e9}
        if arithmetic is not None:
            times["arithmetic"] = macs / self.gmac_s[arithmetic] / 1e9
        return times


class Limits:
    """Probes of a device, measured as often as `sample` is called; the best counts, since others only slow a processor down."""

    def __init__(self, device: NativeDevice):
        self.threads = device.info.threads
        self._device = device
        self._handles: list[int] = []
        self._best: dict[tuple[str, int], float] = {}
        self._plans: list[tuple[tuple[str, int], NativePlan, float]] = []  # with what a call reads or computes, in 10^9
        out = self._buffer(self.threads)
        memory = self._buffer(MEMORY_BYTES // limits.WORD)
        for threads in {1, self.threads}:
            cache = Buffer(memory.handle, 0, (threads * CACHE_BYTES // limits.WORD,), "uint32")
            words = memory.nbytes // limits.WORD // PARTS
            for at in range(PARTS):
                part = Buffer(memory.handle, at * words * limits.WORD, (words,), "uint32")
                self._plan("memory", threads, "read", part, out, 1, part.nbytes)
            self._plan("cache", threads, "read", cache, out, CACHE_ROUNDS, cache.nbytes * CACHE_ROUNDS)
            for kind in ARITHMETIC:
                macs = params.MS_LIMITS_MACS * COMPUTE_ROUNDS * threads
                self._plan(kind, threads, kind, cache, out, COMPUTE_ROUNDS, macs)

    def sample(self) -> None:
        """Measure every probe some times."""
        for _ in range(SAMPLES):
            for key, plan, amount in self._plans:
                began = time.perf_counter()
                plan.wait(plan.run())
                self._best[key] = max(self._best.get(key, 0.0), amount / (time.perf_counter() - began))

    def roof(self, threads: int | None = None) -> Roof:
        """The best so far. threads: 1 or the device's, by default those."""
        count = threads or self.threads
        gmac_s = {name: self._best[kind, count] for kind, name in ARITHMETIC.items()}
        return Roof(self._best["memory", count], self._best["cache", count], gmac_s)

    def facts(self) -> list[dict[str, Any]]:
        """The best so far, by number of threads."""
        roofs = [(threads, self.roof(threads)) for threads in sorted({1, self.threads})]
        return [
            {"threads": threads, "memory_gb_s": roof.read, "cache_gb_s": roof.cache, "fp32_gflop_s": 2 * roof.gmac_s["fp32"],
             "int16_gmac_s": roof.gmac_s["int16"], "int8_gmac_s": roof.gmac_s["int8"]}
            for threads, roof in roofs
        ]  # fmt: skip

    def close(self) -> None:
        for _, plan, _ in self._plans:
            plan.close()
        self._plans.clear()
        for handle in self._handles:
            self._device.destroy_buffer(handle)

    def _buffer(self, words: int) -> Buffer:
        owner = self._device.create_buffer(words * limits.WORD)
        owner.numpy(np.uint32, (words,))[:] = 1  # memory is there once it is written
        self._handles.append(owner.handle)
        return Buffer(owner.handle, 0, (words,), "uint32")

    def _plan(self, name: str, threads: int, kind: str, words: Buffer, out: Buffer, rounds: int, amount: float) -> None:
        plan = self._device.create_plan(limits.launches(kind, words, out, rounds=rounds), 1, 1)
        plan.limit_threads(threads)
        plan.wait(plan.run())
        self._plans.append(((name, threads), plan, amount / 1e9))
