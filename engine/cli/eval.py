"""`metalstep eval`: what a KV scheme costs in quality, on a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from metalstep.choices import ARITHMETIC
from metalstep.cli.bench_output import emit, print_head, progress
from metalstep.cli.errors import CommandError, unknown
from metalstep.cli.parser import MODEL_HELP, Parser, add_device_options, counted, integers, memory, positive

HELP = """usage: metalstep eval kv [options]

  kv   schemes of the KV cache against the float16 cache: divergence, agreement, perplexity, needle retrieval

examples:
  metalstep eval kv --model smollm2 --schemes affine8,turbo8v4,turbo4v2 --text book.txt

`metalstep eval kv --help` describes it."""
KV_EXAMPLES = [
    "metalstep eval kv --model smollm2 --schemes affine8,turbo8v4,turbo4v2,q8_0,q4_0 --text book.txt",
    "metalstep eval kv --schemes turbo4,turbo4:boundary=0,turbo4:scale=matched/unbiased --text book.txt --tokens 4096 --no-needles",
    "metalstep eval kv --schemes turbo4v2,turbo3 --text book.txt --needle-lengths 512,2048 --plot quality.svg --json > quality.json",
]
SCHEMES = "affine8,turbo8v4,turbo4,turbo4v2,q8_0,q4_0"
CONTEXT = 2048  # tokens of a window
NEEDLE_LENGTH = 1024


def main(argv: list[str]) -> int:
    """measure what KV schemes cost in quality on a text: divergence, perplexity, needles"""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] != "kv":
        raise unknown("no evaluation", argv[0], parsers(), "metalstep eval --help")
    return kv(argv[1:])


def parsers() -> dict[str, Parser]:
    """By subcommand."""
    return {"kv": kv_parser()}


def kv_parser() -> Parser:
    p = Parser(
        "metalstep eval kv",
        "Quality of the KV cache's schemes on a text, each side by side with a float16 cache: KL divergence of the next token's "
        "distribution, agreement on the most likely token, perplexity, and a needle hidden in the text.",
        KV_EXAMPLES,
    )
    p.add_argument("--model", default="smollm2", metavar="MODEL", help=f"{MODEL_HELP} (default: smollm2)")
    p.add_argument(
        "--schemes", default=SCHEMES, metavar="A,B,…",
        help="names of load's kv_scheme, with options behind colons (boundary=, norm_dtype=, scale=, key_center=, dtype=), and to compare "
        f"with llama.cpp's q8_0 and q4_0 (default: {SCHEMES})",
    )  # fmt: skip
    p.add_argument("--text", metavar="FILE", help="text to run over, - for stdin; needed")
    p.add_argument("--tokens", type=positive, metavar="N", help="tokens of the text that are used (default: all)")
    p.add_argument(
        "--context", type=positive, metavar="N",
        help=f"the text is cut into windows of N tokens, each of which begins anew (default: {CONTEXT}, or the model's limit)",
    )  # fmt: skip
    p.add_argument(
        "--needle-lengths", type=integers, metavar="N,…", help=f"tokens of the contexts that hide a needle (default: {NEEDLE_LENGTH})"
    )
    p.add_argument("--no-needles", action="store_true", help="no needle retrieval")
    p.add_argument("--json", action="store_true", help="everything as JSON, each needle's answer too")
    p.add_argument("--plot", metavar="FILE", help="divergence against bytes per token as a picture: .svg, or .png with matplotlib")
    group = p.add_argument_group("how the model runs")
    add_device_options(group)
    group.add_argument("--threads", type=positive, metavar="N", help="threads of the host device (default: all that it may use)")
    group.add_argument("--arithmetic", choices=ARITHMETIC, default="int16", help="of quantised weights on the host device (default: int16)")
    group.add_argument("--kv-memory", type=memory, metavar="SIZE", help="memory of each of the two caches: 2GB, or 0.2 of what is free")
    return p


def kv(argv: list[str]) -> int:
    args = kv_parser().parse_args(argv)
    from metalstep.eval.kv import evaluate_kv
    from metalstep.eval.plot import write_plot
    from metalstep.eval.schemes import schemes_of
    from metalstep.plot.file import check_plot

    if args.device == "eager":
        raise CommandError("--device eager keeps mlx-lm's own cache, which has no schemes", "leave --device out")
    if args.no_needles and args.needle_lengths:
        raise CommandError("--no-needles and --needle-lengths exclude each other", "leave one of them out")
    try:
        schemes = schemes_of(args.schemes.split(","))
    except ValueError as error:
        raise CommandError(f"--schemes: {error}", "metalstep eval kv --help") from None
    if args.plot:
        check_plot(args.plot)
    text = read_text(args.text)
    context, lengths = _lengths(args)
    if not args.json:
        print_head(args.model, f"windows of {counted(context, 'token')}, against a float16 cache side by side", args.device)
    options: dict[str, Any] = {name: getattr(args, name) for name in ("device", "threads", "arithmetic", "batch_invariant")}
    if args.kv_memory is not None:
        options["kv_memory"] = args.kv_memory
    result = evaluate_kv(
        args.model, schemes, text, tokens=args.tokens, context=context, needle_lengths=lengths, progress=progress, **options
    )
    emit(result, args.json, describe)
    if args.plot:
        write_plot(args.plot, result)
        print(f"plot: {args.plot}", file=sys.stderr)
    return 0


def read_text(name: str | None) -> str:
    """Of a file, or stdin's for `-`. Raises: CommandError without a name, and for a file that is no text."""
    if name is None:
        raise CommandError(
            "--text is needed: a text file of some thousand tokens in the model's language",
            "--text FILE, or --text - for stdin; documentation, a book, a transcript",
        )
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
    except UnicodeDecodeError:
        raise CommandError(f"--text {name}: not UTF-8 text", "a text file") from None
    except OSError as error:
        raise CommandError(f"--text {name}: {error.strerror or error}", "the name of a text file that can be read") from None


def _lengths(args: Any) -> tuple[int, list[int]]:
    """Tokens of a window and of the needles' contexts; the defaults shrink to the model's limit."""
    from metalstep.checkpoint import open_checkpoint
    from metalstep.eval.needle import ANSWER_TOKENS

    with open_checkpoint(args.model) as checkpoint:
        limit = checkpoint.config.get("max_position_embeddings")
    limit = limit if isinstance(limit, int) and limit > 0 else 1 << 30
    context = args.context or min(CONTEXT, limit)
    lengths = [] if args.no_needles else args.needle_lengths or [min(NEEDLE_LENGTH, limit - ANSWER_TOKENS)]
    for name, value, most in [("context", context, limit), *(("needle-lengths", length, limit - ANSWER_TOKENS) for length in lengths)]:
        if value > most:
            raise CommandError(f"--{name} is {value}, and this model takes at most {most} tokens", f"--{name} {most}")
    return context, lengths


def describe(result: dict[str, Any]) -> list[str]:
    """The result in lines to read."""
    reference, rows = result["reference"], result["rows"]
    width = max(7, *(len(row["scheme"]) for row in rows))
    lines = [
        f"device     {result['device']}",
        f"text       {counted(result['tokens'], 'token')} in {counted(result['windows'], 'window')} of up to {result['context']:,}, "
        f"sha256 {result['text_sha256'][:12]}",
        f"positions  {rows[0]['positions']:,} with the whole vocabulary",
        "",
        f"{'scheme':{width}} {'B/token':>8} {'ratio':>6} {'KLD mean':>9} {'± stderr':>8} {'median':>8} {'p95':>8} {'p99':>8} {'max':>8} "
        f"{'top-1':>7} {'perplexity':>10} {'ratio':>8}" + ("  needles" if "needle" in rows[0] else ""),
        f"{'float16':{width}} {reference['kv_bytes_per_token']:8,} {1:6.2f} {'':9} {'':8} {'':8} {'':8} {'':8} {'':8} {'':7} "
        f"{reference['perplexity']:10.4f} {1:8.5f}" + _needle(reference),
    ]
    for row in rows:
        kld = " ".join(f"{row[f'kld_{name}']:8.2e}" for name in ("stderr", "median", "p95", "p99", "max"))
        lines.append(
            f"{row['scheme']:{width}} {row['kv_bytes_per_token']:8,} {row['ratio']:6.2f} {row['kld_mean']:9.3e} {kld} {row['top1']:7.4f} "
            f"{row['perplexity']:10.4f} {row['perplexity_ratio']:8.5f}" + _needle(row)
        )
    lines += [
        "",
        "KLD: of the float16 cache's distribution to the scheme's, nats; its standard error takes positions as independent.",
        "top-1: positions with the same most likely token. perplexity: of the text; ratio: to the float16 cache's.",
    ]
    if "needle" in rows[0]:
        lines.append(
            "needles: numbers that a greedy answer has, of all; in brackets the mean log-probability of the number when it is given, less "
            "the float16 cache's."
        )
    return lines


def _needle(row: dict[str, Any]) -> str:
    if "needle" not in row:
        return ""
    needle = row["needle"]
    return f"  {needle['found']}/{needle['cases']} ({needle['logprob_difference']:+.3f})"
