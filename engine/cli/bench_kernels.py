"""`metalstep bench kernels`: the kernels of a device one by one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from metalstep.chips import CHIPS, find_chip
from metalstep.choices import ARITHMETIC, KV_DTYPES, DeviceNames, device_kind
from metalstep.cli.bench_output import HelpFormatter, Output, add_output_options, progress
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser, counted, integers, positive

if TYPE_CHECKING:
    from metalstep.kernels.gpu.bench_case import BenchCase, BenchSizes
    from metalstep.kernels.native import NativeDevice

SAMPLES = 20
DEFAULTS = {  # of a device: shape, rows, contexts, samples
    "metal": ("qwen3-0.6b", [1, 4, 16, 64, 512], [1024, 8192], SAMPLES),
    "cuda": ("qwen3-0.6b", [1, 8, 32, 64, 512], [1024, 8192], SAMPLES),
    "metal-sim": ("tiny", [1, 8], [64], 2),
    "host": ("smollm2-135m", [1, 8, 64], [1024], SAMPLES),
}
KV_CODECS = "affine8,turbo4"
PEERS = ("mlx",)
BEYOND = 1.1  # of a limit: more than noise explains
EXAMPLES = """examples:
  metalstep bench kernels --against mlx --plot kernels.svg
  metalstep bench kernels --device metal-sim --shape qwen3-0.6b --case linear-o-1rows
  metalstep bench kernels --device cuda --op linear,attention --shape qwen3-4b --rows 1,8       # with an NVIDIA GPU
  metalstep bench kernels --device metal --chip m4-max                                          # on a Mac
  metalstep bench kernels --device metal --case 'attention-decode-*' --context 1024,32768       # on a Mac"""


def parser() -> Parser:
    p = Parser(
        "metalstep bench kernels",
        "Time of a device's kernels one by one, on shapes of public models and random numbers; no result is checked. On the host device "
        "each is set against what this machine's memory and processors allow, which is measured in the same run. On metal-sim, which is "
        "no measure of speed, the shape is a tiny one by default, and large cases run only if --case names them.",
    )
    p.formatter_class = HelpFormatter
    p.epilog = EXAMPLES
    p.add_argument(
        "--device",
        choices=DeviceNames(("host", "metal", "cuda", "metal-sim")),
        help="metal: this Mac's GPU (default on a Mac); cuda: an NVIDIA GPU, cuda:1 the second; host: the CPU (default "
        "elsewhere); metal-sim: the GPU's kernels on the CPU",
    )
    p.add_argument(
        "--op",
        metavar="NAMES",
        help="linear, attention, row_program, sample, step_advance, step_load; on the host also embedding, kv_write, rms_norm, rope "
        "(default: all)",
    )
    p.add_argument("--case", metavar="PATTERN", help="only cases of these names, e.g. linear-qkv-1rows or 'attention-*-8192', with commas")
    p.add_argument("--shape", metavar="NAME", help=f"a public model's, or tiny (default: {_defaults(0)})")
    p.add_argument("--rows", type=integers, metavar="N,…", help=f"rows of plans (default: {_defaults(1)})")
    p.add_argument("--context", type=integers, metavar="N,…", help=f"tokens of a sequence (default: {_defaults(2)})")
    p.add_argument("--bits", type=positive, default=4, metavar="N", help="of weights; 16: not quantised (default: 4)")
    p.add_argument("--group-size", type=positive, default=64, metavar="N", help="of quantised weights (default: 64)")
    p.add_argument("--arithmetic", choices=ARITHMETIC, default="int16", help="of quantised weights on the host device (default: int16)")
    p.add_argument("--kv-dtype", choices=sorted(KV_DTYPES), default="float16", help="type of the KV cache (default: float16)")
    p.add_argument(
        "--kv-codecs", metavar="NAMES", help=f"on the host also caches in these codecs; none: in no other (default: {KV_CODECS})"
    )
    p.add_argument("--threads", type=positive, metavar="N", help="threads of the host device (default: all that it may use)")
    p.add_argument("--against", default="", metavar="LIST", help="mlx: also MLX's own op for each case, in turns (default: none)")
    p.add_argument("--chip", metavar="NAME", help=f"show fractions of this chip's bandwidth, on a Mac: {', '.join(CHIPS)}")
    p.add_argument("--samples", type=positive, metavar="N", help=f"of each case (default: {_defaults(3)})")
    add_output_options(p, plot=True)
    return p


def _defaults(field: int) -> str:
    def words(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    return "; ".join(f"{device} {words(values[field])}" for device, values in DEFAULTS.items())


def kernels(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    device_name = args.device or ("metal" if sys.platform == "darwin" else "host")
    _check(args, device_name)

    from metalstep.bench.kernels import shape_sizes
    from metalstep.kernels.native import NativeDevice

    shape, rows, contexts, samples = DEFAULTS[device_kind(device_name)]
    shape, samples = (args.shape or shape).lower(), args.samples or samples
    sizes = shape_sizes(
        shape,
        args.rows or rows,
        args.context or contexts,
        bits=args.bits,
        group_size=args.group_size,
        kv_dtype=args.kv_dtype,
        kind="nvidia" if device_kind(device_name) == "cuda" else "apple",
    )
    weights = "bfloat16" if args.bits == 16 else f"{args.bits} bits in groups of {args.group_size}"
    facts: dict[str, Any] = {"shape": shape, "weights": weights, "kv_dtype": args.kv_dtype, "samples": samples}
    if device_name == "host":
        sizes = replace(sizes, norm_rows=1 << 31)  # its linears norm their input whatever the rows
        facts["arithmetic"] = args.arithmetic
    cases = _named(_cases(args, device_name, sizes), args.case)
    method = f"{counted(samples, 'sample')} after a warm-up, random numbers" + (", in turns with MLX's op" if args.against else "")
    with NativeDevice.open(device_name, (args.threads or 0) if device_name == "host" else 0) as device:
        output = Output(args, "kernels", argv, f"shape {shape}, weights {weights}, KV {args.kv_dtype}", method, device_name)
        result = _measured(args, device_name, device, sizes, cases, samples)
    for reason in dict.fromkeys(entry["reason"] for entry in result.get("left_out", [])):
        names = ", ".join(entry["name"] for entry in result["left_out"] if entry["reason"] == reason)
        print(f"left out, {reason}: {names}", file=sys.stderr)
    if not result["rows"]:
        raise CommandError("no case is left to measure", "name large ones with --case, or choose fewer --rows or a shorter --context")
    output.finish({**facts, **result}, describe)
    return 0


def _check(args: Any, device_name: str) -> None:
    """Raises: CommandError for options that the device does not have."""
    simulated = device_name == "metal-sim"
    if args.chip and simulated:
        raise CommandError("--chip: times of metal-sim are no speeds", "leave it out, or use --device metal on a Mac")
    if args.chip and device_name == "host":
        raise CommandError("--chip: the host device's limits are measured", "leave it out, or use --device metal on a Mac")
    if args.chip and device_kind(device_name) == "cuda":
        raise CommandError("--chip: these are Apple's; an NVIDIA GPU's bandwidth is measured", "leave it out")
    if args.chip:
        find_chip(args.chip)
    if args.against not in ("", *PEERS):
        raise CommandError(f"--against: no peer {args.against!r}, expected {' or '.join(PEERS)}", "metalstep bench kernels --help")
    if args.against and simulated:
        raise CommandError("--against: times of metal-sim are no speeds", "leave it out, or use --device host")
    for option, value in (("--threads", args.threads), ("--kv-codecs", args.kv_codecs)):
        if value is not None and device_name != "host":
            raise CommandError(f"{option}: only the host device has it", f"leave it out, or use --device host instead of {device_name}")
    _ops(args.op, device_name)
    if device_name == "metal" and sys.platform != "darwin":
        raise CommandError(
            "--device metal: this machine has no Metal device", "use --device host, or metal-sim, which is no measure of speed"
        )


def _cases(args: Any, device_name: str, sizes: BenchSizes) -> Sequence[BenchCase]:
    ops = _ops(args.op, device_name)
    if device_name != "host":
        from metalstep.bench.kernels import bench_cases

        return bench_cases(sizes, ops)
    from metalstep.bench import host_cases
    from metalstep.kernels.kv_codec import KVCodec

    names = [name for name in (KV_CODECS if args.kv_codecs is None else args.kv_codecs).split(",") if name and name != "none"]
    try:
        for name in names:
            KVCodec(name).check_dim(sizes.head_dim)
    except ValueError as error:
        raise CommandError(f"--kv-codecs: {error}", "metalstep bench kernels --help") from None
    return host_cases.bench_cases(sizes, ops, list(dict.fromkeys([args.kv_dtype, *names])), args.arithmetic)


def _measured(
    args: Any, device_name: str, device: NativeDevice, sizes: BenchSizes, cases: Sequence[Any], samples: int
) -> dict[str, Any]:
    if device_name == "host":
        from metalstep.bench.host_kernels import bench_host_kernels

        return bench_host_kernels(device, sizes, cases, samples=samples, against=bool(args.against), progress=progress)
    from metalstep.bench.kernels import bench_kernels

    chip = None if args.chip is None else find_chip(args.chip)
    return bench_kernels(
        device, sizes, cases, samples=samples, chip=chip, simulated=device_name == "metal-sim", large=args.case is not None,
        against=bool(args.against), progress=progress,
    )  # fmt: skip


def _ops(text: str | None, device_name: str) -> list[str]:
    """Ops of --op, each once. Raises: CommandError for one that the device does not have."""
    if device_name == "host":
        from metalstep.bench.host_cases import OPS as HOST_OPS

        known = list(HOST_OPS)
    else:
        from metalstep.bench.kernels import OPS

        known = list(OPS)
    ops = list(dict.fromkeys(part.strip() for part in text.split(","))) if text is not None else known
    for op in ops:
        if op not in known:
            raise CommandError(f"--op: no op {op!r}, expected one of {', '.join(known)}", "metalstep bench kernels --help")
    return ops


def _named(cases: Sequence[BenchCase], patterns: str | None) -> Sequence[BenchCase]:
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
    return describe_host(result) if "limits" in result else describe_gpu(result)


def describe_host(result: dict[str, Any]) -> list[str]:
    width = max([4, *(len(row["name"]) for row in result["rows"])])
    against = "mlx" in result["rows"][0]
    device = f"{result['device']} ({result['isa']}, {counted(result['threads'], 'thread')})"
    lines = [f"device     {device}", f"not timed  {result['not_timed']}"]
    for limit in result["limits"]:
        lines.append(
            f"limits     {counted(limit['threads'], 'thread')}: memory {limit['memory_gb_s']:.1f} GB/s, second-level cache "
            f"{limit['cache_gb_s']:.1f} GB/s, fp32 {limit['fp32_gflop_s']:.1f} GFLOP/s, int16 {limit['int16_gmac_s']:.1f} GMAC/s, "
            f"int8 {limit['int8_gmac_s']:.1f} GMAC/s"
        )
    lines += ["", f"{'case':{width}} {'µs':>18} {'n':>3} {'GB/s':>7} {'computes':>19} {'of limit':>8}  {'limit':10}"]
    lines[-1] = (lines[-1] + (f" {'MLX µs':>18} {'ratio':>7}  MLX's ops" if against else "")).rstrip()
    for row in result["rows"]:
        time = f"{row['run_us']['mean']:.1f} ± {row['run_us']['sigma']:.1f}"
        line = (
            f"{row['name']:{width}} {time:>18} {row['run_us']['n']:3} {row['gb_s']:7.1f} {computed(row):>19} {row['fraction']:8.0%}  "
            f"{row['limit']:10}"
        )
        if against:
            mlx = row["mlx"]
            theirs = f"{mlx['run_us']['mean']:.1f} ± {mlx['run_us']['sigma']:.1f}" if mlx["ops"] else "-"
            line += f" {theirs:>18} " + (f"{mlx['ratio']['of_medians']:6.2f}×  {mlx['ops']}" if mlx["ops"] else f"{'-':>7}  no such op")
        lines.append(line.rstrip())
    lines += ["", "limit: the longest of bytes from memory, bytes through the second-level cache, and arithmetic; of it: by the median"]
    if beyond := [row["name"] for row in result["rows"] if row["fraction"] > BEYOND]:
        lines.append(f"warning: {', '.join(beyond)}: faster than the limit, so something disturbed its measurement; measure again")
    if against:
        lines.append("ratio: speed over MLX's, above 1 metalstep is faster; its time has its graph's making and evaluation, in turns")
    return lines


def computed(row: dict[str, Any]) -> str:
    """Arithmetic per second, with its unit."""
    if "gmac_s" in row:
        return f"{row['gmac_s']:.1f} GMAC/s {row['arithmetic']}"
    return f"{row['gflop_s']:.1f} GFLOP/s" if "gflop_s" in row else ""


def describe_gpu(result: dict[str, Any]) -> list[str]:
    """Lines of a result, a row per case."""
    against = "mlx" in (result["rows"] or [{}])[0]
    chip, width = result["chip"], max([4, *(len(row["name"]) for row in result["rows"])])
    lines = [
        f"device     {result['device']}",
        f"not timed  {result['not_timed']}",
        "",
        f"{'case':{width}} {'launches':>8} {'threadgroups':>12} {'copies':>6} {'alone µs':>18} {'run µs':>18} {'n':>3} {'MB':>8} "
        + f"{'GB/s':>7} {'GFLOP/s':>8}"
        + (f" {'of ' + chip:>11}" if chip else "")
        + (f" {'× MLX':>7}" if against else ""),
    ]
    for row in result["rows"]:
        alone, run = (f"{row[key]['mean']:.1f} ± {row[key]['sigma']:.1f}" for key in ("alone_us", "run_us"))
        line = (
            f"{row['name']:{width}} {row['launches']:8} {row['threadgroups']:12} {row['copies']:6} {alone:>18} {run:>18} "
            f"{row['run_us']['n']:3} {row['bytes'] / 1e6:8.2f} {row['gb_s']:7.1f} "
            + (f"{row['gflop_s']:8.1f}" if "gflop_s" in row else f"{'':8}")
            + (f" {row['fraction']:11.0%}" if chip else "")
        )
        if against:
            line += f" {row['mlx']['ratio']['of_medians']:6.2f}×" if row["mlx"]["ratio"] else f" {'-':>7}"
        lines.append(line.rstrip())
    lines += [
        "",
        "alone: a command buffer for each launch, the GPU's start to its end, summed over a case's launches; a launch's start is in it.",
        "run: repeats one behind the other in calls of several steps, by the host's clock, divided by their number; GB/s is of this.",
        "copies: of weights or cache, used in turns so that a cache does not hold them; activations are one and may lie in a cache.",
    ]
    if result["note"]:
        lines.append(result["note"])
    return lines
