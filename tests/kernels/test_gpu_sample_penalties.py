"""sample on a GPU: penalties, by windows of the history and by counts; what is committed over the steps of a run, and speculation."""
from dataclasses import replace

import numpy as np
import pytest
import samples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import STRIDE, assert_same, draw, run, tables
from test_sample_penalties import PENALTIES, SIZES, occurrences

from metalstep.kernels import params, sample
from metalstep.kernels.sample import Parameters

CLOSE = dict(rtol=2e-7, atol=4e-6)  # four roundings, as test_gpu_sample.py has them, of logits that are twice as large


@given(
    seed=st.integers(0, 9999), vocab=st.sampled_from([3, 33, 97, 5000]), length=st.integers(1, 40), prompt=st.integers(0, 40),
    counted=st.integers(0, 40), sizes=st.tuples(SIZES | st.just(0), SIZES | st.just(0), SIZES | st.just(0)),
    repetition=st.sampled_from([1.0, 0.8, 1.1, 2.0]), presence=st.sampled_from([0.0, 1.5, -0.7]), frequency=st.sampled_from([0.0, 0.4]),
    biased=st.booleans(),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_windows_and_counts_are_as_the_reference_has_them(
    g, host, seed, vocab, length, prompt, counted, sizes, repetition, presence, frequency, biased
):
    """Tokens that the counts hold, and tokens that only the history does; the host's very bits."""
    rng = np.random.default_rng(seed)
    prompt = min(prompt, length)
    counted = max(prompt, min(counted, length))
    logits = (rng.standard_normal((1, vocab)) * 4).astype(np.float32)
    history = rng.integers(0, min(vocab, 30), length)
    bias = {int(t): float(rng.standard_normal()) for t in rng.choice(vocab, 2, replace=False)} if biased else {}
    p = Parameters(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, repetition_window=sizes[0],
        presence_window=sizes[1], frequency_window=sizes[2], history=history, counted=counted, bias=bias, processed_logprobs=True,
        prompt=occurrences(history[:prompt]), output=occurrences(history[prompt:counted]),
    )  # fmt: skip
    out = draw(g, logits, [p])
    np.testing.assert_allclose(out.logits[0], sample.process(logits[0], p), **CLOSE)
    np.testing.assert_array_equal(out.logits, samples.draw(host, logits, [p]).logits)
    assert out.sampled["token"] == out.logits[0].argmax()


def test_a_row_without_a_state_has_no_penalties_and_commits_nothing(g):
    logits = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    t = tables([Parameters(repetition_penalty=2.0, frequency_penalty=3.0, history=[0, 1, 2], processed_logprobs=True)] * 2, 40, commit=True)
    t.sampling["state"] = -1
    out = run(g, logits, t)
    assert_same(out.logits, logits)
    assert_same(out.history, t.history)
    assert_same(out.counts, t.counts)


def test_a_callers_embeddings_are_no_tokens(g):
    """They are negative in the history."""
    logits = np.ones((1, 5), np.float32)
    p = Parameters(presence_penalty=2.0, presence_window=9, history=[-1, 3, -5, -(2**31)], processed_logprobs=True)
    assert draw(g, logits, [p]).logits[0].tolist() == [1, 1, 1, -1, 1]


@pytest.mark.parametrize("window", [0, 5])
def test_counts_hold_prompt_and_output_apart(g, window):
    """Token 1 is in the prompt, 2 in the output, 3 in both."""
    logits = np.full((1, 5), 8, np.float32)
    p = Parameters(prompt={1: 4, 3: 1}, output={2: 2, 3: 1}, history=[1, 3, 2, 2, 3], counted=5, processed_logprobs=True)
    by_name = {
        "repetition_penalty": ([8, 4, 4, 4, 8], [8, 4, 4, 4, 8]),
        "presence_penalty": ([8, 8, 6, 6, 8], [8, 6, 6, 6, 8]),
        "frequency_penalty": ([8, 8, 4, 6, 8], [8, 6, 4, 4, 8]),
    }
    for name, (by_counts, by_window) in by_name.items():
        one = replace(p, **{name: 2.0, name.replace("penalty", "window"): window})
        assert draw(g, logits, [one]).logits[0].tolist() == (by_window if window else by_counts)


# ---- commits --------------------------------------------------------------------------------------------------------------------
@given(seed=st.integers(0, 999), rows=st.integers(1, 6), temperature=st.sampled_from([0.0, 1.0]))
@settings(max_examples=10, deadline=None)
def test_a_sample_is_written_behind_the_row_and_counted_once(g, seed, rows, temperature):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, 30)).astype(np.float32)
    some = [
        Parameters(temperature=temperature, history=rng.integers(0, 30, rng.integers(1, 49)), prompt={4: 1}, output={5: 3})
        for _ in range(rows)
    ]
    t = tables(some, 30, seed=seed, commit=True)
    t.sampling["state"] = rng.permutation(rows)
    out = run(g, logits, t)
    history, counts = t.history.copy(), t.counts.copy()
    for i, state in enumerate(t.sampling["state"]):
        if t.positions[i] + 1 < history.shape[1]:  # a full row counts all the same
            history[state, t.positions[i] + 1] = out.sampled["token"][i]
        counts[state, out.sampled["token"][i]] += 1
    assert_same(out.history, history)
    assert_same(out.counts, counts)


@given(
    seed=st.integers(0, 9999), rows=st.integers(1, 5), steps=st.integers(2, 6), penalties=PENALTIES, processed=st.booleans(),
    thread_order=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_a_run_of_several_steps_leaves_what_the_hosts_does(g, host, seed, rows, steps, penalties, processed, thread_order):
    """Samples, history and counts feed the next step's penalties. Processed logits stay in place, so that they grow with the steps."""
    rng, vocab = np.random.default_rng(seed), 700
    logits = rng.standard_normal((rows, vocab)).astype(np.float32)
    some = []
    for _ in range(rows):
        history = rng.integers(0, vocab, rng.integers(1, STRIDE - steps))
        options = dict(temperature=float(rng.choice([0.0, 1.0])), top_k=int(rng.choice([0, 20])), top=3, bias={1: 2.0})
        some.append(Parameters(history=history, counted=len(history), processed_logprobs=processed, **options, **penalties))
    t = tables(some, vocab, seed=seed, commit=True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("METALSTEP_SIM_SEED", str(thread_order))
        out = run(g, logits, t, steps=steps)
    expected = samples.run(host, logits, t, steps=steps)
    np.testing.assert_array_equal(out.sampled["token"], expected.sampled["token"])
    np.testing.assert_array_equal(out.sampled["rank"], expected.sampled["rank"])
    np.testing.assert_array_equal(out.top["token"], expected.top["token"])
    for name in ("history", "counts", "sampling", "logits"):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected, name))


@given(
    seed=st.integers(0, 9999), steps=st.integers(1, 5), temperature=st.sampled_from([0.0, 1.0]), penalties=PENALTIES,
    processed=st.booleans(),
)  # fmt: skip
@example(
    seed=0, steps=8, temperature=0.0, processed=False,
    penalties=dict(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_rows_of_one_step_are_the_same_as_one_after_the_other(g, seed, steps, temperature, penalties, processed):
    """Speculation: the drafted tokens are in the history, the counts end before them, nothing is committed."""
    rng, vocab = np.random.default_rng(seed), 12
    logits = rng.standard_normal((steps, vocab)).astype(np.float32)
    start = Parameters(
        temperature=temperature, history=rng.integers(0, vocab, 6), counted=6, prompt={3: 1}, output={4: 2, 5: 1},
        processed_logprobs=processed, top=3, **penalties,
    )  # fmt: skip
    one = tables([start], vocab, seed=seed, commit=True)
    after = one
    alone = []
    for step in range(steps):
        out = run(g, logits[step : step + 1], after)
        alone.append(out)
        after = replace(after, history=out.history, counts=out.counts, positions=after.positions + 1, sampling=after.sampling.copy())
        after.sampling["counter"] += 1
        after.sampling["counted"] += 1
    drawn = np.concatenate([out.sampled["token"] for out in alone])
    np.testing.assert_array_equal(after.history[0, 6 : 6 + steps], drawn)
    np.testing.assert_array_equal(after.counts[0] - one.counts[0], np.bincount(drawn, minlength=vocab))

    together = tables([start] * steps, vocab, seed=seed)
    together.sampling["state"], together.sampling["counter"] = 0, np.arange(steps)
    together = replace(together, history=after.history, counts=one.counts, positions=one.positions[0] + np.arange(steps, dtype=np.int32))
    out = run(g, logits, together)
    for name in ("sampled", "top", "logits"):
        assert_same(getattr(out, name), np.concatenate([getattr(one, name) for one in alone]))
    assert_same(out.history, after.history)
    assert_same(out.counts, one.counts)


def test_a_history_of_any_length_is_seen(g):
    """More of it than a threadgroup has threads, and counts of all of it."""
    vocab, length = 600, 3000
    rng = np.random.default_rng(2)
    history = rng.integers(0, vocab, length)
    p = Parameters(frequency_penalty=0.01, presence_penalty=0.5, presence_window=700, history=history[:1], processed_logprobs=True)
    t = tables([p], vocab)
    t = replace(t, history=history.astype(np.int32)[None], positions=np.array([length - 1], np.int32))
    out = run(g, np.zeros((1, vocab), np.float32), t)
    expected = -0.01 * np.bincount(history, minlength=vocab) - 0.5 * np.isin(np.arange(vocab), history[-700:])
    np.testing.assert_allclose(out.logits[0], expected, rtol=1e-6)
    assert length < params.MS_COUNT_IN_PROMPT
