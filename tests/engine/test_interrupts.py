"""Ctrl-C at any point, and fork: the interrupted thread loses its own request, all others give what they give alone, no block is lost."""
from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from engines import TEXT, check, kinds, load, row, rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interrupt_at import InterruptAt, drop_interrupted

import metalstep
from metalstep import Request, SamplingParams
from metalstep.grammar import ChoiceGrammar
from metalstep.models.cache import make_prompt_cache

COUNT = 12  # tokens of a request
EXPLORE = settings(max_examples=40, phases=(Phase.explicit, Phase.generate))  # an example takes a tenth of a second


def run_all(model, interrupts):
    """Requests of every kind, a token of each in turn, up to an interrupt. Returns streams, what they gave, and which one it fell into."""
    starts = kinds(model, COUNT)
    streams, got, at = [None] * len(starts), [[] for _ in starts], 0
    try:
        with interrupts:
            for at, start in enumerate(starts):
                streams[at] = start(model.engine, None)
            while any(not stream.finished for stream in streams):
                for at, stream in enumerate(streams):
                    for output in stream:
                        got[at].append(row(output))
                        break
    except KeyboardInterrupt:
        return streams, got, at
    return streams, got, None


def check_interrupted(model, expected, points):
    """The law. The streams of the thread go on behind the interrupt, except for the one that it fell into and those not submitted yet."""
    streams, got, lost = run_all(model, InterruptAt(points))
    for i, (stream, tokens, wanted) in enumerate(zip(streams, got, expected, strict=True)):
        if stream is not None and i != lost:
            assert tokens + rows(stream) == wanted, f"request {i}"
        else:
            assert tokens == wanted[: len(tokens)], f"request {i}, which was interrupted"
    for stream in filter(None, streams):
        stream.close()
    del streams, stream
    check(model)


@pytest.fixture(scope="module", params=["llama", "mistral_windows"])
def family(request, tmp_path_factory):
    """(model, what every kind of request gives alone, when each bytecode runs)."""
    with load(request.param, tmp_path_factory.mktemp(request.param)) as model:
        expected = [rows(start(model.engine, None)) for start in kinds(model, COUNT)]
        run_all(model, InterruptAt())  # with every prefix in the cache
        counting = InterruptAt()
        assert run_all(model, counting)[1] == expected
        yield model, expected, counting


def test_an_interrupt_before_any_bytecode_leaves_the_others_alone(family):
    model, expected, counting = family
    draw = random.Random(1)
    places = [draw.choice(times) for times in counting.places.values()]
    for point in draw.sample(places, 150):
        check_interrupted(model, expected, [point])


@EXPLORE
@given(first=st.floats(0, 1), behind=st.integers(1, 60), more=st.integers(0, 400))
def test_so_do_several_in_a_row(family, first, behind, more):
    """The second falls into what the first one has set off: the way out of a turn, closing a stream, or setting the engine right."""
    model, expected, counting = family
    point = 1 + int(first * counting.count)
    check_interrupted(model, expected, [point, point + behind, point + behind + more])


@settings(max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(points=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_an_interrupted_driver_leaves_other_threads_alone(family, points):
    """Other threads wait for tokens meanwhile, and one of them takes the turn over."""
    model, expected, counting = family
    starts = kinds(model, COUNT)
    got = [None] * len(starts)

    def work(i):
        got[i] = rows(starts[i](model.engine, None))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(starts))]
    for thread in threads:
        thread.start()
    for part in points:
        run_all(model, InterruptAt([1 + int(part * counting.count)]))
    for thread in threads:
        thread.join()
    assert got == expected
    check(model)


@EXPLORE
@given(place=st.floats(0, 1), max_kv_size=st.sampled_from([None, 20]))
def test_a_prompt_cache_goes_on_behind_an_interrupt(family, place, max_kv_size):
    """It holds some beginning of the conversation, and what follows is what follows that beginning without a cache."""
    model, _, _ = family
    engine = model.engine
    start = kinds(model, COUNT)[-1 if max_kv_size else -2]

    def talk(interrupts):
        cache = make_prompt_cache(model, max_kv_size)
        with interrupts:
            for _ in range(2):
                with contextlib.suppress(KeyboardInterrupt):
                    rows(start(engine, cache))
        assert cache.offset == len(cache.tokens) and not cache.in_use
        return list(cache.tokens), rows(start(engine, cache))

    counting = InterruptAt()
    talk(counting)
    held, answer = talk(InterruptAt([1 + int(place * counting.count)]))
    whole = Request(held + TEXT[3:23], SamplingParams(seed=5, temperature=0.9), COUNT // 2, max_kv_size=max_kv_size)
    assert answer == rows(engine.submit(whole))
    check(model)


@pytest.mark.parametrize("what", ["a stream with a prompt cache", "a prompt cache"])
def test_an_interrupt_cannot_keep_what_is_collected(family, what):
    """Python prints and forgets one that falls into a finalizer, so what is collected must be told of without one."""
    model, _, _ = family
    cache = make_prompt_cache(model)
    stream = kinds(model, COUNT)[-2](model.engine, cache)
    if what == "a prompt cache":
        rows(stream)
        stream = None
        assert cache.offset
    else:
        next(stream)
    dropped = [stream, cache]
    del stream, cache
    drop_interrupted(dropped)
    check(model)


def test_an_interrupt_at_the_end_of_a_load_closes_what_it_has_made(tmp_path, monkeypatch):
    made = []

    def interrupted(self, checkpoint, skeleton, native, reason):
        made.append(native)
        raise KeyboardInterrupt

    monkeypatch.setattr(metalstep.Model, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("llama", tmp_path)
    with pytest.raises(ValueError, match="closed"):
        made[0].device.create_buffer(16)


class Pressed(ChoiceGrammar):
    """Ctrl-C comes while it takes in a token, before or after it has."""

    def __init__(self, at, after):
        super().__init__([TEXT[:9]])
        self.left, self.after = at, after

    def accept(self, token):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        super().accept(token)
        if self.left == 0:
            raise KeyboardInterrupt


class Forgetful:
    """A grammar that cannot go back to its start."""

    def __init__(self, grammar):
        self.fill_bitmask, self.accept = grammar.fill_bitmask, grammar.accept
        self.is_terminated = False


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_an_interrupt_in_a_grammar_ends_its_request_only_if_it_cannot_start_again(family, at, after):
    model, expected, _ = family
    for wrapped in (False, True):
        grammar = Pressed(at, after)
        stream = model.engine.submit(Request(TEXT[:5], max_tokens=20, grammar=Forgetful(grammar) if wrapped else grammar))
        driving, other = kinds(model, COUNT)[:2]
        waiting, interrupted = other(model.engine, None), driving(model.engine, None)
        with pytest.raises(KeyboardInterrupt):
            rows(interrupted)
        assert rows(waiting) == expected[1]
        if wrapped:
            with pytest.raises(RuntimeError, match="give it a method `reset`, or send the request again"):
                rows(stream)
        else:
            assert [token for token, *_ in rows(stream)] == TEXT[:9]
    stream = waiting = interrupted = None
    check(model)


SIGNALS = """
    import os, random, signal, sys, threading, time
    from pathlib import Path
    sys.path[:0] = {paths!r}
    from engines import check, kinds, load, rows

    model = load("llama", Path({directory!r}))
    starts = kinds(model, 40)
    expected = [rows(start(model.engine, None)) for start in starts]
    draw, wrong, done = random.Random(5), [], threading.Event()

    def others(i):
        while not done.is_set():
            if (got := rows(starts[i](model.engine, None))) != expected[i]:
                wrong.append((i, got))

    def press():
        while not done.is_set():
            time.sleep(draw.uniform(0.001, 0.03))
            os.kill(os.getpid(), signal.SIGINT)

    threads = [threading.Thread(target=others, args=(i,), daemon=True) for i in range(len(starts))]
    threads.append(threading.Thread(target=press, daemon=True))
    interrupted = 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for thread in threads:
        thread.start()
    while interrupted < 150:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            while True:
                rows(starts[0](model.engine, None))
        except KeyboardInterrupt:
            interrupted += 1
    while True:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            break
        except KeyboardInterrupt:
            continue
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert [rows(start(model.engine, None)) for start in starts] == expected
    check(model)
    print("others are whole")
"""

FORKS = """
    import os, signal, sys, threading
    from contextlib import suppress
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import mlx.core as mx
    import metalstep
    from engines import check, kinds, load, rows
    from metalstep.models.cache import make_prompt_cache
    from metalstep.plan.target import PlanShape

    model = load("llama", Path({directory!r}))
    engine, starts = model.engine, kinds(model, 60)
    expected = [rows(start(engine, None)) for start in starts]
    cache = make_prompt_cache(model)
    rows(starts[-2](engine, cache))
    done, wrong = threading.Event(), []

    def others(i):
        while not done.is_set():
            if (got := rows(starts[i](engine, None))) != expected[i]:
                wrong.append((i, got))

    threads = [threading.Thread(target=others, args=(i,), daemon=True) for i in range(len(starts))]
    for thread in threads:
        thread.start()

    def child(stream):
        signal.alarm(20)  # ends a child that blocks
        request = metalstep.Request([5, 6, 7], max_tokens=2)
        for enter in (
            lambda: engine.submit(request), lambda: engine.logits([5]), lambda: engine.collect(request), engine.stats, engine.settle,
            lambda: engine.exclusively(lambda: None), lambda: engine.wait([stream]), lambda: model(model_input),
            lambda: rows(starts[-2](engine, cache)), lambda: cache.trim(3), cache.copy, lambda: cache[0].state,
            lambda: model.native.plan(PlanShape(3, 3)),
        ):
            try:
                enter()
            except ValueError as error:
                assert "this process was forked" in str(error) or "the model is closed" in str(error), error
                continue
            raise AssertionError(f"{{enter}} was not refused")
        with suppress(ValueError):  # unless the parent's threads had run it to its end
            list(stream)
        engine.cancel(stream)
        stream.close()
        model.close()
        os._exit(0)

    model_input = mx.array([[5]])
    for _ in range(25):
        stream = starts[0](engine, None)
        next(stream)
        pid = os.fork()
        if pid == 0:
            try:
                child(stream)
            except BaseException as error:
                print(f"{{type(error).__name__}}: {{error}}", flush=True)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
        assert len(rows(stream)) == len(expected[0]) - 1
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    cache = None
    check(model)
    print("parent and children are whole")
"""


@pytest.mark.parametrize(
    ("script", "said"), [(SIGNALS, "others are whole"), (FORKS, "parent and children are whole")], ids=["sigint", "fork"]
)
def test_in_a_process_of_its_own(tmp_path, script, said):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "capture")]
    script = textwrap.dedent(script).format(paths=paths, directory=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=os.environ)
    assert result.stdout.endswith(f"{said}\n"), result.stdout + result.stderr
