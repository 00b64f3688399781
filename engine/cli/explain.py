"""`metalstep explain`: what one decode step launches, fuses, reads and, predicted for a chip, takes."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

from metalstep.chips import CHIPS, find_chip
from metalstep.choices import DEFAULT_DEVICE, device_kind
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import MODEL_HELP, Parser, add_load_options, counted, load_model, positive, scheme_options

MIB = 1 << 20
CONTEXT = 1024  # tokens of each sequence, unless told otherwise
OF_PAPER = ("batch", "context")  # options of a plan on paper
OF_SHAPE = ("bits", "group_size")


def parser() -> Parser:
    p = Parser(
        "metalstep explain",
        "Show how a model runs: launches per token and what each fused, barriers, bytes read per token, memory; "
        "or why it runs eagerly. With --chip or --shape the step is planned for a GPU on paper, on any machine.",
        [
            "metalstep explain smollm2",
            "metalstep explain smollm2 --all",
            "metalstep explain --shape qwen3-0.6b --chip m4-max --context 4096",
            "metalstep explain smollm2 --kv-scheme turbo4v2 --json",
        ],
    )
    p.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    p.add_argument("--json", action="store_true", help="everything as one JSON object")
    p.add_argument("--all", action="store_true", help="every launch in order instead of one row per kind")
    paper = p.add_argument_group("a plan on paper, for --device metal or cuda")
    paper.add_argument("--chip", metavar="NAME", help=f"predict what a step takes on this chip: {', '.join(CHIPS)}")
    paper.add_argument("--shape", metavar="NAME", help="a public model's shape instead of MODEL: qwen3-0.6b, llama-3.2-1b, …")
    paper.add_argument("--batch", type=positive, metavar="N", help="sequences that are decoded together (default: 1)")
    paper.add_argument(
        "--context", type=positive, metavar="TOKENS", help=f"tokens of each sequence (default: {CONTEXT}, or the model's limit)"
    )
    paper.add_argument("--bits", type=positive, metavar="N", help="of a shape's weights; 16: not quantised (default: 4)")
    paper.add_argument("--group-size", type=positive, metavar="N", help="of a shape's quantised weights (default: 64)")
    add_load_options(p)
    return p


def main(argv: list[str]) -> int:
    """show what one token costs: launches and what each fused, bytes; also on paper"""
    args = parser().parse_args(argv)
    if args.model and args.shape:
        raise CommandError("MODEL and --shape exclude each other", "leave one of them out")
    if not args.model and not args.shape:
        raise CommandError("the following arguments are required: MODEL, or --shape NAME", "metalstep explain --help")
    from metalstep.doctor_cuda import has_gpu

    kind = device_kind(args.device or DEFAULT_DEVICE)
    absent = (kind == "metal" and sys.platform != "darwin") or (kind == "cuda" and not has_gpu())
    if args.shape or args.chip or absent:
        report = on_paper(args)
    else:
        _refuse_shape_options(args)
        paper = "--chip or --shape" if sys.platform == "darwin" else "--chip, --shape or --device metal"
        _refuse(args, OF_PAPER, f"needs a plan on paper: {paper}", "add --chip m4-max, or use --shape NAME in place of MODEL")
        model, _ = load_model(args)
        with model:
            report = {"model": args.model, "device_description": model.device_description, **model.explain()}
    print(json.dumps(report, indent=2) if args.json else "\n".join(describe(report, args.all)))
    return 0


def on_paper(args: argparse.Namespace) -> dict[str, Any]:
    """The report of a step that is planned for a GPU and not run."""
    from metalstep.checkpoint import Checkpoint, open_checkpoint
    from metalstep.explain import explain_on_paper
    from metalstep.kv_scheme import parse
    from metalstep.plan.gpu_target import GpuTarget
    from metalstep.shapes import ShapeCheckpoint

    device = device_kind(args.device or "metal")
    if device not in ("metal", "cuda"):
        raise CommandError(f"--device {device} cannot be planned on paper", "use --device metal or --device cuda")
    if args.chip and device != "metal":
        raise CommandError(f"--chip is of --device metal, and --device is {device}", "leave one of them out")
    _refuse(args, ("threads", "kv_memory", "max_context"), "has no meaning on paper", "leave it out; --context says how long sequences are")
    if args.arithmetic != "int16":
        raise CommandError("--arithmetic is of the host device", "leave it out")
    chip = None if args.chip is None else find_chip(args.chip)
    checkpoint: Checkpoint
    if args.shape:
        checkpoint = shape = ShapeCheckpoint(args.shape, bits=args.bits or 4, group_size=args.group_size or 64)
        quantisation = "bfloat16" if shape.bits == 16 else f"{shape.bits} bits in groups of {shape.group_size}"
        about = {"model": args.shape, "shape": True, "shape_source": shape.shape.source, "quantisation": quantisation}
    else:
        _refuse_shape_options(args)
        checkpoint = open_checkpoint(args.model)
        about = {"model": args.model}
    with checkpoint:
        context = args.context or min(CONTEXT, checkpoint.config.get("max_position_embeddings") or CONTEXT)
        report = explain_on_paper(
            checkpoint,
            GpuTarget("nvidia" if device == "cuda" else "apple", batch_invariant=args.batch_invariant),
            device=device,
            chip=chip,
            batch=args.batch or 1,
            context=context,
            scheme=parse(args.kv_scheme, kv_dtype=args.kv_dtype, **{k: v for k, v in scheme_options(args).items() if k != "kv_scheme"}),
            strict=args.strict,
        )
    return {**about, "device_description": f"{device}, planned on paper", **report}


def _refuse_shape_options(args: argparse.Namespace) -> None:
    _refuse(args, OF_SHAPE, "is of a shape's weights, and MODEL has its own", "leave it out, or use --shape NAME in place of MODEL")


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str, hint: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise CommandError(f"--{name.replace('_', '-')} {why}", hint)


def describe(plan: dict[str, Any], every: bool = False) -> list[str]:
    """The plan in lines to read. plan: Model.explain() or explain_on_paper() with `model` and `device_description`."""
    shape = f", its shape alone: {plan['quantisation']}" if plan.get("shape") else ""
    lines = [
        f"model               {plan['model']} ({plan['model_type']}, {plan['file_bytes'] / MIB:,.1f} MiB{shape})",
        f"device              {plan['device_description']}",
    ]
    if not plan["native"]:
        return [*lines, f"runs eagerly        {plan['fallback_reason']}"]
    if plan.get("batch_invariant"):
        lines.append("batch-invariant     a sequence's logits are the same bits in any batch")
    if plan.get("paper"):
        lines += paper_totals(plan)
        return lines + (every_launch if every else kinds)(plan["launches"])
    if "arithmetic" in plan:
        lines.append(f"arithmetic          {plan['arithmetic']}")
    lines += [
        f"launches per token  {plan['launches_per_token']}, {plan['barriers_per_token']} of them behind a barrier",
        f"read per token      {plan['weight_bytes_per_token'] / MIB:,.2f} MiB of weights, "
        f"{plan['kv_bytes_per_token']:,} bytes of KV cache per cached token",
        *cache_lines(plan["kv"]),
        f"memory              arena {plan['arena_bytes']:,} bytes; a sequence has up to {counted(plan['max_context'], 'token')}",
        "",
    ]
    return lines + (every_launch if every else kinds)(plan["launches"])


def cache_lines(kv: dict[str, Any]) -> list[str]:
    """The KV cache's encoding where it has one: what it gains, and which layers have which codecs."""
    if kv["scheme"] == "none":
        return []
    from metalstep.explain import codec_runs

    centred = f", keys of {counted(kv['centred_layers'], 'layer')} centred" if kv["centred_layers"] else ""
    gained = f"{kv['capacity']:.2f}x the tokens of float16 in the same memory"
    return [f"KV cache            {kv['effective']}{centred}: {gained}", *(f"  {run}" for run in codec_runs(kv))]


def paper_totals(plan: dict[str, Any]) -> list[str]:
    """The lines of a step on paper, above its launches."""
    sequences = "of 1 sequence" if plan["batch"] == 1 else f"for each of {plan['batch']} sequences"
    lines = [
        f"step                a token {sequences} with {counted(plan['context'], 'token')}, KV cache {plan['kv_dtype']}",
        f"launches per step   {plan['launches_per_token']}, {plan['barriers_per_token']} of them behind a barrier",
        f"moved per step      {plan['weight_bytes_per_token'] / MIB:,.2f} MiB of weights, {plan['kv_bytes_per_step'] / MIB:,.2f} MiB of KV "
        f"cache, {plan['other_bytes_per_step'] / MIB:,.2f} MiB of activations and the like",
        f"computed per step   {plan['flops_per_step'] / 1e9:,.2f} GFLOP",
        f"memory              arena {plan['arena_bytes']:,} bytes; {plan['kv_bytes_per_token']:,} bytes of KV cache per token",
        *cache_lines(plan["kv"]),
    ]
    predicted = plan.get("prediction")
    if predicted:
        low, high = (time / 1e3 for time in predicted["step_us_range"])
        slow, fast = predicted["tokens_per_s_range"]
        lines += [
            f"chip                {predicted['chip']}: {predicted['chip_gb_s']:g} GB/s, {predicted['chip_gpu_cores']} GPU cores, "
            f"{predicted['chip_f32_tflops']:.1f} TFLOP/s",
            f"predicted           {predicted['step_us'] / 1e3:.2f} ms a step ({low:.2f} to {high:.2f}), "
            f"{predicted['tokens_per_s']:,.0f} tokens/s ({slow:,.0f} to {fast:,.0f})",
            f"  each alone        launches {predicted['dispatch_us'] / 1e3:.2f} ms, memory {predicted['memory_us'] / 1e3:.2f}, arithmetic "
            f"{predicted['arithmetic_us'] / 1e3:.2f}",
            f"                    {predicted['label']}",
        ]
    return [*lines, ""]


def every_launch(launches: list[dict[str, Any]]) -> list[str]:
    """One line per launch in order; `|` marks a barrier before it."""
    timed = _timed(launches)
    width = _kernel_width(launches)
    rows = [f"{'launch':>6}   {'kernel':{width}} {'weight KiB':>10}{timed}  what it computes"]
    for index, launch in enumerate(launches):
        mark = "|" if launch["barrier"] else " "
        time = f" {launch['predicted_us']:12.2f}" if timed else ""
        rows.append(
            f"{index:6} {mark} {launch['kernel']:{width}} {launch['weight_bytes'] / 1024:10,.1f}{time}  {operations(launch)}"
        )
    return rows


def kinds(launches: list[dict[str, Any]]) -> list[str]:
    """One line per kind of launch (same kernel, same operations), in the order of their first appearance."""
    counts: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    times: dict[tuple[str, str], float] = {}
    for launch in launches:
        kind = (launch["kernel"], operations(launch))
        counts[kind] += 1
        weights[kind] += launch["weight_bytes"]
        times[kind] = times.get(kind, 0.0) + launch.get("predicted_us", 0.0)
    timed = _timed(launches)
    width = _kernel_width(launches)
    rows = [f"{'count':>6}  {'kernel':{width}} {'weight MiB':>10}{timed}  what it computes"]
    for kind, n in counts.items():
        time = f" {times[kind]:12.1f}" if timed else ""
        rows.append(f"{n:6}  {kind[0]:{width}} {weights[kind] / MIB:10,.2f}{time}  {kind[1]}")
    return rows


def _timed(launches: list[dict[str, Any]]) -> str:
    """The heading of the column of predicted times; empty when there is none."""
    return f" {'predicted µs':>12}" if any("predicted_us" in launch for launch in launches) else ""


def _kernel_width(launches: list[dict[str, Any]]) -> int:
    return max(12, *(len(launch["kernel"]) for launch in launches))


def operations(launch: dict[str, Any]) -> str:
    """What one launch computes, e.g. `rms_norm linear×3`: runs of one operation are counted."""
    words: list[list[Any]] = []
    for op in launch["ops"]:
        if words and words[-1][0] == op:
            words[-1][1] += 1
        else:
            words.append([op, 1])
    return " ".join(op if n == 1 else f"{op}×{n}" for op, n in words)
