"""`metalstep bench`: speed against peers, time per launch, quality against float32."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metalstep.bench.machine import machine
from metalstep.bench.peers import PEERS
from metalstep.cli.parser import CommandError, Parser, add_load_options, integers, load_model, positive
from metalstep.cli.version import versions

HELP = """usage: metalstep bench decode|launches|quality [options]

  decode    TTFT and decode speed, in turns with mlx-lm and llama.cpp in one run on the same model
  launches  time of each kind of launch in a decode step
  quality   KL divergence, top-1 agreement and perplexity against MLX in float32

`metalstep bench decode --help` describes each."""


def main(argv: list[str]) -> int:
    """measure: decode speed against peers, time per launch, quality against float32"""
    benches: dict[str, Callable[[list[str]], int]] = {"decode": decode, "launches": launches, "quality": quality}
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] not in benches:
        raise CommandError(f"no benchmark {argv[0]!r}, expected one of {', '.join(benches)}", "metalstep bench --help")
    return benches[argv[0]](argv[1:])


def decode_parser() -> Parser:
    p = Parser(
        "metalstep bench decode",
        "Time to first token and decode speed, batch 1, greedy. Engines take turns in one run, each a process that loads once, so that a "
        "noisy machine treats them alike. Not timed: loading, tokenizing, detokenizing.",
    )
    p.add_argument(
        "--model", default="smollm2", metavar="MODEL", help="the model (default: smollm2); llama.cpp needs a .gguf file"
    )
    p.add_argument(
        "--against", default="", metavar="LIST", help="peers with commas between them: mlx-lm,llama.cpp (default: none)"
    )
    p.add_argument(
        "--pairs", type=positive, default=5, metavar="N", help="rounds; each measures every engine once (default: 5)"
    )
    p.add_argument(
        "--tokens", type=positive, default=50, metavar="N", help="tokens decoded per measurement (default: 50)"
    )
    p.add_argument("--prompt-tokens", type=positive, default=18, metavar="N", help="tokens of the prompt (default: 18)")
    p.add_argument(
        "--context",
        type=integers,
        metavar="LIST",
        help="prompt lengths to compare, e.g. 64,4096; replaces --prompt-tokens",
    )
    p.add_argument(
        "--threads", type=positive, metavar="N", help="threads of every engine that lets one choose (default: the CPUs)"
    )
    p.add_argument(
        "--peers-python", metavar="PATH", help="the Python that has the peers (default: .venv-peers/bin/python)"
    )
    p.add_argument("--json", action="store_true", help="the same as JSON, with every sample")
    return p


def decode(argv: list[str]) -> int:
    from metalstep.bench.decode import bench_decode

    args = decode_parser().parse_args(argv)
    against = [name for name in args.against.split(",") if name]
    for name in against:
        if name not in PEERS:
            raise CommandError(
                f"--against: no peer {name!r}, expected {' or '.join(PEERS)}", "metalstep bench decode --help"
            )
    threads = args.threads or int(machine()["cpus"])
    if not args.json:
        print_head(args.model, f"threads {threads}, batch 1, greedy, {args.tokens} tokens, {args.pairs} pairs")
    result = bench_decode(
        args.model,
        against,
        pairs=args.pairs,
        tokens=args.tokens,
        prompts=args.context or [args.prompt_tokens],
        threads=threads,
        peers_path=args.peers_python,
        progress=progress,
    )
    result["versions"] = versions()
    emit(result, args.json, describe_decode)
    return 0


def describe_decode(result: dict[str, Any]) -> list[str]:
    lines = [f"{head['engine']:10} {head['version']}, loaded in {head['load_s']:.2f} s" for head in result["engines"]]
    lines += [f"not timed: {result['not_timed']}", ""]
    lines.append(
        f"{'engine':10} {'prompt':>6} {'TTFT ms':>8} {'best':>7}  {'decode tok/s':>16} {'median':>7} {'best':>7} "
        f"{'spread':>6} {'n':>3}  GB/s"
    )
    for row in result["cases"]:
        ttft, rate = row["ttft_ms"], row["decode_tok_s"]
        mean = f"{rate['mean']:.1f} ± {rate['sigma']:.1f}"
        bandwidth = f"{row['gb_s']['median']:.1f}" if "gb_s" in row else ""
        lines.append(
            f"{row['engine']:10} {row['prompt_tokens']:6} {ttft['median']:8.1f} {ttft['best']:7.1f}  {mean:>16} {rate['median']:7.1f} "
            f"{rate['best']:7.1f} {rate['spread']:6.0%} {rate['n']:3}  {bandwidth}"
        )
    for row in result["ratios"]:
        lines.append(
            f"metalstep / {row['against']}, prompt {row['prompt_tokens']}: decode {row['decode']['of_medians']:.2f}×, "
            f"TTFT {row['ttft']['of_medians']:.2f}× (ratio of medians; of pairs {row['decode']['median_of_pairs']:.2f}× and "
            f"{row['ttft']['median_of_pairs']:.2f}×); the same first {row['same_ids']} tokens"
        )
    if any("gb_s" in row for row in result["cases"]):
        lines.append("GB/s: weights and KV cache read per token, times the median rate")
    return lines


def launches(argv: list[str]) -> int:
    from metalstep.bench.host_time import bench_host_time
    from metalstep.bench.launches import bench_launches

    p = Parser(
        "metalstep bench launches",
        "Time of each kind of launch in a decode step (a sum of medians: stalls of a busy machine drop out of it), and how much of a "
        "generated token passes outside the native call.",
    )
    p.add_argument("--model", default="smollm2", metavar="MODEL", help="the model (default: smollm2)")
    p.add_argument("--context", type=positive, default=64, metavar="N", help="tokens in the cache (default: 64)")
    p.add_argument("--steps", type=positive, default=50, metavar="N", help="profiled steps (default: 50)")
    p.add_argument("--json", action="store_true", help="the same as JSON")
    add_load_options(p)
    args = p.parse_args(argv)
    if not args.json:
        print_head(args.model, f"context {args.context}, {args.steps} steps, medians")
    model, tokenizer = load_model(args)
    with model:
        result = bench_launches(model, context=args.context, steps=args.steps)
        result["generation"] = bench_host_time(model, tokenizer, tokens=args.steps)
    emit(result, args.json, describe_launches)
    return 0


def describe_launches(result: dict[str, Any]) -> list[str]:
    lines = [
        f"device {result['device']}",
        "",
        f"{'count':>6} {'kernel':12} {'µs':>8} {'share':>6} {'GB/s':>6}  what it computes",
    ]
    for row in sorted(result["rows"], key=lambda row: -row["us"]):
        share = row["us"] / result["total_us"] if result["total_us"] else 0.0
        lines.append(
            f"{row['count']:6} {row['kernel']:12} {row['us']:8.1f} {share:6.1%} {row['gb_s']:6.1f}  {row['ops']}"
        )
    lines.append(f"{'':19} {result['total_us']:8.1f}")
    if token := result.get("generation"):
        lines.append(
            f"a token at a short context: {token['token_us']:.0f} µs, of which {token['host_us']:.0f} µs ({token['host_share']:.1%}) "
            "outside the native call"
        )
    return lines


def quality(argv: list[str]) -> int:
    from metalstep.bench.quality import TEXT, bench_quality

    p = Parser(
        "metalstep bench quality",
        "KL divergence, top-1 agreement and perplexity of the native step against MLX in float32 on the same weights.",
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
    p.add_argument("--json", action="store_true", help="the same as JSON")
    add_load_options(p)
    args = p.parse_args(argv)
    if args.device == "eager":
        raise CommandError("--device eager compares MLX with itself", "leave --device out")
    text = TEXT if args.text is None else sys.stdin.read() if args.text == "-" else Path(args.text).read_text()
    if not args.json:
        print_head(args.model, f"arithmetic {args.arithmetic}, KV {args.kv_dtype}, against MLX float32")
    options = {name: getattr(args, name) for name in ("threads", "arithmetic", "kv_dtype", "max_context")}
    result = bench_quality(args.model, text, max_tokens=args.max_tokens, **options)
    emit(result, args.json, describe_quality)
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


def print_head(model: str, method: str) -> None:
    """The machine and the versions, before anything is measured."""
    here = machine()
    print(f"machine    {here['cpu']}, {here['cpus']} CPUs, {here['system']}")
    print("versions   " + ", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"model      {model}")
    print(f"method     {method}", flush=True)


def emit(result: dict[str, Any], as_json: bool, describe: Callable[[dict[str, Any]], list[str]]) -> None:
    """A result on stdout: JSON, or lines."""
    progress("")
    print(json.dumps(result, indent=2) if as_json else "\n".join(describe(result)))


def progress(text: str) -> None:
    """One line on stderr that the next replaces; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
