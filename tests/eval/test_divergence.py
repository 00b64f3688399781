"""Divergence: direct formulas, chunks, and what must be zero."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstep.eval.divergence import ROWS, Divergence, standard_error
from metalstep.eval.kv import check_length, windows

SEEDS = st.integers(0, 9999)


def logits(seed, rows, vocab=11, spread=4.0):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def result(reference, other, following, chunk=None):
    divergence = Divergence()
    for at in range(0, len(reference), chunk or len(reference)):
        end = at + (chunk or len(reference))
        divergence.add(reference[at:end], other[at:end], np.array(following[at:end], np.int64))
    return divergence


def softmax(x):
    powers = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@given(seed=SEEDS, rows=st.sampled_from([2, 33, ROWS, ROWS + 1, 150]), last=st.booleans())
@settings(max_examples=25)
def test_every_number_is_the_formulas(seed, rows, last):
    """last: the text goes on behind the last position."""
    reference, other = logits(seed, rows), logits(seed + 1, rows)
    following = np.random.default_rng(seed).integers(0, 11, rows if last else rows - 1)
    got = result(reference, other, following).result()
    p, q = softmax(reference), softmax(other)
    kld = (p * np.log(p / q)).sum(-1)
    nll = [-np.log(x[np.arange(len(following)), following]) for x in (p, q)]
    same = p.argmax(-1) == q.argmax(-1)
    expected = {
        "positions": rows,
        "kld_mean": kld.mean(),
        "kld_stderr": kld.std(ddof=1) / np.sqrt(rows),
        "kld_median": np.sort(kld)[(rows - 1) // 2 : rows // 2 + 1].mean(),
        "kld_p95": np.percentile(kld, 95),
        "kld_p99": np.percentile(kld, 99),
        "kld_max": kld.max(),
        "top1": same.mean(),
        "top1_stderr": np.sqrt(same.mean() * (1 - same.mean()) / rows),
        "perplexity": np.exp(nll[1].mean()),
        "perplexity_reference": np.exp(nll[0].mean()),
        "perplexity_ratio": np.exp(nll[1].mean()) / np.exp(nll[0].mean()),
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-9)


@given(seed=SEEDS, chunk=st.integers(1, 80))
@settings(max_examples=25)
def test_chunks_do_not_matter(seed, chunk):
    reference, other = logits(seed, 130), logits(seed + 1, 130)
    following = np.random.default_rng(seed).integers(0, 11, 129)
    whole, parts = result(reference, other, following), result(reference, other, following, chunk)
    np.testing.assert_allclose(whole.klds(), parts.klds(), rtol=1e-12)
    assert whole.result() == pytest.approx(parts.result(), rel=1e-12)


@given(seed=SEEDS, shift=st.floats(-50, 50, width=32))
def test_the_same_distribution_is_at_no_distance(seed, shift):
    """A constant added to logits changes no distribution, but for float32's rounding of it."""
    x = logits(seed, 20)
    got = result(x, x, np.zeros(19, int)).result()
    assert (got["kld_mean"], got["kld_max"], got["top1"], got["perplexity_ratio"]) == (0.0, 0.0, 1.0, 1.0)
    assert got["perplexity"] == got["perplexity_reference"]
    assert result(x, x + np.float32(shift), np.zeros(19, int)).result()["kld_max"] < 1e-9


@given(seed=SEEDS)
def test_divergence_is_never_below_zero_and_grows_with_noise(seed):
    x, noise = logits(seed, 64), logits(seed + 7, 64, spread=1.0)
    means = [result(x, x + np.float32(scale) * noise, np.zeros(63, int)).klds() for scale in (0.01, 0.1, 1.0)]
    assert all((kld >= -1e-12).all() for kld in means)
    assert means[0].mean() < means[1].mean() < means[2].mean()


def test_probabilities_that_vanish_in_float32_still_count():
    """A token that the reference is sure of and the other model all but excludes: 200 nats."""
    reference = np.array([[200.0, 0.0]], np.float32)
    got = result(reference, reference[:, ::-1], np.array([0])).result()
    assert got["kld_mean"] == pytest.approx(200.0)
    assert got["kld_stderr"] == 0.0 == standard_error(np.ones(1))


@given(ids=st.lists(st.integers(0, 99), min_size=1, max_size=60), context=st.integers(3, 20), begin=st.sampled_from([[], [7]]))
def test_windows_are_the_text_in_order_and_know_what_follows(ids, context, begin):
    cut = windows(begin, ids, context)
    assert [token for window in cut for token in window.tokens[len(begin) :]] == ids
    assert all(window.tokens[: len(begin)] == begin and len(window.tokens) <= context for window in cut)
    for window, after in zip(cut, [*cut[1:], None], strict=True):
        assert window.following == window.tokens[1:] + (after.tokens[len(begin) : len(begin) + 1] if after else [])


@pytest.mark.parametrize(("have", "tokens", "text"), [
    (31, None, "the text has 31 tokens, expected at least 32; pass a longer text$"),
    (99, 100, "the text has 99 tokens, expected at least 100; pass a longer text or fewer tokens"),
])  # fmt: skip
def test_a_text_that_is_too_short_is_refused(have, tokens, text):
    with pytest.raises(ValueError, match=text):
        check_length([1] * have, tokens)
