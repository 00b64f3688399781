"""Many clients at once, good, bad and impatient, for as long as asked: `make soak`.

    python tests/plugin/soak.py [--seconds N] [--model MODEL] [--port PORT | --url URL]

Every good request is answered once alone; under load its answer has to be the same, bit for bit. Every bad one has to be refused with a
message. Afterwards nothing may be left: no request, no block of the KV cache, no memory. In the end the engine's process is killed, and the
server has to say so and end. With --url a server that runs already is used; its memory is not looked at and nothing of it is killed.
Prints one page; the exit status is 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
from soak_bad import CHAT, COMPLETIONS, Bad, bad_requests
from soak_good import Good, ask, good_requests
from soak_http import Address, dechunked

from metalstep.bench.process_tree import MIB, Usage
from metalstep.bench.serve_process import ServerProcess, metalstep_command

CLIENTS = 32
CONTEXT = 1024  # tokens; a prompt may take several steps
KV_BYTES = 32 * MIB  # about 1,450 tokens of SmolLM2: too few for all clients at once, so requests are preempted
FLAGS = ["--enable-sleep-mode", "--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", str(KV_BYTES)]
GOOD, BAD, ABANDONED = 0.6, 0.25, 0.15  # shares of the requests
ANSWER_WITHIN = 120.0  # seconds; sleep and load included
NAP_EVERY, NAP = (5.0, 12.0), (0.2, 1.5)  # seconds between two naps of the server, and of one
NAPS = [(level, mode) for level in (0, 1) for mode in ("wait", "keep", "abort")]
WARM_UP = 0.3  # of the time; until then caches of code and grammars fill
GROWTH = 24 * MIB  # of a process's peak from the first half of the rest to the second; naps free memory in between
DEAD_WITHIN = 20.0  # seconds from kill -9 of the engine to the end of the server
SHOWN = 20  # failures that are printed


class Soak:
    """One run. failures: what was wrong, in words. counts: what was done."""

    def __init__(self, address: Address, model: str, seconds: float, seed: int, server: ServerProcess | None):
        self.address, self.model, self.seconds, self.server = address, model, seconds, server
        self.draw = random.Random(seed)
        # A connection for each request: a server may close an idle one just when the next request is sent on it, which is nobody's fault.
        http = openai.DefaultAsyncHttpxClient(limits=httpx.Limits(max_keepalive_connections=0))
        self.client = openai.AsyncOpenAI(
            base_url=f"http://{address.host}:{address.port}/v1", api_key="none", max_retries=0, timeout=ANSWER_WITHIN, http_client=http
        )
        self.good, self.bad = good_requests(), bad_requests(model, CONTEXT)
        self.known: dict[str, Any] = {}
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self.aborting = 0  # begins and ends of naps that end the running requests: odd during one
        self.memory: list[tuple[float, list[Usage]]] = []
        self.until = 0.0

    async def run(self) -> None:
        started = time.monotonic()
        await self.learn()
        self.counts["seconds alone"] = round(time.monotonic() - started)
        if not self.known:
            return  # nothing could be compared
        self.until = time.monotonic() + self.seconds
        await asyncio.gather(self.sleeper(), self.watcher(), *(self.one_client() for _ in range(CLIENTS)))
        await self.quiet()
        for good in self.good:  # what was computed under load must not have left anything in a cache
            await self.good_one(good, stream=False)

    async def learn(self) -> None:
        """Every good request alone."""
        for good in self.good:
            try:
                self.known[good.name] = await ask(self.client, self.model, good, stream=False)
            except openai.APIError as error:
                self.fail(f"alone: {good.name}: {error}")

    async def one_client(self) -> None:
        while time.monotonic() < self.until and self.alive:
            (kind,) = self.draw.choices([self.good_one, self.bad_one, self.abandoned_one], [GOOD, BAD, ABANDONED])
            await kind()

    async def good_one(self, good: Good | None = None, stream: bool | None = None) -> None:
        good = good or self.draw.choice(self.good)
        stream = good.streams and self.draw.random() < 0.6 if stream is None else stream
        before = self.aborting
        try:
            answer = await ask(self.client, self.model, good, stream)
        except openai.APIError as error:
            napped = self.aborting != before or before % 2
            if napped and "echo" in good.fields and "list index out of range" in str(error):
                # vLLM puts the logprobs of the prompt before the answer's, and a request that a nap ended early has none.
                self.counts["ended by a nap"] += 1
                return
            self.fail(f"good request: {good.name}{' (stream)' * stream}: {type(error).__name__}: {error} ({error.__cause__!r})")
            return
        # A stream that ends before its first token has no piece at all.
        ended = not answer or any(choice["finish_reason"] in (None, "abort") for choice in answer)
        if ended and (self.aborting != before or before % 2):
            self.counts["ended by a nap"] += 1
        elif answer == self.known.get(good.name):
            self.counts["right answers"] += 1
        else:
            self.fail(f"wrong answer: {good.name}{' (stream)' * stream}: {difference(self.known.get(good.name), answer)}")

    async def bad_one(self) -> None:
        bad = self.draw.choice(self.bad)
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                status, body = await self.address.send(bad)
        except (OSError, TimeoutError) as error:
            self.fail(f"bad request: {bad.name}: no answer ({type(error).__name__}: {error})")
            return
        if wrong := judged(bad, status, body):
            self.fail(f"bad request: {bad.name}: {wrong}")
        else:
            self.counts["refused" if (status or 0) >= 400 else "odd ones answered"] += 1

    async def abandoned_one(self) -> None:
        good = self.draw.choice(self.good)
        body = {"model": self.model, **good.fields, **good.extra, "max_tokens": 200, "stream": good.streams and self.draw.random() < 0.8}
        try:
            await self.address.abandon(CHAT if good.chat else COMPLETIONS, body, self.draw)
        except (OSError, TimeoutError) as error:
            self.fail(f"abandoned request: {good.name}: {type(error).__name__}: {error}")
        else:
            self.counts["abandoned"] += 1

    async def sleeper(self) -> None:
        while time.monotonic() < self.until and self.alive:
            await asyncio.sleep(min(self.draw.uniform(*NAP_EVERY), max(0.0, self.until - time.monotonic())))
            level, mode = self.draw.choice(NAPS)
            self.aborting += mode == "abort"
            name = f"nap of level {level}, mode {mode}"
            try:
                await self.expect(name, "POST", f"/sleep?level={level}&mode={mode}", b"sleeping")
                if level:
                    await self.expect(name, "GET", "/is_sleeping", b'"is_sleeping":true')
                await asyncio.sleep(self.draw.uniform(*NAP))
                await self.expect(name, "POST", "/wake_up" if level else "/wake_up?tags=scheduling", b"awake")
                await self.expect(name, "GET", "/is_sleeping", b'"is_sleeping":false')
            except (OSError, TimeoutError) as error:
                self.fail(f"{name}: {type(error).__name__}: {error}")
            self.aborting += mode == "abort"
            self.counts["naps"] += 1

    async def expect(self, name: str, method: str, path: str, text: bytes) -> None:
        status, body = await self.address.call(method, path, ANSWER_WITHIN)
        if status != 200 or text not in body:
            self.fail(f"{name}: {method} {path} answered {status}: {body[:200]!r}, expected {text.decode()}")

    async def watcher(self) -> None:
        """Memory every second or two, and whether the server lives."""
        while time.monotonic() < self.until:
            if self.server is not None:
                if not self.alive:
                    self.fail(f"the server ended with status {self.server.status}")
                    return
                self.memory.append((time.monotonic(), await asyncio.to_thread(self.server.usage)))
            await asyncio.sleep(1.5)

    @property
    def alive(self) -> bool:
        return self.server is None or self.server.status is None

    async def quiet(self) -> None:
        """Wait until nothing runs; then nothing may be held."""
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + 30
        while True:
            try:
                found = await self.address.metrics()
            except (OSError, TimeoutError) as error:
                self.fail(f"/metrics: {type(error).__name__}: {error}")
                return
            held = {name: found.get(name) for name in gauges}
            if not any(held.values()):
                break
            if time.monotonic() > deadline:
                self.fail(f"30 s after the last request there is still {held}")
                break
            await asyncio.sleep(0.2)
        if None in held.values():
            self.fail(f"/metrics lacks {[name for name in gauges if held[name] is None]}")
        for name in ("preemptions", "prefix_cache_hits"):
            key = "vllm:num_preemptions_total" if name == "preemptions" else "vllm:prefix_cache_hits_total"
            self.counts[name] = int(found.get(key, 0))

    def fail(self, what: str) -> None:
        self.failures.append(what)
        if len(set(self.failures)) <= SHOWN and self.failures.count(what) == 1:
            print(f"FAILED {what}", file=sys.stderr, flush=True)  # as it happens; the summary has it too


def difference(known: Any, answer: Any) -> str:
    """Where two answers part."""
    if known is None or len(known) != len(answer):
        return f"{answer!r:.300}, expected {known!r:.300}"
    for index, (right, wrong) in enumerate(zip(known, answer, strict=True)):
        for key in right:
            if right[key] != wrong[key]:
                return f"choice {index}, {key}: {wrong[key]!r:.300}, expected {right[key]!r:.300}"
    return "none"


def judged(bad: Bad, status: int | None, body: bytes) -> str | None:
    """What was wrong with the answer to a bad request; None where it was right."""
    text = dechunked(body).decode(errors="replace").strip()
    if status is None or status not in bad.statuses:
        return f"status {status}, expected {bad.statuses.start} to {bad.statuses.stop - 1}: {text[:200]}"
    if status < 400 or bad.raw is not None:
        return None if text else "no text"
    try:
        answer = json.loads(text)
        message = answer["error"]["message"] if "error" in answer else answer["detail"]
    except (ValueError, KeyError, TypeError):
        return f"no message: {text[:200]!r}"
    return None if message else "an empty message"


def growth(soak: Soak) -> list[str]:
    """A line per process of the server with its own memory behind the warm-up and at the end; a failure for one that grew."""
    if not soak.memory:
        return ["memory      not looked at: the server was not started here"]
    begin, end = soak.memory[0][0], soak.memory[-1][0]
    behind = [processes for when, processes in soak.memory if when >= begin + WARM_UP * (end - begin)]
    first, last = behind[: len(behind) // 2], behind[len(behind) // 2 :]
    lines = []
    for process in soak.memory[-1][1]:
        before, after = (peak(part, process.pid) for part in (first, last))
        name, grown = process.name[:40], f"{before / MIB:.1f} to {after / MIB:.1f} MiB"
        lines.append(f"memory      {name:40} at most {grown} from the first half behind the warm-up to the second")
        if after - before > GROWTH:
            soak.fail(f"{name} grew from {grown}, by more than {GROWTH / MIB:.0f} MiB")
    return lines


def peak(samples: list[list[Usage]], pid: int) -> int:
    """The most memory of its own that a process had; resident memory where the system tells no other."""
    found = [one.rss if one.private is None else one.private for processes in samples for one in processes if one.pid == pid]
    return max(found, default=0)


def kill_engine(soak: Soak, server: ServerProcess) -> str:
    """Kill the engine's process; the server has to end with an error and a message. A line about it."""
    engines = [process for process in server.usage() if "EngineCore" in process.name]
    if len(engines) != 1:
        soak.fail(f"expected one process named EngineCore, found {[process.name for process in server.usage()]}")
        return "kill -9     not tried"
    os.kill(engines[0].pid, signal.SIGKILL)
    started = time.monotonic()
    while server.status is None and time.monotonic() - started < DEAD_WITHIN:
        time.sleep(0.05)
    seconds = time.monotonic() - started
    said = [line for line in server.log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    if server.status is None:
        soak.fail(f"the server still runs {DEAD_WITHIN:.0f} s after its engine was killed")
    elif server.status == 0:
        soak.fail("the server ended with status 0 after its engine was killed")
    if not any("engine" in line for line in said):
        soak.fail(f"the server did not say that its engine is gone; its errors are {said}")
    return f"kill -9     the server ended {seconds:.1f} s later with status {server.status}: {(said or ['no message'])[-1]}"


def summary(soak: Soak, lines: list[str]) -> str:
    counts = soak.counts
    done = ["right answers", "refused", "odd ones answered", "abandoned", "ended by a nap", "naps", "preemptions", "prefix_cache_hits"]
    return "\n".join(
        [
            f"soak        {soak.seconds:.0f} s of load behind {counts['seconds alone']} s alone, {CLIENTS} clients, "
            f"{len(soak.good)} good and {len(soak.bad)} bad requests drawn by chance",
            *(f"{'':11} {counts[name]:7,} {name.replace('_', ' ')}" for name in done),
            *lines,
            f"failures    {len(soak.failures)}",
            *(f"{times:11,} × {failure}" for failure, times in Counter(soak.failures).most_common(SHOWN)),
        ]
    )


def main() -> int:
    p = argparse.ArgumentParser(description="Many clients at once, good, bad and impatient.")
    p.add_argument("--seconds", type=float, default=600, help="of load (default: 600)")
    p.add_argument("--model", default="smollm2", help="the model (default: smollm2)")
    p.add_argument("--port", type=int, help="of the server that is started (default: a free one)")
    p.add_argument("--url", help="of a server that runs already, e.g. http://127.0.0.1:8000")
    p.add_argument("--seed", type=int, default=1, help="of what is drawn (default: 1)")
    p.add_argument("--log", type=Path, help="a file for the summary, beside stdout")
    p.add_argument("--server-log", type=Path, default=Path("build/soak-server.log"), help="(default: build/soak-server.log)")
    args = p.parse_args()
    if args.url:
        return finish(soaked(Address(args.url), args, None), [], args.log)
    args.server_log.parent.mkdir(parents=True, exist_ok=True)
    command = metalstep_command(args.model, [*FLAGS, "--served-model-name", "soaked"])
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # sleep and wake
    with ServerProcess("metalstep serve", command, args.server_log, environment=environment, port=args.port) as server:
        server.wait_ready()
        lines = [f"server      ready in {server.ready_s:.1f} s, its log is {args.server_log}"]
        soak = soaked(Address(f"http://127.0.0.1:{server.port}"), args, server)
        lines += growth(soak)
        if soak.alive:
            lines.append(kill_engine(soak, server))
        return finish(soak, lines, args.log)


def soaked(address: Address, args: argparse.Namespace, server: ServerProcess | None) -> Soak:
    model = "soaked" if server is not None else asyncio.run(model_name(address))
    soak = Soak(address, model, args.seconds, args.seed, server)
    asyncio.run(soak.run())
    return soak


async def model_name(address: Address) -> str:
    return str(json.loads(dechunked((await address.call("GET", "/v1/models"))[1]))["data"][0]["id"])


def finish(soak: Soak, lines: list[str], log: Path | None) -> int:
    text = summary(soak, lines)
    print(text, flush=True)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text + "\n")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
