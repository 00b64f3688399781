"""What a vLLM server counts (/metrics, Prometheus' text format), and what two looks at it say about the time between them."""

from __future__ import annotations

import math
import re
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from metalstep.cli.errors import CommandError, printable

LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
TIMEOUT = 5.0  # seconds for an answer
LATENCY_SECONDS = 60.0  # that percentiles are of
QUANTILES = (0.5, 0.9, 0.99)
TTFT, ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
START = "start one with `metalstep serve smollm2`, or pass the address of one: metalstep top http://HOST:PORT"


class NoServer(CommandError):
    """Nothing answers there, or something else does."""


@dataclass
class Look:
    """The server's counts at a moment. values: summed over labels (engines, models). buckets: of histograms, by upper bound, cumulative."""

    at: float
    values: dict[str, float] = field(default_factory=dict)
    engines: dict[str, list[float]] = field(default_factory=dict)  # gauges that have one value per engine
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)  # requests by their reason
    model: str = ""


def parse(text: str, at: float) -> Look:
    """The body of /metrics. Lines that are no samples are left out, as are numbers that are not finite."""
    look = Look(at)
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        name, labels, number = match[1], dict(LABEL.findall(match[2] or "")), match[3]
        try:
            value, bound = float(number), float(labels.get("le", 0))
        except ValueError:
            continue
        if not math.isfinite(value):
            continue
        look.model = look.model or printable(labels.get("model_name", ""))
        if name.endswith("_bucket") and "le" in labels:
            buckets = look.buckets.setdefault(name.removesuffix("_bucket"), {})
            buckets[bound] = buckets.get(bound, 0.0) + value
            continue
        look.values[name] = look.values.get(name, 0.0) + value
        if name == "vllm:kv_cache_usage_perc":
            look.engines.setdefault(name, []).append(value)
        elif name == "vllm:request_success_total":
            reason = labels.get("finished_reason", "")
            look.ended[reason] = look.ended.get(reason, 0.0) + value
    return look


def fetch(url: str) -> Look:
    """Ask the server. url: without /metrics. Raises: NoServer."""
    address = f"{url}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            text = answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        raise NoServer(f"{address} answers {error.code} {error.reason}, expected a vLLM server's metrics", START) from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NoServer(f"nothing answers at {url}: {getattr(reason, 'strerror', None) or reason}", START) from None
    except Exception as error:  # what is no HTTP: http.client has errors of its own
        raise NoServer(f"{url} does not speak HTTP: {type(error).__name__}", START) from None
    look = parse(text, time.monotonic())
    if "vllm:num_requests_running" not in look.values:
        raise NoServer(f"{address} answers without vLLM's metrics: another server, or one started with --disable-log-stats", START)
    return look


def address(text: str) -> str:
    """A server's URL as users write it: with or without http://, /metrics or /v1. Raises: CommandError."""
    url = text if "://" in text else f"http://{text}"
    url = url.rstrip("/")
    for path in ("/metrics", "/v1"):
        url = url.removesuffix(path)
    if not re.match(r"^https?://[^/\s]+", url):
        raise CommandError(f"{text!r} is no address of a server, expected http://HOST:PORT", "metalstep top http://127.0.0.1:8000")
    return url


def quantiles(buckets: dict[float, float]) -> list[float] | None:
    """QUANTILES of a cumulative histogram, each within its bucket by linear interpolation, as Prometheus does; None: it is empty."""
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    found = []
    for quantile in QUANTILES:
        rank, lower, below = quantile * buckets[bounds[-1]], 0.0, 0.0
        for bound in bounds:
            count = buckets[bound]
            if count >= rank:
                inside = (rank - below) / (count - below) if count > below else 1.0
                found.append(lower if math.isinf(bound) else lower + (bound - lower) * inside)
                break
            lower, below = bound, count
    return found


class Watch:
    """Looks at one server, and what they say. restarted: its counts fell, so it is another process than before."""

    def __init__(self) -> None:
        self._looks: deque[Look] = deque()
        self.speeds: deque[float] = deque(maxlen=120)
        self.restarted = False

    def add(self, look: Look) -> dict[str, Any] | None:
        """The sample between the last look and this one; None for the first."""
        looks = self._looks
        counted = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
        self.restarted = bool(looks) and any(look.values.get(name, 0) < looks[-1].values.get(name, 0) for name in counted)
        if self.restarted:
            looks.clear()
        looks.append(look)
        while len(looks) > 2 and look.at - looks[1].at >= LATENCY_SECONDS:
            looks.popleft()
        if len(looks) < 2:
            return None
        found = sample(looks[-2], look, looks[0])
        self.speeds.append(found["generation_tok_s"])
        return found


def sample(before: Look, look: Look, oldest: Look) -> dict[str, Any]:
    """What `metalstep top --json` prints. Speeds are since `before`, percentiles since `oldest`, or since the server's start where nothing
    has come since."""
    seconds = max(look.at - before.at, 1e-9)
    values = look.values

    def rate(name: str) -> float:
        return round((values.get(name, 0.0) - before.values.get(name, 0.0)) / seconds, 2)

    queries, hits = (values.get(f"vllm:prefix_cache_{what}_total", 0.0) for what in ("queries", "hits"))
    usage = look.engines.get("vllm:kv_cache_usage_perc", [0.0])
    return {
        "model": look.model,
        "seconds": round(seconds, 3),
        "generation_tok_s": rate("vllm:generation_tokens_total"),
        "prompt_tok_s": rate("vllm:prompt_tokens_total"),
        "running": int(values["vllm:num_requests_running"]),
        "waiting": int(values.get("vllm:num_requests_waiting", 0)),
        "kv_cache_usage": sum(usage) / len(usage),
        "prefix_hit_rate": hits / queries if queries else 0.0,
        "preemptions": int(values.get("vllm:num_preemptions_total", 0)),
        "generation_tokens": int(values.get("vllm:generation_tokens_total", 0)),
        "prompt_tokens": int(values.get("vllm:prompt_tokens_total", 0)),
        "ended": {reason: int(count) for reason, count in look.ended.items() if count},
        "ttft_ms": latency(TTFT, oldest, look),
        "itl_ms": latency(ITL, oldest, look),
    }


def latency(name: str, oldest: Look, look: Look) -> dict[str, Any] | None:
    """Percentiles in ms of a histogram. of: how many seconds, None: since the server's start. None: nothing was measured yet."""
    now, then = look.buckets.get(name, {}), oldest.buckets.get(name, {})
    recent = quantiles({bound: count - then.get(bound, 0.0) for bound, count in now.items()})
    found = recent or quantiles(now)
    if found is None:
        return None
    named = {f"p{quantile * 100:g}": round(value * 1e3, 2) for quantile, value in zip(QUANTILES, found, strict=True)}
    return {**named, "seconds": round(look.at - oldest.at, 1) if recent else None}
