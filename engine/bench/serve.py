"""Throughput and latency of the HTTP server against the engine's own `batch_generate` and vLLM's CPU backend, in turns in one run."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from metalstep.bench.json_process import JsonProcess
from metalstep.bench.machine import machine
from metalstep.bench.process_tree import cpu_seconds, machine_cpu_seconds, totals
from metalstep.bench.prompts import Prompts
from metalstep.bench.rounds import Case, Contender, Progress, Runs, alternate
from metalstep.bench.serve_process import ServerProcess, metalstep_command
from metalstep.bench.statistics import ratio, summary
from metalstep.bench.vllm_checkpoint import bfloat16_directory
from metalstep.checkpoint import Checkpoint, open_checkpoint

SERVER, GENERATE, VLLM = "metalstep serve", "batch_generate", "vllm serve"
CLIENT = Path(__file__).with_name("serve_client.py")
NOT_TIMED = "start-up, tokenizing the prompts of completions, opening connections"
LOAD_OPTIONS = ("device", "threads", "arithmetic", "batch_invariant")  # of --additional-config, which batch_generate loads with too
SLACK = 64  # tokens of a context that a chat template may add
MODEL_LENGTH = 2048  # tokens, at least, of a sequence in servers that are compared
SETTLE = 0.5  # seconds before a run: threads that wait for more work spin for a while, and a server ends its requests
KV_SHARE = 2  # times the cached tokens that the largest case needs


@dataclass(frozen=True)
class Plan:
    """What is measured. streams: requests at once, each a case. tokens: of each answer. prompt_tokens: of each prompt, before a chat's
    template. pairs: counted rounds. starts: of each server; all but the last are only timed. flags: of `metalstep serve`."""

    model: str
    streams: tuple[int, ...] = (1, 8, 32)
    tokens: int = 128
    prompt_tokens: int = 64
    pairs: int = 5
    starts: int = 1
    chat: bool = False
    idle_s: float = 10.0
    against_vllm: bool = False
    flags: tuple[str, ...] = ()

    @property
    def cases(self) -> list[Case]:
        return [Case(streams, self.prompt_tokens, self.tokens - 1) for streams in self.streams]

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.tokens + (SLACK if self.chat else 0)

    @property
    def load_options(self) -> dict[str, Any]:
        """Of --additional-config among the flags, what says how the engine computes. Raises: ValueError for one that is no JSON object."""
        options: dict[str, Any] = {}
        for name, value in itertools.zip_longest(self.flags, self.flags[1:], fillvalue=""):
            if name == "--additional-config" or name.startswith("--additional-config="):
                text = name.partition("=")[2] or value
                try:
                    given = json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(f"--additional-config is {text!r}, expected a JSON object ({error})") from None
                options = {key: given[key] for key in LOAD_OPTIONS if key in given}
        return options


def bench_serve(plan: Plan, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure the server and `batch_generate`, and vLLM's own CPU server where the plan says so, on the same fresh prompts in turns.

    Both servers keep running and idle while another is measured; so does the process of `batch_generate`. Returns machine, servers
    (time to ready, memory once ready and at the end, idle CPU), cases (a row per number of streams and contender) and ratios of the
    server over each other one. Raises: PeerError for a server or client that cannot be started or fails.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metalstep-bench-")))
        checkpoint = stack.enter_context(open_checkpoint(plan.model))
        tokenizer = checkpoint.tokenizer(None)
        servers = {}
        for name, start in starts(plan, checkpoint, scratch).items():
            servers[name] = stack.enter_context(started(start, plan.starts, partial(progress, f"starting {name}")))
        progress(f"loading {GENERATE}")
        generate = JsonProcess(GENERATE, generate_command(plan), os.environ)
        stack.callback(generate.close)
        head = generate.answer()
        client = JsonProcess("client", [sys.executable, str(CLIENT)], {**os.environ, "PYTHONSAFEPATH": "1"})
        stack.callback(client.close)
        turns = Turns(plan, tokenizer, {name: one.server for name, one in servers.items()}, generate, client)
        contenders = [Contender(name) for name in (*servers, GENERATE)]
        runs = alternate(turns.measure, Prompts.of(tokenizer), plan.cases, lambda _: contenders, plan.pairs, progress)
        progress(f"idle for {plan.idle_s:.0f} s")
        rows = [server_row(name, one, plan.idle_s) for name, one in servers.items()]
    return {
        "machine": machine(),
        "gpu": head["gpu"],
        "model": plan.model,
        "endpoint": turns.path,
        "contenders": {GENERATE: head["version"], **{row["name"]: row["version"] for row in rows}},
        "pairs": plan.pairs,
        "prompt_tokens": plan.prompt_tokens,
        "tokens": plan.tokens,
        "flags": list(plan.flags),
        "not_timed": NOT_TIMED,
        "servers": rows,
        "cases": [case_row(case, contender, samples) for (case, contender), samples in runs.items()],
        "ratios": [ratios(case, against, runs) for case in plan.cases for against in contenders[1:]],
    }


@dataclass
class Started:
    """A server that is ready. ready_s: of each start; memory: once ready, as `totals`."""

    server: ServerProcess
    ready_s: list[float]
    memory: dict[str, float | None]


def starts(plan: Plan, checkpoint: Checkpoint, scratch: Path) -> dict[str, Callable[[], ServerProcess]]:
    """How each server of the plan is started, by name; ours first."""
    common: list[str] = []
    if plan.against_vllm:
        # vLLM would take 92 % of the memory for its cache, and touches all of it; both get what the cases need.
        length = max(plan.context, min(MODEL_LENGTH, checkpoint.config.get("max_position_embeddings", MODEL_LENGTH)))
        tokens = KV_SHARE * max(length, max(plan.streams) * plan.context)
        needed = tokens * cached_token_bytes(checkpoint.config)
        common = ["--max-model-len", str(length), "--kv-cache-memory-bytes", str(needed)]
    ours = partial(ServerProcess, SERVER, metalstep_command(plan.model, [*common, *plan.flags]), scratch / "metalstep.log")
    if not plan.against_vllm:
        return {SERVER: ours}
    folder = bfloat16_directory(checkpoint)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "bfloat16", *common]
    theirs = partial(ServerProcess, VLLM, command, scratch / "vllm.log", environment=vllm_environment())
    return {SERVER: ours, VLLM: theirs}


def vllm_environment() -> dict[str, str]:
    """What makes vLLM run on its own CPU backend, with a thread on every CPU that this process may use."""
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else "auto"
    return {"VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": cpus, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def cached_token_bytes(config: dict[str, Any]) -> int:
    """Bytes of keys and values of one token in a 16-bit cache."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * 2 * config["num_hidden_layers"] * heads * head_dim)


def generate_command(plan: Plan) -> list[str]:
    options = {"max_context": plan.context, **plan.load_options}
    return [sys.executable, "-m", "metalstep.bench.generate_worker", plan.model, json.dumps(options)]


@contextmanager
def started(start: Callable[[], ServerProcess], times: int, progress: Callable[[], None]) -> Iterator[Started]:
    """Start a server `times` times, keep the last one running and close it in the end."""
    ready_s = []
    for left in reversed(range(times)):
        progress()
        with start() as server:
            server.wait_ready()
            ready_s.append(server.ready_s)
            if not left:
                yield Started(server, ready_s, totals(server.usage()))


@dataclass(frozen=True)
class Clocks:
    """Seconds: of the wall, and of processors. idle: of processes that should idle. own: of this one and all that it started."""

    wall: float
    idle: float
    own: float
    machine: float | None

    @classmethod
    def now(cls, idle: Sequence[int]) -> Clocks:
        return cls(time.perf_counter(), sum(map(cpu_seconds, idle)), cpu_seconds(os.getpid()), machine_cpu_seconds())

    def since(self, before: Clocks) -> dict[str, float | None]:
        """idle_cpu and elsewhere_cpu in cores, see `Turns.measure`."""
        seconds = self.wall - before.wall
        if self.machine is None or before.machine is None:
            elsewhere = None
        else:
            elsewhere = max(0.0, self.machine - before.machine - (self.own - before.own)) / seconds
        return {"idle_cpu": (self.idle - before.idle) / seconds, "elsewhere_cpu": elsewhere}


@dataclass
class Turns:
    """Runs one contender while the others idle."""

    plan: Plan
    tokenizer: Any
    servers: dict[str, ServerProcess]
    generate: JsonProcess
    client: JsonProcess

    def __post_init__(self) -> None:
        self.path = "/v1/chat/completions" if self.plan.chat else "/v1/completions"
        self._names = {name: server.model_name() for name, server in self.servers.items()}

    def measure(self, contender: Contender, prompts: list[list[int]], case: Case) -> dict[str, Any]:
        """One run: seconds and tokens; a server's also streams, of `batch_generate` also prompt_s. idle_cpu: what those took, in cores,
        that should have idled. elsewhere_cpu: what programs took that are not measured here, None where the system does not tell."""
        pids = {**{name: server.pid for name, server in self.servers.items()}, GENERATE: self.generate.pid}
        idle = [pid for name, pid in pids.items() if name != contender.engine]
        time.sleep(SETTLE)
        before = Clocks.now(idle)
        if contender.engine == GENERATE:
            found = self.generate.ask({"prompts": self._ids(prompts), "tokens": case.tokens + 1})
        else:
            server, name = self.servers[contender.engine], self._names[contender.engine]
            bodies = [self._body(name, prompt, case.tokens + 1) for prompt in prompts]
            found = self.client.ask({"port": server.port, "path": self.path, "bodies": bodies})
            found["tokens"] = sum(stream["tokens"] for stream in found["streams"])
        if found["tokens"] != case.batch * (case.tokens + 1):
            raise RuntimeError(f"{contender.name} gave {found['tokens']} tokens, expected {case.batch * (case.tokens + 1)}")
        return {**found, **Clocks.now(idle).since(before)}

    def _ids(self, prompts: list[list[int]]) -> list[list[int]]:
        """The tokens that a server makes of them."""
        if not self.plan.chat:
            return prompts
        return [
            self.tokenizer.apply_chat_template(self._messages(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
            for prompt in prompts
        ]

    def _messages(self, prompt: list[int]) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.tokenizer.decode(prompt)}]

    def _body(self, name: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        asked: dict[str, Any] = {"messages": self._messages(prompt)} if self.plan.chat else {"prompt": prompt}
        return {
            **asked,
            "model": name,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def server_row(name: str, one: Started, idle_s: float) -> dict[str, Any]:
    """What a server costs besides the time of its answers; asks nothing of it for `idle_s` seconds."""
    processes = one.server.usage()
    return {
        "name": name,
        "version": f"vLLM {one.server.version()}",
        "ready_s": summary(one.ready_s, best="min"),
        "memory_ready": one.memory,
        "memory_end": totals(processes),
        "processes": [{"name": process.name[:60], **totals([process])} for process in processes],
        "idle_cpu": one.server.idle_cpu(idle_s),
    }


def rate(run: dict[str, Any]) -> float:
    """Tokens per second of all streams together, prompts included in the time."""
    return run["tokens"] / run["seconds"]


def step_seconds(case: Case, run: dict[str, Any]) -> float:
    """Mean time between two tokens of a sequence: of `batch_generate` a step, of a server what its clients wait for."""
    if "streams" in run:
        return statistics.fmean((stream["last_s"] - stream["first_s"]) / (stream["tokens"] - 1) for stream in run["streams"])
    return (run["seconds"] - run["prompt_s"]) / case.tokens


def case_row(case: Case, contender: Contender, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: a contender with a number of streams. gap_ms: time between two pieces of an answer, percentiles of all runs; a piece may
    hold several tokens, pieces_per_token says how many pieces a token made."""
    row: dict[str, Any] = {
        "contender": contender.name,
        "streams": case.batch,
        "prompt_tokens": case.prompt,
        "tokens": case.tokens + 1,
        "tok_s": summary([rate(run) for run in runs]),
        "itl_ms": summary([step_seconds(case, run) * 1e3 for run in runs], best="min"),
        "idle_cpu_of_others": max(run["idle_cpu"] for run in runs),
        "elsewhere_cpu": [run["elsewhere_cpu"] for run in runs],
    }
    if contender.engine == GENERATE:
        row["ttft_ms"] = summary([run["prompt_s"] * 1e3 for run in runs], best="min")
        return row
    streams = [stream for run in runs for stream in run["streams"]]
    gaps = sorted(gap * 1e3 for stream in streams for gap in stream["gaps_s"])
    row["ttft_ms"] = summary([statistics.median(s["first_s"] for s in run["streams"]) * 1e3 for run in runs], best="min")
    row["gap_ms"] = {"p50": percentile(gaps, 0.50), "p95": percentile(gaps, 0.95), "p99": percentile(gaps, 0.99)}
    row["pieces_per_token"] = sum(len(s["gaps_s"]) + 1 for s in streams) / sum(s["tokens"] for s in streams)
    return row


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest of `values`, which are sorted; 0 where there is none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def ratios(case: Case, against: Contender, runs: Runs) -> dict[str, Any]:
    """The server over another one: tok_s, of rates, above 1 is faster; itl, of times between two tokens, above 1 is slower."""
    ours, theirs = runs[case, Contender(SERVER)], runs[case, against]
    return {
        "against": against.name,
        "streams": case.batch,
        "tok_s": ratio([rate(run) for run in ours], [rate(run) for run in theirs]),
        "itl": ratio([step_seconds(case, run) for run in ours], [step_seconds(case, run) for run in theirs]),
    }
