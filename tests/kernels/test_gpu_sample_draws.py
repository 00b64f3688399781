"""sample on a GPU: how often tokens are drawn, against the reference's probabilities, and that they are the host's tokens. Seeds are
fixed: each test gives the same counts always.
"""
import numpy as np
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import draw, draw_many, supports
from test_sample_draws import ALL, OFF, SOME, assert_frequencies

from metalstep.kernels import sample
from metalstep.kernels.sample import Parameters


@pytest.mark.parametrize(("first", "temperature"), [(False, 0.5), (True, 1.7)], ids=["mlx", "vllm"])
@pytest.mark.parametrize("options", SOME, ids=str)
def test_tokens_appear_as_often_as_the_reference_says(g, temperature, options, first):
    logits = (np.random.default_rng(5).standard_normal(97) * 2).astype(np.float32)
    p = Parameters(temperature=temperature, temperature_first=first, **options)
    assert_frequencies(draw_many(g, logits, p, 1280, seed=11), sample.probabilities(logits.astype(np.float64), p))


def test_biases_penalties_stop_tokens_and_masks_change_how_often_tokens_appear(g):
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal(300) * 2).astype(np.float32)
    most = np.argsort(-logits)
    p = Parameters(
        temperature=0.9, top_p=0.97, bias={int(most[3]): -1.0, int(most[200]): 6.0}, stop_tokens=[int(most[0])], min_tokens=10**6,
        allowed=rng.random(300) < 0.7, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2,
        history=[int(t) for t in most[:20]] * 2, prompt={int(most[0]): 1}, output={int(t): 1 for t in most[1:10]}, counted=20,
    )  # fmt: skip
    assert_frequencies(draw_many(g, logits, p, 3200, seed=12), sample.reference(logits, p).probabilities)


@pytest.mark.parametrize("bias", [-95.0, -110.0, -500.0, 12.0, 500.0])
def test_a_bias_that_moves_the_largest_logit_far_leaves_the_others_shares(g, bias):
    logits = (np.random.default_rng(8).standard_normal(97) * 2).astype(np.float32)
    token = int(logits.argmax()) if bias < 0 else int(logits.argmin())
    logits[token] += 100 if bias < 0 else 0
    p = Parameters(temperature=1.0, top_p=0.9, bias={token: bias})
    assert_frequencies(draw_many(g, logits, p, 1280, seed=13), sample.reference(logits, p).probabilities)


# Parts of 512 and of 2048 tokens, more candidates than the list of 1024 has, and ties over all of them.
LARGE = [
    OFF, dict(top_p=0.9), dict(top_p=0.995), dict(top_k=1500), dict(min_p=1e-5, top_k=3000), dict(xtc_probability=0.6, xtc_threshold=1e-3),
]  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("options", LARGE, ids=str)
def test_larger_vocabularies_with_ties_are_drawn_from_as_they_are_filtered(g, options, first):
    vocab = 4099
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal(vocab) * 1.5).astype(np.float32)
    logits[rng.random(vocab) < 0.5] = 1.25
    logits[rng.choice(vocab, 40, replace=False)] = 7.5
    p = Parameters(temperature=0.8, temperature_first=first, **options)
    assert_frequencies(draw_many(g, logits, p, 640, seed=3), sample.probabilities(logits.astype(np.float64), p))


@given(
    vocab=st.sampled_from([1, 2, 33, 63, 97]), top_p=st.sampled_from([1.0, 0.99, 0.7, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]), min_keep=st.sampled_from([0, 1, 5]), top_k=st.sampled_from([0, 1, 5, 40, 99]),
    xtc=st.sampled_from([0.0, 0.5, 1.0]), threshold=st.sampled_from([0.0, 0.01, 0.1, 0.4]), first=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 5.0]), spread=st.sampled_from([0.5, 2.0]), ties=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_the_tokens_that_can_appear_do_and_others_do_not(
    g, vocab, top_p, min_p, min_keep, top_k, xtc, threshold, first, temperature, spread, ties, seed
):
    logits = (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)
    if ties:
        logits = np.round(logits)
    p = Parameters(
        temperature=temperature, top_p=top_p, min_p=min_p, min_keep=min_keep, top_k=top_k, xtc_probability=xtc,
        xtc_threshold=threshold, temperature_first=first,
    )  # fmt: skip
    least, most = supports(logits, p)
    tokens = draw_many(g, logits, p, 640, seed=seed)
    drawn = np.bincount(tokens, minlength=vocab) > 0
    assert (most[drawn] > 0).all()
    assert drawn[least * len(tokens) > 25].all()  # e^-25 each


# ---- the host's tokens ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("options", [*SOME[:6], SOME[8], ALL | dict(top_k=700), dict(top_p=0.99)], ids=str)
@pytest.mark.parametrize("vocab", [97, 5000])
def test_a_seed_draws_the_hosts_tokens(g, host, vocab, options, first):
    """Both invert the same distribution at the same number. A draw that falls within the roundings of an edge is one in 10^6."""
    rows = 40
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((rows, vocab)) * 2).astype(np.float32)
    some = [Parameters(temperature=1.1, temperature_first=first, **options)] * rows
    draws = dict(seed=rng.integers(0, 2**63, rows).astype(np.uint64), counters=np.arange(rows))
    own, others = draw(g, logits, some, **draws).sampled, samples.draw(host, logits, some, **draws).sampled
    for name in ("token", "rank", "status"):
        np.testing.assert_array_equal(own[name], others[name])
    np.testing.assert_allclose(own["logprob"], others["logprob"], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("options", [OFF, dict(top_k=5), dict(top_p=0.999), dict(min_p=1e-30)], ids=str)
def test_a_token_of_no_probability_is_never_drawn(g, options):
    """Not even where a filter would keep more tokens than there are, or at a temperature that makes all equal."""
    logits = np.full(40, -np.inf, np.float32)
    logits[[3, 17, 39]] = [0, -1, -2]
    assert set(draw_many(g, logits, Parameters(temperature=1e30, **options), 160)) == {3, 17, 39}
