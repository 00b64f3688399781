"""Steps that a server schedules give, bit for bit, what the engine gives, however they are cut and whatever is under way."""
from __future__ import annotations

import queue
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
from engines import CHOICES, TEXT, directory_of
from families import VOCAB
from hypothesis import example, given, settings
from hypothesis import strategies as st
from metal_models import DEVICE
from session_driver import Driver, outputs
from workload import alone, answers, requests

import metalstep
from metalstep import Request, SamplingParams
from metalstep.grammar import ChoiceGrammar
from metalstep.kernels import params
from metalstep.plan.gpu_target import GpuTarget
from metalstep.served_model import ServedModel
from metalstep.step_session import STAGES, Place, Span

CONTEXT, SEQS, BLOCKS = 128, 3, 96
FAMILIES_RUN = ["llama", "gemma3_text"]  # one group of layers, and two


def session_of(directory, **options):
    served = ServedModel(directory, strict=True, **options)
    return served, served.allocate(BLOCKS, max_context=CONTEXT, max_seqs=SEQS)


@pytest.fixture(scope="module", params=FAMILIES_RUN)
def pair(request, tmp_path_factory):
    """(engine, session) of the same weights on the host device."""
    directory = directory_of(request.param, tmp_path_factory.mktemp(request.param))
    model, _ = metalstep.load(directory, strict=True, max_context=CONTEXT)
    served, session = session_of(directory)
    with model:
        yield model.engine, session
    served.close()


SEEDS = st.integers(0, 2**32 - 1)  # of a server's choices
WANTED = requests(9, VOCAB, longest=50, tokens=(3, 9))  # every kind of sampling


@pytest.fixture(scope="module")
def expected(pair):
    return alone(pair[0], WANTED)


@settings(max_examples=25)
@given(seed=SEEDS, lag=st.integers(0, 6), rows=st.sampled_from([1, 3, 8, 64]), preempts=st.booleans(), taken=st.booleans())
@example(seed=1, lag=6, rows=3, preempts=False, taken=False)
@example(seed=2, lag=3, rows=8, preempts=True, taken=True)
def test_any_interleaving_gives_what_the_engine_gives(pair, expected, seed, lag, rows, preempts, taken):
    with ThreadPoolExecutor(1) as other:
        taker = other if taken else None
        driver = Driver(pair[1], BLOCKS, Random(seed), lag=lag, rows=rows, preempts=preempts, taker=taker)
        assert outputs(driver, WANTED) == expected


def test_a_prompt_in_more_pieces_than_stages_and_tokens_fed_before_they_are_known(pair):
    engine, session = pair
    wanted = [Request(TEXT[:60], SamplingParams(temperature=0.9, seed=3, logprobs=2), 8)]
    driver = Driver(session, BLOCKS, Random(0), lag=40, rows=4, whole_prompts=False)
    assert outputs(driver, wanted) == alone(engine, wanted)
    assert driver.most_under_way > STAGES


def test_a_session_looks_at_nothing_until_it_must(pair):
    _, session = pair
    slot = session.acquire()
    session.fill(slot, SamplingParams(), TEXT[:5], 5, frozenset())
    session.set_blocks(slot, 0, 0, [1, 2])
    for group in range(1, session.arrays.sizes.groups):
        session.set_blocks(slot, group, 0, [3, 4])
    first = session.begin([Span(slot, 0, TEXT[:5], known=5)])
    session.sample(first)
    second = session.begin([Span(slot, 5, [-1], Place(first, 0), known=6)])
    session.sample(second)
    assert first.sampled is None and Place(first, 0).token is None
    session.collect(second)
    assert first.sampled is not None and Place(first, 0).token == int(first.sampled["token"][0])
    session.settle()
    session.release(slot)


def test_a_row_of_results_is_not_used_again_before_it_was_taken(pair):
    """More steps under way than rows of results: a stage's turn takes the results of the step that had it before."""
    engine, session = pair
    assert len(session.stages) == STAGES
    wanted = [Request(TEXT[i : i + 3], SamplingParams(seed=i, temperature=1.0), 20) for i in range(SEQS)]
    driver = Driver(session, BLOCKS, Random(5), lag=100, rows=1)
    assert outputs(driver, wanted) == alone(engine, wanted)
    assert driver.most_under_way > session.arrays.sizes.steps


def test_another_thread_may_wait_for_steps(pair):
    """As vLLM's multiprocessing executor does: one thread begins steps, another takes their results."""
    engine, session = pair
    prompt, count = TEXT[:4], CONTEXT - 4
    slot = session.acquire()
    session.fill(slot, SamplingParams(seed=9, temperature=1.0), prompt, 4, frozenset())
    for group in range(session.arrays.sizes.groups):
        session.set_blocks(slot, group, 0, range(1 + 8 * group, 9 + 8 * group))
    steps: queue.Queue = queue.Queue()

    def take():
        tokens = []
        for _ in range(count):
            step = steps.get(timeout=60)
            session.collect(step)
            tokens.append((int(step.sampled["token"][0]), step.top.shape))
        return tokens

    with ThreadPoolExecutor(1) as other:
        result = other.submit(take)
        last = None
        for i in range(count):
            tokens = prompt if last is None else [-1]
            step = session.begin([Span(slot, 3 + i if i else 0, tokens, last, known=4 + i)])
            session.sample(step)
            steps.put(step)
            last = Place(step, 0)
        got = result.result(timeout=60)
    session.release(slot)
    want = [output.token for output in engine.submit(Request(prompt, SamplingParams(seed=9, temperature=1.0), count))]
    assert got == [(token, (1, 32)) for token in want]


class Slow:
    """A plan of a device that takes its time: a wait for it ends when `end` is set."""

    def __init__(self, plan):
        self.run, self._wait = plan.run, plan.wait
        self.waited, self.end = threading.Event(), threading.Event()

    def wait(self, ticket):
        self.waited.set()
        self.end.wait(10)
        self._wait(ticket)


@pytest.mark.parametrize("split", [False, True])
def test_a_step_begins_while_another_thread_waits_for_the_one_before(pair, split):
    """As vLLM's executor has it: a thread of its own asks for a step's results as soon as it is sampled. Begun anew, and by the device."""
    _, session = pair
    slots = [session.acquire() for _ in range(2)]
    for at, slot in enumerate(slots, 1):
        session.fill(slot, SamplingParams(), [5], 1, frozenset())
        for group in range(session.arrays.sizes.groups):
            session.set_blocks(slot, group, 0, [at])
    if session._count % session.arrays.sizes.steps == 0:
        session.sample(session.begin([Span(slots[1], 0, [5], known=1)]))  # the first row of results is always begun anew
    first = session.begin([Span(slots[0], 0, [5], known=1)])
    slow = first.rest = Slow(first.rest)
    session.sample(first)
    session.release(slots[1])
    with ThreadPoolExecutor(1) as other:
        taken = other.submit(session.collect, first)
        assert slow.waited.wait(60)
        second = session.begin([Span(slots[0], 1, [-1], Place(first, 0), known=2)], split=split)
        session.sample(second)
        again = session.acquire()
        assert first.sampled is None
        slow.end.set()
        taken.result()
    session.settle()
    for slot in (again, slots[0]):
        session.release(slot)


def test_logits_of_a_step_go_with_it(pair):
    """A slot that its sequence has left remembers none of them."""
    _, session = pair
    slots = [session.acquire() for _ in range(SEQS)]
    for at, slot in enumerate(slots, 1):
        session.fill(slot, SamplingParams(), [5], 1, frozenset())
        for group in range(session.arrays.sizes.groups):
            session.set_blocks(slot, group, 0, [at])
    kept = []
    for slot in slots:
        step = session.begin([Span(slot, 0, [5], known=1)], keep_logits=True)
        session.sample(step)
        kept.append(weakref.ref(step.logits))
        session.release(slot)
    del step
    other = session.acquire()
    for _ in range(STAGES):
        session.sample(session.begin([Span(other, 0, [5], known=1)]))
    session.settle()
    session.release(other)
    assert all(reference() is None for reference in kept)


def test_masks_written_between_the_halves_are_the_grammars(pair):
    engine, session = pair

    def wanted():
        return [
            Request(TEXT[:4], SamplingParams(seed=1, temperature=1.2, logprobs=2), 12, grammar=ChoiceGrammar(CHOICES)),
            Request(TEXT[3:9], SamplingParams(seed=2, temperature=0.7), 12),
            Request(TEXT[9:30], SamplingParams(seed=4, processed_logprobs=True, logprobs=4), 12, grammar=ChoiceGrammar(CHOICES)),
        ]

    assert outputs(Driver(session, BLOCKS, Random(3)), wanted()) == answers(engine, wanted())


def test_prompt_logprobs_of_a_divided_prompt(pair):
    engine, session = pair
    wanted = [Request(TEXT[i : i + 40], SamplingParams(seed=i, prompt_logprobs=2), 3) for i in range(4)]
    got = Driver(session, BLOCKS, Random(4), rows=24).run(wanted)
    for request, running in zip(wanted, got, strict=True):
        stream = engine.submit(request)
        assert running.outputs == [(o.token, o.logprob, o.rank, o.top, o.finish_reason) for o in stream]
        assert running.prompt == [(x.token, x.logprob, x.rank, x.top) for x in stream.prompt_logprobs[1:]]


def test_kept_logits_are_the_engines(pair):
    engine, session = pair
    wanted = [Request(TEXT[i : i + 20], SamplingParams(seed=i), 4, keep_logits=i != 1) for i in range(3)]
    for request, running in zip(wanted, Driver(session, BLOCKS, Random(6)).run(wanted), strict=True):
        kept = [o.logits.numpy() for o in engine.submit(request)] if request.keep_logits else []
        np.testing.assert_array_equal(running.logits, kept)


def test_a_slot_whose_step_is_under_way_is_handed_out_last_and_after_the_step(pair):
    _, session = pair
    slots = [session.acquire() for _ in range(SEQS)]
    with pytest.raises(ValueError, match=f"{SEQS} sequences run already; release one first"):
        session.acquire()
    steps = []
    for block, slot in enumerate(slots, 1):
        session.fill(slot, SamplingParams(), [5], 1, frozenset())
        for group in range(session.arrays.sizes.groups):
            session.set_blocks(slot, group, 0, [block])
        steps.append(session.begin([Span(slot, 0, [5], known=1)]))
        session.sample(steps[-1])
    for slot in slots:
        session.release(slot)
    session.collect(steps[1])  # and the first
    assert steps[2].sampled is None
    assert {session.acquire(), session.acquire()} == set(slots[:2])
    assert steps[2].sampled is None
    assert session.acquire() == slots[2] and steps[2].sampled is not None
    for slot in slots:
        session.release(slot)


def test_a_row_that_fails_says_so_and_its_token_is_0(pair):
    _, session = pair
    slot = session.acquire()
    session.fill(slot, SamplingParams(logprobs=2), [5, 6], 2, frozenset(), masked=True)
    for group in range(session.arrays.sizes.groups):
        session.set_blocks(slot, group, 0, [1])
    step = session.begin([Span(slot, 0, [5, 6], known=2)])
    session.mask(slot)[:] = 0
    session.sample(step)
    session.collect(step)
    assert step.sampled["status"][0] == params.MS_SAMPLE_NOTHING_ALLOWED and Place(step, 0).token == 0
    session.release(slot)


def test_too_many_rows_are_refused_and_the_session_goes_on(pair):
    engine, session = pair
    slot = session.acquire()
    with pytest.raises(ValueError, match="a step of 513 rows"):
        session.begin([Span(slot, 0, [1] * (session.max_rows + 1))])
    session.release(slot)
    assert outputs(Driver(session, BLOCKS, Random(7)), WANTED[:2]) == alone(engine, WANTED[:2])


def test_the_metal_device_gives_what_its_engine_gives(tmp_path, monkeypatch):
    """With plans that do not depend on the batch. Simulated off Apple."""
    monkeypatch.setattr(GpuTarget, "warm_shapes", lambda *_: [])
    directory = directory_of("llama", tmp_path / "llama")
    options = {"device": DEVICE, "batch_invariant": True}
    wanted = [Request(x.prompt[:20], x.sampling, 4, x.stop_token_ids) for x in WANTED[:4]]
    with metalstep.load(directory, strict=True, max_context=CONTEXT, kv_memory="16MB", **options)[0] as model:
        expected = alone(model.engine, wanted)
    served, session = session_of(directory, **options)
    assert outputs(Driver(session, BLOCKS, Random(8), rows=16), wanted) == expected
    served.close()


def test_the_device_makes_the_inputs_of_steady_decodes(pair, monkeypatch):
    """Over the ends of blocks and of the rows of results, with penalties, whose counts are the device's too."""
    engine, session = pair
    made = []
    go_on = session.forward.go_on
    monkeypatch.setattr(session.forward, "go_on", lambda *given: made.append(given) or go_on(*given))
    prompts, steps = [TEXT[:4], TEXT[4:25]], 90
    sampling = [SamplingParams(temperature=0.9, seed=i, repetition_penalty=1.2, frequency_penalty=0.3) for i in range(2)]
    slots = [session.acquire() for _ in prompts]
    for i, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
        session.fill(slot, sampling[i], prompt, len(prompt), frozenset())
        for group in range(session.arrays.sizes.groups):
            first = 1 + 8 * (2 * group + i)
            session.set_blocks(slot, group, 0, range(first, first + 8))
    under_way = [session.begin([Span(s, 0, p, known=len(p)) for s, p in zip(slots, prompts, strict=True)])]
    session.sample(under_way[0])
    got = [[], []]
    for k in range(1, steps + 1):
        if k < steps:
            last = [Place(under_way[-1], i) for i in range(2)]
            lengths = [len(prompt) + k for prompt in prompts]
            spans = [Span(slot, n - 1, [-1], place, known=n) for slot, n, place in zip(slots, lengths, last, strict=True)]
            under_way.append(session.begin(spans))
            session.sample(under_way[-1])
        session.collect(under_way[0])
        for i in range(2):
            got[i].append(under_way[0].rows[i][0])
        del under_way[0]
    for slot in slots:
        session.release(slot)
    rows = session.arrays.sizes.steps
    assert len(made) == steps - 1 - 1 - sum((session._count - k) % rows == 0 for k in range(1, steps - 1))
    for prompt, own, tokens in zip(prompts, sampling, got, strict=True):
        assert tokens == [output.token for output in engine.submit(Request(prompt, own, steps))]
