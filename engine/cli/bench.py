"""`metalstep bench`: speed against peers, where a step's time goes, the GPU kernels one by one, quality against float32, the server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metalstep.cli import bench_kernels, bench_kv, bench_report, bench_serve
from metalstep.cli.bench_output import Output, add_output_options
from metalstep.cli.bench_peers import decode, decode_parser, prefill, prefill_parser
from metalstep.cli.bench_steps import launches, launches_parser, sampling, sampling_parser
from metalstep.cli.errors import CommandError, unknown
from metalstep.cli.parser import Parser, add_load_options, positive

HELP = """usage: metalstep bench decode|prefill|launches|sampling|kv|quality|kernels|serve|report [options]

  decode    TTFT and decode speed of one sequence or a batch, in turns with mlx-lm and llama.cpp in one run on the same model
  prefill   speed of prompts, likewise
  launches  time of each kind of launch in a decode step, and of Python around it
  sampling  time of a decode step with filters, penalties and logprobs against a greedy one
  kv        decode speed and time to first token with KV schemes against the plain cache
  quality   KL divergence, top-1 agreement and perplexity against MLX in float32
  kernels   time of a device's kernels one by one, against what the machine allows and against MLX's ops
  serve     the HTTP server against batch_generate and, on request, vLLM's own CPU backend
  report    a page of tables and pictures from results that --out has written

examples:
  metalstep bench decode --against llama.cpp --batch 1,8,32
  metalstep bench prefill --against llama.cpp --tokens 512
  metalstep bench kernels --against mlx --plot kernels.svg
  metalstep bench sampling --batch 8

`metalstep bench decode --help` and so on describe each."""


def main(argv: list[str]) -> int:
    """measure: decode and prompt speed against peers, time per launch, quality"""
    benches: dict[str, Callable[[list[str]], int]] = {
        "decode": decode,
        "prefill": prefill,
        "launches": launches,
        "sampling": sampling,
        "kv": bench_kv.kv,
        "quality": quality,
        "kernels": bench_kernels.kernels,
        "serve": bench_serve.serve,
        "report": bench_report.report,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] not in benches:
        raise unknown("no benchmark", argv[0], benches, "metalstep bench --help")
    return benches[argv[0]](argv[1:])


def parsers() -> dict[str, Parser]:
    """By subcommand."""
    return {
        "decode": decode_parser(),
        "prefill": prefill_parser(),
        "launches": launches_parser(),
        "sampling": sampling_parser(),
        "kv": bench_kv.parser(),
        "quality": quality_parser(),
        "kernels": bench_kernels.parser(),
        "serve": bench_serve.parser(),
        "report": bench_report.parser(),
    }


def quality_parser() -> Parser:
    p = Parser(
        "metalstep bench quality",
        "KL divergence, top-1 agreement and perplexity of the native step against MLX in float32 on the same weights.",
        ["metalstep bench quality", "metalstep bench quality --text book.txt --max-tokens 4096 --arithmetic int8 --json"],
    )
    p.add_argument("--model", default="smollm2", metavar="MODEL", help="the model (default: smollm2)")
    p.add_argument("--text", metavar="FILE", help="text to run over, - for stdin (default: Python's heapq.__about__)")
    p.add_argument(
        "--max-tokens",
        type=positive,
        default=1024,
        metavar="N",
        help="tokens of the text that are used (default: 1024)",
    )
    add_output_options(p)
    add_load_options(p)
    return p


def quality(argv: list[str]) -> int:
    args = quality_parser().parse_args(argv)
    from metalstep.bench.prompts import TEXT
    from metalstep.bench.quality import bench_quality

    if args.device == "eager":
        raise CommandError("--device eager compares MLX with itself", "leave --device out")
    text = TEXT if args.text is None else sys.stdin.read() if args.text == "-" else Path(args.text).read_text()
    method = f"arithmetic {args.arithmetic}, KV {args.kv_dtype}, against MLX float32"
    output = Output(args, "quality", argv, args.model, method, args.device)
    options = {name: getattr(args, name) for name in ("device", "threads", "arithmetic", "kv_dtype", "kv_memory", "max_context")}
    result = bench_quality(args.model, text, max_tokens=args.max_tokens, **options)
    output.finish(result, describe_quality)
    return 0


def describe_quality(result: dict[str, Any]) -> list[str]:
    return [
        f"device            {result['device']}",
        f"tokens            {result['tokens']}",
        f"KLD               mean {result['kld_mean']:.2e}, max {result['kld_max']:.2e} nats",
        f"top-1 agreement   {result['top1']:.4f}",
        f"perplexity        {result['perplexity']:.4f}, MLX {result['perplexity_mlx_f32']:.4f}, ratio {result['perplexity_ratio']:.5f}",
        f"logits            rms difference {result['logits_rms']:.2e}, max {result['logits_max']:.2e}",
    ]
