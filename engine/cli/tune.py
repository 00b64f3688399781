"""`metalstep tune`: geometries of a GPU's kernels, found by measuring decode steps on it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalstep.cli.bench_output import check_out, progress
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser, integers, positive

if TYPE_CHECKING:
    from metalstep.tune import Tuner

DEVICE = "metal" if sys.platform == "darwin" else "cuda"
EXAMPLES = [
    "metalstep tune",
    "metalstep tune --device cuda --shape qwen3-0.6b,qwen3-4b --rows 1,8,32,64 --time-budget 600",
    "metalstep tune --shape llama-3.2-1b --rows 1 --out llama.json",
]
SHAPE = "qwen3-0.6b"
SECONDS = 300
CONTEXT = 256
ROWS = [1, 8, 32, 64]
MAX_ROWS = 64
MAX_CONTEXT = 2**31 - 2  # tokens: positions are int32, and a step has one more


def parser() -> Parser:
    p = Parser(
        "metalstep tune",
        "Find the fastest geometry of each linear of a decode step on this machine's GPU: threadgroups, tiles, splits of k. Each is "
        "tried inside of a step of a model with random weights, and kept where the step becomes faster. The table goes to a file that "
        "every later run on this device uses; delete it to go back to the one that metalstep comes with.",
        EXAMPLES,
    )
    p.add_argument("--device", default=DEVICE, metavar="NAME", help=f"metal, cuda, cuda:N or metal-sim (default: {DEVICE})")
    p.add_argument("--shape", default=SHAPE, metavar="NAMES", help=f"shapes of public models: qwen3-0.6b,qwen3-4b (default: {SHAPE})")
    p.add_argument("--rows", type=integers, default=ROWS, metavar="N", help="sequences of the steps (default: 1,8,32,64)")
    p.add_argument("--context", type=positive, default=CONTEXT, metavar="TOKENS", help=f"of each sequence (default: {CONTEXT})")
    p.add_argument("--bits", type=positive, default=4, metavar="N", help="of the weights; 16: not quantised (default: 4)")
    p.add_argument("--group-size", type=positive, default=64, metavar="N", help="of quantised weights (default: 64)")
    p.add_argument("--time-budget", type=positive, default=SECONDS, metavar="SECONDS", help=f"for all of it, about (default: {SECONDS})")
    p.add_argument("--out", metavar="FILE", help="the table's file (default: the device's own in metalstep's cache folder)")
    p.add_argument("--json", action="store_true", help="what was found as JSON")
    return p


def main(argv: list[str]) -> int:
    """find the fastest geometry of this GPU's kernels, for all later runs"""
    args = parser().parse_args(argv)
    kind = kind_of(args.device)
    if not all(1 <= rows <= MAX_ROWS for rows in args.rows):
        given = ",".join(map(str, args.rows))
        raise CommandError(f"--rows is {given}, of which each must be 1 to {MAX_ROWS}", "they are sequences that are decoded together")
    if args.context > MAX_CONTEXT:
        raise CommandError(f"--context is {args.context}, of which {MAX_CONTEXT} tokens are the most", "choose a smaller --context")
    if args.out:
        check_out(args.out)
    shapes = [name.strip() for name in args.shape.split(",") if name.strip()]
    if not shapes:
        raise CommandError("--shape names no shape", f"name one or more, as in --shape {SHAPE},qwen3-4b")
    from metalstep.kernels.gpu import linear_tables
    from metalstep.tune import Tuner
    from metalstep.tuning_files import tuning_file

    effort = {"steps": 1, "samples": 1} if args.device == "metal-sim" else {}
    tuner = Tuner(linear_tables.table(kind), progress=progress, **effort)
    name = search(tuner, args, shapes)
    progress("")
    file = Path(args.out) if args.out else tuning_file(name)
    try:
        if not args.out:
            file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(linear_tables.dump(tuner.table), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"the table cannot be written ({error})", "name a file with --out") from None
    result = describe_result(tuner, name, file, bool(args.out))
    print(json.dumps(result, indent=2) if args.json else "\n".join(describe(result)))
    return 0


def kind_of(device: str) -> str:
    """Of GPU, as tuning tables name it. Raises: CommandError for a device without such tables."""
    from metalstep.choices import device_kind

    kinds = {"metal": "apple", "metal-sim": "apple", "cuda": "nvidia"}
    kind = kinds.get(device_kind(device))
    if kind is None:
        raise CommandError(f"--device {device} is no GPU", f"use one of {', '.join(kinds)}, or cuda:N")
    return kind


def search(tuner: Tuner, args: argparse.Namespace, shapes: list[str]) -> str:
    """Tune every shape at every number of rows, each with its part of the time that is left. Returns the device's own name."""
    from metalstep.kernels.native import NativeDevice
    from metalstep.tune_model import RandomCheckpoint, TuneModel
    from metalstep.tuning_files import tuning_of

    deadline = time.monotonic() + args.time_budget
    checkpoints = [RandomCheckpoint(name, bits=args.bits, group_size=args.group_size) for name in shapes]
    left = len(shapes) * len(args.rows)
    name = ""
    for shape, checkpoint in zip(shapes, checkpoints, strict=True):
        device = NativeDevice.open(args.device)
        name = device.info.name
        if not tuner.points:
            tuner.table = tuning_of(name, tuner.table.kind)
        progress(f"{shape}: random weights")
        try:
            model = TuneModel(device, tuner.table.kind, checkpoint, rows=max(args.rows), context=args.context)
            try:
                for rows in args.rows:
                    tuner.tune(model, shape, rows, max(1.0, (deadline - time.monotonic()) / left))
                    left -= 1
            finally:
                model.close()
        except MemoryError as error:
            took = f"{shape} with {max(args.rows)} sequences of --context {args.context} tokens takes more memory than there is"
            told = " ".join(str(error).split())
            raise CommandError(f"{took} ({told})" if told else took, "choose a smaller --context, or fewer --rows") from None
    return name


def describe_result(tuner: Tuner, device: str, file: Path, named: bool) -> dict[str, Any]:
    from metalstep.tune import report

    used = how_used(file, named, os.environ.get("METALSTEP_TUNING"))
    return {"device": device, "kind": tuner.table.kind, "file": str(file), "use": used, "points": report(tuner.points)}


def how_used(file: Path, named: bool, in_use: str | None) -> str:
    """Which runs use the table, or what makes them. named: with --out. in_use: METALSTEP_TUNING, which wins over a device's own table."""
    if in_use and Path(in_use).absolute() == file.absolute():
        return "METALSTEP_TUNING names it: every later run with that variable uses it"
    if named:
        return f"set METALSTEP_TUNING={file} to use it" + (f" (it is set to {in_use} now)" if in_use else "")
    if in_use:
        return f"METALSTEP_TUNING is set to {in_use} and wins; unset it, and every later run on this device uses the new table"
    return "every later run on this device uses it; delete it to undo this"


def describe(result: dict[str, Any]) -> list[str]:
    """The result in lines to read."""
    lines = [
        f"device     {result['device']} ({result['kind']})",
        f"table      {result['file']}: {result['use']}",
        "",
        f"{'shape':16} {'rows':>4} {'before µs':>10} {'after µs':>10} {'ratio':>7} {'tried':>6}  changed",
    ]
    for point in result["points"]:
        changed = ", ".join(change["linear"] for change in point["changes"]) or "nothing"
        times = f"{point['before_us']:10.1f} {point['after_us']:10.1f} {point['ratio']:6.3f}×"
        lines.append(f"{point['shape']:16} {point['rows']:4} {times} {point['tried']:6}  {changed}")
        if point["wrong"]:
            lines.append(f"warning: {point['wrong']} geometries gave other logits and were left out; this is a bug, please report it")
    lines += ["", "before, after: a decode step with the table in use and with the new one, in turns; it has few layers"]
    for point in result["points"]:
        for change in point["changes"]:
            lines.append(f"{point['shape']}, {point['rows']} rows: {change['linear']}: {change['before']} → {change['after']}")
    return lines
