"""How much of a generated token is Python: time outside the native call, in a real generation."""

from __future__ import annotations

import statistics
import time
from typing import Any

from metalstep.generate import stream_generate
from metalstep.model import Model

PROMPT = "The quick brown fox jumps over the lazy dog and then"
REPEATS = 7


def bench_host_time(model: Model, tokenizer: Any, *, tokens: int) -> dict[str, float]:
    """Generate `tokens` tokens, greedy, REPEATS times. The prompt and its token are not counted.

    Returns: token_us, the median time of a token; host_us, what of it passes outside `run` and `wait` of the native plan, two reads
    of the clock included; host_share, the median of their ratio.
    """
    assert model.native is not None
    plans = model.native.decode_plan._native
    inside = 0.0
    began = 0.0

    def timed(plan: Any) -> None:
        run, wait = plan.run, plan.wait

        def timed_run(steps: int) -> int:
            nonlocal began
            began = time.perf_counter()
            return run(steps)

        def timed_wait(ticket: int) -> None:
            nonlocal inside
            wait(ticket)
            inside += time.perf_counter() - began

        plan.run, plan.wait = timed_run, timed_wait

    for plan in plans:
        timed(plan)
    totals, shares = [], []
    try:
        for _ in range(REPEATS):
            stream = stream_generate(model, tokenizer, PROMPT, max_tokens=tokens + 1)
            next(stream)
            inside, count, started = 0.0, 0, time.perf_counter()
            for _ in stream:
                count += 1
            total = time.perf_counter() - started
            totals.append(total / count)
            shares.append(1 - inside / total)
    finally:
        for plan in plans:
            del plan.run, plan.wait
    host = statistics.median(t * s for t, s in zip(totals, shares, strict=True))
    return {
        "token_us": statistics.median(totals) * 1e6,
        "host_us": host * 1e6,
        "host_share": statistics.median(shares),
    }
