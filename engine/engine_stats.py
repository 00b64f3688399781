"""What an engine counts and measures. Cheap enough to be always on: a step costs a few reads of the clock and two tuples."""
from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WINDOW = 5.0  # seconds that speeds are of
SLOT = 0.25  # seconds of steps that are added up


@dataclass(frozen=True)
class KVUse:
    """Of a group of layers. window: its attention window in positions, None: all. used_blocks: held by requests and prompt caches now;
    peak_blocks: the most that a step had. block_bytes: of one block of 16 tokens, in all layers of the group."""

    window: int | None
    used_blocks: int
    total_blocks: int
    peak_blocks: int
    block_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.used_blocks * self.block_bytes

    @property
    def total_bytes(self) -> int:
        return self.total_blocks * self.block_bytes


@dataclass(frozen=True)
class EngineStats:
    """running, waiting: requests now. free_blocks, total_blocks: of the first group of layers; kv has all of them.

    Since the start: steps (native calls), prompt_tokens (computed), cached_tokens (found in the prefix cache), generated_tokens,
    preemptions; finished, cancelled (by their callers) and failed requests. prefix_hit_rate: the part of the prompts' tokens that was
    found, 0 to 1. batch, rows: requests and rows of the latest step.
    decode_tok_s, prompt_tok_s: tokens per second that were generated and computed in the last 5 seconds, or since the first step in them.
    step_ms: mean time of a step then, or of the latest one if there was none; device_ms: what of it the device worked, the rest is the
    host's. last_step_ms, last_device_ms: of the latest. uptime_s: since the model was loaded. Two that differ in times only are equal.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    batch: int = 0
    rows: int = 0
    kv: tuple[KVUse, ...] = ()
    decode_tok_s: float = field(default=0.0, compare=False)
    prompt_tok_s: float = field(default=0.0, compare=False)
    step_ms: float = field(default=0.0, compare=False)
    device_ms: float = field(default=0.0, compare=False)
    last_step_ms: float = field(default=0.0, compare=False)
    last_device_ms: float = field(default=0.0, compare=False)
    uptime_s: float = field(default=0.0, compare=False)

    @property
    def prefix_hit_rate(self) -> float:
        return self.cached_tokens / max(1, self.cached_tokens + self.prompt_tokens)

    @property
    def kv_used_bytes(self) -> int:
        return sum(group.used_bytes for group in self.kv)

    @property
    def kv_total_bytes(self) -> int:
        return sum(group.total_bytes for group in self.kv)

    @property
    def kv_peak_bytes(self) -> int:
        return sum(group.peak_blocks * group.block_bytes for group in self.kv)

    def as_dict(self) -> dict[str, Any]:
        """All of it, properties too, as JSON has it."""
        names = ("prefix_hit_rate", "kv_used_bytes", "kv_peak_bytes", "kv_total_bytes")
        kv = [{**dataclasses.asdict(group), "used_bytes": group.used_bytes, "total_bytes": group.total_bytes} for group in self.kv]
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in names}, "kv": kv}


class StepTimes(NamedTuple):
    """Of a step, by time.perf_counter_ns: scheduled, its arrays filled, the native call queued and done, its results handed out."""

    began: int
    scheduled: int
    prepared: int
    submitted: int
    done: int
    ended: int


class Slot(NamedTuple):
    """Steps that ended in one SLOT of time. began: the first of them, ns. ns, device_ns: of all of them."""

    number: int
    began: int
    steps: int
    ns: int
    device_ns: int
    prompt_tokens: int
    generated_tokens: int


class Speeds(NamedTuple):
    """As EngineStats has them."""

    decode_tok_s: float
    prompt_tok_s: float
    step_ms: float
    device_ms: float


class StepMeter:
    """Speeds over a sliding window. The thread whose turn it is calls `step`, any thread reads.

    Everything is replaced as a whole, by one store: an interrupt loses a step at most, and a reader sees no half of one.
    """

    def __init__(self, groups: int) -> None:
        self.started = time.perf_counter_ns()
        self.latest: tuple[int, int, int, int] = (0, 0, 0, 0)  # requests, rows, ns, device's ns
        self.peaks: tuple[int, ...] = (0,) * groups
        self._totals = (0, 0)  # tokens of prompts and generated ones, before the latest step
        self._slots: deque[Slot] = deque(maxlen=int(WINDOW / SLOT) + 1)

    def step(self, times: StepTimes, batch: int, rows: int, prompt_tokens: int, generated_tokens: int) -> None:
        """prompt_tokens, generated_tokens: since the start."""
        before, self._totals = self._totals, (prompt_tokens, generated_tokens)
        prompt, generated = prompt_tokens - before[0], generated_tokens - before[1]
        ns, device = times.ended - times.began, times.done - times.prepared
        self.latest = (batch, rows, ns, device)
        slots, number = self._slots, int(times.ended / 1e9 / SLOT)
        last = slots[-1] if slots else None
        if last is None or last.number != number:
            slots.append(Slot(number, times.began, 1, ns, device, prompt, generated))
        else:
            slots[-1] = Slot(
                number, last.began, last.steps + 1, last.ns + ns, last.device_ns + device, last.prompt_tokens + prompt,
                last.generated_tokens + generated,
            )  # fmt: skip

    def saw(self, used: Iterable[int]) -> None:
        """Blocks in use in each group."""
        peaks = tuple(map(max, self.peaks, used))
        if peaks != self.peaks:
            self.peaks = peaks

    def speeds(self, now: int | None = None) -> Speeds:
        """now: by time.perf_counter_ns; None: now."""
        now = time.perf_counter_ns() if now is None else now
        oldest = int((now / 1e9 - WINDOW) / SLOT)
        slots = [slot for slot in tuple(self._slots) if slot.number > oldest]
        if not slots:
            _, _, ns, device = self.latest
            return Speeds(0.0, 0.0, ns / 1e6, device / 1e6)
        seconds = max(min((now - slots[0].began) / 1e9, WINDOW), 1e-9)
        steps = sum(slot.steps for slot in slots)
        return Speeds(
            sum(slot.generated_tokens for slot in slots) / seconds,
            sum(slot.prompt_tokens for slot in slots) / seconds,
            sum(slot.ns for slot in slots) / steps / 1e6,
            sum(slot.device_ns for slot in slots) / steps / 1e6,
        )


class Ends:
    """Requests that ended, by how. Each counts once, though an interrupt may have its end run again."""

    def __init__(self) -> None:
        self._counts: tuple[dict[str, int], dict[int, str]] = ({"finished": 0, "cancelled": 0, "failed": 0}, {})

    def add(self, number: int, how: str) -> None:
        """number: the request's own."""
        self._counts[1].setdefault(number, how)

    def settle(self) -> None:
        """Everything is whole: no end that was added comes again."""
        if self._counts[1]:
            self._counts = (self.counts(), {})

    def counts(self) -> dict[str, int]:
        """finished, cancelled and failed since the start."""
        counts, new = self._counts
        hows = list(new.values())
        return {how: count + hows.count(how) for how, count in counts.items()}
