"""Where a decode step's time goes: nanoseconds of each kind of launch."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from metalstep.bench.machine import machine
from metalstep.model import Model
from metalstep.plan.plan import Plan, StepBatch
from metalstep.sampling import SamplingParams


def bench_launches(model: Model, *, context: int, steps: int) -> dict[str, Any]:
    """Profile `steps` decode steps at a cache of `context` tokens (their contents are zeros).

    The profiled step waits for each launch. Medians leave out stalls that hit different launches in different steps, so on a
    busy machine their sum is below the time of a step. Returns rows per kind of launch: kernel, ops, count, us (sum of the
    medians over its launches), gb_s of the weights that it reads.
    Raises: ValueError for a model without a native step.
    """
    if model.native is None:
        raise ValueError(f"the model runs eagerly ({model.fallback_reason}), so it has no launches")
    run = model.native.start(SamplingParams(seed=0))
    try:
        run.reserve(context + 1)
        run.advance(context)
        plan: Plan = model.native.decode_plan
        batch: StepBatch = run.batch(np.zeros(1, np.int64), [0])
        model.native.run(plan, batch)
        samples = [plan.profile() for _ in range(steps)]
    finally:
        run.close()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for index, entry in enumerate(plan.launches):
        ops = " ".join(entry.ops)
        row = rows.setdefault(
            (entry.launch.kernel, ops),
            {"kernel": entry.launch.kernel, "ops": ops, "count": 0, "us": 0.0, "weight_bytes": 0},
        )
        row["count"] += 1
        row["us"] += statistics.median(sample[index] for sample in samples) / 1e3
        row["weight_bytes"] += entry.weight_bytes
    for row in rows.values():
        row["gb_s"] = row["weight_bytes"] / row["us"] / 1e3 if row["us"] else 0.0
    return {
        "machine": machine(),
        "device": model.device_description,
        "context": context,
        "steps": steps,
        "total_us": sum(row["us"] for row in rows.values()),
        "rows": list(rows.values()),
    }
