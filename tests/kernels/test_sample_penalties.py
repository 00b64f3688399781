"""sample: penalties agree with mlx-lm's processors, by windows of the history and by counts; what is committed, and speculation."""
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors
from samples import assert_same, draw, run, tables

from metalstep.kernels import params
from metalstep.kernels.sample import Parameters

# mlx-lm subtracts a frequency penalty once per occurrence, the kernel all at once: up to 40 roundings of numbers below 32.
CLOSE = dict(rtol=1e-6, atol=4e-5)
SIZES = st.sampled_from([1, 2, 5, 20, 90])  # windows; histories have up to 40 tokens


def mlx_processed(logits, tokens, **options):
    """A row after mlx-lm's processors for these tokens."""
    x = mx.array(logits)[None]
    for processor in make_logits_processors(**options):
        x = processor(mx.array(tokens), x)
    return np.array(x[0])


def occurrences(tokens):
    return {int(token): int(times) for token, times in zip(*np.unique(tokens, return_counts=True), strict=True)}


@given(
    seed=st.integers(0, 9999), vocab=st.sampled_from([3, 17, 100]), length=st.integers(1, 40), sizes=st.tuples(SIZES, SIZES, SIZES),
    repetition=st.sampled_from([1.0, 0.8, 1.1, 2.0]), presence=st.sampled_from([0.0, 1.5, -0.7]), frequency=st.sampled_from([0.0, 0.4]),
    biased=st.booleans(),
)  # fmt: skip
@settings(max_examples=60)
def test_windows_are_mlx_lms_context_sizes(h, seed, vocab, length, sizes, repetition, presence, frequency, biased):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((1, vocab)) * 4).astype(np.float32)
    history = rng.integers(0, vocab, length)
    bias = {int(t): float(rng.standard_normal()) for t in rng.choice(vocab, 2, replace=False)} if biased else {}
    p = Parameters(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, repetition_window=sizes[0],
        presence_window=sizes[1], frequency_window=sizes[2], history=history, counted=int(rng.integers(0, length + 1)), bias=bias,
        processed_logprobs=True,
    )  # fmt: skip
    expected = mlx_processed(
        logits[0], history, logit_bias=bias, repetition_penalty=repetition, repetition_context_size=sizes[0],
        presence_penalty=presence, presence_context_size=sizes[1], frequency_penalty=frequency, frequency_context_size=sizes[2],
    )  # fmt: skip
    out = draw(h, logits, [p])
    np.testing.assert_allclose(out.logits[0], expected, **CLOSE)
    assert out.sampled["token"] == out.logits[0].argmax()


@given(
    seed=st.integers(0, 9999), vocab=st.sampled_from([3, 17, 100, 5000]), length=st.integers(1, 40), prompt=st.integers(0, 40),
    counted=st.integers(0, 40), repetition=st.sampled_from([1.0, 0.8, 1.1]), presence=st.sampled_from([0.0, 1.5]),
    frequency=st.sampled_from([0.0, 0.4]),
)  # fmt: skip
@settings(max_examples=60)
def test_without_windows_all_tokens_count_whether_counts_or_the_history_hold_them(
    h, seed, vocab, length, prompt, counted, repetition, presence, frequency
):
    """Repetition sees the prompt and the output, the others the output alone. The counts hold the prompt at least."""
    rng = np.random.default_rng(seed)
    prompt = min(prompt, length)
    counted = max(prompt, min(counted, length))
    logits = (rng.standard_normal((1, vocab)) * 4).astype(np.float32)
    history = rng.integers(0, min(vocab, 30), length)
    p = Parameters(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, history=history, counted=counted,
        prompt=occurrences(history[:prompt]), output=occurrences(history[prompt:counted]), processed_logprobs=True,
    )  # fmt: skip
    expected = mlx_processed(logits[0], history, repetition_penalty=repetition, repetition_context_size=1000)
    options = dict(presence_penalty=presence, frequency_penalty=frequency, presence_context_size=1000, frequency_context_size=1000)
    if prompt < length:
        expected = mlx_processed(expected, history[prompt:], **options)
    np.testing.assert_allclose(draw(h, logits, [p]).logits[0], expected, **CLOSE)


def test_a_row_without_a_state_has_no_penalties_and_commits_nothing(h):
    logits = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    t = tables([Parameters(repetition_penalty=2.0, frequency_penalty=3.0, history=[0, 1, 2], processed_logprobs=True)] * 2, 40, commit=True)
    t.sampling["state"] = -1
    out = run(h, logits, t)
    assert_same(out.logits, logits)
    assert_same(out.history, t.history)
    assert_same(out.counts, t.counts)


def test_a_callers_embeddings_are_no_tokens(h):
    """They are negative in the history."""
    logits = np.ones((1, 5), np.float32)
    p = Parameters(presence_penalty=2.0, presence_window=9, history=[-1, 3, -5, -(2**31)], processed_logprobs=True)
    assert draw(h, logits, [p]).logits[0].tolist() == [1, 1, 1, -1, 1]


# ---- commits --------------------------------------------------------------------------------------------------------------------
@given(seed=st.integers(0, 999), rows=st.integers(1, 9), temperature=st.sampled_from([0.0, 1.0]), threads=st.integers(1, 3))
@settings(max_examples=20)
def test_a_sample_is_written_behind_the_row_and_counted_once(by_threads, seed, rows, temperature, threads):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, 30)).astype(np.float32)
    some = [
        Parameters(temperature=temperature, history=rng.integers(0, 30, rng.integers(1, 49)), prompt={4: 1}, output={5: 3})
        for _ in range(rows)
    ]
    t = tables(some, 30, seed=seed, commit=True)
    t.sampling["state"] = rng.permutation(rows)
    out = run(by_threads[threads], logits, t)
    history, counts = t.history.copy(), t.counts.copy()
    for i, state in enumerate(t.sampling["state"]):
        if t.positions[i] + 1 < history.shape[1]:  # a full row counts all the same
            history[state, t.positions[i] + 1] = out.sampled["token"][i]
        counts[state, out.sampled["token"][i]] += 1
    assert_same(out.history, history)
    assert_same(out.counts, counts)


PENALTIES = st.fixed_dictionaries(
    dict(
        repetition_penalty=st.sampled_from([1.0, 1.5]), presence_penalty=st.sampled_from([0.0, 1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.5]), repetition_window=st.sampled_from([0, 3]),
        presence_window=st.sampled_from([0, 3]), frequency_window=st.sampled_from([0, 7]),
    )
)  # fmt: skip


@given(
    seed=st.integers(0, 9999), steps=st.integers(1, 8), temperature=st.sampled_from([0.0, 1.0]), penalties=PENALTIES,
    processed=st.booleans(), threads=st.integers(1, 3),
)  # fmt: skip
@example(
    seed=0, steps=8, temperature=0.0, processed=False, threads=2,
    penalties=dict(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5),
)  # fmt: skip
@settings(max_examples=40)
def test_rows_of_one_step_are_the_same_as_one_after_the_other(by_threads, seed, steps, temperature, penalties, processed, threads):
    """Speculation: the drafted tokens are in the history, the counts end before them, nothing is committed."""
    h, rng, vocab = by_threads[threads], np.random.default_rng(seed), 12
    logits = rng.standard_normal((steps, vocab)).astype(np.float32)
    start = Parameters(
        temperature=temperature, history=rng.integers(0, vocab, 6), counted=6, prompt={3: 1}, output={4: 2, 5: 1},
        processed_logprobs=processed, top=3, **penalties,
    )  # fmt: skip
    one = tables([start], vocab, seed=seed, commit=True)
    after = one
    alone = []
    for step in range(steps):
        out = run(h, logits[step : step + 1], after)
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
    out = run(h, logits, together)
    for name in ("sampled", "top", "logits"):
        assert_same(getattr(out, name), np.concatenate([getattr(one, name) for one in alone]))
    assert_same(out.history, after.history)
    assert_same(out.counts, one.counts)


@pytest.mark.parametrize("window", [0, 5])
def test_counts_hold_prompt_and_output_apart(h, window):
    """Token 1 is in the prompt, 2 in the output, 3 in both."""
    logits = np.full((1, 5), 8, np.float32)
    p = Parameters(prompt={1: 4, 3: 1}, output={2: 2, 3: 1}, history=[1, 3, 2, 2, 3], counted=5, processed_logprobs=True)
    t = tables([p], 5)
    assert t.counts[0, 1:4].tolist() == [params.MS_COUNT_IN_PROMPT, 2, params.MS_COUNT_IN_PROMPT + 1]
    by_name = {
        "repetition_penalty": ([8, 4, 4, 4, 8], [8, 4, 4, 4, 8]),
        "presence_penalty": ([8, 8, 6, 6, 8], [8, 6, 6, 6, 8]),
        "frequency_penalty": ([8, 8, 4, 6, 8], [8, 6, 4, 4, 8]),
    }
    for name, (by_counts, by_window) in by_name.items():
        one = replace(p, **{name: 2.0, name.replace("penalty", "window"): window})
        assert draw(h, logits, [one]).logits[0].tolist() == (by_window if window else by_counts)
