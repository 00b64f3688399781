"""Two machines with an engine each behind one server, by vLLM's own data parallelism."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from hosts import Host, two_hosts
from server import START

from metalstep.bench.serve_process import free_port

MODEL = "smollm2"
REQUESTS = 6
ASK = """
import concurrent.futures, json, sys, urllib.request
url, bodies = sys.argv[1], json.loads(sys.argv[2])
def ask(body):
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["text"]
with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
    texts = list(pool.map(ask, bodies))
with urllib.request.urlopen(url + "/metrics", timeout=30) as reply:
    print(json.dumps([texts, reply.read().decode()]))
"""
HEALTH = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + '/health', timeout=5)"


def start(host: Host, arguments: list[str], log: IO[str]) -> subprocess.Popen[str]:
    command = [*host.run, sys.executable, "-m", "metalstep.cli.main", "serve", MODEL, "--max-model-len", "512", *arguments]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def python(host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on a host: where the server listens."""
    return subprocess.run([*host.run, sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=180)


def wait(host: Host, url: str, processes: list[subprocess.Popen[str]], log: Path) -> None:
    end = time.monotonic() + START
    while python(host, HEALTH, url).returncode != 0:
        assert all(process.poll() is None for process in processes) and time.monotonic() < end, log.read_text(errors="replace")[-4000:]
        time.sleep(0.5)


def test_two_machines_share_the_requests(tmp_path: Path) -> None:
    """Each engine answers some of them, and all alike."""
    port, rpc = free_port(), free_port()
    with two_hosts() as (first, second), (tmp_path / "log.txt").open("w") as log:
        shared = ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--data-parallel-address", first.address]
        shared += ["--data-parallel-rpc-port", str(rpc)]
        processes = [
            start(first, [*shared, "--port", str(port), "--api-server-count", "1"], log),
            start(second, [*shared, "--headless", "--data-parallel-start-rank", "1"], log),
        ]
        try:
            url = f"http://127.0.0.1:{port}"
            wait(first, url, processes, tmp_path / "log.txt")
            bodies = [{"model": MODEL, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}] * REQUESTS
            asked = python(first, ASK, url, json.dumps(bodies))
            assert asked.returncode == 0, asked.stderr
            texts, metrics = json.loads(asked.stdout)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert len(set(texts)) == 1 and texts[0].startswith(" Paris")
    finished = re.finditer(r'^vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\S+)$', metrics, re.M)
    answered = {match[1]: float(match[2]) for match in finished}
    assert sum(answered.values()) == REQUESTS and answered["0"] and answered["1"]
