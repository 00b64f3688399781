"""`metalstep top`: what a server does now, redrawn on a terminal, a line per look elsewhere."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from metalstep.cli.server_metrics import NoServer, Watch, address, fetch

if TYPE_CHECKING:
    from rich.panel import Panel

    from metalstep.cli.parser import Parser

DEFAULT_URL = "http://127.0.0.1:8000"
BARS = "▁▂▃▄▅▆▇█"
EXAMPLES = (
    "metalstep top",
    "metalstep top http://192.168.1.20:8000 --interval 0.5",
    "metalstep top --once --json",
    "metalstep top --json > load.jsonl",
)


def parser() -> Parser:
    from metalstep.cli.parser import Parser

    p = Parser(
        "metalstep top",
        "Watch a running `metalstep serve` (or any vLLM server): tokens per second, requests, KV cache, prefix cache, preemptions, time to "
        "first token (TTFT) and between tokens (ITL). It reads /metrics once per look, which takes no time from the engine's process. On a "
        "terminal the view is redrawn, elsewhere each look is a line. Ctrl-C ends it.",
        EXAMPLES,
    )
    p.add_argument("url", nargs="?", default=DEFAULT_URL, metavar="URL", help=f"the server (default: {DEFAULT_URL})")
    p.add_argument("--interval", type=interval, default=1.0, metavar="SECONDS", help="between two looks (default: 1)")
    p.add_argument("--once", action="store_true", help="two looks, one interval apart, and what they say; then end")
    p.add_argument("--json", action="store_true", help="one JSON object per line")
    return p


def interval(text: str) -> float:
    """Seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no time from 0.05 to 3600 seconds")
    return seconds


def main(argv: list[str]) -> int:
    """watch a running server: tokens per second, KV cache, requests, latencies"""
    args = parser().parse_args(argv)
    url = address(args.url)
    watch = Watch()
    watch.add(fetch(url))  # a server that is not there is an error; one that goes away is waited for
    if not args.once and not args.json and sys.stdout.isatty():
        return draw(url, watch, args.interval)
    while True:
        time.sleep(args.interval)
        try:
            found = watch.add(fetch(url))
        except NoServer as error:
            if args.once:
                raise
            print(f"{error}; trying again", file=sys.stderr, flush=True)
            continue
        if found is None:
            print("the server was started anew", file=sys.stderr, flush=True)
            continue
        print(json.dumps({"url": url, **found}) if args.json else line(found), flush=True)
        if args.once:
            return 0


def line(found: dict[str, Any]) -> str:
    """A sample in a line."""
    parts = [
        f"{found['generation_tok_s']:.1f} tok/s",
        f"prompt {found['prompt_tok_s']:.1f} tok/s",
        f"running {found['running']}",
        f"waiting {found['waiting']}",
        f"KV {found['kv_cache_usage']:.1%}",
        f"prefix hits {found['prefix_hit_rate']:.1%}",
        f"preemptions {found['preemptions']}",
    ]
    parts += [f"{name} {times(found[key])}" for name, key in (("TTFT", "ttft_ms"), ("ITL", "itl_ms")) if found[key]]
    return ", ".join(parts)


def times(latency: dict[str, Any] | None) -> str:
    """Percentiles in a few words."""
    if latency is None:
        return "no tokens yet"
    text = " / ".join(f"{value:.4g}" for name, value in latency.items() if name != "seconds")
    return f"{text} ms"


def sparkline(values: list[float], width: int) -> str:
    """The last `width` values, scaled to the highest of them."""
    shown = values[-width:]
    top = max(shown, default=0.0)
    return "".join(BARS[min(len(BARS) - 1, math.floor(value / top * len(BARS)))] if top > 0 else BARS[0] for value in shown)


def bar(part: float, width: int = 30) -> str:
    full = round(min(max(part, 0.0), 1.0) * width)
    return "█" * full + "░" * (width - full)


def draw(url: str, watch: Watch, seconds: float) -> int:
    """The view, until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    shown: dict[str, Any] | None = None
    lost: float | None = None
    with Live(Text(f"{url}: one moment"), console=console, screen=False, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            note = ""
            try:
                found = watch.add(fetch(url))
                shown, lost = found or shown, None
                note = "the server was started anew" if watch.restarted else ""
            except NoServer as error:
                lost = time.monotonic() if lost is None else lost
                note = f"{error}; trying again for {time.monotonic() - lost:.0f} s"
            live.update(view(url, shown, list(watch.speeds), note, console.width), refresh=True)


def view(url: str, found: dict[str, Any] | None, speeds: list[float], note: str, width: int) -> Panel:
    """A sample as a panel. found: None before the first."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True)
    rows: list[tuple[str, str]] = []
    if found is not None:
        ended = ", ".join(f"{count:,} {reason}" for reason, count in found["ended"].items()) or "none"
        rows = [
            ("generated", f"{found['generation_tok_s']:.1f} tok/s   {found['generation_tokens']:,} tokens"),
            ("", sparkline(speeds, max(10, min(60, width - 24)))),
            ("prompts", f"{found['prompt_tok_s']:.1f} tok/s   {found['prompt_tokens']:,} tokens"),
            ("requests", f"{found['running']} running, {found['waiting']} waiting"),
            ("ended", ended),
            ("KV cache", f"{bar(found['kv_cache_usage'])} {found['kv_cache_usage']:.1%}"),
            ("prefix cache", f"{found['prefix_hit_rate']:.1%} of the prompts' tokens were found"),
            ("preemptions", f"{found['preemptions']:,}"),
            ("TTFT", f"{times(found['ttft_ms'])}   {of(found['ttft_ms'])}"),
            ("ITL", f"{times(found['itl_ms'])}   {of(found['itl_ms'])}"),
        ]
    for name, text in rows:
        table.add_row(name, Text(text))
    if note:
        table.add_row("note", Text(note, style="bold"))
    model = f" {found['model']}" if found and found["model"] else ""
    return Panel(table, title=Text(f"metalstep top{model} {url}"), title_align="left", expand=False)


def of(latency: dict[str, Any] | None) -> str:
    """What percentiles are of."""
    if latency is None:
        return ""
    since = "since its start" if latency["seconds"] is None else f"last {latency['seconds']:.0f} s"
    return f"(p50 / p90 / p99, {since})"
