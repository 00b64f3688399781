"""What a plan does, as data: launches, what each replaced, barriers and bytes; on paper also what a chip would take, predicted."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metalstep.capture import CaptureError, capture
from metalstep.checkpoint import Checkpoint, build_model
from metalstep.chips import Chip
from metalstep.kv_cache import CacheGroup, layer_order
from metalstep.kv_scheme import PLAIN, KVScheme
from metalstep.launch_model import EXPECTED, FAST, LABEL, SLOW, Cost, launch_costs, predict
from metalstep.plan.paper import PaperPlan, paper_plan
from metalstep.plan.plan import Plan
from metalstep.plan.target import Target


def explain_plan(plan: Plan | PaperPlan) -> dict[str, Any]:
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


def explain_cache(scheme: KVScheme, groups: list[CacheGroup], centred: int = 0) -> dict[str, Any]:
    """The effective scheme of each layer, in the model's order, bytes per token, and how many times more tokens that is than in float16.

    centred: layers whose keys are.
    """
    shapes = {layer: shape for group in groups for layer, shape in group.layers.items()}
    layers = [
        {"layer": layer, "keys": shape.k_codec.name, "values": shape.v_codec.name, "bytes_per_token": shape.token_bytes}
        for layer, shape in ((layer, shapes[layer]) for layer in layer_order(shapes))
    ]
    plain = sum(2 * shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes.values())
    total = sum(shape.token_bytes for shape in shapes.values())
    return {
        "scheme": scheme.name,
        "effective": scheme.describe(len(layers)),
        "bytes_per_token": total,
        "float16_bytes_per_token": plain,
        "capacity": plain / total,
        "centred_layers": centred,
        "layers": layers,
    }


def codec_runs(kv: Mapping[str, Any]) -> list[str]:
    """Neighbouring layers with the same codecs in one text each. kv: explain_cache's."""
    runs: list[tuple[list[object], str]] = []
    for entry in kv["layers"]:
        codecs = f"keys {entry['keys']}, values {entry['values']}"
        if not runs or runs[-1][1] != codecs:
            runs.append(([], codecs))
        runs[-1][0].append(entry["layer"])
    return [f"layers {layers[0]} to {layers[-1]}: {codecs}" for layers, codecs in runs]


def explain_on_paper(
    checkpoint: Checkpoint,
    target: Target,
    *,
    chip: Chip | None = None,
    batch: int = 1,
    context: int = 1024,
    scheme: KVScheme = PLAIN,
    strict: bool = False,
    device: str = "metal",
) -> dict[str, Any]:
    """A decode step of `batch` sequences of `context` tokens each as `target` plans it, without its device: nothing is read or run.

    Adds to explain_plan's keys what a launch moves and computes (see launch_model.Cost), per launch and in all, and with a chip the time
    that it is predicted to take. A model that cannot be captured says so in `fallback_reason`. device: the target's, for the report.
    Raises: ValueError for an option; CaptureError with strict.
    """
    from metalstep.native_model import MAX_SEQS  # which imports this module

    limit = checkpoint.config.get("max_position_embeddings")
    if not 1 <= batch <= MAX_SEQS:
        raise ValueError(f"batch is {batch}, expected 1 to {MAX_SEQS} sequences; others wait until one of these ends")
    if context < 1 or (isinstance(limit, int) and context > limit):
        raise ValueError(f"context is {context}, expected 1 to the model's own limit of {limit} tokens; pass a shorter one")
    model_type = checkpoint.config.get("model_type", "")
    model = build_model(checkpoint)
    head: dict[str, Any] = {"model_type": model_type, "file_bytes": checkpoint.file_bytes, "device": device, "paper": True}
    try:
        captured = capture(model, model_type)
        plan = paper_plan(captured, checkpoint.tensors, target, rows=batch, context=context, scheme=scheme)
    except CaptureError as error:
        if strict:
            raise
        reason = str(error) if str(error).startswith(model_type) else f"{model_type} has no native step yet: {error}"
        return {**head, "native": False, "fallback_reason": reason, "launches_per_token": None, "launches": []}
    costs = launch_costs(plan, batch, context)
    report = {
        **head,
        "native": True,
        "fallback_reason": None,
        **target.facts(),
        "batch": batch,
        "context": context,
        "kv_dtype": scheme.name if scheme.compressed else scheme.k.name,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv": explain_cache(scheme, plan.groups),
        "max_context": limit,
        **explain_plan(plan),
        "kv_bytes_per_step": sum(cost.kv_bytes for cost in costs),
        "other_bytes_per_step": sum(cost.other_bytes for cost in costs),
        "flops_per_step": sum(cost.flops for cost in costs),
    }
    for launch, cost in zip(report["launches"], costs, strict=True):
        launch.update(kv_bytes=cost.kv_bytes, other_bytes=cost.other_bytes, flops=cost.flops)
    if chip is not None:
        _add_prediction(report, costs, chip)
    return report


def _add_prediction(report: dict[str, Any], costs: list[Cost], chip: Chip) -> None:
    """Add what `chip` is predicted to take: to the report, and to each of its launches."""
    barriers = [launch["barrier"] for launch in report["launches"]]
    expected, fast, slow = (predict(costs, barriers, chip, constants) for constants in (EXPECTED, FAST, SLOW))
    for launch, time in zip(report["launches"], expected.launches_us, strict=True):
        launch["predicted_us"] = time
    report["prediction"] = {
        "label": LABEL,
        "chip": chip.name,
        "chip_gb_s": chip.bandwidth,
        "chip_gpu_cores": chip.cores,
        "chip_f32_tflops": chip.tflops,
        "chip_source": chip.source,
        "step_us": expected.total_us,
        "step_us_range": [fast.total_us, slow.total_us],
        "tokens_per_s": report["batch"] * 1e6 / expected.total_us,
        "tokens_per_s_range": [report["batch"] * 1e6 / slow.total_us, report["batch"] * 1e6 / fast.total_us],
        "dispatch_us": expected.dispatch_us,
        "memory_us": expected.memory_us,
        "arithmetic_us": expected.arithmetic_us,
    }
