"""`metalstep bench kv`: the speed of KV schemes against the plain cache."""

from __future__ import annotations

import argparse
from typing import Any

from metalstep.choices import MAX_SEQS
from metalstep.cli.bench_output import HelpFormatter, Output, add_output_options, joined, progress
from metalstep.cli.bench_subject import MODEL, add_shape_options, named, subject
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser, add_device_options, counted, integers, memory, positive
from metalstep.kv_scheme import parse

SCHEMES = "affine8,turbo8v4,turbo4,turbo4v2"
EXAMPLES = """examples:
  metalstep bench kv
  metalstep bench kv --schemes turbo4v2,turbo8v4 --context 7680 --batch 8
  metalstep bench kv --schemes turbo4 --context 512 --prompt-tokens 4096"""


def parser() -> Parser:
    p = Parser(
        "metalstep bench kv",
        "Decode speed over long contexts and time to first token with KV schemes, against the plain cache. Schemes take turns in one "
        "process, each with a model of its own. Contexts are one prompt's, in blocks of each sequence's own.",
    )
    p.formatter_class = HelpFormatter
    p.epilog = EXAMPLES
    p.add_argument("--model", default=MODEL, metavar="MODEL", help="the model (default: smollm2)")
    add_shape_options(p)
    p.add_argument("--schemes", default=SCHEMES, metavar="LIST", help=f"schemes with commas between them (default: {SCHEMES})")
    p.add_argument("--context", type=integers, default=[512], metavar="LIST", help="tokens of each sequence (default: 512)")
    p.add_argument("--batch", type=integers, default=[1], metavar="LIST", help="sequences decoded together (default: 1)")
    p.add_argument(
        "--prompt-tokens", type=integers, default=[], metavar="LIST", help="also the time to first token of fresh prompts of so many tokens"
    )
    p.add_argument("--rounds", type=positive, default=7, metavar="N", help="each measures every scheme once (default: 7)")
    p.add_argument("--steps", type=positive, default=16, metavar="N", help="decode steps of a sample (default: 16)")
    p.add_argument("--threads", type=positive, metavar="N", help="threads of the host device (default: the CPUs)")
    p.add_argument("--kv-memory", type=memory, metavar="SIZE", help="of each scheme's cache, where all must fit (default: as `generate`)")
    add_device_options(p)
    add_output_options(p, plot=True)
    return p


def kv(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from metalstep.bench.kv import bench_kv

    schemes = [name for name in args.schemes.split(",") if name]
    for name in schemes:
        parse(name)
    if args.device == "eager":
        raise CommandError("--device eager has no KV schemes", "leave --device out")
    if max(args.batch) > MAX_SEQS:
        raise CommandError(f"--batch is {max(args.batch)}, and at most {MAX_SEQS} sequences run at once", "metalstep bench kv --help")
    if min(args.context + args.prompt_tokens) < 2:
        raise CommandError("--context and --prompt-tokens need 2 tokens or more", "metalstep bench kv --help")
    output = Output(args, "kv", argv, named(args), _method(args), args.device)
    options = {name: value for name, value in (("device", args.device), ("threads", args.threads)) if value is not None}
    if args.batch_invariant:
        options["batch_invariant"] = True
    if args.kv_memory is not None:
        options["kv_memory"] = args.kv_memory
    with subject(args) as measured:
        result = bench_kv(
            measured.model, schemes, batches=args.batch, contexts=args.context, prompts=args.prompt_tokens, rounds=args.rounds,
            steps=args.steps, options=options, progress=progress,
        )  # fmt: skip
    result["model"] = measured.name
    output.finish(result, describe)
    return 0


def _method(args: argparse.Namespace) -> str:
    return (
        f"contexts {joined(args.context)}, batch {joined(args.batch)}, greedy, {counted(args.steps, 'step')} a sample, "
        f"{counted(args.rounds, 'round')}; speed is over that of none, of medians and the median of rounds"
    )


def describe(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':8} {'batch':>5} {'context':>7}  {'scheme':10} {'B/token':>8} {'median':>9} {'unit':6} {'spread':>6} {'n':>3}  speed"]
    for row in result["rows"]:
        unit = "tok/s" if row["what"] == "decode" else "ms"
        lines.append(
            f"{row['what']:8} {row['batch']:5} {row['context']:7}  {row['scheme']:10} "
            f"{result['schemes'][row['scheme']]['bytes_per_token']:8,} {row['median']:9.1f} {unit:6} {row['spread']:6.1%} {row['n']:3}  "
            f"{row['speed']['of_medians']:.3f} / {row['speed']['median_of_pairs']:.3f}"
        )
    return lines
