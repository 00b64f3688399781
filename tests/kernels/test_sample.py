"""sample: which tokens can appear and how often, as mlx-lm's filters say; what a draw depends on, and what it does not."""
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from programs import own_buffers

from metalstep.kernels import params, sample
from metalstep.kernels.launch import Launch

VOCABULARIES = [1, 2, 15, 16, 17, 63, 300, 4095, 4096, 4097, 5000]  # logits are summed in chunks of 4096
SAMPLING, SAMPLED = params.record("MSSampling"), params.record("MSSampled")
NOTHING = np.array((-7, np.nan, 12345, 99), SAMPLED)  # of a row that did not run


@pytest.fixture(scope="module", autouse=True)
def interpreted_filters():
    """mlx-lm compiles its filters, which takes longer than all that is tested here, once per value of an option."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def requests(rows, *, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0, seed=0, counter=None):
    """MSSampling of `rows` rows; the counters count them unless given."""
    out = np.zeros(rows, SAMPLING)
    out["temperature"], out["top_p"], out["min_p"], out["top_k"] = temperature, top_p, min_p, top_k
    out["seed_lo"], out["seed_hi"] = seed & 0xFFFFFFFF, seed >> 32
    out["counter"] = np.arange(rows) if counter is None else counter
    return out


def draw(h, logits, sampling, plan_rows=None):
    """MSSampled of each row of `logits`; a plan for more rows leaves the others as NOTHING."""
    rows, vocab = logits.shape
    plan_rows = plan_rows or rows
    with own_buffers(h):
        step = h.step(rows, sampling=sampling.view(np.uint8))
        owner = h.put(np.full(plan_rows, NOTHING, SAMPLED).view(np.uint8))
        step = type(step)(**{**vars(step), "sampled": owner})
        h.run(sample.launches(h.put(logits.astype(np.float32)), step, vocab, plan_rows), plan_rows, plan_rows)
        return h.get(owner, SAMPLED, (plan_rows,))


def filtered(logits, top_p=1.0, min_p=0.0, top_k=0):
    """Logprobs of mlx-lm's sampler before its temperature, -inf where a filter removes."""
    x = mx.array(logits)[None]
    x = x - mx.logsumexp(x, keepdims=True)
    if 0 < top_p < 1:
        x = apply_top_p(x, top_p)
    if min_p > 0:
        x = apply_min_p(x, min_p)
    if 0 < top_k < x.shape[1]:
        x = apply_top_k(x, top_k)
    return np.array(x[0])


def between(logits, top_p=1.0, min_p=0.0, top_k=0):
    """Tokens that pass the filters for certain, and those that may: float32 sums of probabilities end a few units apart."""
    sure = np.isfinite(filtered(logits, max(top_p - 1e-5, 1e-7) if top_p < 1 else 1.0, min_p * (1 + 1e-5), top_k))
    may = np.isfinite(filtered(logits, top_p + 1e-5 if top_p < 1 else 1.0, min_p * (1 - 1e-5), top_k))
    return sure, may


def assert_frequencies(counts, probabilities):
    """Chi-square below its value at five standard deviations (Wilson-Hilferty); bins of fewer than 8 are put together."""
    expected = probabilities / probabilities.sum() * counts.sum()
    assert (counts[expected == 0] == 0).all()
    order = np.argsort(expected)
    bins = np.floor(np.cumsum(expected[order]) / 8).astype(int)
    bins = np.unique(bins, return_inverse=True)[1]
    observed, expected = (np.bincount(bins, weights=a[order]) for a in (counts, expected))
    keep = expected > 0
    chi, free = ((observed - expected)[keep] ** 2 / expected[keep]).sum(), max(keep.sum() - 1, 1)
    assert chi <= free * (1 - 2 / (9 * free) + 5 * np.sqrt(2 / (9 * free))) ** 3


def assert_same(some, others):
    """Bit for bit, NaN included."""
    np.testing.assert_array_equal(some.view(np.uint32), others.view(np.uint32))


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def ranks(logits, tokens):
    """1 + how many are larger, equal ones by their index."""
    own = logits[np.arange(len(logits)), tokens][:, None]
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < tokens[:, None]))
    return 1 + before.sum(1)


# ---- the random numbers -------------------------------------------------------------------------------------------------
def philox(counter, key):
    """Philox 4x32-10 as the paper has it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_has_its_known_answers():
    """kat_vectors of Random123: the yardstick of the next test."""
    ones = [0xFFFFFFFF] * 6
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones[:4], ones[4:]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("vocab", [2**12, 2**16])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x299F31D0A4093822])
def test_a_draw_among_equal_logits_shows_the_first_word_of_philox(h, vocab, seed):
    counters = [0, 1, 2, 0x243F6A88, 2**32 - 1]
    words = [philox([c, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[0] for c in counters]
    out = draw(h, np.zeros((5, vocab)), requests(5, seed=seed, counter=counters))
    np.testing.assert_array_equal(out["token"], [w * vocab >> 32 for w in words])
    np.testing.assert_array_equal(out["rank"], out["token"] + 1)
    out = draw(h, np.zeros((5, vocab)), requests(5, seed=seed, counter=counters, top_k=vocab // 4))
    np.testing.assert_array_equal(out["token"], [w * (vocab // 4) >> 32 for w in words])


# ---- greedy ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", VOCABULARIES)
@given(seed=st.integers(0, 99), ties=st.booleans(), rows=st.integers(1, 9))
@settings(max_examples=12)
def test_temperature_0_takes_the_first_of_the_most_likely(by_threads, vocab, seed, ties, rows):
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-3, 4, (rows, vocab)) if ties else rng.standard_normal((rows, vocab)) * 5).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[:, rng.integers(vocab)] = 3
    for threads in (1, 3):
        out = draw(by_threads[threads], logits, requests(rows, temperature=0.0, top_p=0.5, top_k=3))
        np.testing.assert_array_equal(out["token"], logits.argmax(1))
        np.testing.assert_array_equal(out["rank"], 1)
        np.testing.assert_array_equal(out["status"], params.MS_SAMPLE_OK)
        np.testing.assert_allclose(out["logprob"], log_softmax(logits).max(1), rtol=2e-6, atol=2e-7)


def test_minus_0_and_0_are_one_logit(h):
    logits = np.array([[-1, -0.0, 0.0], [-1, 0.0, -0.0]], np.float32)
    np.testing.assert_array_equal(draw(h, logits, requests(2, temperature=0.0))["token"], [1, 1])
    out = draw(h, np.tile(logits[:1], (200, 1)), requests(200, top_k=1))
    assert set(out["token"]) == {1}


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize("options", [dict(), dict(top_k=4), dict(top_p=0.9)])
def test_a_tiny_temperature_draws_among_the_most_likely_alone(h, temperature, options):
    logits = np.array([1, 5, 2, 5, -np.inf, 4.99], np.float32)
    out = draw(h, np.tile(logits, (100, 1)), requests(100, temperature=temperature, **options))
    assert set(out["token"]) == {1, 3}


# ---- the tokens that filters leave ------------------------------------------------------------------------------------------
OFF = dict(top_p=1.0, min_p=0.0, top_k=0)


@given(
    vocab=st.sampled_from([1, 2, 16, 17, 63, 100]), top_p=st.sampled_from([1.0, 0.99, 0.7, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.05, 0.5]), top_k=st.sampled_from([0, 1, 5, 40, 99]),
    spread=st.sampled_from([0.5, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
@example(vocab=100, top_p=1.0, min_p=0.0, top_k=40, spread=2.0, seed=0)
@example(vocab=100, top_p=0.7, min_p=0.0, top_k=0, spread=2.0, seed=0)
@example(vocab=100, top_p=1.0, min_p=0.05, top_k=0, spread=2.0, seed=0)
@settings(max_examples=40)
def test_the_tokens_that_can_appear_are_those_that_pass_mlx_lms_filters(h, vocab, top_p, min_p, top_k, spread, seed):
    """At a high temperature those are about equally likely: 25 draws for each show them all."""
    logits = (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)
    options = dict(top_p=top_p, min_p=min_p, top_k=top_k)
    sure, may = between(logits, **options)
    rows = 25 * int(may.sum())
    out = draw(h, np.tile(logits, (rows, 1)), requests(rows, temperature=100.0, seed=seed, **options))
    drawn = np.bincount(out["token"], minlength=vocab) > 0
    assert (drawn <= may).all() and (sure <= drawn).all()
    np.testing.assert_array_equal(out["rank"], ranks(np.tile(logits, (rows, 1)), out["token"]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "options",
    [
        OFF, dict(top_p=0.9), dict(min_p=0.02), dict(top_k=20), dict(top_p=0.95, min_p=0.01, top_k=50),
        dict(top_p=0.5, top_k=3), dict(min_p=0.3, top_k=1000),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_appear_as_often_as_their_tempered_probability_says(h, temperature, options):
    logits = (np.random.default_rng(5).standard_normal(200) * 2).astype(np.float32)
    rows = 6000
    out = draw(h, np.tile(logits, (rows, 1)), requests(rows, temperature=temperature, seed=11, **options))
    kept = filtered(logits, **options).astype(np.float64)
    assert_frequencies(np.bincount(out["token"], minlength=200), np.exp((kept - kept.max()) / temperature))
    np.testing.assert_allclose(out["logprob"], log_softmax(logits[None])[0][out["token"]], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("options", [OFF, dict(top_p=0.8), dict(top_k=7)], ids=str)
def test_seeds_are_as_good_as_counters(h, options):
    """One draw of each of many requests."""
    logits = (np.random.default_rng(6).standard_normal(30) * 1.5).astype(np.float32)
    rows = 6000
    sampling = requests(rows, counter=0, **options)
    kept = filtered(logits, **options).astype(np.float64)
    for half, other in (("seed_lo", "seed_hi"), ("seed_hi", "seed_lo")):
        sampling[half], sampling[other] = np.arange(rows), 7
        out = draw(h, np.tile(logits, (rows, 1)), sampling)
        assert_frequencies(np.bincount(out["token"], minlength=30), np.exp(kept - kept.max()))


@pytest.mark.parametrize("vocab", [4095, 4096, 4097, 5000, 100_000])
@pytest.mark.parametrize(
    "options", [OFF, dict(top_p=0.9), dict(min_p=0.01), dict(top_k=50), dict(top_p=0.95, min_p=1e-4, top_k=2000)], ids=str
)
def test_large_vocabularies_are_drawn_from_as_they_are_filtered(by_threads, vocab, options):
    """The large logits lie in every chunk; half of the largest vocabulary are ties."""
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal(vocab) * 2.5).astype(np.float32)
    if vocab == 100_000:
        logits[rng.random(vocab) < 0.5] = 1.25
    rows = 200 if vocab == 100_000 else 1000
    out = draw(by_threads[3], np.broadcast_to(logits, (rows, vocab)), requests(rows, temperature=0.8, seed=3, **options))
    tokens = out["token"]
    _, may = between(logits, **options)
    assert may[tokens].all()
    kept = filtered(logits, **options).astype(np.float64)
    assert_frequencies(np.bincount(tokens, minlength=vocab), np.exp((kept - kept.max()) / 0.8))
    np.testing.assert_allclose(out["logprob"], log_softmax(logits[None])[0][tokens], rtol=2e-6, atol=2e-7)
    for token in {int(t) for t in tokens[:20]}:
        assert set(out["rank"][tokens == token]) == {int(ranks(logits[None], np.array([token]))[0])}


@given(seed=st.integers(0, 99), top_k=st.integers(1, 12), vocab=st.sampled_from([17, 63]))
@settings(max_examples=20)
def test_of_equal_logits_top_k_keeps_the_first_and_top_p_keeps_all(h, seed, top_k, vocab):
    logits = np.random.default_rng(seed).integers(-1, 2, vocab).astype(np.float32)
    first = np.argsort(-logits, kind="stable")[:top_k]
    out = draw(h, np.tile(logits, (25 * vocab, 1)), requests(25 * vocab, temperature=100.0, top_k=top_k))
    assert set(out["token"]) == set(first.tolist())
    largest = np.flatnonzero(logits == logits.max())
    out = draw(h, np.tile(logits, (25 * vocab, 1)), requests(25 * vocab, temperature=100.0, top_p=1e-3))
    assert set(out["token"]) == set(largest.tolist())


@pytest.mark.parametrize("options", [OFF, dict(top_k=5), dict(top_p=0.999), dict(min_p=1e-30)], ids=str)
def test_a_token_of_no_probability_is_never_drawn(h, options):
    """Not even where a filter would keep more tokens than there are, or at a temperature that makes all equal."""
    logits = np.full(40, -np.inf, np.float32)
    logits[[3, 17, 39]] = [0, -1, -2]
    out = draw(h, np.tile(logits, (300, 1)), requests(300, temperature=1e30, **options))
    assert set(out["token"]) == {3, 17, 39}


# ---- what a draw depends on ---------------------------------------------------------------------------------------------
@given(
    vocab=st.sampled_from([1, 17, 300, 4097, 9000]), rows=st.integers(1, 30), threads=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
@example(vocab=9000, rows=13, threads=3, seed=0)  # more rows than the threads share by chunks
@example(vocab=9000, rows=2, threads=3, seed=0)
@settings(max_examples=25)
def test_a_row_is_the_same_alone_and_in_any_batch(by_threads, vocab, rows, threads, seed):
    rng = np.random.default_rng(seed % 2**32)
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    sampling = requests(rows, temperature=rng.choice([0.0, 0.7, 1.0], rows), seed=seed, counter=rng.integers(0, 2**32, rows))
    sampling["top_p"], sampling["top_k"] = rng.choice([1.0, 0.8], rows), rng.choice([0, 9], rows)
    sampling["min_p"] = rng.choice([0.0, 0.1], rows)
    together = draw(by_threads[threads], logits, sampling)
    order = rng.permutation(rows)
    assert_same(draw(by_threads[2], logits[order], sampling[order]), together[order])
    for i in range(min(rows, 4)):
        assert_same(draw(by_threads[1], logits[i : i + 1], sampling[i : i + 1]), together[i : i + 1])


def test_other_seeds_and_counters_draw_other_tokens(h):
    logits = np.zeros((64, 4096), np.float32)
    base = draw(h, logits, requests(64, seed=1))["token"]
    assert len(set(base.tolist())) > 55  # 64 draws among 4096 repeat about half a token
    for other in (requests(64, seed=2), requests(64, seed=1 + 2**32), requests(64, seed=1, counter=np.arange(64) + 64)):
        assert (draw(h, logits, other)["token"] == base).sum() < 4


@pytest.mark.parametrize("plan_rows", [9, 40])
def test_how_many_rows_run_is_data(by_threads, plan_rows):
    logits = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)
    for threads in (1, 3):
        out = draw(by_threads[threads], logits, requests(4), plan_rows)
        assert_same(out[:4], draw(by_threads[2], logits, requests(4)))
        assert_same(out[4:], np.full(plan_rows - 4, NOTHING, SAMPLED))
        none = draw(by_threads[threads], logits[:0], requests(0), plan_rows)
        assert_same(none, np.full(plan_rows, NOTHING, SAMPLED))


# ---- rows that are not finite ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", [1, 17, 4097])
@pytest.mark.parametrize("value", [np.nan, np.inf, "all -inf"])
@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(), dict(top_k=3), dict(top_p=0.5, min_p=0.1)], ids=str)
def test_a_row_that_is_not_finite_says_so_and_disturbs_no_other(by_threads, vocab, value, options):
    logits = np.random.default_rng(1).standard_normal((5, vocab)).astype(np.float32)
    for threads in (1, 3):
        for place in {0, vocab // 2, vocab - 1}:
            clean = draw(by_threads[threads], logits, requests(5, **options))
            bad = logits.copy()
            if value == "all -inf":
                bad[2] = -np.inf
            else:
                bad[2, place] = value
            out = draw(by_threads[threads], bad, requests(5, **options))
            assert out["status"].tolist() == [0, 0, params.MS_SAMPLE_NOT_FINITE, 0, 0]
            assert 0 <= out["token"][2] < vocab and np.isnan(out["logprob"][2])
            assert_same(np.delete(out, 2), np.delete(clean, 2))


# ---- refusals -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("constants", "binds", "why"),
    [
        (b"", 4, "constants are not one MSSampleParams"),
        (bytes(8), 4, "constants are not one MSSampleParams"),
        (params.pack("MSSampleParams", vocab_size=0), 4, "vocab_size is 0 or above"),
        (params.pack("MSSampleParams", vocab_size=2**31), 4, "vocab_size is 0 or above"),
        (params.pack("MSSampleParams", vocab_size=2**32 - 1), 4, "vocab_size is 0 or above"),
        (params.pack("MSSampleParams", vocab_size=10), 3, "fewer bindings than ms_sample_slot names"),
        (params.pack("MSSampleParams", vocab_size=10), 0, "fewer bindings than ms_sample_slot names"),
    ],
)
def test_constants_that_do_not_fit_are_refused(h, constants, binds, why):
    bindings = [h.empty((64,)) for _ in range(binds)]
    with pytest.raises(ValueError, match=rf"launch 0 \(sample\): .*{why}"):
        h.device.create_plan([Launch("sample", bindings, constants, (1, 1, 1), (1, 1, 1))], 1, 1)


@given(words=st.lists(st.integers(0, 40) | st.integers(0, 2**32 - 1), max_size=3), max_sampled=st.integers(0, 2**16))
@settings(max_examples=60)
def test_any_constants_are_refused_or_run(h, words, max_sampled):
    """The step is zero: no rows."""
    with own_buffers(h):
        bindings = [h.put(np.zeros(64, np.float32)) for _ in range(4)]
        launch = Launch("sample", bindings, np.array(words, np.uint32).tobytes(), (1, 1, 1), (1, 1, 1))
        try:
            plan = h.device.create_plan([launch], 1, max_sampled)
        except (ValueError, MemoryError) as error:
            assert str(error)
            return
        plan.wait(plan.run(1))
        plan.close()
