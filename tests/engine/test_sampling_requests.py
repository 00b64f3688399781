"""What requests ask for, end to end: masks, grammars, logprobs, ends, refusals; and whose own fault ends only them."""
from __future__ import annotations

import threading
from dataclasses import fields, replace

import mlx.core as mx
import numpy as np
import pytest
from engines import TEXT, check, kinds, load, rows
from families import BASE, FAMILIES, VOCAB, build
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny import write_model

import metalstep
from metalstep import Request, SamplingParams
from metalstep.grammar import ChoiceGrammar
from metalstep.models.cache import make_prompt_cache

FEW = settings(max_examples=20, phases=(Phase.explicit, Phase.generate))
TOLERANCE = 1e-5  # of a logprob: float32 sums of exponentials against float64
ALL = frozenset(range(VOCAB))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load("llama_untied", tmp_path_factory.mktemp("llama")) as model:
        yield model


@pytest.fixture(scope="module")
def cramped(tmp_path_factory):
    """The same weights, in a cache that running requests overfill."""
    with load("llama_untied", tmp_path_factory.mktemp("cramped"), max_context=128, kv_memory=20 * 16 * 512) as model:
        yield model


@pytest.fixture(scope="module")
def poisoned(model, tmp_path_factory):
    """(a model with the same weights but for NaN as one token's embedding, that token, what requests of every kind give alone)."""
    expected = [rows(start(model.engine, None)) for start in kinds(model, 30)]
    token = min(ALL - {0} - set(TEXT[:60]) - {r[0] for answered in expected for r in answered})
    network = build("llama_untied", quantized=False)
    weight = np.array(network.model.embed_tokens.weight)
    weight[token] = np.nan
    network.model.embed_tokens.weight = mx.array(weight)
    config = {"model_type": "llama", **BASE, **FAMILIES["llama_untied"].config}
    with metalstep.load(write_model(tmp_path_factory.mktemp("poisoned"), network, config), strict=True)[0] as other:
        yield other, token, expected


def answer(model, prompt, count=12, stops=frozenset(), *, steps=1, grammar=None, **sampling):
    """Outputs of one request."""
    request = Request(prompt, SamplingParams(**sampling), count, stops, grammar=grammar, decode_steps=steps)
    return list(model.engine.submit(request))


def tokens(*args, **options):
    return [output.token for output in answer(*args, **options)]


def log_softmax(logits):
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


# ---- errors of one request ------------------------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


class Faulty(ChoiceGrammar):
    """Raises in the named method when it is called for the n-th time."""

    def __init__(self, method, n, error):
        self.left, self.method, self.error = n, method, error
        super().__init__([TEXT[:9], TEXT[9:18]])

    def count(self, method):
        if method == self.method:
            self.left -= 1
            if self.left < 0:
                self.error()

    def fill_bitmask(self, row):
        self.count("fill_bitmask")
        super().fill_bitmask(row)
        if self.method == "empty" and len(self._accepted) == 3:
            row[:] = 0

    def accept(self, token):
        self.count("accept")
        super().accept(token)


def raise_own():
    raise OwnError("the caller's own")


def raise_at(n):
    calls = []

    def pick(ids, logits):
        calls.append(1)
        if len(calls) > n:
            raise_own()
        return int(logits.argmax()), 0.0, logits

    return pick


def culprits(model, poison):
    """By name: a function that submits a request which is at fault itself, and the error that it gets."""
    engine = model.engine

    def constrained(method, n=0, error=raise_own, **sampling):
        return lambda: engine.submit(Request(TEXT[:9], SamplingParams(**sampling), grammar=Faulty(method, n, error)))

    inside, nothing = "the engine was called from inside of its own step", "no token is allowed"
    return {
        "the grammar raises when it fills": (constrained("fill_bitmask", 3), OwnError),
        "the grammar raises when it accepts": (constrained("accept", 2), OwnError),
        "the grammar allows nothing": (constrained("empty"), nothing),
        "the grammar calls the engine": (constrained("accept", 1, engine.stats), inside),
        "the grammar waits for the engine": (constrained("fill_bitmask", 1, lambda: engine.logits([5])), inside),
        "everything that it allows is banned": (constrained("", banned_token_ids=[TEXT[1], TEXT[10]]), nothing),
        "the picker raises": (lambda: engine.submit(Request(TEXT[:9], hand_out_logits=True), raise_at(3)), OwnError),
        "the progress callback raises": (lambda: engine.submit(Request(TEXT[:9]), progress=lambda *_: raise_own()), OwnError),
        "the logits are not finite": (lambda: engine.submit(Request([*TEXT[:7], poison, 7])), "not finite"),
        "nor are they where it samples": (
            lambda: engine.submit(Request([poison, 9], SamplingParams(temperature=1.0, top_p=0.9, seed=3))),
            "not finite",
        ),
    }


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_request_at_fault_ends_alone_with_its_own_error_in_its_own_thread(poisoned, rounds):
    model, token, expected = poisoned
    starts, found = kinds(model, 30), culprits(model, token)
    got, errors = [[None] * rounds for _ in starts], {}
    barrier = threading.Barrier(len(starts) + len(found))

    def neighbour(i):
        barrier.wait()
        for j in range(rounds):
            got[i][j] = rows(starts[i](model.engine, None))

    def culprit(name):
        barrier.wait()
        for _ in range(rounds):
            try:
                rows(found[name][0]())
            except Exception as error:
                errors.setdefault(name, []).append(error)

    threads = [threading.Thread(target=neighbour, args=(i,)) for i in range(len(starts))]
    threads += [threading.Thread(target=culprit, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate(expected):
        assert got[i] == [wanted] * rounds, f"request {i}"
    for name, (_, wanted) in found.items():
        assert len(errors[name]) == rounds, name
        for error in errors[name]:
            if isinstance(wanted, str):
                assert isinstance(error, RuntimeError) and wanted in str(error), name
            else:
                assert type(error) is wanted and str(error) == "the caller's own", name
    found = errors = None
    check(model)


def test_what_came_before_the_error_is_delivered(model):
    stream = model.engine.submit(Request(TEXT[:9], grammar=Faulty("accept", 4, raise_own)))
    got = []
    with pytest.raises(OwnError):
        for output in stream:
            got.append(output.token)
    assert got in (TEXT[:4], TEXT[9:13])
    assert list(stream) == []


# ---- logprobs -------------------------------------------------------------------------------------------------------------------


@FEW
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    top=st.integers(0, 8),
    chunk=st.sampled_from([1, 7, 16, 512]),
    steps=st.sampled_from([1, 8]),
    tight=st.booleans(),
    processed=st.booleans(),
)
def test_logprobs_are_the_log_softmax_of_the_logits(model, cramped, lengths, top, chunk, steps, tight, processed):
    """Of prompts and of generated tokens; ranks count what is more likely, and the most likely come first."""
    engine = (cramped if tight else model).engine
    params = SamplingParams(temperature=0.9, seed=3, logprobs=top, prompt_logprobs=top, processed_logprobs=processed)
    prompts = [[(i * 31 + j * 7) % (VOCAB - 3) + 3 for j in range(n)] for i, n in enumerate(lengths)]
    streams = [engine.submit(Request(p, params, 9, decode_steps=steps, prefill_rows=chunk)) for p in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        outputs = list(stream)
        ids = prompt + [output.token for output in outputs]
        expected = log_softmax(model.engine.logits(ids))
        first, *reported = stream.prompt_logprobs
        assert first is None and len(reported) == len(prompt) - 1
        assert [entry.token for entry in reported] == prompt[1:]
        for entry, want in zip([*reported, *outputs], expected, strict=False):
            assert abs(entry.logprob - want[entry.token]) < TOLERANCE
            assert entry.rank == 1 + (want > want[entry.token]).sum()
            if not top:
                assert not entry.top
                continue
            best = np.argsort(-want, kind="stable")[:top]
            assert [token for token, _ in entry.top] == best.tolist()
            np.testing.assert_allclose([logprob for _, logprob in entry.top], want[best], atol=TOLERANCE)
    check(cramped if tight else model)


def test_a_prompt_cache_has_no_logprobs_for_what_it_holds(model):
    cache = make_prompt_cache(model)
    held = TEXT[:20] + [output.token for output in model.engine.submit(Request(TEXT[:20], max_tokens=3, prompt_cache=cache))]
    stream = model.engine.submit(Request(TEXT[30:37], SamplingParams(prompt_logprobs=1), 1, prompt_cache=cache))
    list(stream)
    expected = log_softmax(model.engine.logits(held + TEXT[30:37]))
    first, *reported = stream.prompt_logprobs
    assert first is None and [entry.token for entry in reported] == TEXT[31:37]
    for place, entry in enumerate(reported, len(held)):
        assert abs(entry.logprob - expected[place, entry.token]) < TOLERANCE


# ---- which tokens -----------------------------------------------------------------------------------------------------------------


SOME = st.sets(st.integers(3, VOCAB - 1), min_size=1, max_size=40)


@FEW
@given(allowed=SOME, banned=SOME, temperature=st.sampled_from([0.0, 1.5]), steps=st.sampled_from([1, 8]), seed=st.integers(0, 2**64 - 1))
def test_tokens_are_allowed_ones_and_not_banned_ones(model, allowed, banned, temperature, steps, seed):
    options = dict(temperature=temperature, seed=seed, steps=steps)
    left = allowed - banned
    if left:
        assert set(tokens(model, TEXT[:9], allowed_token_ids=allowed, banned_token_ids=banned, **options)) <= left
    else:
        with pytest.raises(ValueError, match="allowed_token_ids and banned_token_ids"):
            answer(model, TEXT[:9], allowed_token_ids=allowed, banned_token_ids=banned, **options)
    assert not set(tokens(model, TEXT[:9], banned_token_ids=banned, **options)) & banned
    same = tokens(model, TEXT[:9], banned_token_ids=banned, **options)
    assert tokens(model, TEXT[:9], allowed_token_ids=ALL - banned, **options) == same
    assert tokens(model, TEXT[:9], logit_bias=dict.fromkeys(banned, -1e30), **options) == same


@FEW
@given(token=st.integers(3, VOCAB - 1), steps=st.sampled_from([1, 8]))
def test_a_bias_can_force_a_token_and_a_penalty_drive_it_out(model, token, steps):
    forced = dict(logit_bias={token: 1000.0}, steps=steps)
    assert tokens(model, TEXT[:9], **forced) == [token] * 12
    assert tokens(model, TEXT[:9], presence_penalty=2000.0, **forced).count(token) == 1
    assert tokens(model, TEXT[:9], frequency_penalty=300.0, **forced)[:3] == [token] * 3


@FEW
@given(least=st.integers(0, 20), steps=st.sampled_from([1, 3, 8]), stops=st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=80))
def test_no_stop_token_comes_before_min_tokens_and_the_first_one_after_ends(model, least, steps, stops):
    outputs = answer(model, TEXT[:9], 30, frozenset(stops), steps=steps, min_tokens=least, temperature=1.0, seed=4)
    ids = [output.token for output in outputs]
    assert not set(ids[: min(least, len(ids) - 1)]) & stops and not set(ids[:-1]) & stops
    assert outputs[-1].finish_reason == ("stop" if ids[-1] in stops else "length")
    assert len(ids) == 30 or len(ids) > least
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(ids) - 1)


@FEW
@given(count=st.integers(1, 40), steps=st.sampled_from([1, 8, 32]), at=st.integers(0, 39))
def test_texts_end_where_they_must_however_many_steps_a_call_makes(model, count, steps, at):
    whole = tokens(model, TEXT[:9], 40, temperature=1.0, seed=2)
    limited = answer(model, TEXT[:9], count, steps=steps, temperature=1.0, seed=2)
    assert [output.token for output in limited] == whole[:count] and limited[-1].finish_reason == "length"
    stopped = answer(model, TEXT[:9], count, frozenset({whole[at]}), steps=steps, temperature=1.0, seed=2)
    end = whole.index(whole[at]) + 1
    assert [output.token for output in stopped] == whole[: min(end, count)]
    assert stopped[-1].finish_reason == ("stop" if end <= count else "length")


@pytest.mark.parametrize("steps", [1, 8])
def test_the_context_ends_a_text(cramped, steps):
    room = cramped.native.max_context
    outputs = answer(cramped, (TEXT * 2)[: room - 13], None, steps=steps)
    assert len(outputs) == 14 and outputs[-1].finish_reason == "length"  # the last token needs no place in the cache


@FEW
@given(
    choices=st.lists(st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=5),
    steps=st.sampled_from([1, 8]),
    temperature=st.sampled_from([0.0, 2.0]),
)
def test_a_choice_is_one_of_the_choices(model, choices, steps, temperature):
    grammar = ChoiceGrammar(choices, eos=2)
    outputs = answer(model, TEXT[:9], 20, frozenset({2}), steps=steps, grammar=grammar, temperature=temperature, seed=1)
    ids = [output.token for output in outputs]
    assert ids[:-1] in choices and ids[-1] == 2 and outputs[-1].finish_reason == "stop"
    logits = model.engine.logits([*TEXT[:9], *ids[:-1]])[8:]
    if temperature == 0:
        for place, token in enumerate(ids):
            following = {c[place] if place < len(c) else 2 for c in choices if c[:place] == ids[:place]}
            assert logits[place][token] == max(logits[place][other] for other in following)
    alone = answer(model, TEXT[:9], 20, grammar=ChoiceGrammar([choices[0]]), steps=steps)
    # Without eos it ends with the choice's own last token.
    assert [output.token for output in alone] == choices[0] and alone[-1].finish_reason == "stop"


@FEW
@given(length=st.integers(1, 60), chunk=st.sampled_from([3, 512]), count=st.integers(1, 20))
def test_picking_the_most_likely_token_by_hand_is_what_the_step_does(model, length, chunk, count):
    def pick(ids, logits):
        assert ids == TEXT[:length] + got
        got.append(int(logits.argmax()))
        return got[-1], float(log_softmax(logits)[got[-1]]), logits

    got = []
    by_hand = list(model.engine.submit(Request(TEXT[:length], max_tokens=count, hand_out_logits=True, prefill_rows=chunk), pick))
    native = answer(model, TEXT[:length], count)
    for ours, theirs in zip(by_hand, native, strict=True):
        assert (ours.token, ours.rank, ours.finish_reason) == (theirs.token, 1, theirs.finish_reason)
        assert abs(ours.logprob - theirs.logprob) < TOLERANCE


# ---- refusals ---------------------------------------------------------------------------------------------------------------------


BAD_REQUESTS = {
    "prompt": [[], [[1]], [1.5], "text", b"ab", None, 5, [-1], [VOCAB], [True], [None], {1: 2}, [2**70], np.zeros((1, 2), int), ["1"]],
    "sampling": [None, {}, "greedy", 0.7, SamplingParams],
    "max_tokens": [0, -1, 1.5, "3", True, 2**40, float("nan")],
    "stop_token_ids": [None, 5, [-1], [VOCAB], "ab", [1.5], [[1]], {1: 2}],
    "embeddings": [[[1.0]], "x", np.zeros((2, 64)), np.zeros((3, 63)), np.full((3, 64), np.nan), np.full((3, 64), "x"), object()],
    "prompt_cache": [5, [], "file", object()],
    "max_kv_size": [0, 4, True, "8", 1.5, -3],
    "grammar": [5, object(), "json", ChoiceGrammar],
    "hand_out_logits": [1, None, "yes", True],
    "keep_logits": [1, None, "yes"],
    "decode_steps": [0, 33, None, True, 1.5, "1"],
    "prefill_rows": [0, 513, True, 1.5, "1"],
}
BAD_AT_SUBMIT = [
    {"logit_bias": {VOCAB: 1.0}},
    {"allowed_token_ids": [VOCAB]},
    {"banned_token_ids": [3, VOCAB + 9]},
    {"xtc_special_tokens": [VOCAB]},
    {"banned_token_ids": range(VOCAB)},
]


def test_every_field_of_a_request_is_checked():
    assert set(BAD_REQUESTS) == {field.name for field in fields(Request)}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_by_the_name_of_its_field(model, name):
    before = model.engine.stats()
    for value in BAD_REQUESTS[name]:
        with pytest.raises(ValueError, match=name):
            model.engine.submit(replace(Request([5, 6, 7], max_tokens=2), **{name: value}))
    assert model.engine.stats() == before and not model.engine._inbox
    check(model)


@FEW
@given(data=st.data())
def test_bad_sampling_is_refused_by_the_name_of_its_field(model, data):
    before = model.engine.stats()
    name = data.draw(st.sampled_from([field.name for field in fields(SamplingParams)]))
    values = [object(), "x", float("nan"), float("inf"), -(10**400), 10**400, [1.5], [[1]], {"a": 1}, {1: "x"}, b"1"]
    value = data.draw(st.sampled_from(values))
    with pytest.raises(ValueError, match=name):
        model.engine.submit(Request([5], SamplingParams(**{name: value})))
    sampling = data.draw(st.sampled_from(BAD_AT_SUBMIT))
    with pytest.raises(ValueError, match=next(iter(sampling))):
        model.engine.submit(Request([5], SamplingParams(**sampling)))
    with pytest.raises(ValueError, match="banned_token_ids and min_tokens"):
        stops = frozenset(range(50))
        model.engine.submit(Request([5], SamplingParams(min_tokens=1, banned_token_ids=range(50, VOCAB)), stop_token_ids=stops))
    assert model.engine.stats() == before


def test_what_two_would_decide_is_refused(model):
    def pick(ids, logits):
        raise AssertionError

    for request, said in (
        (Request([5], grammar=ChoiceGrammar([[5]]), hand_out_logits=True), "grammar and hand_out_logits"),
        (Request([5], SamplingParams(temperature=1.0), hand_out_logits=True), "sampling and hand_out_logits"),
        (Request([5], SamplingParams(logprobs=1), hand_out_logits=True), "sampling and hand_out_logits"),
    ):
        with pytest.raises(ValueError, match=said):
            model.engine.submit(request, pick)
    with pytest.raises(ValueError, match="pick is 5"):
        model.engine.submit(Request([5], hand_out_logits=True), 5)
    with pytest.raises(ValueError, match="progress is 5"):
        model.engine.submit(Request([5]), None, 5)
    check(model)


def test_a_refused_request_leaves_its_prompt_cache_free(model):
    cache = make_prompt_cache(model)
    for bad in ({"max_tokens": 0}, {"prompt": [5] * 300}, {"max_kv_size": 9}):
        with pytest.raises(ValueError):
            model.engine.submit(Request(**{"prompt": [5], "prompt_cache": cache, **bad}))
    assert not cache.in_use
    assert len(rows(model.engine.submit(Request([5], max_tokens=3, prompt_cache=cache)))) == 3
