"""`metalstep bench serve`: the HTTP server against the engine's own batch_generate and against vLLM's CPU backend."""

from __future__ import annotations

import statistics
from typing import Any

from metalstep.choices import MAX_SEQS
from metalstep.cli.bench_output import HelpFormatter, Output, add_output_options, joined, progress
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser, counted, integers, positive

EXAMPLES = """examples:
  metalstep bench serve
  metalstep bench serve smollm2 --streams 1,8,32 --tokens 256
  metalstep bench serve --streams 8,32 --against vllm
  metalstep bench serve --chat -- --additional-config '{"arithmetic": "int8"}'"""
COLUMNS = [("streams", 7), ("tok/s", 17), ("median", 8), ("best", 8), ("n", 3), ("TTFT ms", 8), ("ITL ms", 7), ("p50", 7), ("p95", 7)]
# What the server is to reach, in one run: against batch_generate by streams, and against vLLM's own backend.
RATES = {8: 0.80, 32: 0.85}
RATES_VLLM = {8: 1.5, 32: 1.0}
ITL = 1.1  # times the step of batch_generate, one stream
IDLE = 0.05  # of a core, by a process that should have waited; more disturbs the others
ELSEWHERE = 0.2  # cores, by programs that are not measured


def parser() -> Parser:
    p = Parser(
        "metalstep bench serve",
        "Tokens per second, time to first token and time between tokens of `metalstep serve` over HTTP with several streams at once, in "
        "turns with batch_generate on the same fresh prompts, greedy. Each is a process that loads once and idles while another runs. Also "
        "the server's time to ready, its memory and what it computes while nobody asks. Flags behind -- go to `metalstep serve`.",
    )
    p.formatter_class = HelpFormatter
    p.epilog = EXAMPLES
    p.add_argument("model", nargs="?", default="smollm2", metavar="MODEL", help="the model (default: smollm2)")
    p.add_argument(
        "--streams", type=integers, default=[1, 8, 32], metavar="LIST", help="requests at once, e.g. 1,8,32 (default: 1,8,32)"
    )
    p.add_argument("--tokens", type=positive, default=128, metavar="N", help="tokens of each answer (default: 128)")
    p.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="tokens of each prompt (default: 64)")
    p.add_argument("--pairs", type=positive, default=5, metavar="N", help="rounds; each measures every case once (default: 5)")
    p.add_argument("--chat", action="store_true", help="ask /v1/chat/completions instead of /v1/completions")
    p.add_argument(
        "--against",
        default="",
        metavar="LIST",
        help="vllm: also vLLM's own CPU backend, in bfloat16 on the same weights, with the same room for its cache (default: none)",
    )
    p.add_argument(
        "--starts", type=positive, default=1, metavar="N", help="timed starts of each server; the last one is measured (default: 1)"
    )
    add_output_options(p, plot=True)
    return p


def serve(argv: list[str]) -> int:
    own, flags = split_flags(argv)
    args = parser().parse_args(own)
    if args.against not in ("", "vllm"):
        raise CommandError(f"--against: no peer {args.against!r}, expected vllm", "metalstep bench serve --help")
    if args.tokens < 2:
        raise CommandError("--tokens is 1, expected 2 or more: a time between tokens needs two of them", "metalstep bench serve --help")
    if max(args.streams) > MAX_SEQS:
        raise CommandError(
            f"--streams: metalstep runs at most {MAX_SEQS} sequences at once, not {max(args.streams)}", f"up to {MAX_SEQS} streams"
        )
    from metalstep.bench.serve import Plan, bench_serve

    plan = Plan(
        model=args.model,
        streams=tuple(dict.fromkeys(args.streams)),
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        pairs=args.pairs,
        starts=args.starts,
        chat=args.chat,
        against_vllm=args.against == "vllm",
        flags=tuple(flags),
    )
    endpoint = "/v1/chat/completions" if args.chat else "/v1/completions"
    output = Output(
        args,
        "serve",
        argv,
        args.model,
        f"{endpoint}, streams {joined(args.streams)}, greedy, prompts of {counted(args.prompt_tokens, 'token')}, "
        f"{counted(args.tokens, 'token')} each, {counted(args.pairs, 'pair')}",
    )
    result = bench_serve(plan, progress)
    output.finish(result, describe)
    return 0


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Own arguments, and what stands behind `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def describe(result: dict[str, Any]) -> list[str]:
    names = " ".join(f"{name:>{width}}" for name, width in COLUMNS)
    lines = [f"{name:15} {version}" for name, version in result["contenders"].items()]
    lines += [f"not timed: {result['not_timed']}", ""]
    lines += [line for row in result["servers"] for line in describe_server(row)]
    lines += ["", f"{'':15} {names}"]
    lines += [describe_case(row) for row in result["cases"]]
    lines.append(
        "ITL: mean time between two tokens of a stream, of batch_generate a step; p50 and p95: between two pieces that a client receives"
    )
    lines += [line for row in result["ratios"] for line in describe_ratios(row)]
    busiest = max(row["idle_cpu_of_others"] for row in result["cases"])
    if busiest > IDLE:
        lines.append(f"warning: a process that should have idled took {busiest:.0%} of a core, so these numbers disturb each other")
    elsewhere = [cores for row in result["cases"] for cores in row["elsewhere_cpu"] if cores is not None]
    if elsewhere and max(elsewhere) > ELSEWHERE:
        lines.append(
            f"warning: other programs took {statistics.median(elsewhere):.1f} cores in the median run and up to {max(elsewhere):.1f}: "
            "these numbers are not of this machine alone"
        )
    return lines


def describe_server(row: dict[str, Any]) -> list[str]:
    ready = row["ready_s"]
    times = ", ".join(f"{seconds:.1f}" for seconds in ready["samples"])
    return [
        f"{row['name']:15} ready in {times} s; idle CPU {row['idle_cpu']:.1%} of a core",
        f"{'':15} memory once ready {describe_memory(row['memory_ready'])}; at the end {describe_memory(row['memory_end'])}",
    ]


def describe_memory(memory: dict[str, Any]) -> str:
    if memory["pss_mib"] is None:
        return f"{memory['rss_mib']:.0f} MiB resident"
    return f"{memory['pss_mib']:.0f} MiB ({memory['private_mib']:.0f} private; {memory['rss_mib']:.0f} resident)"


def describe_case(row: dict[str, Any]) -> str:
    rate, gap = row["tok_s"], row.get("gap_ms")
    mean = f"{rate['mean']:.1f} ± {rate['sigma']:.1f}"
    gaps = f" {gap['p50']:7.2f} {gap['p95']:7.2f}" if gap else ""
    return (
        f"{row['contender']:15} {row['streams']:7} {mean:>17} {rate['median']:8.1f} {rate['best']:8.1f} {rate['n']:3} "
        f"{row['ttft_ms']['median']:8.1f} {row['itl_ms']['median']:7.2f}{gaps}"
    )


def describe_ratios(row: dict[str, Any]) -> list[str]:
    from metalstep.bench.serve import GENERATE, SERVER, VLLM

    streams, rate, itl = row["streams"], row["tok_s"], row["itl"]
    wanted = (RATES_VLLM if row["against"] == VLLM else RATES).get(streams)
    line = (
        f"{SERVER} / {row['against']}, {counted(streams, 'stream')}: {rate['of_medians']:.2f}× tok/s "
        f"(of medians; of pairs {rate['median_of_pairs']:.2f}×), {itl['of_medians']:.2f}× the time between tokens"
    )
    bars = []
    if wanted is not None:
        bars.append(f"tok/s at least {wanted:.2f}×: {'yes' if rate['of_medians'] >= wanted else 'no'}")
    if streams == 1 and row["against"] == GENERATE:
        bars.append(f"time at most {ITL:.2f}×: {'yes' if itl['of_medians'] <= ITL else 'no'}")
    return [line + (f"; {', '.join(bars)}" if bars else "")]
