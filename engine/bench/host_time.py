"""How much of a decode step is Python: time outside the native call, in a real generation."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Generator, Iterator
from typing import Any

from metalstep.bench.engine_steps import decode_steps
from metalstep.bench.prompts import Prompts
from metalstep.generate import stream_generate
from metalstep.kernels.native import NativePlan
from metalstep.model import Model
from metalstep.request import Request
from metalstep.sampling import SamplingParams

PROMPT = "The quick brown fox jumps over the lazy dog and then"
REPEATS = 7


class NativeClock:
    """seconds: time with a native run queued that nobody has waited for, added up since `reset`; runs of all plans count."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0
        self._queued: set[int] = set()  # tickets

    def reset(self) -> None:
        self.seconds, self._began = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count the calls of all plans meanwhile."""
        run, wait = NativePlan.run, NativePlan.wait

        def timed_run(native: NativePlan, steps: int = 1) -> int:
            if not self._queued:
                self._began = time.perf_counter()
            ticket = run(native, steps)
            self._queued.add(ticket)
            return ticket

        def timed_wait(native: NativePlan, ticket: int, timeout: float | None = None) -> None:
            wait(native, ticket, timeout)
            now = time.perf_counter()
            self.seconds += now - self._began
            self._began = now
            self._queued = {queued for queued in self._queued if queued > ticket}  # those before it are done too

        NativePlan.run = timed_run  # type: ignore[assignment, method-assign]
        NativePlan.wait = timed_wait  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            NativePlan.run = run  # type: ignore[method-assign]
            NativePlan.wait = wait  # type: ignore[method-assign]


def bench_host_time(
    model: Model, tokenizer: Any, prompts: Prompts, *, tokens: int, batch: int = 1
) -> dict[str, float | int]:
    """Generate up to `tokens` tokens per sequence, greedy, REPEATS times. Prompts and their tokens are not counted.

    batch: 1 is `stream_generate`, text included; more sequences are requests of the engine, drawn by one thread. Returns: batch;
    step_us, the median time of a step (a token of each sequence); host_us, what of it passes outside `run` and `wait` of the native
    plan, two reads of the clock included; host_share, the median of their ratio.
    """
    length = len(tokenizer.encode(PROMPT))
    clock = NativeClock()
    totals, shares = [], []
    with clock.watching():
        for _ in range(REPEATS):
            requests = [Request(prompt, SamplingParams(seed=0)) for prompt in prompts.take(batch, length)]
            run = _text(model, tokenizer, tokens) if batch == 1 else decode_steps(model.engine, requests)
            with contextlib.closing(run) as steps:
                next(steps)
                clock.reset()
                count, started = 0, time.perf_counter()
                for _ in itertools.islice(steps, tokens):
                    count += 1
                total = time.perf_counter() - started
            totals.append(total / count)
            shares.append(1 - clock.seconds / total)
    host = statistics.median(t * s for t, s in zip(totals, shares, strict=True))
    return {
        "batch": batch,
        "step_us": statistics.median(totals) * 1e6,
        "host_us": host * 1e6,
        "host_share": statistics.median(shares),
    }


def _text(model: Model, tokenizer: Any, tokens: int) -> Generator[None, None, None]:
    """Steps of one text; the first is the prompt."""
    for _ in stream_generate(model, tokenizer, PROMPT, max_tokens=tokens + 1):
        yield
