"""`metalstep bench launches` and `sampling`: where the time of a decode step goes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from metalstep.choices import CUDA_PREFILL_ROWS, DEFAULT_DEVICE, MAX_SEQS, PREFILL_ROWS, device_kind
from metalstep.cli.bench_output import HelpFormatter, Output, add_output_options, note, progress
from metalstep.cli.bench_subject import MODEL, add_shape_options, named, subject
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser, add_load_options, counted, load_model, positive

if TYPE_CHECKING:
    from metalstep.model import Model

LAUNCHES_EXAMPLES = """examples:
  metalstep bench launches
  metalstep bench launches --batch 32 --context 512
  metalstep bench launches --prefill 512"""
SAMPLING_EXAMPLES = """examples:
  metalstep bench sampling
  metalstep bench sampling --batch 32 --pairs 11"""


def launches_parser() -> Parser:
    p = Parser(
        "metalstep bench launches",
        "Time of each kind of launch in a decode step (a sum of medians: stalls of a busy machine drop out of it), and how much of a "
        "step passes outside the native call.",
    )
    add_step_options(p, LAUNCHES_EXAMPLES, batch=1)
    p.add_argument(
        "--prefill",
        type=positive,
        metavar="N",
        help=f"profile a step that takes in N tokens of a fresh prompt instead, up to {PREFILL_ROWS}; {CUDA_PREFILL_ROWS:,} on cuda",
    )
    add_load_options(p)
    return p


def sampling_parser() -> Parser:
    p = Parser(
        "metalstep bench sampling",
        "Time of a decode step with filters, penalties and logprobs against a greedy one. The sets of parameters take turns in one run; "
        "a sample is the median step of a round.",
    )
    add_step_options(p, SAMPLING_EXAMPLES, batch=8)
    p.add_argument(
        "--pairs", type=positive, default=7, metavar="N", help="rounds; each measures every set once (default: 7)"
    )
    add_load_options(p)
    return p


def add_step_options(p: Parser, examples: str, batch: int) -> None:
    """The options of both; batch: the default."""
    p.formatter_class = HelpFormatter
    p.epilog = examples
    p.add_argument("--model", default=MODEL, metavar="MODEL", help="the model (default: smollm2)")
    add_shape_options(p)
    p.add_argument(
        "--batch", type=positive, default=batch, metavar="N", help=f"sequences in the step (default: {batch})"
    )
    p.add_argument("--context", type=positive, default=64, metavar="N", help="tokens of each sequence (default: 64)")
    p.add_argument("--steps", type=positive, default=50, metavar="N", help="measured steps (default: 50)")
    add_output_options(p)


def parse(p: Parser, argv: list[str]) -> argparse.Namespace:
    """Raises: CommandError for options that do not go together with a native step."""
    args = p.parse_args(argv)
    if args.batch > MAX_SEQS:
        raise CommandError(f"--batch is {args.batch}, and at most {MAX_SEQS} sequences run at once", f"{p.prog} --help")
    if args.device == "eager":
        raise CommandError("--device eager has no native step to measure", "leave --device out")
    return args


@contextmanager
def loaded(args: argparse.Namespace) -> Iterator[tuple[Model, Any]]:
    """The model that is measured, and its tokenizer."""
    with subject(args) as measured:
        args.model = measured.model
        model, tokenizer = load_model(args)
        with model:
            yield model, tokenizer


def launches(argv: list[str]) -> int:
    args = parse(launches_parser(), argv)
    from metalstep.bench.host_time import bench_host_time
    from metalstep.bench.launches import bench_launches
    from metalstep.bench.prompts import Prompts

    kind = device_kind(args.device or DEFAULT_DEVICE)
    rows = CUDA_PREFILL_ROWS if kind == "cuda" else PREFILL_ROWS
    if args.prefill and args.prefill > rows:
        raise CommandError(f"--prefill is {args.prefill}, and a step on {kind} has at most {rows} rows", "a smaller number")
    if args.prefill and args.batch > 1:
        raise CommandError("--prefill profiles one prompt, so it does not go with --batch", "leave one of them out")
    what = f"prompt of {args.prefill}" if args.prefill else f"batch {args.batch}, context {args.context}"
    output = Output(args, "launches", argv, named(args), f"{what}, {counted(args.steps, 'step')}, medians", args.device)
    with loaded(args) as (model, tokenizer):
        prompts = Prompts.of(tokenizer)
        result = bench_launches(
            model, prompts, context=args.context, steps=args.steps, batch=args.batch, prefill=args.prefill
        )
        if not args.prefill:
            result["generation"] = bench_host_time(model, tokenizer, prompts, tokens=args.steps, batch=args.batch)
    output.finish({**result, "note": note(args.device)}, describe_launches)
    return 0


def sampling(argv: list[str]) -> int:
    args = parse(sampling_parser(), argv)
    from metalstep.bench.sampling import bench_sampling

    output = Output(
        args,
        "sampling",
        argv,
        named(args),
        f"batch {args.batch}, context {args.context}, medians of {counted(args.steps, 'step')}, {counted(args.pairs, 'pair')}, "
        "one token per native call",
        args.device,
    )
    with loaded(args) as (model, tokenizer):
        result = bench_sampling(
            model,
            tokenizer,
            batch=args.batch,
            context=args.context,
            steps=args.steps,
            pairs=args.pairs,
            progress=progress,
        )
    output.finish({**result, "note": note(args.device)}, describe_sampling)
    return 0


def describe_launches(result: dict[str, Any]) -> list[str]:
    width = max([12, *(len(row["kernel"]) for row in result["rows"])])
    lines = [
        f"device {result['device']}",
        "",
        f"{'count':>6} {'kernel':{width}} {'µs':>8} {'share':>6} {'GB/s':>6} {'GMAC/s':>6}  what it computes",
    ]
    for row in sorted(result["rows"], key=lambda row: -row["us"]):
        share = row["us"] / result["total_us"] if result["total_us"] else 0.0
        rates = f"{row['gb_s']:6.1f} {row['gmac_s']:6.1f}"
        lines.append(f"{row['count']:6} {row['kernel']:{width}} {row['us']:8.1f} {share:6.1%} {rates}  {row['ops']}")
    lines.append(f"{'':{width + 7}} {result['total_us']:8.1f}")
    if step := result.get("generation"):
        what = "a token" if step["batch"] == 1 else f"a step of {step['batch']} sequences"
        lines.append(
            f"{what} at a short context: {step['step_us']:.0f} µs, of which {step['host_us']:.0f} µs ({step['host_share']:.1%}) "
            "outside the native call"
        )
    return lines


def describe_sampling(result: dict[str, Any]) -> list[str]:
    lines = [
        f"device {result['device']}",
        "",
        f"{'set':12} {'µs per step':>18} {'median':>9} {'n':>3} {'extra µs':>9} {'ratio':>6} {'of pairs':>8}  what is on",
    ]
    for row in result["rows"]:
        step, ratio = row["step_us"], row["ratio"]
        mean = f"{step['mean']:.1f} ± {step['sigma']:.1f}"
        line = (
            f"{row['name']:12} {mean:>18} {step['median']:9.1f} {step['n']:3} {row['extra_us']:9.1f} {ratio['of_medians']:5.2f}× "
            f"{ratio['median_of_pairs']:7.2f}×  {', '.join(row['on'])}"
        )
        lines.append(line.rstrip())
    lines.append("ratio: of the median step to the greedy one; above 1 the step takes longer")
    return lines
