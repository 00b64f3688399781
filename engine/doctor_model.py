"""What `metalstep doctor MODEL` says: whether it runs natively, the memory and context that it has here, what would be faster."""
from __future__ import annotations

from typing import Any

from metalstep.capture import CaptureError
from metalstep.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from metalstep.choices import DEFAULT_DEVICE, device_kind
from metalstep.doctor_cuda import refusal
from metalstep.doctor_devices import opened
from metalstep.explain import explain_on_paper
from metalstep.finding import FAIL, OK, SLOW, WARN, Finding
from metalstep.memory_size import free_memory
from metalstep.plan.gpu_target import GpuTarget

GIB = 1 << 30
KV_PART = {"metal": 0.25, "cuda": 0.9}  # of the free memory, load's default; 0.5 on other devices
DENSE = ("bfloat16", "float16", "float32")
LARGE = GIB  # bytes of dense weights from which a quantised copy is worth a hint


def examine_model(
    name: str, *, revision: str | None = None, device: str | None = None, batch_invariant: bool = False
) -> tuple[list[Finding], list[Finding]]:
    """(what works, what could be faster). Reads the model's description, structure and tokenizer, and no weight.

    Raises: CheckpointError, ValueError for a model that cannot be opened.
    """
    device = device or DEFAULT_DEVICE
    with open_checkpoint(name, revision) as checkpoint:
        config = checkpoint.config
        limit = config.get("max_position_embeddings")
        context = min(1024, limit) if isinstance(limit, int) and limit > 0 else 1024
        try:
            kind = "nvidia" if device_kind(device) == "cuda" else "apple"
            plan = explain_on_paper(checkpoint, GpuTarget(kind, batch_invariant=batch_invariant), context=context)
        except CaptureError as error:
            plan = {"native": False, "fallback_reason": str(error)}
        weights = described(checkpoint)
        refused = refusal(device) if device_kind(device) in ("cuda", "metal") else None
        free = free_memory() if refused else memory_of(device)
        findings, faster = assess(name, weights, plan, limit if isinstance(limit, int) else None, device, free, refused)
        return [*findings, tokenizer(checkpoint)], faster


def memory_of(device: str) -> int:
    """Bytes of memory for a model: an NVIDIA GPU's own where there is one that opens, else what the machine has free."""
    opened_device = opened(device) if device_kind(device) == "cuda" else None
    if opened_device is None:
        return free_memory()
    with opened_device:
        return opened_device.memory_left()


def tokenizer(checkpoint: Checkpoint) -> Finding:
    """Whether the model's tokenizer loads, and whether it has a chat template."""
    try:
        loaded = checkpoint.tokenizer()
    except CheckpointError as error:
        found, _, hint = str(error).rpartition("; ")
        return Finding("tokenizer", FAIL, found or hint, hint if found else None)
    template = bool(loaded.has_chat_template)
    found = f"{len(loaded.get_vocab()):,} tokens, {'with a' if template else 'no'} chat template"
    return Finding("tokenizer", OK, found, facts={"chat_template": template})


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of the weights: model_type, bytes, and bytes of linears that are not quantised."""
    dense = 0
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) >= 2 and getattr(tensor, "format", None) is None and tensor.dtype in DENSE:
            count = 1
            for size in tensor.shape:
                count *= size
            dense += count * (4 if tensor.dtype == "float32" else 2)
    total = checkpoint.file_bytes
    return {"model_type": checkpoint.config.get("model_type", "unknown"), "bytes": total, "dense_bytes": min(dense, total)}


def assess(
    name: str, weights: dict[str, Any], plan: dict[str, Any], limit: int | None, device: str, free: int, refused: str | None = None
) -> tuple[list[Finding], list[Finding]]:
    """weights: see described. plan: of explain_on_paper. limit: the model's own, in tokens. free: bytes of memory.

    refused: why the device cannot be opened; nothing is said of its memory then.
    """
    facts = {**weights, "free_bytes": None if refused else free, "limit": limit, "device": device}
    size = f"{weights['bytes'] / GIB:.2f} GiB of weights"
    findings = [Finding("model", OK, f"{weights['model_type']}, {size}", facts=facts)]
    faster: list[Finding] = []
    if device == "eager":
        findings.append(Finding("native step", OK, "not wanted: --device eager is mlx-lm's own graph"))
    elif plan["native"] and refused:
        findings.append(Finding("native step", OK, f"the decode step can be captured; {device_kind(device)} would run it"))
    elif plan["native"]:
        findings.append(Finding("native step", OK, f"the decode step can be captured and runs on {device}"))
    else:
        reason = str(plan["fallback_reason"])
        findings.append(Finding("native step", WARN, f"runs eagerly through mlx-lm: {reason}", "nothing to do for it to run"))
        faster.append(Finding("native step", SLOW, "a model without a native step is slower", "docs/models.md lists what has one"))
    if refused is None:
        findings.append(memory(weights["bytes"], free))
    if plan["native"] and device != "eager" and refused is None:
        finding, more = context(plan["kv_bytes_per_token"], weights["bytes"], limit, device, free)
        findings.append(finding)
        faster += more
    if weights["dense_bytes"] >= LARGE or (weights["dense_bytes"] > weights["bytes"] / 2 and weights["bytes"] > LARGE // 8):
        what = f"{weights['dense_bytes'] / GIB:.2f} GiB of weights have 16 bits or more, and a token reads all of them"
        hint = f"metalstep convert {name} --quantize 4bit --output NAME-4bit, or --quantize 4bit at load: about a quarter of the bytes"
        faster.append(Finding("weights", SLOW, what, hint))
    if device == "metal-sim":
        faster.append(Finding("device", SLOW, "metal-sim simulates a GPU on the CPU, for tests", "--device host"))
    if refused is not None:
        why, _, what = refused.rpartition("; ")
        findings.append(Finding("device", FAIL, f"{device} cannot be opened: {why or what}", what if why else "--device host"))
    return findings, faster


def memory(weights: int, free: int) -> Finding:
    facts = {"weights_bytes": weights, "free_bytes": free}
    found = f"needs {weights / GIB:.2f} GiB and its KV cache; {free / GIB:.1f} GiB are free"
    if weights > free:
        hint = "close other programs, or take a smaller quantisation: metalstep convert MODEL --quantize 4bit"
        return Finding("memory", FAIL, found, hint, facts)
    return Finding("memory", OK, found, facts=facts)


def context(per_token: int, weights: int, limit: int | None, device: str, free: int) -> tuple[Finding, list[Finding]]:
    """per_token: bytes of KV cache in float16."""
    part = KV_PART.get(device_kind(device), 0.5)
    fits = int(max(0, free - weights) * part) // max(1, per_token)
    facts = {"kv_bytes_per_token": per_token, "tokens_that_fit": fits}
    words = f"{per_token / 1024:.1f} KiB of KV cache per token; about {fits:,} tokens fit into {part:g} of what is free then"
    if limit is None or fits >= limit:
        own = "" if limit is None else f", the model's own limit is {limit:,}"
        return Finding("context", OK, words + own, facts=facts), []
    hint = "--kv-scheme turbo8v4 has more tokens in the same memory; `metalstep explain MODEL --kv-scheme turbo8v4` says how many"
    more = Finding("context", SLOW, f"less than the model's own {limit:,} tokens fit", hint)
    return Finding("context", OK, f"{words}, of the model's own {limit:,}", facts=facts), [more]
