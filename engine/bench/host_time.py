"""How much of a decode step is Python: time outside the native call, in a real generation."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from metalstep.bench.engine_steps import decode_steps
from metalstep.bench.prompts import Prompts
from metalstep.generate import stream_generate
from metalstep.model import Model
from metalstep.plan.plan import Plan
from metalstep.request import Request
from metalstep.sampling import SamplingParams

PROMPT = "The quick brown fox jumps over the lazy dog and then"
REPEATS = 7


class NativeClock:
    """seconds: time between the beginning of a plan's `run` and the end of its `wait`, added up over calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    @contextlib.contextmanager
    def watching(self, plan: Plan) -> Iterator[None]:
        """Count the calls of `plan` meanwhile."""
        natives: list[Any] = list(plan._native)
        try:
            for native in natives:
                native.run, native.wait = self._run(native.run), self._wait(native.wait)
            yield
        finally:
            for native in natives:
                vars(native).pop("run", None)
                vars(native).pop("wait", None)

    def _run(self, run: Callable[[int], int]) -> Callable[[int], int]:
        def timed(steps: int) -> int:
            self._began = time.perf_counter()
            return run(steps)

        return timed

    def _wait(self, wait: Callable[[int], None]) -> Callable[[int], None]:
        def timed(ticket: int) -> None:
            wait(ticket)
            self.seconds += time.perf_counter() - self._began

        return timed


def bench_host_time(
    model: Model, tokenizer: Any, prompts: Prompts, *, tokens: int, batch: int = 1
) -> dict[str, float | int]:
    """Generate up to `tokens` tokens per sequence, greedy, REPEATS times. Prompts and their tokens are not counted.

    batch: 1 is `stream_generate`, text included; more sequences are requests of the engine, drawn by one thread. Returns: batch;
    step_us, the median time of a step (a token of each sequence); host_us, what of it passes outside `run` and `wait` of the native
    plan, two reads of the clock included; host_share, the median of their ratio.
    """
    native = model.native
    assert native is not None
    length = len(tokenizer.encode(PROMPT))
    clock = NativeClock()
    totals, shares = [], []
    with clock.watching(native.plan_for(batch, decode=True)):
        for _ in range(REPEATS):
            requests = [Request(prompt, SamplingParams(seed=0)) for prompt in prompts.take(batch, length)]
            run = _text(model, tokenizer, tokens) if batch == 1 else decode_steps(model.engine, requests)
            with contextlib.closing(run) as steps:
                next(steps)
                clock.seconds, count, started = 0.0, 0, time.perf_counter()
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
