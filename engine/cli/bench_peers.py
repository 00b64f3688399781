"""`metalstep bench decode` and `prefill`: speed in turns with mlx-lm and llama.cpp."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from metalstep.bench.machine import machine
from metalstep.choices import ARITHMETIC, DEFAULT_DEVICE, KV_DTYPES, MAX_SEQS, MAX_STEPS, PEERS
from metalstep.cli.bench_output import HelpFormatter, Output, add_output_options, joined, note, progress
from metalstep.cli.bench_subject import MODEL, add_shape_options, named, subject
from metalstep.cli.errors import CommandError
from metalstep.cli.parser import Parser, add_device_options, counted, integers, memory, positive

PAIRS = 7
SPREAD_COLUMNS = [("median", 8), ("best", 8), ("spread", 6), ("n", 3)]  # names and widths
DECODE_COLUMNS = [
    ("batch", 5), ("prompt", 6), ("TTFT ms", 8), ("best", 8), ("decode tok/s", 17), *SPREAD_COLUMNS, ("GB/s", 5),
]  # fmt: skip
DECODE_EXAMPLES = """examples:
  metalstep bench decode --against llama.cpp
  metalstep bench decode --against llama.cpp --batch 1,8,32
  metalstep bench decode --context 64,4096
  metalstep bench decode --shape qwen3-0.6b --against mlx-lm --batch 1,8,32,64 --also sampled,invariant"""
PREFILL_EXAMPLES = """examples:
  metalstep bench prefill --against llama.cpp
  metalstep bench prefill --against llama.cpp --tokens 128,512,2048
  metalstep bench prefill --shape qwen3-4b --against mlx-lm --tokens 512,1024,4096,16384 --also turbo4v2"""
CALLS = ("steps", "batch_generate")
ALSO = "metalstep once more with each of these, in the same turns:"


def decode_parser() -> Parser:
    p = Parser(
        "metalstep bench decode",
        "Time to first token and decode speed, greedy, of one sequence or several that are decoded together. Engines take turns in one "
        "run, each a process that loads once, so that a noisy machine treats them alike. Prompts are fresh each time. llama.cpp runs "
        "with flash attention on and off; ratios are against the better. Not timed: loading, making contexts, tokenizing, detokenizing.",
    )
    add_peer_options(p, DECODE_EXAMPLES)
    p.add_argument(
        "--batch",
        type=integers,
        default=[1],
        metavar="LIST",
        help="sequences decoded together, e.g. 1,8,32; speeds are of all of them (default: 1)",
    )
    p.add_argument(
        "--tokens", type=positive, default=50, metavar="N", help="tokens per sequence and measurement (default: 50)"
    )
    p.add_argument("--prompt-tokens", type=positive, default=18, metavar="N", help="tokens of the prompt (default: 18)")
    p.add_argument(
        "--context",
        type=integers,
        metavar="LIST",
        help="prompt lengths to compare, e.g. 64,4096; replaces --prompt-tokens",
    )
    p.add_argument(
        "--decode-steps",
        type=positive,
        default=1,
        metavar="N",
        help=f"tokens that metalstep computes in one native call, up to {MAX_STEPS} (default: 1)",
    )
    p.add_argument(
        "--call",
        choices=CALLS,
        help="how metalstep is called: step by step, or by batch_generate with its own number of tokens to a native call (default: steps; "
        "batch_generate on a GPU)",
    )
    p.add_argument(
        "--also", type=words, default=[], metavar="LIST",
        help=f"{ALSO} sampled (temperature, top-p and logprobs), invariant (batch_invariant), a type of the KV cache or a KV scheme",
    )  # fmt: skip
    return p


def prefill_parser() -> Parser:
    p = Parser(
        "metalstep bench prefill",
        "Speed of prompts: tokens per second of a fresh prompt, up to its first token. Engines take turns in one run, each a process "
        "that loads once. llama.cpp runs with flash attention on and off and, beyond 512 tokens, with its own ubatch of 512 and with "
        "one that takes the whole prompt; ratios are against the best. Not timed: loading, making contexts, tokenizing.",
    )
    add_peer_options(p, PREFILL_EXAMPLES)
    p.add_argument(
        "--tokens", type=integers, default=[512], metavar="LIST", help="tokens of the prompt, e.g. 128,512 (default: 512)"
    )
    p.add_argument(
        "--also", type=words, default=[], metavar="LIST", help=f"{ALSO} invariant (batch_invariant), a type of the KV cache or a KV scheme"
    )
    return p


def words(text: str) -> list[str]:
    """Words with commas between them, each once."""
    return list(dict.fromkeys(word for word in text.split(",") if word))


def add_peer_options(p: Parser, examples: str) -> None:
    """The options of every benchmark against peers."""
    p.formatter_class = HelpFormatter
    p.epilog = examples
    p.add_argument(
        "--model", default=MODEL, metavar="MODEL", help="the model (default: smollm2); llama.cpp needs a .gguf file"
    )
    add_shape_options(p)
    p.add_argument(
        "--against", default="", metavar="LIST", help=f"peers with commas between them: {','.join(PEERS)} (default: none)"
    )
    p.add_argument(
        "--pairs",
        type=positive,
        default=PAIRS,
        metavar="N",
        help=f"rounds; each measures every engine once (default: {PAIRS})",
    )
    p.add_argument(
        "--threads", type=positive, metavar="N", help="threads of every engine that lets one choose (default: the CPUs)"
    )
    p.add_argument(
        "--arithmetic",
        choices=ARITHMETIC,
        default="int16",
        help="of metalstep's quantised weights: int16 is near-exact (default), int8 is what llama.cpp computes with",
    )
    add_device_options(p)
    p.add_argument("--kv-dtype", choices=KV_DTYPES, help="type of metalstep's KV cache (default: float16)")
    p.add_argument("--kv-scheme", metavar="NAME", help="how metalstep's KV cache is encoded: affine8, turbo4v2, … (default: none)")
    p.add_argument(
        "--kv-memory", type=memory, metavar="SIZE",
        help="of metalstep's KV cache, where peers and what --also names need room on the same GPU: 8GB (default: as `generate`)",
    )  # fmt: skip
    p.add_argument(
        "--seconds", type=positive, metavar="N", help="a further round that would end later is not begun; loading and the warm-up are free"
    )
    p.add_argument("--live", action="store_true", help="lines on stderr for what is done and measured, with the time")
    p.add_argument(
        "--peers-python", metavar="PATH", help="the Python that has the peers (default: .venv-peers/bin/python)"
    )
    add_output_options(p, plot=True)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What metalstep loads with."""
    given = {name: getattr(args, name) for name in ("kv_dtype", "kv_scheme", "kv_memory") if getattr(args, name) is not None}
    return {"arithmetic": args.arithmetic, "device": args.device, "batch_invariant": args.batch_invariant, **given}


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """What both benchmarks are given."""
    return dict(
        also=args.also,
        seconds=args.seconds,
        options=load_options(args),
        peers_path=args.peers_python,
        progress=live(args, progress),
        said=live(args),
    )


def check_also(names: list[str], known: tuple[str, ...], hint: str) -> None:
    """Raises: CommandError for a word in --also that means nothing."""
    from metalstep.bench.rounds import variant_options

    for name in names:
        try:
            if name not in known:
                variant_options(name)
        except ValueError as error:
            others = ", ".join((*known, "invariant", *KV_DTYPES))
            raise CommandError(f"--also: {name!r} is none of {others} and no KV scheme: {error}", hint) from None


def live(args: argparse.Namespace, otherwise: Callable[[str], None] = lambda _: None) -> Callable[[str], None]:
    """Where a line for each measurement goes, with --live; else `otherwise`."""
    began = time.monotonic()
    return (lambda text: print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)) if args.live else otherwise


def decode(argv: list[str]) -> int:
    args = decode_parser().parse_args(argv)
    from metalstep.bench.decode import bench_decode
    from metalstep.bench.peers import is_gpu
    from metalstep.bench.rounds import SAMPLED

    against = peers(args.against, "metalstep bench decode --help")
    if max(args.batch) > MAX_SEQS:
        raise CommandError(
            f"--batch: metalstep runs at most {MAX_SEQS} sequences at once, not {max(args.batch)}",
            f"a batch of up to {MAX_SEQS}",
        )
    if args.decode_steps > MAX_STEPS:
        raise CommandError(
            f"--decode-steps is {args.decode_steps}, expected at most {MAX_STEPS}", "metalstep bench decode --help"
        )
    check_also(args.also, (SAMPLED,), "metalstep bench decode --help")
    call = args.call or ("batch_generate" if is_gpu(args.device) and args.decode_steps == 1 else "steps")
    if call == "batch_generate" and args.decode_steps > 1:
        raise CommandError("--decode-steps is of --call steps; batch_generate has a number of its own", "leave one of them out")
    threads = args.threads or int(machine()["cpus"])
    chosen = settings(args, against, threads)
    steps = f", {args.decode_steps} steps per native call" if args.decode_steps > 1 else ""
    steps += ", by batch_generate" if call == "batch_generate" else ""
    output = Output(
        args,
        "decode",
        argv,
        named(args),
        f"{described(chosen)}batch {joined(args.batch)}, greedy, {counted(args.tokens, 'token')}{steps}, {counted(args.pairs, 'pair')}",
        args.device,
    )
    with subject(args) as measured:
        result = bench_decode(
            measured,
            against,
            pairs=args.pairs,
            tokens=args.tokens,
            prompts=args.context or [args.prompt_tokens],
            batches=args.batch,
            threads=threads,
            decode_steps=args.decode_steps,
            call=call,
            **shared(args),
        )
    output.finish({**result, **chosen}, describe_decode)
    return 0


def prefill(argv: list[str]) -> int:
    args = prefill_parser().parse_args(argv)
    from metalstep.bench.prefill import bench_prefill

    against = peers(args.against, "metalstep bench prefill --help")
    check_also(args.also, (), "metalstep bench prefill --help")
    threads = args.threads or int(machine()["cpus"])
    chosen = settings(args, against, threads)
    output = Output(args, "prefill", argv, named(args), f"{described(chosen)}one prompt, {counted(args.pairs, 'pair')}", args.device)
    with subject(args) as measured:
        result = bench_prefill(
            measured,
            against,
            pairs=args.pairs,
            lengths=args.tokens,
            threads=threads,
            **shared(args),
        )
    output.finish({**result, **chosen}, describe_prefill)
    return 0


def peers(text: str, hint: str) -> list[str]:
    """The names in --against. Raises: CommandError for one that is no peer."""
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    for name in names:
        if name not in PEERS:
            raise CommandError(f"--against: no peer {name!r}, expected {' or '.join(PEERS)}", hint)
    return names


def settings(args: argparse.Namespace, against: list[str], threads: int) -> dict[str, Any]:
    """What a result depends on besides the cases: threads, where an engine of the run has any to choose; metalstep's arithmetic on the
    host device; a note on a device's times. None for what does not apply."""
    host = (args.device or DEFAULT_DEVICE) == "host"
    return {
        "threads": threads if host or "llama.cpp" in against else None,
        "arithmetic": args.arithmetic if host else None,
        "note": note(args.device),
    }


def described(chosen: dict[str, Any]) -> str:
    """`settings` as the beginning of a list of words. A GPU has no threads: those are llama.cpp's."""
    threads, arithmetic = chosen["threads"], chosen["arithmetic"]
    if threads is None:
        return ""
    return f"threads {threads}, arithmetic {arithmetic}, " if arithmetic else f"threads {threads} (of llama.cpp), "


def describe_engines(result: dict[str, Any], columns: Sequence[tuple[str, int]]) -> list[str]:
    """The lines above a table of cases: engines, what is not timed, and the columns' names, right-aligned in their widths."""
    lines = [f"{head['engine']:10} {head['version']}, loaded in {head['load_s']:.2f} s" for head in result["engines"]]
    names = " ".join(f"{name:>{width}}" for name, width in columns)
    return [*lines, f"not timed: {result['not_timed']}", "", f"{'engine':22} {names}"]


def engine_name(row: dict[str, Any]) -> str:
    return f"{row['engine']}, {row['setting']}" if row["setting"] else row["engine"]


def describe_decode(result: dict[str, Any]) -> list[str]:
    lines = describe_engines(result, DECODE_COLUMNS)
    for row in result["cases"]:
        ttft, rate = row["ttft_ms"], row["decode_tok_s"]
        mean = f"{rate['mean']:.1f} ± {rate['sigma']:.1f}"
        bandwidth = f"{row['gb_s']['median']:.1f}" if "gb_s" in row else ""
        line = (
            f"{engine_name(row):22} {row['batch']:5} {row['prompt_tokens']:6} {ttft['median']:8.1f} {ttft['best']:8.1f} {mean:>17} "
            f"{rate['median']:8.1f} {rate['best']:8.1f} {rate['spread']:6.0%} {rate['n']:3} {bandwidth:>5}"
        )
        lines.append(line.rstrip())
    for row in result["ratios"]:
        same = row["same_ids"]
        lines.append(
            f"metalstep / {row['against']}, batch {row['batch']}, prompt {row['prompt_tokens']}: "
            f"decode {describe_ratio(row['decode'])}, TTFT {describe_ratio(row['ttft'])}; "
            f"the same first {same['median']:g} token{'' if same['median'] == 1 else 's'} (median; {same['whole']:.0%} of the texts wholly)"
        )
    for row in result.get("also", ()):
        lines.append(
            f"{row['setting']} / metalstep, batch {row['batch']}, prompt {row['prompt_tokens']}: decode {describe_ratio(row['decode'])}, "
            f"TTFT {describe_ratio(row['ttft'])}"
        )
    for row in result["cases"]:
        if "busy" in row:
            lines.append(
                f"batch {row['batch']}, prompt {row['prompt_tokens']}: a step takes {row['device_step_us']['median']:.1f} µs on the device "
                f"alone, so it is busy for {row['busy']:.1%} of a decode"
            )
    if any("gb_s" in row for row in result["cases"]):
        lines.append("GB/s: weights and KV cache read per step, times the median of steps per second")
    return lines + describe_left_out(result)


def describe_prefill(result: dict[str, Any]) -> list[str]:
    lines = describe_engines(result, [("prompt", 6), ("prompt tok/s", 17), *SPREAD_COLUMNS])
    for row in result["cases"]:
        rate = row["prompt_tok_s"]
        mean = f"{rate['mean']:.1f} ± {rate['sigma']:.1f}"
        lines.append(
            f"{engine_name(row):22} {row['prompt_tokens']:6} {mean:>17} {rate['median']:8.1f} {rate['best']:8.1f} "
            f"{rate['spread']:6.0%} {rate['n']:3}"
        )
    for row in result["ratios"]:
        lines.append(
            f"metalstep / {row['against']}, prompt {row['prompt_tokens']}: {describe_ratio(row['prefill'])}; "
            f"the same first token in {row['same_ids']['whole']:.0%}"
        )
    for row in result.get("also", ()):
        lines.append(f"{row['setting']} / metalstep, prompt {row['prompt_tokens']}: {describe_ratio(row['prefill'])}")
    return lines + describe_left_out(result)


def describe_left_out(result: dict[str, Any]) -> list[str]:
    """The cases that have no numbers, and why."""
    lines = []
    for row in result.get("left_out", ()):
        batch = f"batch {row['batch']}, " if "batch" in row else ""
        lines.append(f"left out: {batch}prompt {row['prompt_tokens']}: {row['reason']}")
    return lines


def describe_ratio(ratio: dict[str, Any]) -> str:
    against = f", against {ratio['setting']}" if ratio.get("setting") else ""
    return f"{ratio['of_medians']:.2f}× (of medians; of pairs {ratio['median_of_pairs']:.2f}×{against})"
