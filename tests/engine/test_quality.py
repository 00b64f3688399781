"""SmolLM2 against MLX in float32 on English text: the native step is near-exact, which int8 activations are not."""
import heapq

import mlx.core as mx
import numpy as np
import pytest

TOKENS = 880  # of the essay on heaps that the standard library carries


@pytest.fixture(scope="module")
def logprobs(smollm2, oracle):
    """Text ids; log-probabilities [length, vocab] in float64 of the native step and of MLX."""
    model, tokenizer = smollm2
    ids = np.array(tokenizer.encode(heapq.__about__))[:TOKENS]
    assert len(ids) >= 800

    def normalise(logits):
        wide = np.array(logits, dtype=np.float64)
        wide -= wide.max(-1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))

    return ids, normalise(model(mx.array(ids)[None])[0]), normalise(oracle(mx.array(ids)[None])[0].astype(mx.float32))


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


def test_logits_are_within_a_thousandth_of_their_range(logprobs):
    _, ours, exact = logprobs
    spread = exact.max(-1) - exact.min(-1)
    assert (np.abs(ours - exact).max(-1) / spread).max() <= 1e-3
