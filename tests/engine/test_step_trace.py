"""METALSTEP_TRACE: what is written is a trace that viewers take, it says what ran, and it changes nothing."""
from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import trace_format
from engines import TEXT, directory_of, kinds, load, rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interrupt_at import InterruptAt
from session_driver import Driver, outputs
from workload import alone

from metalstep import Request, SamplingParams, trace
from metalstep.cli.main import main
from metalstep.served_model import ServedModel
from metalstep.session_trace import ServedRequests

COUNT = 12
PARTS = ["schedule", "prepare arrays", "native call", "take results"]


def named(events, name, phase="X"):
    return [event for event in events if event["ph"] == phase and event["name"] == name]


def run_all(model):
    return [rows(stream) for stream in [start(model.engine, None) for start in kinds(model, COUNT)]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What every kind of request gives, untraced, and the engine's counts."""
    with load("llama", tmp_path_factory.mktemp("plain")) as model:
        return run_all(model), model.engine.stats()


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """(model, the trace's file)."""
    path = tmp_path / "trace.json"
    monkeypatch.setenv("METALSTEP_TRACE", str(path))
    with load("llama", tmp_path / "model") as model:
        yield model, path


@pytest.mark.parametrize("launches", [False, True])
def test_a_trace_says_what_ran_and_changes_nothing(plain, tmp_path, monkeypatch, launches):
    path = tmp_path / "trace.json"
    monkeypatch.setenv("METALSTEP_TRACE", str(path))
    monkeypatch.setenv("METALSTEP_TRACE_LAUNCHES", str(int(launches)))
    with load("llama", tmp_path / "model") as model:
        began = trace.now()
        assert run_all(model) == plain[0]
        ended = trace.now()
        stats = model.engine.stats()
        plan = [entry.launch.kernel for entry in model.native.decode_plan.launches]
    assert stats.steps == plain[1].steps
    assert path.read_text().endswith("\n]\n")
    events = trace_format.read(path)
    trace_format.check(events)

    steps = named(events, "step")
    assert [step["args"]["number"] for step in steps] == list(range(1, stats.steps + 1))
    assert began / 1e3 <= steps[0]["ts"] and steps[-1]["ts"] + steps[-1]["dur"] <= ended / 1e3
    for name in PARTS:  # one in each step, and together they are the step
        assert len(named(events, name)) == len(steps)
    for step, *parts in zip(steps, *(named(events, name) for name in PARTS), strict=True):
        assert all(trace_format.inside(part, step) for part in parts)
        assert sum(part["dur"] for part in parts) == pytest.approx(step["dur"], abs=0.01)
    kernels = [event for event in events if "ops" in event.get("args", {})]
    calls = [[e["name"] for e in kernels if trace_format.inside(e, call)] for call in named(events, "native call")]
    timed = [inner for inner in calls if inner]
    if launches:
        singles = sum(step["args"]["decode_steps"] == 1 for step in steps)
        assert len(timed) == singles and plan in timed
    else:
        assert not timed and len(named(events, "wait")) == len(steps)

    requests = named(events, "request", "b")
    assert len(requests) == stats.finished == len(plain[0])
    assert sum(request["args"]["generated_tokens"] for request in requests) == stats.generated_tokens
    assert len(named(events, "first token", "n")) == len(requests)
    for name in ("batch", "KV blocks", "requests", "tok/s"):  # in the end all is quiet
        *_, last = named(events, name, "C")
        assert not any(last["args"].values()), last


def test_what_is_preempted_is_in_the_trace(tmp_path, monkeypatch):
    path = tmp_path / "trace.json"
    monkeypatch.setenv("METALSTEP_TRACE", str(path))
    with load("llama", tmp_path / "model", kv_memory=load_bytes(tmp_path), max_context=64) as model:
        streams = [model.engine.submit(Request(TEXT[i : i + 20], SamplingParams(seed=i), 40)) for i in range(4)]
        for stream in streams:
            rows(stream)
        assert (count := model.engine.stats().preemptions) > 0
    events = trace_format.read(path)
    trace_format.check(events)
    assert len(named(events, "preempted", "n")) == count
    assert sum(request["args"]["preemptions"] for request in named(events, "request", "b")) == count


def load_bytes(tmp_path: Path) -> int:
    """Of a KV cache of six blocks."""
    with load("llama", tmp_path / "size") as model:
        return 6 * 16 * model.native.cache.bytes_per_token


@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(place=st.floats(0, 1))
def test_an_interrupt_leaves_a_trace_that_can_be_read(interrupted, place):
    model, path, expected, count = interrupted
    with contextlib.suppress(KeyboardInterrupt), InterruptAt([1 + int(place * count)]):
        run_all(model)
    assert run_all(model) == expected
    trace_format.check(trace_format.read(path))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALSTEP_TRACE", str(folder / "trace.json"))
        model = load("llama", folder / "model")
    counting = InterruptAt()
    with model:
        expected = run_all(model)
        with counting:
            run_all(model)
        yield model, folder / "trace.json", expected, counting.count


def test_the_steps_that_a_server_schedules_have_the_same_names(tmp_path, monkeypatch):
    path = tmp_path / "trace.json"
    monkeypatch.setenv("METALSTEP_TRACE", str(path))
    model = ServedModel(directory_of("llama", tmp_path / "model"), strict=True)
    with contextlib.closing(model):
        session = model.allocate(64, max_context=128, max_seqs=3)
        served = ServedRequests(trace.current())
        served.changed(new=["a", "b"], preempted=[], finished=[])
        wanted = [Request(TEXT[i : i + 9], SamplingParams(seed=i), COUNT) for i in range(5)]
        got = outputs(Driver(session, 64, Random(3)), wanted)
        served.token("a")
        served.changed(new=[], preempted=["b"], finished=[])
        served.changed(new=[], preempted=[], finished=["a", "b", "unknown"])
    monkeypatch.delenv("METALSTEP_TRACE")
    with load("llama", tmp_path / "model") as model:
        assert got == alone(model.engine, wanted)
    events = trace_format.read(path)
    trace_format.check(events)
    steps = named(events, "step")
    assert len(steps) == len(named(events, "take results")) == len(named(events, "native call", "b")) > 1
    for name in ("prepare arrays", "submit"):
        for part, step in zip(named(events, name), steps, strict=True):
            assert trace_format.inside(part, step)
    assert [request["args"]["id"] for request in named(events, "request", "b")] == ["a", "b"]
    assert len(named(events, "first token", "n")) == len(named(events, "preempted", "n")) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing/trace.json", "No such file or directory"), (".", "Is a directory"), ("pipe", "No such device or address")],
    ids=["no folder", "a folder", "a pipe without a reader"],
)
def test_a_file_that_cannot_be_written_is_refused_before_a_model_is_looked_for(tmp_path, monkeypatch, capsys, name, said):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("METALSTEP_TRACE", str(tmp_path / name))
    assert main(["generate", "--model", "no/such/model.gguf", "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert "error: METALSTEP_TRACE is" in err and said in err and "hint: name a file in a folder that exists" in err


def test_settings_that_say_nothing_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("METALSTEP_TRACE_LAUNCHES", "1")
    with pytest.raises(ValueError, match="METALSTEP_TRACE is not, expected the trace's file; set METALSTEP_TRACE="):
        trace.current()
    monkeypatch.setenv("METALSTEP_TRACE", str(tmp_path / "trace.json"))
    monkeypatch.setenv("METALSTEP_TRACE_LIMIT", "much")
    with pytest.raises(ValueError, match="METALSTEP_TRACE_LIMIT is 'much'"):
        trace.current()


@pytest.mark.parametrize("why", ["limit", "full"])
def test_a_trace_that_cannot_grow_ends_with_one_warning_and_the_generation_goes_on(plain, tmp_path, monkeypatch, why):
    path = tmp_path / "trace.json"
    monkeypatch.setenv("METALSTEP_TRACE", str(path))
    monkeypatch.setenv("METALSTEP_TRACE_LIMIT", "10KB" if why == "limit" else "1GB")
    with load("llama", tmp_path / "model") as model:
        write, room = os.write, 10_000

        def cramped(file, data):
            nonlocal room
            if file != trace.current()._file:
                return write(file, data)
            written = write(file, data[:room])
            room -= written
            return written

        if why == "full":
            monkeypatch.setattr(os, "write", cramped)
        with pytest.warns(RuntimeWarning, match="ends here") as said:
            assert run_all(model) == plain[0]
        assert len(said) == 1
        monkeypatch.undo()
    assert path.stat().st_size <= 10_100
    events = trace_format.read(path)
    assert 5 < len(named(events, "step")) < plain[1].steps


SCRIPT = """
import os, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from engines import load, kinds, rows
from metalstep import trace
model = load("llama", Path({folder!r}) / "model")
rows(kinds(model, 12)[0](model.engine, None))
pid = os.fork()
if pid == 0:
    model.close()
    own = trace.current()
    own.enter()
    own.write([own.span("child", trace.now(), trace.now())])
    os._exit(0)  # without a closing bracket
os.waitpid(pid, 0)
rows(kinds(model, 12)[0](model.engine, None))
print(pid)
os.kill(os.getpid(), 9)
"""


def test_each_process_has_a_file_and_a_killed_one_leaves_it_whole(tmp_path):
    here = Path(__file__).parent
    script = SCRIPT.format(paths=[str(here), str(here.parent / "capture")], folder=str(tmp_path))
    environment = {**os.environ, "METALSTEP_TRACE": str(tmp_path / "trace.json")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    child = int(run.stdout)
    for path, name, count in ((tmp_path / "trace.json", "decode", 2), (tmp_path / f"trace.{child}.json", "child", 1)):
        events = trace_format.read(path)
        trace_format.check(events)
        assert len({event["pid"] for event in events}) == 1 and (events[0]["pid"] == child) is (name == "child")
        assert len(named(events, name, "X" if name == "child" else "b")) == count


def test_checks_find_mistakes():
    """Of the checker itself: what a viewer would show wrongly."""
    head = {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {}}
    thread = {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {}}
    span = {"ph": "X", "name": "a", "pid": 1, "tid": 2, "ts": 1.0, "dur": 5.0}
    part = {"ph": "b", "name": "a", "pid": 1, "ts": 1.0, "cat": "c", "id": "1"}
    trace_format.check([head, thread, span, {**span, "ts": 2.0, "dur": 4.0}, part, {**part, "ph": "e", "ts": 2.0}])
    for wrong in ([span, {**span, "ts": 3.0}], [part], [{**part, "ph": "e"}], [{**span, "tid": 9}], [{**span, "dur": -1}]):
        with pytest.raises(AssertionError):
            trace_format.check([head, thread, *wrong])
    assert np.isfinite(trace_format.SLACK)
