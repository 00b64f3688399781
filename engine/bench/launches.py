"""Where a step's time goes: nanoseconds of each kind of launch."""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

from metalstep.bench.engine_steps import decode_steps
from metalstep.bench.machine import machine
from metalstep.bench.prompts import Prompts
from metalstep.model import Model
from metalstep.request import Request
from metalstep.sampling import SamplingParams


def bench_launches(
    model: Model, prompts: Prompts, *, context: int, steps: int, batch: int = 1, prefill: int | None = None
) -> dict[str, Any]:
    """Profile a decode step of `batch` sequences with `context` tokens each, `steps` times.

    prefill: profile a step that takes in so many tokens of one fresh prompt instead, up to PREFILL_ROWS; batch and context have no
    meaning then. The profiled step waits for each launch. Medians leave out stalls that hit different launches in different steps, so
    on a busy machine their sum is below the time of a step. Returns rows per kind of launch: kernel, ops, count, us (sum of the
    medians over its launches), weight_bytes, gb_s of the weights that it reads, macs (rows times elements of weights; padding and
    attention are not counted) and gmac_s.
    Raises: ValueError for a model without a native step; RuntimeError when a prompt was in the prefix cache.
    """
    native = model.native
    if native is None:
        raise ValueError(f"the model runs eagerly ({model.fallback_reason}), so it has no launches")
    if prefill:
        batch, context = 1, 0
    requests = [Request(prompt, SamplingParams(seed=0)) for prompt in prompts.take(batch, prefill or context)]
    plan = native.plan_for(prefill or batch, decode=not prefill, context=context + steps)

    def profile() -> tuple[list[list[int]], dict[str, int]]:
        step = native.arrays.step
        if step["num_tokens"][0] != (prefill or batch):
            raise RuntimeError(f"the step has {step['num_tokens'][0]} rows, expected {prefill or batch}; take prompts that are fresh")
        native.arrays.edit(step["advance"])[...] = 0  # the same step each time
        step_rows = {"tokens": int(step["num_tokens"][0]), "sampled": int(step["num_sampled"][0])}
        return [plan.profile() for _ in range(steps)], step_rows

    with contextlib.closing(decode_steps(model.engine, requests)) as stream:
        next(stream)
        if not prefill:
            next(stream)  # the arrays hold the latest step: now one of this plan
        samples, step_rows = model.engine.exclusively(profile)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for index, entry in enumerate(plan.launches):
        ops = " ".join(entry.ops)
        row = rows.setdefault(
            (entry.launch.kernel, ops),
            {"kernel": entry.launch.kernel, "ops": ops, "count": 0, "us": 0.0, "weight_bytes": 0, "macs": 0},
        )
        row["count"] += 1
        row["us"] += statistics.median(sample[index] for sample in samples) / 1e3
        row["weight_bytes"] += entry.weight_bytes
        row["macs"] += step_rows[entry.rows] * entry.weight_elements
    for row in rows.values():
        row["gb_s"] = row["weight_bytes"] / row["us"] / 1e3 if row["us"] else 0.0
        row["gmac_s"] = row["macs"] / row["us"] / 1e3 if row["us"] else 0.0
    return {
        "machine": machine(),
        "device": model.device_description,
        "batch": batch,
        "context": context,
        "prefill": prefill,
        "steps": steps,
        "total_us": sum(row["us"] for row in rows.values()),
        "rows": list(rows.values()),
    }
