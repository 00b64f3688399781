"""What a plan does, as data: launches, what each replaced, barriers and bytes."""
from __future__ import annotations

from typing import Any

from metalstep.plan.plan import Plan


def explain_plan(plan: Plan) -> dict[str, Any]:
    """Launches of one step of `plan` in order, and their totals. Bytes are of weights as they lie on the device."""
    launches = [
        {
            "kernel": entry.launch.kernel,
            "ops": entry.ops,
            "barrier": bool(entry.launch.barrier),
            "weight_bytes": entry.weight_bytes,
        }
        for entry in plan.launches
    ]
    return {
        "launches_per_token": len(launches),
        "barriers_per_token": sum(bool(entry.launch.barrier) for entry in plan.launches),
        "weight_bytes_per_token": sum(entry.weight_bytes for entry in plan.launches),
        "arena_bytes": plan.arena_bytes,
        "launches": launches,
    }
