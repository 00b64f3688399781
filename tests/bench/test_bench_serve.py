"""`metalstep bench serve`: its client against a small server of events, what it makes of times, its servers and its peers' weights."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mlx.core as mx
import numpy as np
import pytest

from metalstep.bench import serve
from metalstep.bench.json_process import JsonProcess, PeerError
from metalstep.bench.process_tree import Usage, cpu_seconds, totals, tree, usage
from metalstep.bench.rounds import Case, Contender
from metalstep.bench.serve import (
    GENERATE,
    SERVER,
    VLLM,
    Clocks,
    Plan,
    cached_token_bytes,
    case_row,
    percentile,
    ratios,
    step_seconds,
)
from metalstep.bench.serve_client import ClientError, dechunked, timeline
from metalstep.bench.serve_process import ServerProcess, last_error
from metalstep.bench.vllm_checkpoint import bfloat16_directory, dequantised
from metalstep.cli.bench_serve import describe, split_flags
from metalstep.cli.main import main as command


class Events(BaseHTTPRequestHandler):
    """Streams as many pieces as `max_tokens` says, `pause` seconds apart; refuses a model named "other"."""

    protocol_version = "HTTP/1.1"
    pause = 0.02

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] == "other":
            content = b'{"error": {"message": "The model does not exist."}}'
            self.send_response(404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = "messages" in body
        if chat:
            self.event({"choices": [{"delta": {"role": "assistant"}}]})
        for i in range(body["max_tokens"]):
            time.sleep(self.pause)
            self.event({"choices": [{"delta": {"content": "x"}} if chat else {"text": "x"}], "number": i})
        if body["model"] == "cut":
            return
        if body["model"] == "failing":
            self.event({"error": {"message": "the engine has ended"}})
        self.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data):
        text = b"data: " + json.dumps(data).encode() + b"\n\n"
        self.chunk(text[:7])  # an event may come in two pieces
        self.chunk(text[7:])

    def chunk(self, data):
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@contextmanager
def events():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Events)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def client():
    process = JsonProcess("client", [sys.executable, str(serve.CLIENT)], {**os.environ, "PYTHONSAFEPATH": "1"})
    try:
        yield process
    finally:
        process.close()


@pytest.mark.parametrize("asked", [{"prompt": [1, 2]}, {"messages": []}], ids=["completions", "chat"])
def test_the_client_times_every_piece_of_every_stream(asked, monkeypatch):
    monkeypatch.setattr(Events, "pause", 0.2)  # a client without a processor for less than that sees every piece alone
    with events() as port, client() as process:
        bodies = [{**asked, "model": "m", "max_tokens": tokens} for tokens in (3, 6)]
        answer = process.ask({"port": port, "path": "/v1", "bodies": bodies})
    short, long = answer["streams"]
    assert [short["tokens"], long["tokens"]] == [3, 6]
    assert [len(short["gaps_s"]), len(long["gaps_s"])] == [2, 5]
    for stream in answer["streams"]:
        assert stream["first_s"] >= Events.pause
        assert all(gap > 0.25 * Events.pause for gap in stream["gaps_s"])
        assert stream["last_s"] == pytest.approx(stream["first_s"] + sum(stream["gaps_s"]))
    assert answer["seconds"] == long["last_s"] > short["last_s"]  # together, not one after the other
    assert answer["seconds"] < short["last_s"] + long["last_s"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("other", "HTTP/1.1 404 Not Found: .*The model does not exist"),
        ("failing", "ended a stream with .*the engine has ended"),
        ("cut", "ended early, after 2 pieces"),
    ],
)
def test_the_client_says_what_the_server_did_wrong_and_goes_on(model, message):
    with events() as port, client() as process:
        with pytest.raises(PeerError, match=message):
            process.ask({"port": port, "path": "/v1", "bodies": [{"prompt": [1], "model": model, "max_tokens": 2}]})
        assert process.ask({"port": port, "path": "/v1", "bodies": [{"prompt": [1], "model": "m", "max_tokens": 1}]})
    with client() as process, pytest.raises(PeerError, match="ConnectionRefused"):
        process.ask({"port": port, "path": "/v1", "bodies": [{"prompt": [1], "model": "m", "max_tokens": 1}]})


def answer(*chunks):
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    return [(0.0, head), *((float(i), b"%x\r\n%s\r\n" % (len(c), c)) for i, c in enumerate(chunks, start=1)), (9.0, b"0\r\n\r\n")]


def test_events_in_one_chunk_came_together_and_an_event_is_there_with_its_last_byte():
    piece = b'data: {"choices": [{"text": ""}]}\n\n'
    end = b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\ndata: [DONE]\n\n'
    found = timeline(answer(piece + piece, b": ping\n\n" + piece[:9], piece[9:], piece, end), started=0.5)
    assert found == {"first_s": 0.5, "last_s": 3.5, "gaps_s": [0.0, 2.0, 1.0], "tokens": 4}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_chunks_may_be_received_in_any_pieces(cut):
    whole = b"".join(data for _, data in answer(b"data: 1\n\n", b"data: 2\n\n"))
    arrivals, body = dechunked([(0.0, whole[:cut]), (1.0, whole[cut:])])
    assert body == b"data: 1\n\ndata: 2\n\n"
    assert arrivals[-1] == (len(body), 1.0)
    assert arrivals[0][0] <= cut


def test_an_answer_that_is_not_streamed_is_refused():
    with pytest.raises(ClientError, match="not streamed in chunks"):
        dechunked([(0.0, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")])
    with pytest.raises(ClientError, match="the server answered nothing"):
        dechunked([])


QUIET = {"idle_cpu": 0.0, "elsewhere_cpu": 0.01}
CASE = Case(2, 16, 10)  # 11 tokens of each of two streams


def http_run(seconds, step, *, first=0.5):
    stream = {"first_s": first, "last_s": first + 10 * step, "gaps_s": [step] * 10, "tokens": 11}
    return {"seconds": seconds, "tokens": 22, "streams": [stream, stream], **QUIET}


def generate_run(seconds, prompt_s):
    return {"seconds": seconds, "tokens": 22, "prompt_s": prompt_s, **QUIET}


def test_rates_include_the_prompts_and_steps_do_not():
    assert step_seconds(CASE, http_run(2.0, 0.125)) == pytest.approx(0.125)
    assert step_seconds(CASE, generate_run(2.0, 1.0)) == pytest.approx(0.1)
    runs = {
        (CASE, Contender(SERVER)): [http_run(2.0, 0.125), http_run(4.0, 0.25), http_run(2.0, 0.125)],
        (CASE, Contender(GENERATE)): [generate_run(1.0, 0.5), generate_run(2.0, 0.75), generate_run(2.0, 1.0)],
    }
    row = case_row(CASE, Contender(SERVER), runs[CASE, Contender(SERVER)])
    assert row["tok_s"]["samples"] == [11.0, 5.5, 11.0]
    assert row["itl_ms"]["median"] == pytest.approx(125)
    assert row["ttft_ms"]["median"] == pytest.approx(500)
    assert row["gap_ms"]["p95"] == pytest.approx(250)
    assert row["pieces_per_token"] == 1.0
    assert case_row(CASE, Contender(GENERATE), runs[CASE, Contender(GENERATE)])["ttft_ms"]["median"] == pytest.approx(750)
    found = ratios(CASE, Contender(GENERATE), runs)
    assert found["tok_s"] == {"of_medians": pytest.approx(1.0), "median_of_pairs": pytest.approx(0.5)}
    assert found["itl"]["of_medians"] == pytest.approx(1.25)


def test_a_percentile_is_one_of_the_values():
    values = [float(i) for i in range(100)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.95, 1.0)] == [0, 50, 95, 99]
    assert percentile([], 0.5) == 0.0


def made_up_result():
    case = Case(8, 16, 10)
    runs = {
        (case, Contender(SERVER)): [{**http_run(2.0, 0.1), "tokens": 88}],
        (case, Contender(GENERATE)): [{**generate_run(1.0, 0.1), "tokens": 88}],
        (case, Contender(VLLM)): [{**http_run(4.0, 0.3), "tokens": 88, "idle_cpu": 0.5, "elsewhere_cpu": 1.25}],
    }
    memory = totals([Usage(1, "a", 3 << 20, 1 << 20, 2 << 20, 0.0)])
    server = {"ready_s": {"samples": [9.0, 8.0]}, "memory_ready": memory, "memory_end": memory, "processes": [], "idle_cpu": 0.001}
    return {
        "contenders": {SERVER: "vLLM 0", GENERATE: "metalstep 0"},
        "not_timed": serve.NOT_TIMED,
        "servers": [{"name": SERVER, **server}],
        "cases": [case_row(case, contender, found) for (case, contender), found in runs.items()],
        "ratios": [ratios(case, against, runs) for _, against in list(runs)[1:]],
    }


def test_the_summary_says_which_bars_are_met_and_who_disturbed():
    text = "\n".join(describe(made_up_result()))
    assert "ready in 9.0, 8.0 s; idle CPU 0.1% of a core" in text
    assert "2 MiB (1 private; 3 resident)" in text
    assert "metalstep serve / batch_generate, 8 streams: 0.50× tok/s" in text
    assert "tok/s at least 0.80×: no" in text
    assert "metalstep serve / vllm serve, 8 streams: 2.00× tok/s" in text
    assert "tok/s at least 1.50×: yes" in text
    assert "warning: a process that should have idled took 50% of a core" in text
    assert "warning: other programs took 0.0 cores in the median run and up to 1.2" in text


def test_what_runs_elsewhere_is_what_the_machine_gave_to_others():
    before = Clocks(wall=10.0, idle=1.0, own=5.0, machine=100.0)
    assert Clocks(12.0, 1.5, 7.0, 103.0).since(before) == {"idle_cpu": 0.25, "elsewhere_cpu": 0.5}
    assert Clocks(12.0, 1.0, 7.0, 101.9).since(before) == {"idle_cpu": 0.0, "elsewhere_cpu": 0.0}  # clocks tick in hundredths
    assert Clocks(12.0, 1.0, 7.0, None).since(before)["elsewhere_cpu"] is None
    now = Clocks.now([os.getpid()])
    assert now.idle == pytest.approx(now.own, abs=0.5)


def test_flags_of_the_server_stand_behind_two_dashes():
    assert split_flags(["smollm2", "--pairs", "2", "--", "--max-model-len", "512", "--"]) == (
        ["smollm2", "--pairs", "2"],
        ["--max-model-len", "512", "--"],
    )
    assert split_flags(["smollm2"]) == (["smollm2"], [])


@pytest.mark.parametrize("flags", [("--additional-config", '{"threads": 1, "strict": true}'), ('--additional-config={"threads": 1}',)])
def test_batch_generate_computes_as_the_server_does(flags):
    assert Plan("m", flags=("--port", "1", *flags)).load_options == {"threads": 1}
    assert Plan("m").load_options == {}
    with pytest.raises(ValueError, match=r"--additional-config is '\{', expected a JSON object"):
        _ = Plan("m", flags=("--additional-config", "{")).load_options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--against", "llama.cpp"], "--against: no peer 'llama.cpp', expected vllm"),
        (["--tokens", "1"], "--tokens is 1, expected 2 or more"),
        (["--streams", "1,65"], "at most 64 sequences at once, not 65"),
        (["--max-model-len", "5"], "unrecognized arguments: --max-model-len"),
    ],
)
def test_wrong_calls_are_refused_before_anything_starts(capsys, argv, message):
    assert command(["bench", "serve", *argv]) == 2
    assert message in capsys.readouterr().err


def script(folder, text):
    """A program that takes --host and --port."""
    path = folder / "server.py"
    path.write_text(textwrap.dedent(text))
    return [sys.executable, str(path)]


FAKE_SERVER = """
    import http.server, subprocess, sys, time
    time.sleep(0.1)
    subprocess.Popen(["sleep", "60"])
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "tiny"}], "version": "1.2"}')
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_server_is_ready_when_it_answers_and_nothing_of_it_outlives_its_close(tmp_path):
    with ServerProcess("fake", script(tmp_path, FAKE_SERVER), tmp_path / "log") as server:
        server.wait_ready(timeout=20)
        assert 0.1 < server.ready_s < 20
        assert (server.model_name(), server.version()) == ("tiny", "1.2")
        found = server.usage()
        assert [process.pid for process in found] == tree(server.pid)
        assert len(found) == 2 and found[1].name.startswith("sleep")
        assert totals(found)["rss_mib"] > totals(found[1:])["rss_mib"] > 0
        assert server.idle_cpu(0.1) < 0.5
    assert server.status is not None
    assert not any(usage(process.pid) for process in found)


def test_a_server_that_ends_is_told_by_its_own_error(tmp_path):
    text = "import sys; print('ValueError: no such model', file=sys.stderr); print('bye'); sys.exit(3)"
    error = "fake ended with status 3 before it was ready: ValueError: no such model"
    with ServerProcess("fake", script(tmp_path, text), tmp_path / "log") as server, pytest.raises(PeerError, match=error):
        server.wait_ready(timeout=20)


def test_a_server_that_never_answers_is_given_up(tmp_path):
    command, error = script(tmp_path, "import time; time.sleep(60)"), "not ready within 0 s: it printed nothing"
    with ServerProcess("fake", command, tmp_path / "log") as server, pytest.raises(PeerError, match=error):
        server.wait_ready(timeout=0.2)


def test_the_cause_is_preferred_to_an_error_that_refers_to_it(tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO x\nValueError: too long\nRuntimeError: Engine failed. See root cause above.\n")
    assert last_error(log) == "ValueError: too long"


def test_processor_time_is_of_all_descendants():
    code = "import time\nwhile time.process_time() < 0.35: pass\nprint(1, flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        parent.stdout.readline()
        assert cpu_seconds(parent.pid) >= 0.3
        assert len(tree(parent.pid)) == 2
    finally:
        os.killpg(parent.pid, 9)
        parent.wait()
        parent.stdout.close()
    assert usage(parent.pid) == []


def test_packed_weights_become_plain_ones_and_the_rest_stays():
    weight = mx.random.normal((4, 64), dtype=mx.float32)
    packed, scales, biases = mx.quantize(weight, group_size=32, bits=8)
    arrays = {"a.weight": packed, "a.scales": scales, "a.biases": biases, "a.bias": mx.ones(4), "norm.weight": mx.zeros(3)}
    config = {"quantization": {"group_size": 64, "bits": 4, "a": {"group_size": 32, "bits": 8}}}
    found = dequantised(arrays, config)
    assert set(found) == {"a.weight", "a.bias", "norm.weight"}
    np.testing.assert_allclose(np.array(found["a.weight"]), np.array(weight), atol=0.03)
    with pytest.raises(ValueError, match="a has scales, but the config does not say how it is quantised"):
        dequantised(arrays, {})


class Model:
    """What `bfloat16_directory` reads of a checkpoint."""

    def __init__(self, path, config):
        self.path, self.config, self.file_bytes, self.built = path, config, 5, 0
        self._tokenizer = self

    def build(self):
        self.built += 1

    def arrays(self, dtype):
        return {"norm.weight": mx.ones(3, dtype)}

    def tokenizer(self, _):
        return self

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_vllms_weights_are_written_once(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("x")
    model = Model(path, {"architectures": ["A"], "quantization": {"bits": 4}, "torch_dtype": "float16"})
    folder = bfloat16_directory(model, tmp_path / "cache")
    assert json.loads((folder / "config.json").read_text()) == {"architectures": ["A"], "torch_dtype": "bfloat16"}
    assert mx.load(str(folder / "model.safetensors"))["norm.weight"].dtype == mx.bfloat16
    assert bfloat16_directory(model, tmp_path / "cache") == folder
    assert model.built == 1
    (folder / "complete").unlink()  # as if it had been interrupted
    assert bfloat16_directory(model, tmp_path / "cache") == folder
    assert model.built == 2
    with pytest.raises(PeerError, match="names no architectures"):
        bfloat16_directory(Model(path, {}), tmp_path / "cache")


def test_a_cached_token_has_keys_and_values_of_16_bits_in_every_layer():
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    assert cached_token_bytes(config) == 23_040
