"""One engine for many threads: everybody gets what they get alone, whatever the others do, and nothing is left behind."""
from __future__ import annotations

import gc
import itertools
import sys
import threading
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from engines import TEXT, check, kinds, load, pick, row, rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interrupt_at import drop_interrupted
from workload import SAMPLINGS, watched
from workload import requests as made

import metalstep
from metalstep import Request, SamplingParams, generate, stream_generate
from metalstep.models.cache import make_prompt_cache
from metalstep.plan.plan import Plan
from metalstep.running_request import KEPT_LOGITS

FEW = settings(max_examples=15, phases=(Phase.explicit, Phase.generate))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def model(directory):
    with load("llama", directory) as model:
        yield model


@pytest.fixture
def fresh(directory):
    """A model for a test that breaks it."""
    with metalstep.load(directory, strict=True)[0] as model:
        yield model


def in_threads(functions):
    """Run each in a thread of its own, all at once; what they returned, or raised."""
    results, barrier = [None] * len(functions), threading.Barrier(len(functions))

    def work(i):
        barrier.wait()
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ---- many threads ----------------------------------------------------------------------------------------------------------


def test_threads_with_different_parameters_share_batches_and_get_their_own_answers(model, directory):
    tokenizer = metalstep.load(directory, device="eager")[1]
    tokenizer.eos_token_ids = {0}

    def text(i):
        return generate(model, tokenizer, TEXT[i : i + 9], max_tokens=30, seed=i, **SAMPLINGS[i % len(SAMPLINGS)])

    def responses(i):
        options = dict(max_tokens=30, seed=i, **SAMPLINGS[i % len(SAMPLINGS)])
        got = [(r.token, r.logprob, np.array(r.logprobs).tobytes()) for r in stream_generate(model, tokenizer, TEXT[i : i + 20], **options)]
        return got

    submitted = [
        replace(request, decode_steps=1 + i % 3, max_tokens=30, stop_token_ids=frozenset())
        for i, request in enumerate(made(8, model.native.vocab_size, seed=4))
    ]
    functions = [lambda i=i: text(i) for i in range(6)] + [lambda i=i: responses(i) for i in range(6)]
    functions += [lambda request=request: rows(model.engine.submit(request)) for request in submitted]
    functions += [lambda start=start: rows(start(model.engine, None)) for start in kinds(model, 30)]
    alone = [function() for function in functions]
    with watched(model.engine) as calls:
        together = in_threads(functions)
    assert together == alone
    assert max(count for count, _ in calls) >= 8
    check(model)


@FEW
@given(data=st.data())
def test_requests_that_end_early_leave_the_others_alone(model, data):
    """Closed, cancelled, dropped or left open for a while, after any number of tokens."""
    engine, starts = model.engine, kinds(model, 12)
    expected = [rows(start(engine, None)) for start in starts]
    streams = [start(engine, None) for start in starts]
    got = [[] for _ in starts]
    open_ones = set(range(len(starts)))
    for _ in range(data.draw(st.integers(0, 40))):
        i = data.draw(st.sampled_from(sorted(open_ones)))
        what = data.draw(st.sampled_from(["next"] * 4 + ["close", "cancel", "drop"]))
        if what == "next":
            got[i] += [row(output) for output in itertools.islice(streams[i], 1)]
            continue
        if what == "close":
            streams[i].close()
            assert rows(streams[i]) == []
        elif what == "cancel":
            engine.cancel(streams[i])
            got[i] += rows(streams[i])
        streams[i] = None
        open_ones.remove(i)
        if not open_ones:
            break
    for i in open_ones:
        got[i] += rows(streams[i])
        assert got[i] == expected[i]
    for tokens, wanted in zip(got, expected, strict=True):
        assert tokens == wanted[: len(tokens)]
    streams = None
    check(model)


def test_who_keeps_a_response_does_not_keep_its_request_from_ending(model, directory, monkeypatch):
    """An interrupt in a generator's clean-up is printed and forgotten; then its stream ends when nobody has it."""
    monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)  # pytest's keeps the exception, whose frames have the stream
    tokenizer = metalstep.load(directory, device="eager")[1]
    generator = stream_generate(model, tokenizer, TEXT[50:70], max_tokens=20)
    kept, dropped = next(generator), [generator]
    del generator
    drop_interrupted(dropped)
    check(model)
    assert kept.cached_tokens == 0 and kept.prompt_logprobs is None


def test_a_generator_that_is_dropped_gives_its_blocks_back(model, directory):
    tokenizer = metalstep.load(directory, device="eager")[1]
    generators = [stream_generate(model, tokenizer, TEXT[:20], max_tokens=100) for _ in range(5)]
    for generator in generators[:4]:
        next(generator)
    assert model.engine.stats().running == 5
    del generator, generators
    check(model)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("kind", ["picked", "kept", "several"])
def test_the_latest_step_keeps_nothing_of_a_request_that_is_gone(model, kind, count):
    """Neither the request, nor the prompt cache that it had: its blocks are free though no other step follows."""
    fields = {"picked": {"hand_out_logits": True}, "kept": {"keep_logits": True}, "several": {"decode_steps": 4}}[kind]
    request = Request(TEXT[:20], max_tokens=20, prompt_cache=make_prompt_cache(model), **fields)
    stream = model.engine.submit(request, pick if kind == "picked" else None)
    for _ in range(count):
        next(stream)
    running = weakref.ref(stream.running.request)
    stream.close()
    assert model.engine.stats().free_blocks < model.engine.stats().total_blocks
    del stream, request
    check(model)
    assert running() is None


def test_garbage_that_is_collected_in_a_step_is_taken_in_after_it(model, monkeypatch):
    """Streams and prompt caches in reference cycles go when the collector runs, which may be in the middle of anything."""
    engine, starts = model.engine, kinds(model, 12)
    expected = [rows(start(engine, None)) for start in starts]
    run = engine._runner.run

    def litter():
        for start in starts:
            cycle = [start(engine, None)]
            cycle.append(cycle)
            next(cycle[0])

    def run_and_collect(schedule, *more):
        gc.collect()
        ended = run(schedule, *more)
        gc.collect()
        return ended

    for _ in range(3):
        gc.disable()
        gc.freeze()  # what was there before is not looked at in every step
        try:
            litter()
            monkeypatch.setattr(engine._runner, "run", run_and_collect)
            assert [rows(start(engine, None)) for start in starts] == expected
        finally:
            monkeypatch.undo()
            gc.unfreeze()
            gc.enable()
    check(model)


def test_of_two_threads_with_one_prompt_cache_one_is_refused(model):
    request = Request(TEXT[:9], max_tokens=8)
    for _ in range(10):
        cache = make_prompt_cache(model)
        submitted = in_threads([partial(model.engine.submit, replace(request, prompt_cache=cache))] * 4)
        refused = [result for result in submitted if isinstance(result, ValueError)]
        assert len(refused) == 3 and all("in use" in str(error) for error in refused)
        for result in submitted:
            if result not in refused:
                result.close()
        assert len(rows(model.engine.submit(replace(request, prompt_cache=cache)))) == 8


# ---- callers that are slow, or hold each other up ------------------------------------------------------------------------------


def test_a_slow_consumer_of_logits_holds_few_of_them_and_nobody_up(model):
    engine, starts = model.engine, kinds(model, 30)
    expected = [rows(start(engine, None)) for start in starts]
    slow = [engine.submit(Request(TEXT[i : i + 5], SamplingParams(seed=1), 30, keep_logits=True)) for i in range(4)]
    assert [rows(start(engine, None)) for start in starts] == expected
    for stream in slow:
        waiting = [output for output in stream.running.outputs if output is not None]
        assert len(waiting) == KEPT_LOGITS
    for i, stream in enumerate(slow):
        outputs = list(stream)
        assert len(outputs) == 30
        for output, place in zip(outputs, range(5, 35), strict=True):
            ids = TEXT[i : i + 5] + [o.token for o in outputs[: place - 5]]
            if place in (5, 6, 20, 34):
                np.testing.assert_array_equal(output.logits.numpy(), engine.logits(ids)[-1])
    check(model)


def test_polling_lets_a_request_go_on_that_was_held_back(model):
    stream = model.engine.submit(Request(TEXT[:5], SamplingParams(), 9, keep_logits=True))
    tokens = []
    while not stream.finished:
        if (output := stream.poll()) is None:
            model.engine.wait([stream])
        else:
            tokens.append(output.token)
    assert tokens == [r[0] for r in rows(model.engine.submit(Request(TEXT[:5], SamplingParams(), 9)))]


def test_callers_may_wait_for_each_other_while_they_pick(model):
    """Each of four threads picks only when all four have logits: the step must go on for those that have none yet."""
    barrier = threading.Barrier(4, timeout=60)

    def slowly(tokens, logits):
        barrier.wait()
        return pick(tokens, logits)

    requests = [Request(TEXT[i : 3 * i + 4], max_tokens=6, hand_out_logits=True) for i in range(4)]
    alone = [rows(model.engine.submit(request, pick)) for request in requests]
    assert in_threads([lambda r=request: rows(model.engine.submit(r, slowly)) for request in requests]) == alone
    check(model)


def test_waiting_for_a_stream_that_another_thread_picks_for_returns(model):
    """Nothing can run until the other thread has picked; the wait ends all the same, and sees the token when it is there."""
    picking, go_on = threading.Event(), threading.Event()

    def slowly(tokens, logits):
        picking.set()
        assert go_on.wait(60)
        return pick(tokens, logits)

    stream = model.engine.submit(Request(TEXT[:4], max_tokens=2, hand_out_logits=True), slowly)
    result = []
    thread = threading.Thread(target=lambda: result.extend(rows(stream)))
    thread.start()
    assert picking.wait(60)
    other = model.engine.submit(Request(TEXT[:4], max_tokens=5))
    assert len(rows(other)) == 5
    parked = model.engine.submit(Request(TEXT[4:8], max_tokens=1, hand_out_logits=True), pick)
    while not parked.running.has_news:
        model.engine.wait([parked])
    model.engine.wait([])
    go_on.set()
    thread.join()
    assert len(result) == 2 and len(rows(parked)) == 1
    check(model)


def test_what_asks_between_steps_waits_for_the_step_in_progress_only(model, monkeypatch):
    """A thread that generates without a pause does not keep others from their turn."""
    engine, done, asked = model.engine, threading.Event(), []

    class Visitors(dict):
        def __setitem__(self, thread, value):
            super().__setitem__(thread, value)
            asked.append(engine._runner.steps)

    monkeypatch.setattr(engine._turn, "_visitors", Visitors())
    stream = engine.submit(Request(TEXT[:5], max_tokens=245))

    def ask():
        waits = []
        while not done.is_set():
            waits.append(engine.stats().steps - asked[-1])
        return waits

    def consume():
        list(stream)
        done.set()

    _, waits = in_threads([consume, ask])
    assert max(waits) <= 1


# ---- the end ----------------------------------------------------------------------------------------------------------------


def test_closing_ends_every_request_in_every_thread(fresh):
    engine = fresh.engine
    started = threading.Barrier(len(kinds(fresh, 200)) + 1)

    def generating(start):
        stream = start(engine, None)
        next(stream)
        started.wait()
        return rows(stream)

    def closing():
        started.wait()
        fresh.close()

    *results, _ = in_threads([*(lambda s=start: generating(s) for start in kinds(fresh, 200)), closing])
    ended = [result for result in results if isinstance(result, ValueError)]
    assert all("the model is closed; load it again" in str(error) for error in ended)
    assert len(ended) >= 4  # a choice and a short cache may have come to their ends
    assert not [result for result in results if isinstance(result, Exception) and result not in ended]
    fresh.close()
    for enter in (lambda: engine.submit(Request([5])), engine.stats, lambda: engine.logits([5]), lambda: engine.wait([])):
        with pytest.raises(ValueError, match="the model is closed"):
            enter()


def test_an_exception_that_is_a_callers_own_ends_its_request_alone(model, monkeypatch):
    """As a signal handler of the thread that runs a step for all raises it: the others give what they give alone."""
    engine, starts = model.engine, kinds(model, 30)
    expected = [rows(start(engine, None)) for start in starts]
    calls, start_run, started = itertools.count(), Plan.start, threading.Barrier(len(starts))

    def time_out_once(self, steps):
        if next(calls) == 12:
            raise TimeoutError("the caller has waited for long enough")
        return start_run(self, steps)

    def generating(start):
        stream = start(engine, None)
        started.wait()
        return rows(stream)

    monkeypatch.setattr(Plan, "start", time_out_once)
    results = in_threads([lambda s=start: generating(s) for start in starts])
    assert [type(result) for result in results if isinstance(result, Exception)] == [TimeoutError]
    assert all(result == wanted or isinstance(result, TimeoutError) for result, wanted in zip(results, expected, strict=True))
    del results
    check(model)


@pytest.mark.parametrize("where", ["start", "write"])
def test_what_the_device_says_ends_the_requests_in_flight_and_nothing_else(model, monkeypatch, where):
    engine, starts = model.engine, kinds(model, 30)
    expected = [rows(start(engine, None)) for start in starts]
    calls, start_run, write = itertools.count(), Plan.start, model.native.arrays.write
    failing = {"start": 12, "write": 2}[where]  # while all are in flight: rows are written anew only when those of a step change

    def fail_once(function, *args):
        if next(calls) == failing:
            raise RuntimeError("the device was lost: code 7")
        return function(*args)

    if where == "start":
        monkeypatch.setattr(Plan, "start", lambda self, steps: fail_once(start_run, self, steps))
    else:
        monkeypatch.setattr(model.native.arrays, "write", lambda batch: fail_once(write, batch))
    started = threading.Barrier(len(starts))

    def generating(start):
        stream = start(engine, None)
        started.wait()
        return rows(stream)

    results = in_threads([lambda s=start: generating(s) for start in starts])
    errors = [result for result in results if isinstance(result, Exception)]
    assert len(errors) >= 6 and len({id(error) for error in errors}) == len(errors)
    for result, wanted in zip(results, expected, strict=True):
        assert result == wanted or (type(result) is RuntimeError and str(result) == "the device was lost: code 7")
    del results, errors
    assert [rows(start(engine, None)) for start in starts] == expected
    check(model)


def test_a_device_that_fails_for_good_says_so_to_everybody(fresh, monkeypatch):
    engine = fresh.engine

    def fail(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(Plan, "start", fail)
    monkeypatch.setattr(engine._runner._fence, "run", fail)
    for _ in range(3):
        results = in_threads([lambda: rows(engine.submit(Request(TEXT[:4], max_tokens=3)))] * 4)
        assert [str(result) for result in results] == ["out of order"] * 4
    fresh.close()


# ---- who goes first ---------------------------------------------------------------------------------------------------------


def test_a_short_request_is_not_overtaken_and_every_step_moves_every_decode(model, monkeypatch):
    """While long prompts flood in, a request that decodes gets a token from every step, and a short one its turn."""
    engine = model.engine
    early = engine.submit(Request(TEXT[:5], max_tokens=200))
    next(early)
    steps = []  # tokens of `early` behind each step
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda: (run(), steps.append(len(early.running.outputs)))[0])
    salt = itertools.count()

    def flood():
        return engine.submit(Request([3 + next(salt) % 90, *TEXT[:100], 3 + next(salt) % 90, *TEXT[100:170]], max_tokens=2))

    ahead = [flood() for _ in range(20)]
    short = engine.submit(Request(TEXT[9:12], max_tokens=3))
    behind = [flood() for _ in range(20)]
    first: dict[int, int] = {}  # the step that gave a stream's first token
    streams = [short, *ahead, *behind]
    while not all(stream.finished for stream in streams):
        engine.wait([stream for stream in streams if not stream.finished])
        for stream in streams:
            while stream.poll() is not None:
                first.setdefault(id(stream), len(steps))
        if len(steps) < 30:  # and on it goes
            streams.append(flood())
    assert [after - before for before, after in itertools.pairwise(steps)] == [1] * (len(steps) - 1)
    assert first[id(short)] <= len(ahead) * 172 // (512 - 64) + 3
    assert all(first[id(short)] <= first[id(stream)] for stream in streams[len(ahead) + 1 :])
    early.close()
    streams = ahead = behind = short = None
    check(model)


# ---- numbers ----------------------------------------------------------------------------------------------------------------


@FEW
@given(seed=st.integers(0, 2**32), count=st.integers(1, 20), steps=st.sampled_from([1, 8]))
def test_the_numbers_add_up(model, seed, count, steps):
    engine = model.engine
    wanted = [replace(request, decode_steps=steps) for request in made(count, model.native.vocab_size, seed=seed)]
    before = engine.stats()
    with watched(engine) as calls:
        streams = [engine.submit(request) for request in wanted]
        during = engine.stats()
        assert during.running + during.waiting == count
        got = [rows(stream) for stream in streams]
    after = engine.stats()
    prompts = sum(len(request.prompt) for request in wanted)
    cached = after.cached_tokens - before.cached_tokens
    assert cached == sum(stream.cached_tokens for stream in streams)
    assert after.prompt_tokens - before.prompt_tokens + cached == prompts
    assert after.generated_tokens - before.generated_tokens == sum(map(len, got))
    assert after.steps - before.steps == len(calls)
    assert after.preemptions == before.preemptions
    check(model)


def test_a_request_longer_than_the_cache_is_refused_when_it_is_submitted(directory):
    with metalstep.load(directory, strict=True, kv_memory=5 * 16 * 512)[0] as small:
        room = small.native.max_context
        assert room < 200
        with pytest.raises(ValueError, match=f"{room + 1} tokens do not fit into the context of {room}"):
            small.engine.submit(Request(TEXT[: room + 1], max_tokens=1))
        assert len(rows(small.engine.submit(Request(TEXT[:room], max_tokens=5)))) == 1
        cache = make_prompt_cache(small)
        rows(small.engine.submit(Request(TEXT[: room - 9], max_tokens=4, prompt_cache=cache)))
        with pytest.raises(ValueError, match=rf"{room + 5} tokens \({room - 5} of them in the prompt cache\) do not fit"):
            small.engine.submit(Request(TEXT[:10], max_tokens=1, prompt_cache=cache))
        assert not cache.in_use
