"""`metalstep explain`: what one decode step launches, fuses and reads."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from metalstep.cli.parser import Parser, add_load_options, load_model

MIB = 1 << 20


def parser() -> Parser:
    p = Parser(
        "metalstep explain",
        "Show how a model runs: launches per token and what each fused, barriers, bytes read per token, memory; "
        "or why it runs eagerly.",
    )
    p.add_argument("model", metavar="MODEL", help="smollm2, a .gguf file, a directory or a Hugging Face id")
    p.add_argument("--json", action="store_true", help="everything as one JSON object")
    p.add_argument("--all", action="store_true", help="every launch in order instead of one row per kind")
    add_load_options(p)
    return p


def main(argv: list[str]) -> int:
    """show what one token costs: launches and what each fused, barriers, bytes"""
    args = parser().parse_args(argv)
    model, _ = load_model(args)
    with model:
        plan = {"model": args.model, "device_description": model.device_description, **model.explain()}
    print(json.dumps(plan, indent=2) if args.json else "\n".join(describe(plan, args.all)))
    return 0


def describe(plan: dict[str, Any], every: bool = False) -> list[str]:
    """The plan in lines to read. plan: Model.explain() with `model` and `device_description`."""
    lines = [
        f"model               {plan['model']} ({plan['model_type']}, {plan['file_bytes'] / MIB:.1f} MiB)",
        f"device              {plan['device_description']}",
    ]
    if not plan["native"]:
        return [*lines, f"runs eagerly        {plan['fallback_reason']}"]
    lines += [
        f"arithmetic          {plan['arithmetic']}",
        f"launches per token  {plan['launches_per_token']}, {plan['barriers_per_token']} of them behind a barrier",
        f"read per token      {plan['weight_bytes_per_token'] / MIB:.2f} MiB of weights, "
        f"{plan['kv_bytes_per_token']:,} bytes of KV cache per cached token",
        f"memory              arena {plan['arena_bytes']:,} bytes; a sequence has up to {plan['max_context']:,} tokens",
        "",
    ]
    return lines + (every_launch if every else kinds)(plan["launches"])


def every_launch(launches: list[dict[str, Any]]) -> list[str]:
    """One line per launch in order; `|` marks a barrier before it."""
    rows = [f"{'launch':>6}   {'kernel':12} {'weight KiB':>10}  what it computes"]
    for index, launch in enumerate(launches):
        mark = "|" if launch["barrier"] else " "
        rows.append(
            f"{index:6} {mark} {launch['kernel']:12} {launch['weight_bytes'] / 1024:10.1f}  {operations(launch)}"
        )
    return rows


def kinds(launches: list[dict[str, Any]]) -> list[str]:
    """One line per kind of launch (same kernel, same operations), in the order of their first appearance."""
    counts: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    for launch in launches:
        kind = (launch["kernel"], operations(launch))
        counts[kind] += 1
        weights[kind] += launch["weight_bytes"]
    rows = [f"{'count':>6}  {'kernel':12} {'weight MiB':>10}  what it computes"]
    rows += [f"{n:6}  {kind[0]:12} {weights[kind] / MIB:10.2f}  {kind[1]}" for kind, n in counts.items()]
    return rows


def operations(launch: dict[str, Any]) -> str:
    """What one launch computes, e.g. `rms_norm linear×3`: runs of one operation are counted."""
    words: list[list[Any]] = []
    for op in launch["ops"]:
        if words and words[-1][0] == op:
            words[-1][1] += 1
        else:
            words.append([op, 1])
    return " ".join(op if n == 1 else f"{op}×{n}" for op, n in words)
