"""SmolLM2 against MLX in float32 on English text: the native step is near-exact, which int8 activations are not."""
import heapq

import mlx.core as mx
import numpy as np
import pytest

import metalstep

TOKENS = 880  # of the essay on heaps that the standard library carries


def normalise(logits):
    wide = np.array(logits, dtype=np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def exact(smollm2, oracle):
    """Text ids, and MLX's log-probabilities [length, vocab] in float64."""
    ids = np.array(smollm2[1].encode(heapq.__about__))[:TOKENS]
    assert len(ids) >= 800
    return ids, normalise(oracle(mx.array(ids)[None])[0].astype(mx.float32))


@pytest.fixture(scope="module")
def logprobs(smollm2, exact):
    """Text ids; log-probabilities of the native step and of MLX."""
    ids, reference = exact
    return ids, normalise(smollm2[0](mx.array(ids)[None])[0]), reference


def test_the_mean_divergence_from_float32_is_below_1e_4(logprobs):
    _, ours, exact = logprobs
    assert (np.exp(exact) * (exact - ours)).sum(-1).mean() <= 1e-4


def test_the_most_likely_token_agrees_on_99_5_percent(logprobs):
    _, ours, exact = logprobs
    assert (ours.argmax(-1) == exact.argmax(-1)).mean() >= 0.995


def test_perplexity_is_within_a_thousandth(logprobs):
    ids, ours, exact = logprobs
    rows = np.arange(len(ids) - 1)
    perplexity = [np.exp(-lp[rows, ids[1:]].mean()) for lp in (ours, exact)]
    assert abs(perplexity[0] / perplexity[1] - 1) <= 1e-3


def test_logits_with_a_float32_cache_are_within_a_thousandth_of_their_range(exact):
    """A float16 cache alone moves single logits of 43 million by up to 1.2e-3 of the range."""
    ids, reference = exact
    model, _ = metalstep.load("smollm2", strict=True, kv_dtype="float32", max_context=1024)
    with model:
        ours = normalise(model(mx.array(ids)[None])[0])
    spread = reference.max(-1) - reference.min(-1)
    assert (np.abs(ours - reference).max(-1) / spread).max() <= 1e-3
