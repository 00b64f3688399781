"""`metalstep top` against a small server with what vLLM 0.32 says at /metrics (recorded), and against what is no server."""
from __future__ import annotations

import http.server
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.cli.main import main
from metalstep.cli.server_metrics import QUANTILES, Watch, address, parse, quantiles
from metalstep.cli.top import bar, line, sparkline

METRICS = Path(__file__).with_name("metrics")
BEFORE, AFTER = ((METRICS / name).read_text() for name in ("before.txt", "after.txt"))  # of a fresh server, and 900 tokens later


@contextmanager
def serving(answers, status=200, port=0):
    """A server that gives one of `answers` after the other, then the last one again. Yields its URL."""
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = (left.pop(0) if len(left) > 1 else left[0]).encode()
            self.send_response(status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http.server.ThreadingHTTPServer.allow_reuse_address = True
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_one_sample_as_json(capsys):
    with serving([BEFORE, AFTER]) as url:
        assert main(["top", url, "--once", "--json", "--interval", "0.05"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1 and found["url"] == url and found["model"] == "smollm2"
    assert (found["generation_tokens"], found["prompt_tokens"], found["running"], found["preemptions"]) == (900, 30, 0, 0)
    assert found["generation_tok_s"] == pytest.approx(900 / found["seconds"], rel=0.02)
    assert found["ended"] == {"length": 3}
    assert 100 <= found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"] <= 250  # all three lie in that bucket
    assert found["ttft_ms"]["seconds"] == round(found["seconds"], 1)
    assert 5 < found["itl_ms"]["p50"] < 40


def test_as_a_line(capsys):
    with serving([BEFORE, AFTER]) as url:
        assert main(["top", f"{url}/metrics", "--once", "--interval", "0.05"]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(
        r"[\d.]+ tok/s, prompt [\d.]+ tok/s, running 0, waiting 0, KV 0\.0%, prefix hits 0\.0%, preemptions 0, "
        r"TTFT [\d.]+ / [\d.]+ / [\d.]+ ms, ITL [\d.]+ / [\d.]+ / [\d.]+ ms\n",
        out,
    )


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        (["no"], 404, "answers 404 Not Found, expected a vLLM server's metrics"),
        (["<html>"], 200, "answers without vLLM's metrics"),
        (["process_start_time_seconds 1\n"], 200, "another server, or one started with --disable-log-stats"),
    ],
)
def test_what_is_no_server_of_vllms_is_said(capsys, answers, status, said):
    with serving(answers, status) as url:
        assert main(["top", url, "--once"]) == 2
    err = capsys.readouterr().err
    assert said in err and "hint: start one with `metalstep serve smollm2`" in err


def test_nothing_there_and_no_address(capsys):
    with serving([BEFORE]) as url:
        pass
    assert main(["top", url]) == 2
    assert f"error: nothing answers at {url}: Connection refused\nhint: start one with" in capsys.readouterr().err
    for text, said in (("ftp://here", "is no address of a server"), ("http://", "is no address of a server")):
        assert main(["top", text]) == 2
        assert said in capsys.readouterr().err
    for seconds in ("0", "fast", "nan"):
        assert main(["top", "--interval", seconds]) == 2
        assert "is no time from 0.05 to 3600 seconds" in capsys.readouterr().err


def test_a_server_that_goes_away_is_waited_for(tmp_path):
    """And one that comes back with smaller counts is a new one."""
    out, err = tmp_path / "out", tmp_path / "err"
    with serving([AFTER]) as url:
        command = [sys.executable, "-m", "metalstep.cli.main", "top", url, "--interval", "0.1", "--json"]
        with out.open("w") as to, err.open("w") as errors:
            process = subprocess.Popen(command, stdout=to, stderr=errors)
        wait_for(out, "smollm2")
    try:
        wait_for(err, "Connection refused; trying again")
        port, samples = int(url.rpartition(":")[2]), out.read_text().count("\n")
        with serving([BEFORE], port=port):
            wait_for(err, "the server was started anew")
            wait_for(out, "\n", samples + 1)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert all(json.loads(row)["generation_tok_s"] >= 0 for row in out.read_text().splitlines())


def wait_for(path, text, count=1):
    end = time.monotonic() + 60
    while path.read_text().count(text) < count:
        assert time.monotonic() < end, path.read_text()
        time.sleep(0.05)


def test_on_a_terminal_the_view_is_drawn():
    with serving([BEFORE, AFTER]) as url:
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "metalstep.cli.main", "top", url, "--interval", "0.1"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
        os.close(follower)
        seen = b""
        while b"p50 / p90 / p99" not in seen:
            seen += os.read(leader, 4096)
        process.send_signal(signal.SIGINT)
        os.set_blocking(leader, False)
        assert process.wait(30) == 130
        os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode(errors="replace"))
    for part in ("metalstep top smollm2", "900 tokens", "█", "KV cache", "░", "prefix cache", "TTFT"):
        assert part in text, text


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200), st.lists(st.floats(0.5, 120), min_size=1, max_size=12, unique=True))
def test_quantiles_lie_in_the_bucket_of_the_true_one(values, bounds):
    bounds = [*sorted(bounds), float("inf")]
    found = quantiles({bound: float(sum(value <= bound for value in values)) for bound in bounds})
    for quantile, got in zip(QUANTILES, found, strict=True):
        true = sorted(values)[max(0, -(-int(quantile * 100) * len(values) // 100) - 1)]
        upper = next(bound for bound in bounds if true <= bound)
        lower = max([0.0, *(bound for bound in bounds if bound < true)])
        assert lower <= got <= upper
    assert found == sorted(found)
    assert quantiles(dict.fromkeys(bounds, 0.0)) is None


def test_several_engines_are_added_up():
    rows = 'vllm:num_requests_running{engine="0"} 2\nvllm:num_requests_running{engine="1"} 3\n'
    rows += 'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.4\nvllm:other NaN\n'
    watch = Watch()
    assert watch.add(parse(rows, 1.0)) is None
    found = watch.add(parse(rows + 'vllm:generation_tokens_total{model_name="a\\"b"} 50\n', 3.0))
    assert (found["running"], found["generation_tok_s"]) == (5, 25.0)
    assert found["kv_cache_usage"] == pytest.approx(0.3) and found["ttft_ms"] is None
    assert "running 5" in line(found) and "TTFT" not in line(found)


def test_drawings():
    assert sparkline([0, 1, 2, 4], 3) == "▃▅█" and sparkline([0.0], 9) == "▁" and sparkline([], 9) == ""
    assert bar(0.5, 4) == "██░░" and bar(2, 2) == "██" and bar(-1, 2) == "░░"
    assert address("here:1/v1/") == "http://here:1"
