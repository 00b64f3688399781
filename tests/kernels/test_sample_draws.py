"""sample: how often tokens are drawn, against the reference's probabilities. Seeds are fixed: each test gives the same counts always."""
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from samples import draw, draw_many, supports

from metalstep.kernels import sample
from metalstep.kernels.sample import Parameters


@pytest.fixture(scope="module", autouse=True)
def interpreted_filters():
    """mlx-lm compiles its filters, which takes longer than all that is tested here, once per value of an option."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def fits(tokens, probabilities):
    """Chi-square below what one in a million exceeds (4.75 standard deviations, Wilson-Hilferty); bins of about 8 or more."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return False
    expected = probabilities * len(tokens)
    order = np.argsort(expected, kind="stable")
    bins = np.unique(np.floor(np.cumsum(expected[order]) / 8).astype(int), return_inverse=True)[1]
    observed, expected = (np.bincount(bins, weights=a[order]) for a in (counts, expected))
    keep = expected > 0
    chi, free = ((observed - expected)[keep] ** 2 / expected[keep]).sum(), max(keep.sum() - 1, 1)
    return chi <= free * (1 - 2 / (9 * free) + 4.75 * np.sqrt(2 / (9 * free))) ** 3


def assert_frequencies(tokens, probabilities):
    assert (np.bincount(tokens, minlength=len(probabilities))[probabilities == 0] == 0).all()
    assert fits(tokens, probabilities)


OFF: dict = dict()
ALL = dict(top_p=0.95, min_p=0.01, top_k=50)
SOME = [
    OFF, dict(top_p=0.9), dict(min_p=0.02), dict(min_p=0.9, min_keep=30), dict(top_k=20), ALL, dict(top_p=0.5, top_k=3),
    dict(xtc_probability=0.4, xtc_threshold=0.03), dict(xtc_probability=1.0, xtc_threshold=0.02, xtc_special_tokens=(3, 90, 7), **ALL),
    dict(xtc_probability=0.7, xtc_threshold=0.03, top_k=30), dict(xtc_probability=0.7, xtc_threshold=0.03, min_p=0.05),
    dict(xtc_probability=0.7, xtc_threshold=0.03, top_p=0.8),
]  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("options", SOME, ids=str)
def test_tokens_appear_as_often_as_the_reference_says(h, temperature, options, first):
    logits = (np.random.default_rng(5).standard_normal(200) * 2).astype(np.float32)
    p = Parameters(temperature=temperature, temperature_first=first, **options)
    assert_frequencies(draw_many(h, logits, p, 6400, seed=11), sample.probabilities(logits.astype(np.float64), p))


def test_biases_penalties_stop_tokens_and_masks_change_how_often_tokens_appear(h):
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal(300) * 2).astype(np.float32)
    most = np.argsort(-logits)
    p = Parameters(
        temperature=0.9, top_p=0.97, bias={int(most[3]): -1.0, int(most[200]): 6.0}, stop_tokens=[int(most[0])], min_tokens=10**6,
        allowed=rng.random(300) < 0.7, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2,
        history=[int(t) for t in most[:20]] * 2, prompt={int(most[0]): 1}, output={int(t): 1 for t in most[1:10]}, counted=20,
    )  # fmt: skip
    expected = sample.reference(logits, p)
    assert_frequencies(draw_many(h, logits, p, 6400, seed=12), expected.probabilities)


@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("options", [OFF, dict(min_p=0.001), dict(top_k=3), dict(top_p=0.99)], ids=str)
def test_xtc_keeps_its_special_tokens(h, options, first):
    """Tokens 0 to 3 are above the threshold: 0 and 2 stay for they are special, 3 for it is the least likely."""
    logits = np.array([3, 2.9, 2.8, 2.7, 0, -1, -1], np.float32)
    p = Parameters(
        temperature=1.0, temperature_first=first, xtc_probability=1.0, xtc_threshold=0.1, xtc_special_tokens=(2, 0), **options
    )  # fmt: skip
    tokens = draw_many(h, logits, p, 3200, seed=14)
    assert {0, 2, 3} <= set(tokens) and 1 not in tokens
    assert_frequencies(tokens, sample.probabilities(logits.astype(np.float64), p))


@pytest.mark.parametrize("bias", [-95.0, -110.0, -500.0, 12.0, 500.0])
def test_a_bias_that_moves_the_largest_logit_far_leaves_the_others_shares(h, bias):
    """The sums of the model's own logits and of the processed ones share what no bias changes, unless they are far apart."""
    logits = (np.random.default_rng(8).standard_normal(300) * 2).astype(np.float32)
    token = int(logits.argmax()) if bias < 0 else int(logits.argmin())
    logits[token] += 100 if bias < 0 else 0
    p = Parameters(temperature=1.0, top_p=0.9, bias={token: bias})
    assert_frequencies(draw_many(h, logits, p, 3200, seed=13), sample.reference(logits, p).probabilities)


@pytest.mark.parametrize("options", [OFF, dict(top_p=0.8), dict(top_k=7)], ids=str)
def test_seeds_are_as_good_as_counters(h, options):
    """One draw of each of many requests, whose seeds differ in one half."""
    logits = (np.random.default_rng(6).standard_normal(30) * 1.5).astype(np.float32)
    rows, p = 6000, Parameters(temperature=1.0, **options)
    for seeds in (np.arange(rows) + (7 << 32), (np.arange(rows) << 32) + 7):
        out = draw(h, np.tile(logits, (rows, 1)), [p] * rows, seed=seeds)
        assert_frequencies(out.sampled["token"], sample.probabilities(logits.astype(np.float64), p))


# ---- vocabularies of a language model's size ----------------------------------------------------------------------------------
LARGE = [
    OFF, dict(top_p=0.9), dict(min_p=0.01), dict(top_k=50), dict(top_p=0.95, min_p=1e-4, top_k=2000),
    dict(xtc_probability=0.6, xtc_threshold=0.001), dict(xtc_probability=0.6, xtc_threshold=0.002, top_p=0.9, top_k=100),
    dict(xtc_probability=1.0, xtc_threshold=0.001, top_k=300, min_p=0.02, xtc_special_tokens=(1, 2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("options", LARGE, ids=str)
def test_large_vocabularies_with_ties_are_drawn_from_as_they_are_filtered(by_threads, options, first):
    """The large logits lie in every chunk; half of the vocabulary are ties, and so are many of the most likely."""
    vocab = 100_003
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal(vocab) * 2.5).astype(np.float32)
    logits[rng.random(vocab) < 0.5] = 1.25
    logits[rng.choice(vocab, 40, replace=False)] = 9.5
    logits[[1, 2, 3]] = 10
    p = Parameters(temperature=0.8, temperature_first=first, **options)
    tokens = draw_many(by_threads[2], logits, p, 3200, seed=3)
    assert_frequencies(tokens, sample.probabilities(logits.astype(np.float64), p))


# Filters, and those of them that change nothing: each keeps the most likely tokens, so the strictest hides the others.
ALL_FILTERS = [
    (dict(top_p=0.7, min_p=0.01, min_keep=40, top_k=12), {"min_p", "min_keep"}),
    (dict(top_p=0.9, min_p=0.6, min_keep=24, top_k=18), {"top_p", "top_k"}),
]
WINDOWS = dict(repetition_window=24, presence_window=12, frequency_window=30)
BY_COUNTS = dict(prompt={}, output={}, counted=38)
WRONG = dict(
    temperature=1.6, top_p=1.0, min_p=0.0, min_keep=1, top_k=0, xtc_probability=0.15, xtc_threshold=0.1, xtc_special_tokens=(),
    repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, history=(), bias={}, stop_tokens=(), min_tokens=0, allowed=None,
)  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("windows", [{}, WINDOWS], ids=["counts", "windows"])
@pytest.mark.parametrize(("filters", "hidden"), ALL_FILTERS, ids=["top", "min"])
def test_everything_at_once_is_drawn_as_the_reference_says(by_threads, filters, hidden, windows, first):
    """Ties among the likely tokens and half of the vocabulary; a seed gives the same tokens again; no option is without effect.

    Both masks hold tokens back. Each wrong value in turn gives the reference another distribution, which the draws do not fit.
    """
    vocab = 100_003
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal(vocab) * 2).astype(np.float32)
    logits[rng.random(vocab) < 0.5] = 1.25
    likely = [int(token) for token in rng.choice(vocab, 60, replace=False)]
    logits[likely] = np.repeat(np.linspace(12, 9, 20), 3)
    allowed = rng.random(vocab) < 0.7
    allowed[likely[:4]], allowed[likely[4]] = True, False
    p = Parameters(
        temperature=0.7, temperature_first=first, xtc_probability=0.5, xtc_threshold=0.02,
        xtc_special_tokens=likely[7:9] + likely[20:22], repetition_penalty=1.06, presence_penalty=0.4, frequency_penalty=0.3,
        history=likely[4:20] + likely[:12] + likely[6:14], counted=30, prompt=dict.fromkeys(likely[20:24], 1),
        output={token: 1 + i % 3 for i, token in enumerate(likely[3:18])}, allowed=allowed, min_tokens=10**6,
        bias={likely[1]: -2.0, likely[30]: 2.5, likely[50]: 2.0, 70_000: 11.0}, stop_tokens=likely[2:3] + likely[16:18],
        **filters, **windows,
    )  # fmt: skip
    draws, seed = 6400, 21
    tokens = draw_many(by_threads[2], logits, p, draws, seed)
    np.testing.assert_array_equal(draw_many(by_threads[3], logits, p, draws, seed), tokens)
    assert (draw_many(by_threads[2], logits, p, 128, seed + 1) != draw_many(by_threads[2], logits, p, 128, seed)).any()
    alone = draw(by_threads[1], logits[None], [p], seed=seed, counters=101).sampled["token"]
    assert alone == tokens.reshape(100, 64)[1, 1]  # 64 rows of 100 steps: step 1 of row 1

    assert_frequencies(tokens, sample.reference(logits, p).probabilities)
    further = dict.fromkeys(windows, 2) if windows else BY_COUNTS
    for name, value in {**WRONG, **further, "temperature_first": not first}.items():
        if name not in hidden:
            assert not fits(tokens, sample.reference(logits, replace(p, **{name: value})).probabilities), f"{name} is without effect"


@pytest.mark.parametrize("vocab", [4095, 4096, 4097, 5000])
@pytest.mark.parametrize("options", [OFF, dict(top_p=0.9), dict(top_k=50), dict(top_k=3000)], ids=str)
def test_a_chunks_edges_are_no_edges_of_the_distribution(by_threads, vocab, options):
    logits = (np.random.default_rng(vocab).standard_normal(vocab) * 2.5).astype(np.float32)
    p = Parameters(temperature=0.8, **options)
    assert_frequencies(draw_many(by_threads[3], logits, p, 3200, seed=3), sample.probabilities(logits.astype(np.float64), p))


# ---- which tokens can appear ------------------------------------------------------------------------------------------------
@given(
    vocab=st.sampled_from([1, 2, 16, 17, 63, 100]), top_p=st.sampled_from([1.0, 0.99, 0.7, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]), min_keep=st.sampled_from([0, 1, 5]), top_k=st.sampled_from([0, 1, 5, 40, 99]),
    xtc=st.sampled_from([0.0, 0.5, 1.0]), threshold=st.sampled_from([0.0, 0.01, 0.1, 0.4]), first=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 5.0]), spread=st.sampled_from([0.5, 2.0]), ties=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@example(  # a threshold of 0 drops all but the least likely
    vocab=100, top_p=1.0, min_p=0.0, min_keep=1, top_k=0, xtc=1.0, threshold=0.0, first=False, temperature=1.0, spread=0.5, ties=False,
    seed=0,
)  # fmt: skip
@settings(max_examples=80)
def test_the_tokens_that_can_appear_do_and_others_do_not(
    h, vocab, top_p, min_p, min_keep, top_k, xtc, threshold, first, temperature, spread, ties, seed
):
    logits = (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)
    if ties:
        logits = np.round(logits)
    p = Parameters(
        temperature=temperature, top_p=top_p, min_p=min_p, min_keep=min_keep, top_k=top_k, xtc_probability=xtc,
        xtc_threshold=threshold, temperature_first=first,
    )  # fmt: skip
    least, most = supports(logits, p)
    tokens = draw_many(h, logits, p, 2560, seed=seed)
    drawn = np.bincount(tokens, minlength=vocab) > 0
    assert (most[drawn] > 0).all()
    assert drawn[least * len(tokens) > 25].all()  # e^-25 each


def mlx_filtered(logits, top_p, min_p, min_keep, top_k):
    """Logprobs of mlx-lm's sampler before its temperature, -inf where a filter removes."""
    x = mx.array(logits)[None]
    x = x - mx.logsumexp(x, keepdims=True)
    if 0 < top_p < 1:
        x = apply_top_p(x, top_p)
    if min_p > 0:
        x = apply_min_p(x, min_p, min_keep)
    if 0 < top_k < x.shape[1]:
        x = apply_top_k(x, top_k)
    return np.array(x[0])


@given(
    vocab=st.sampled_from([17, 63, 100]), top_p=st.sampled_from([1.0, 0.99, 0.7, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.05, 0.5]), min_keep=st.sampled_from([1, 5]), top_k=st.sampled_from([0, 1, 5, 40]),
    spread=st.sampled_from([0.5, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_the_reference_keeps_what_mlx_lms_filters_keep(vocab, top_p, min_p, min_keep, top_k, spread, seed):
    """Up to a token at the edge: mlx-lm adds up probabilities in float32."""
    logits = (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)
    p = Parameters(temperature=1.0, top_p=top_p, min_p=min_p, min_keep=min_keep, top_k=top_k)
    least, most = supports(logits, p)
    kept = np.isfinite(mlx_filtered(logits, top_p, min_p, min_keep, top_k))
    assert (most[kept] > 0).all() and kept[least > 0].all()


@given(seed=st.integers(0, 99), top_k=st.integers(1, 12), vocab=st.sampled_from([17, 63]))
@settings(max_examples=20)
def test_of_equal_logits_top_k_keeps_the_first_and_mlx_lms_top_p_keeps_all(h, seed, top_k, vocab):
    logits = np.random.default_rng(seed).integers(-1, 2, vocab).astype(np.float32)
    first = np.argsort(-logits, kind="stable")
    assert set(draw_many(h, logits, Parameters(temperature=100.0, top_k=top_k), 3200)) == set(first[:top_k])
    largest = np.flatnonzero(logits == logits.max())
    assert set(draw_many(h, logits, Parameters(temperature=100.0, top_p=1e-3), 3200)) == set(largest)
    one = Parameters(temperature=100.0, top_p=1e-3, temperature_first=True)
    assert set(draw_many(h, logits, one, 128)) == {first[0]}


@pytest.mark.parametrize("options", [OFF, dict(top_k=5), dict(top_p=0.999), dict(min_p=1e-30)], ids=str)
def test_a_token_of_no_probability_is_never_drawn(h, options):
    """Not even where a filter would keep more tokens than there are, or at a temperature that makes all equal."""
    logits = np.full(40, -np.inf, np.float32)
    logits[[3, 17, 39]] = [0, -1, -2]
    assert set(draw_many(h, logits, Parameters(temperature=1e30, **options), 320)) == {3, 17, 39}
