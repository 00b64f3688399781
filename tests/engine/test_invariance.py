"""A request's tokens and logprobs do not depend on what else runs, how its prompt is cut, or how many steps a native call makes."""
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from workload import alone, answers, requests, watched

import metalstep

COUNT = 40
NO_SHRINKING = (Phase.explicit, Phase.generate)  # an example takes seconds


@pytest.fixture(scope="module")
def expected(smollm2):
    model, _ = smollm2
    wanted = requests(COUNT, model.native.vocab_size)
    return wanted, alone(model.engine, wanted)


@settings(max_examples=6, phases=NO_SHRINKING)
@given(
    order=st.permutations(range(COUNT)),
    chunks=st.lists(st.sampled_from([1, 3, 16, 17, 64, 512]), min_size=COUNT, max_size=COUNT),
    steps=st.sampled_from([1, 8, 3]),
)
def test_in_any_batch_with_any_chunks_and_any_number_of_steps(smollm2, expected, order, chunks, steps):
    engine = smollm2[0].engine
    wanted, lone = expected
    mixed = [replace(wanted[i], prefill_rows=chunks[i], decode_steps=steps) for i in order]
    with watched(engine) as calls:
        got = answers(engine, mixed)
    assert max(rows for rows, _ in calls) >= 32
    assert (max(k for _, k in calls) > 1) == (steps > 1)
    for i, answer in zip(order, got, strict=True):
        assert answer == lone[i], f"request {i}"


def test_thirty_two_requests_really_decode_in_one_call(smollm2, expected):
    engine = smollm2[0].engine
    wanted, lone = expected
    decoding = [replace(request, max_tokens=10, stop_token_ids=frozenset(), decode_steps=8) for request in wanted[:32]]
    with watched(engine) as calls:
        got = answers(engine, decoding)
    assert (32, 8) in calls
    for answer, other in zip(got, lone, strict=False):
        shared = min(len(answer), len(other))
        assert [a[:4] for a in answer[:shared]] == [o[:4] for o in other[:shared]]


def test_fifty_tokens_of_thirty_two_requests_are_as_many_calls_as_steps_ask_for(smollm2):
    model, _ = smollm2
    for steps in (1, 7, 8, 32):
        wanted = [
            replace(request, max_tokens=51, stop_token_ids=frozenset(), decode_steps=steps)
            for request in requests(32, model.native.vocab_size, longest=8, seed=steps)
        ]
        streams = [model.engine.submit(request) for request in wanted]
        first = [next(stream) for stream in streams]
        with watched(model.engine) as calls:
            rest = [list(stream) for stream in streams]
        assert len(first) == 32 and all(len(tokens) == 50 for tokens in rest)
        assert len(calls) == -(-50 // steps)


@pytest.fixture(scope="module")
def cramped():
    """A cache for a fraction of what the requests need: they push each other out."""
    model, _ = metalstep.load("smollm2", strict=True, max_context=320, kv_memory=24 * 16 * 23_040)
    with model:
        yield model


@settings(max_examples=4, phases=NO_SHRINKING)
@given(order=st.permutations(range(COUNT)), steps=st.sampled_from([1, 8]), chunk=st.sampled_from([5, 48, 512]))
def test_after_preemption(cramped, expected, order, steps, chunk):
    wanted, lone = expected
    with watched(cramped.engine):
        got = answers(cramped.engine, [replace(wanted[i], decode_steps=steps, prefill_rows=chunk) for i in order])
    after = cramped.engine.stats()
    for i, answer in zip(order, got, strict=True):
        assert answer == lone[i], f"request {i}"
    assert after.preemptions > 0
    assert after.free_blocks == after.total_blocks


def test_with_a_prefix_hit(smollm2):
    engine = smollm2[0].engine
    prefix = [(7 * i) % 40_000 + 5 for i in range(200)]
    for i, request in enumerate(requests(9, smollm2[0].native.vocab_size, longest=40, seed=6)):
        wanted = replace(request, prompt=prefix + request.prompt)
        salted = replace(wanted, prompt=[1000 + i, *wanted.prompt[1:]])  # no prefix in common with anything
        cold = answers(engine, [salted])[0]
        hot_stream = engine.submit(salted)
        hot = [(o.token, o.logprob, o.rank, o.top, o.finish_reason) for o in hot_stream]
        assert hot_stream.cached_tokens >= 192
        assert hot == cold
