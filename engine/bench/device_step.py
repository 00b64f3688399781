"""How long a decode step takes on the device alone: steps behind each other, and nothing that the host does between them."""

from __future__ import annotations

import contextlib
import time

from metalstep.bench.engine_steps import decode_steps
from metalstep.model import Model
from metalstep.request import Request
from metalstep.sampling import SamplingParams

SHORT, LONG = 8, 32  # steps of two native calls: what their times differ by has neither call's beginning nor its end
SAMPLES = 9


def device_step_seconds(model: Model, prompts: list[list[int]], tokens: int) -> list[float]:
    """Seconds of one decode step of all `prompts` together, `tokens` tokens behind them, SAMPLES times.

    A sample is the difference of a long and a short native call of the very same step, divided by their difference in steps.
    Raises: ValueError for a model without a native step; what ends a request.
    """
    native = model.native
    if native is None:
        raise ValueError(f"the model runs eagerly ({model.fallback_reason}), so it has no step on a device")
    arrays, engine = native.arrays, model.engine
    requests = [Request(prompt, SamplingParams(seed=0)) for prompt in prompts]
    plan = native.plan_for(len(prompts), decode=True, context=max(map(len, prompts)) + tokens)

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        plan.replay(steps)
        return time.perf_counter() - began

    def measure() -> list[float]:
        arrays.edit(arrays.step["advance"])[...] = 0  # the same step each time
        seconds(SHORT)
        return [(seconds(LONG) - seconds(SHORT)) / (LONG - SHORT) for _ in range(SAMPLES)]

    with contextlib.closing(decode_steps(engine, requests)) as stream:
        for _ in range(max(2, tokens)):  # the first takes in the prompts; then the arrays hold a decode step
            next(stream)
        return engine.exclusively(measure)
