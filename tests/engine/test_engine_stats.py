"""Engine.stats: counts that add up whatever happens, speeds over a window, and a watcher that changes nothing."""
from __future__ import annotations

import contextlib
import gc
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from engines import TEXT, kinds, load, rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interrupt_at import InterruptAt

from metalstep import EngineStats, Request, SamplingParams
from metalstep.engine_stats import SLOT, WINDOW, Ends, StepMeter, StepTimes

COUNT = 12
SECOND = 1_000_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load("mistral_windows", tmp_path_factory.mktemp("model")) as loaded:
        yield loaded


def run_all(model):
    return [rows(stream) for stream in [start(model.engine, None) for start in kinds(model, COUNT)]]


def ended(stats: EngineStats) -> int:
    return stats.finished + stats.cancelled + stats.failed


def test_counts_and_sizes_are_those_of_what_ran(model):
    engine = model.engine
    before = engine.stats()
    streams = [engine.submit(Request(TEXT[i : i + 20], SamplingParams(seed=i), 6)) for i in range(3)]
    cancelled = engine.submit(Request(TEXT[:9], max_tokens=50))
    next(streams[0])
    during = engine.stats()
    assert (during.running, during.batch) == (4, 4) and during.rows == during.prompt_tokens - before.prompt_tokens == 69
    assert [group.total_blocks for group in during.kv] == model.native.num_blocks
    assert during.kv[0].used_blocks == during.total_blocks - during.free_blocks > 0
    assert during.kv_total_bytes == model.native.cache.nbytes
    assert 0 < during.kv_used_bytes <= during.kv_peak_bytes <= during.kv_total_bytes
    cancelled.close()
    for stream in streams:
        rows(stream)
    after = engine.stats()
    assert (after.finished - before.finished, after.cancelled - before.cancelled, after.failed) == (3, 1, before.failed)
    assert after.kv_used_bytes == 0 < after.kv_peak_bytes
    again = engine.submit(Request(TEXT[:20], max_tokens=1))
    rows(again)
    found = engine.stats()
    assert found.cached_tokens - after.cached_tokens == again.cached_tokens == 16
    assert found.prefix_hit_rate == found.cached_tokens / (found.cached_tokens + found.prompt_tokens)
    assert 0 < found.last_device_ms <= found.last_step_ms and 0 < found.device_ms <= found.step_ms < 1e3 * found.uptime_s
    assert found.decode_tok_s > 0 and found.prompt_tok_s > 0


@pytest.mark.parametrize("length", [1, 16, 17, 18])
def test_a_prompt_counts_in_full_where_one_row_of_it_is_left(model, length):
    """Which a step takes for a decode: what is behind cached blocks, and behind the last whole chunk."""
    engine = model.engine
    for rows_at_once in (None, 16, None):
        before = engine.stats()
        rows(engine.submit(Request(TEXT[90 : 90 + length], max_tokens=2, prefill_rows=rows_at_once)))
        after = engine.stats()
        found = after.cached_tokens - before.cached_tokens
        assert after.prompt_tokens - before.prompt_tokens + found == length
        assert after.generated_tokens - before.generated_tokens == 2


def test_failures_are_counted(model, monkeypatch):
    engine = model.engine
    before = engine.stats()
    monkeypatch.setattr(engine._scheduler, "advance", lambda schedule: 1 / 0)
    streams = [engine.submit(Request(TEXT[:5], max_tokens=9)) for _ in range(2)]
    with pytest.raises(ZeroDivisionError):
        rows(streams[0])
    monkeypatch.undo()
    assert engine.stats().failed == before.failed + 2


def test_as_json_it_has_every_field_and_two_that_differ_in_times_are_equal(model):
    stats = model.engine.stats()
    found = json.loads(json.dumps(stats.as_dict()))
    assert set(found) >= set(EngineStats.__dataclass_fields__) | {"prefix_hit_rate", "kv_used_bytes", "kv_total_bytes"}
    assert found["kv"][1]["window"] and found["kv"][0]["total_blocks"] == stats.total_blocks
    assert replace(stats, uptime_s=9.0, decode_tok_s=1.0) == stats != replace(stats, finished=-1)


def test_a_watcher_changes_neither_tokens_nor_steps(model):
    """And what it sees only grows."""
    engine = model.engine
    expected, steps = run_all(model), engine.stats().steps
    expected, steps = run_all(model), engine.stats().steps - steps  # with every prefix in the cache
    before, seen, done = engine.stats(), [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(engine.stats(wait=False))
            time.sleep(0.0005)

    watcher, rounds = threading.Thread(target=watch), 0
    watcher.start()
    try:
        while rounds < 500 and not any(stats.running for stats in list(seen)):
            assert run_all(model) == expected
            rounds += 1
    finally:
        done.set()
        watcher.join()
    assert engine.stats().steps - before.steps == rounds * steps
    assert any(stats.running for stats in seen)
    for name in ("steps", "prompt_tokens", "generated_tokens", "preemptions", "finished", "uptime_s"):
        values = [getattr(stats, name) for stats in seen]
        assert values == sorted(values), name


def test_a_look_does_not_wait_for_the_step_in_progress(model, monkeypatch):
    """stats() does."""
    engine, run = model.engine, model.engine._runner.run
    looks = []

    def looking(schedule, *more):
        thread = threading.Thread(target=lambda: looks.append(engine.stats(wait=False)))
        thread.start()
        thread.join(5)
        return run(schedule, *more)

    monkeypatch.setattr(engine._runner, "run", looking)
    rows(engine.submit(Request(TEXT[:5], max_tokens=3)))
    assert [stats.running for stats in looks] == [1, 1, 1]


@pytest.fixture(scope="module")
def bytecodes(model):
    """Of requests of every kind, submitted together."""
    with InterruptAt() as counting:
        run_all(model)
    return counting.count


@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(points=st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_every_request_counts_once_whatever_an_interrupt_hits(model, bytecodes, points):
    engine, starts = model.engine, kinds(model, COUNT)
    before, streams = engine.stats(), []
    with contextlib.suppress(KeyboardInterrupt), InterruptAt([1 + int(point * bytecodes) for point in points]):
        for start in starts:
            streams.append(start(engine, None))
        for stream in streams:
            rows(stream)
    submitted = len(streams)
    for stream in streams:
        stream.close()
    stream = None
    del streams
    gc.collect()  # of a stream that an interrupt lost
    after = engine.stats()
    assert after.running == after.waiting == 0
    assert submitted <= ended(after) - ended(before) <= submitted + 1  # the last one may have been cut off
    more = run_all(model)
    assert ended(engine.stats()) == ended(after) + len(more)


@given(ends=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["finished", "failed", "cancelled"]), st.booleans()), max_size=40))
def test_an_end_counts_once(ends):
    """Against a dict that remembers all. A number comes again only until `settle`."""
    counted, model, settled = Ends(), {}, set()
    for number, how, settle in ends:
        if number not in settled:
            counted.add(number, how)
            model.setdefault(number, how)
        if settle:
            counted.settle()
            settled |= set(model)
        assert counted.counts() == {name: list(model.values()).count(name) for name in ("finished", "cancelled", "failed")}


STEPS = st.lists(st.tuples(st.integers(1, 3 * SECOND), st.integers(1, SECOND), st.integers(0, 512)), min_size=1, max_size=60)


@given(steps=STEPS, later=st.integers(0, 12 * SECOND))
def test_speeds_are_those_of_the_window(steps, later):
    """Against a list of all steps: tokens of the window, give or take its oldest slot, over the time since the first of them began."""
    meter, now, prompt, log = StepMeter(1), 0, 0, []
    for pause, length, more in steps:
        began, now, prompt = now + pause, now + pause + length, prompt + more
        meter.step(StepTimes(began, began, began + length // 4, began + length // 4, now, now), 1, 1, prompt, 0)
        log.append((began, now, more))
    ended = now
    now += later
    speeds = meter.speeds(now)
    low, high = (sum(step[2] for step in log if now - step[1] <= (WINDOW + edge) * SECOND) for edge in (-SLOT, SLOT))
    inside = [step for step in log if now - step[1] <= (WINDOW - SLOT) * SECOND]
    longest = WINDOW if not inside else min(WINDOW, (now - inside[0][0]) / SECOND)
    assert low / WINDOW <= speeds.prompt_tok_s * (1 + 1e-9)
    assert speeds.prompt_tok_s <= high / max(longest, 1e-9) * (1 + 1e-9)
    if now - ended > (WINDOW + SLOT) * SECOND:
        assert speeds[:2] == (0.0, 0.0) and speeds.step_ms == (log[-1][1] - log[-1][0]) / 1e6
    assert speeds.device_ms <= speeds.step_ms


def test_a_steady_run_has_its_speed():
    meter = StepMeter(1)
    for step in range(2000):  # 100 steps of 10 ms a second, for 20 s, of 4 tokens each
        began = step * SECOND // 100
        meter.step(StepTimes(began, began, began, began, began + SECOND // 200, began + SECOND // 100), 4, 4, 0, 4 * (step + 1))
        if step > 10:
            assert meter.speeds(began + SECOND // 100).decode_tok_s == pytest.approx(400, rel=0.06)
    assert meter.speeds(20 * SECOND).step_ms == pytest.approx(10) and meter.speeds(20 * SECOND).device_ms == pytest.approx(5)
    assert meter.speeds(23 * SECOND).decode_tok_s == pytest.approx(160, rel=0.2)  # of the last 5 s, 2 were busy
    assert np.isclose(meter.speeds(40 * SECOND).decode_tok_s, 0)
