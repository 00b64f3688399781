"""`metalstep bench kernels`: the GPU kernels one by one."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from metalstep.chips import CHIPS, find_chip
from metalstep.cli.bench_output import HelpFormatter, emit, print_head, progress
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser, counted, integers, positive
from metalstep.cli.version import versions
from metalstep.kernels.native import NativeDevice
from metalstep.kv_cache import DTYPES

if TYPE_CHECKING:
    from metalstep.kernels.gpu.bench_case import BenchCase

SHAPE, ROWS, CONTEXTS, SAMPLES = "qwen3-0.6b", [1, 4, 16, 64, 512], [1024, 8192], 20
SIMULATED_ROWS, SIMULATED_CONTEXTS, SIMULATED_SAMPLES = [1, 8], [64], 2
EXAMPLES = """examples:
  metalstep bench kernels --shape qwen3-0.6b --case linear-o-1rows
  metalstep bench kernels --chip m4-max                                             # on a Mac
  metalstep bench kernels --op linear --shape qwen3-4b --rows 1,2,4,8 --json        # on a Mac
  metalstep bench kernels --case 'attention-decode-*' --context 1024,8192,32768     # on a Mac"""


def parser() -> Parser:
    p = Parser(
        "metalstep bench kernels",
        "Time of the GPU's kernels one by one, on shapes of public models and random numbers; no result is checked. On metal-sim, which "
        "is no measure of speed, the shape is a tiny one by default, and large cases run only if --case names them.",
    )
    p.formatter_class = HelpFormatter
    p.epilog = EXAMPLES
    p.add_argument(
        "--device", choices=("metal", "metal-sim"), help="metal: this Mac's GPU (default on a Mac); metal-sim: the CPU (default elsewhere)"
    )
    p.add_argument("--op", metavar="NAMES", help="linear, attention, row_program, sample, step_advance, step_load (default: all)")
    p.add_argument("--case", metavar="PATTERN", help="only cases of these names, e.g. linear-qkv-1rows or 'attention-*-8192', with commas")
    p.add_argument("--shape", metavar="NAME", help=f"a public model's, or tiny (default: {SHAPE}; on metal-sim tiny)")
    p.add_argument("--rows", type=integers, metavar="N,…", help="rows of plans (default: 1,4,16,64,512; on metal-sim 1,8)")
    p.add_argument("--context", type=integers, metavar="N,…", help="tokens of a sequence (default: 1024,8192; on metal-sim 64)")
    p.add_argument("--bits", type=positive, default=4, metavar="N", help="of weights; 16: not quantised (default: 4)")
    p.add_argument("--group-size", type=positive, default=64, metavar="N", help="of quantised weights (default: 64)")
    p.add_argument("--kv-dtype", choices=sorted(DTYPES), default="float16", help="type of the KV cache (default: float16)")
    p.add_argument("--chip", metavar="NAME", help=f"show fractions of this chip's bandwidth: {', '.join(CHIPS)}")
    p.add_argument("--samples", type=positive, metavar="N", help=f"of each case (default: {SAMPLES}; on metal-sim {SIMULATED_SAMPLES})")
    p.add_argument("--json", action="store_true", help="the same as JSON")
    return p


def kernels(argv: list[str]) -> int:
    from metalstep.bench.kernels import TINY, bench_cases, bench_kernels, shape_sizes

    args = parser().parse_args(argv)
    device_name = args.device or ("metal" if sys.platform == "darwin" else "metal-sim")
    simulated = device_name == "metal-sim"
    if simulated and args.chip:
        raise CommandError("--chip: times of metal-sim are no speeds", "leave it out, or use --device metal on a Mac")
    ops, chip = _ops(args.op), None if args.chip is None else find_chip(args.chip)
    if device_name == "metal" and sys.platform != "darwin":
        raise CommandError("--device metal: this machine has no Metal device", "use --device metal-sim, which is no measure of speed")
    shape = (args.shape or (TINY if simulated else SHAPE)).lower()
    sizes = shape_sizes(
        shape,
        args.rows or (SIMULATED_ROWS if simulated else ROWS),
        args.context or (SIMULATED_CONTEXTS if simulated else CONTEXTS),
        bits=args.bits,
        group_size=args.group_size,
        kv_dtype=args.kv_dtype,
    )
    cases = _named(bench_cases(sizes, ops), args.case)
    samples = args.samples or (SIMULATED_SAMPLES if simulated else SAMPLES)
    weights = "bfloat16" if args.bits == 16 else f"{args.bits} bits in groups of {args.group_size}"
    with NativeDevice.open(device_name) as device:
        if not args.json:
            method = f"{counted(samples, 'sample')} after a warm-up, random numbers"
            print_head(f"shape {shape}, weights {weights}, KV {args.kv_dtype}", method, device_name)
        options: dict[str, Any] = dict(samples=samples, chip=chip, simulated=simulated, large=args.case is not None)
        result = bench_kernels(device, sizes, cases, **options, progress=progress)
    reasons = [entry["reason"] for entry in result["left_out"]]
    for reason in dict.fromkeys(reasons):
        names = ", ".join(entry["name"] for entry in result["left_out"] if entry["reason"] == reason)
        print(f"left out, {reason}: {names}", file=sys.stderr)
    if not result["rows"]:
        raise CommandError("no case is left to measure", "name large ones with --case, or choose fewer --rows or a shorter --context")
    about = {"versions": versions(), "shape": shape, "weights": weights, "kv_dtype": args.kv_dtype, "samples": samples}
    emit({**about, **result}, args.json, describe)
    return 0


def _ops(text: str | None) -> list[str]:
    """Ops of --op, each once. Raises: CommandError for one that is not known."""
    from metalstep.bench.kernels import OPS

    ops = list(dict.fromkeys(part.strip() for part in text.split(","))) if text is not None else list(OPS)
    for op in ops:
        if op not in OPS:
            raise CommandError(f"--op: no op {op!r}, expected one of {', '.join(OPS)}", "metalstep bench kernels --help")
    return ops


def _named(cases: list[BenchCase], patterns: str | None) -> list[BenchCase]:
    """Cases whose name a pattern of --case matches. Raises: CommandError for a pattern that matches none."""
    if patterns is None:
        return cases
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            names = ", ".join(case.name for case in cases)
            raise CommandError(f"--case: no case {pattern!r} among {names}", "name one of these, or other --rows and --context")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in wanted)]


def describe(result: dict[str, Any]) -> list[str]:
    """Lines of a result, a row per case."""
    chip, width = result["chip"], max([4, *(len(row["name"]) for row in result["rows"])])
    lines = [
        f"device     {result['device']}",
        f"not timed  {result['not_timed']}",
        "",
        f"{'case':{width}} {'launches':>8} {'threadgroups':>12} {'copies':>6} {'alone µs':>18} {'run µs':>18} {'n':>3} {'MB':>8} "
        + f"{'GB/s':>7}"
        + (f" {'of ' + chip:>11}" if chip else ""),
    ]
    for row in result["rows"]:
        alone, run = (f"{row[key]['mean']:.1f} ± {row[key]['sigma']:.1f}" for key in ("alone_us", "run_us"))
        lines.append(
            f"{row['name']:{width}} {row['launches']:8} {row['threadgroups']:12} {row['copies']:6} {alone:>18} {run:>18} "
            f"{row['run_us']['n']:3} {row['bytes'] / 1e6:8.2f} {row['gb_s']:7.1f}" + (f" {row['fraction']:11.0%}" if chip else "")
        )
    lines += [
        "",
        "alone: a command buffer for each launch, the GPU's start to its end, summed over a case's launches; a launch's start is in it.",
        "run: repeats one behind the other in calls of several steps, by the host's clock, divided by their number; GB/s is of this.",
        "copies: of weights or cache, used in turns so that a cache does not hold them; activations are one and may lie in a cache.",
    ]
    if result["note"]:
        lines.append(result["note"])
    return lines
