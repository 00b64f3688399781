"""sample on a GPU: a row is what the reference says, and the token that the host draws with the same seed; batches, orders of threads,
rows that have no sample, refusals.

How often tokens are drawn is test_gpu_sample_draws.py's; penalties and states are test_gpu_sample_penalties.py's.
"""
from dataclasses import replace

import numpy as np
import pytest
import samples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import NO_TOP, NOTHING, SAMPLED, assert_same, draw, run, supports, tables
from test_sample import COUNTERS, FILTERS, MANY, PROCESSES, philox, random_logits, random_parameters

from metalstep.kernels import params, sample
from metalstep.kernels.gpu import sample as gpu_sample
from metalstep.kernels.launch import Buffer
from metalstep.kernels.sample import Parameters

VOCABULARIES = [1, 2, 7, 33, 97, 511, 513, 1000, 2047, 2049, 5000]  # blocks of 512 tokens, parts of 512 or 2048; the list has 1024
# Sums of e^x in float32 are rounded as often as a lane adds and as they are halved, to either side; a logprob of a large logit carries
# its unit in the last place, and so does the logarithm of the sum, at most that of the vocabulary's size.
LOGPROB = dict(rtol=2e-6, atol=1.2e-6)
TEMPERATURES = [0.0, 0.01, 0.7, 1.0, 30.0]


# ---- the random numbers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", [2**12, 2**14])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x299F31D0A4093822])
def test_a_draw_among_equal_logits_shows_the_first_word_of_philox(g, vocab, seed):
    """Also among more tokens than the list has, of which none weighs more than another."""
    words = [philox([c, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[0] for c in COUNTERS]
    for options, tokens in ((dict(), vocab), (dict(top_k=vocab // 4), vocab // 4), (dict(top_k=64), 64)):
        out = draw(g, np.zeros((5, vocab)), [Parameters(temperature=1.0, **options)] * 5, seed=seed, counters=COUNTERS).sampled
        np.testing.assert_array_equal(out["token"], [w * tokens >> 32 for w in words])
        np.testing.assert_array_equal(out["rank"], out["token"] + 1)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x299F31D0A4093822])
def test_xtcs_coin_is_the_draw_of_the_second_counter_word(g, seed):
    """Token 0 is drawn unless xtc drops it: then the coin was below the probability."""
    logits = np.tile(np.array([4, 3, -60], np.float32), (5, 1))
    coins = [philox([c, 1, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[0] / 2**32 for c in COUNTERS]
    for probability in (1e-6, 0.3, 0.5, 0.7, 1.0):
        row = Parameters(temperature=0.01, xtc_probability=probability, xtc_threshold=0.1)
        out = draw(g, logits, [row] * 5, seed=seed, counters=COUNTERS).sampled
        np.testing.assert_array_equal(out["token"], [int(coin < probability) for coin in coins])


# ---- rows and the reference ------------------------------------------------------------------------------------------------
def check_row(g, host, logits, p, seed):
    """Both modes of a row against the reference and the host; both draw the same token."""
    vocab = logits.shape[1]
    modes = [replace(p, processed_logprobs=processed) for processed in (False, True)]
    own, other = (run(g, logits, tables([mode], vocab, seed=seed)) for mode in modes)
    drawn = samples.run(host, logits, tables(modes[:1], vocab, seed=seed)).sampled["token"]
    assert_same(own.logits, logits)
    expected = sample.reference(logits[0], p)
    assert own.sampled["status"] == other.sampled["status"] == expected.status
    if expected.status != params.MS_SAMPLE_OK:
        assert_same(own.sampled[:1], np.array([(0, np.nan, 0, expected.status)], SAMPLED))
        assert (own.top["token"][0][: p.top] == -1).all() and np.isnan(own.top["logprob"][0][: p.top]).all()
        return
    # A bias, a product, two differences: four roundings, each of half a unit of the largest intermediate value.
    np.testing.assert_allclose(other.logits[0], expected.processed, rtol=2e-7, atol=2e-6)
    token = own.sampled["token"][0]
    assert token == other.sampled["token"][0]
    least, most = supports(other.logits[0], p)
    assert most[token] > 0
    if ((least > 0) == (most > 0)).all():  # else a rounding may decide which tokens are kept
        assert token == drawn
    plain = replace(p, bias={}, history=(), prompt={}, output={}, stop_tokens=(), allowed=None)
    for result, row in ((own, logits[0]), (other, other.logits[0])):
        expected = sample.reference(row, plain)
        np.testing.assert_allclose(result.sampled["logprob"][0], expected.logprobs[token], **LOGPROB)
        assert result.sampled["rank"][0] == expected.ranks[token]
        top = result.top[0]
        assert [int(t) for t in top["token"][: len(expected.top)]] == [t for t, _ in expected.top]
        np.testing.assert_allclose(top["logprob"][: len(expected.top)], [x for _, x in expected.top], **LOGPROB)
        assert (top["token"][len(expected.top) : p.top] == -1).all() and (top["token"][p.top :] == NO_TOP["token"]).all()
    if p.temperature == 0:
        assert token == other.logits[0].argmax()


@pytest.mark.parametrize("name", [*PROCESSES, *FILTERS, "none"])
@given(
    seed=st.integers(0, 9999), vocab=st.sampled_from(VOCABULARIES), ties=st.booleans(), tempered_first=st.booleans(),
    temperature=st.sampled_from(TEMPERATURES), top=st.integers(0, 8),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_each_parameter_alone_is_as_the_reference_has_it(g, host, name, seed, vocab, ties, tempered_first, temperature, top):
    rng = np.random.default_rng(seed)
    fields = dict(temperature=temperature, temperature_first=tempered_first, top=top)
    p = random_parameters(rng, vocab, [] if name == "none" else [name], **fields)
    check_row(g, host, random_logits(rng, 1, vocab, ties), p, seed)


@given(
    seed=st.integers(0, 9999), vocab=st.sampled_from(VOCABULARIES), ties=st.booleans(), tempered_first=st.booleans(),
    names=st.sets(st.sampled_from([*PROCESSES, *FILTERS]), min_size=2), temperature=st.sampled_from([0.0, 0.7, 1.0, 30.0]),
)  # fmt: skip
@example(seed=1, vocab=5000, ties=False, tempered_first=False, names={*PROCESSES, *FILTERS}, temperature=0.7)
@example(seed=2, vocab=5000, ties=True, tempered_first=True, names={*PROCESSES, *FILTERS}, temperature=0.7)
@settings(max_examples=80, deadline=None)
def test_any_parameters_together_are_as_the_reference_has_them(g, host, seed, vocab, ties, tempered_first, names, temperature):
    rng = np.random.default_rng(seed)
    fields = dict(temperature=temperature, temperature_first=tempered_first, top=int(rng.integers(0, 9)))
    p = random_parameters(rng, vocab, sorted(names), **fields)
    check_row(g, host, random_logits(rng, 1, vocab, ties), p, seed)


@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(top_p=0.9), dict(top_p=0.999), dict(top_k=50), dict(top_k=3000, min_p=1e-6), dict(min_p=1e-4, min_keep=2000),
        dict(xtc_probability=1.0, xtc_threshold=1e-3, top_k=1500), dict(top_p=0.5, xtc_probability=1.0, xtc_threshold=1e-5),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("ties", [False, True])
def test_a_large_vocabulary_has_all_ways(g, host, options, first, ties):
    """Nuclei of a few tokens and of thousands; of equal logits, some come in and others do not."""
    rng = np.random.default_rng(3)
    logits = random_logits(rng, 1, 50_001, ties)
    check_row(g, host, logits, Parameters(temperature=1.3, temperature_first=first, top=8, bias={77: 1.5}, **options), 12)


@pytest.mark.parametrize("kind", sorted(gpu_sample.TABLES))
@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.6, 3.0, 12.0])
def test_a_nucleus_may_be_most_of_a_vocabulary_or_a_few_tokens(g, host, monkeypatch, kind, first, spread):
    """Bells of any width: the host draws the same token, whichever of a GPU's threads have it."""
    monkeypatch.setattr(g, "kind", kind)
    logits = (np.random.default_rng(8).standard_normal((1, 20_001)) * spread).astype(np.float32)
    for temperature, top_p in ((1.0, 0.95), (0.8, 0.5), (1.5, 0.999)):
        check_row(g, host, logits, Parameters(temperature=temperature, top_p=top_p, temperature_first=first), 5)


@pytest.mark.parametrize("options", [dict(top_p=0.9), dict(top_k=2000), dict(xtc_probability=1.0, xtc_threshold=1e-4)], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["mlx", "vllm"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_logits_of_any_size_are_filtered(g, host, options, first, scale):
    """Those around 0, and many equal ones, lie beyond what histograms of keys near the largest have: digits find the token."""
    logits = np.random.default_rng(6).standard_normal((1, 5000)).astype(np.float32)
    logits[0, ::2] = 0
    check_row(g, host, logits * np.float32(scale), Parameters(temperature=scale, temperature_first=first, top=3, **options), 9)


@pytest.mark.parametrize("vocab", [1, 33, 513, 5000])
@given(seed=st.integers(0, 99), ties=st.booleans(), rows=st.integers(1, 5), processed=st.booleans())
@settings(max_examples=6, deadline=None)
def test_a_target_is_reported_on_as_the_reference_has_it(g, vocab, seed, ties, rows, processed):
    """Bias counts only where the processed logits are asked for; nothing is drawn or committed."""
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, rows, vocab, ties)
    p = Parameters(temperature=1.0, top_k=1, top=3, bias={0: -2.0, vocab - 1: 3.0}, history=[0], processed_logprobs=processed)
    t = tables([p] * rows, vocab, commit=True)
    t.sampling["target"] = rng.integers(0, vocab, rows)
    out = run(g, logits, t)
    np.testing.assert_array_equal(out.sampled["token"], t.sampling["target"])
    assert_same(out.history, t.history)
    assert_same(out.counts, t.counts)
    for i in range(rows):
        expected = sample.reference(logits[i], p)
        token = t.sampling["target"][i]
        np.testing.assert_allclose(out.sampled["logprob"][i], expected.logprobs[token], **LOGPROB)
        assert out.sampled["rank"][i] == expected.ranks[token]
        assert [int(t) for t in out.top["token"][i][: len(expected.top)]] == [t for t, _ in expected.top]


@pytest.mark.parametrize("top", [20, 256])
@pytest.mark.parametrize("vocab", [97, 5000])
def test_many_of_the_most_likely_are_reported(g, vocab, top):
    """Where all logits are equal, more come up to the bound than the list has. Small ones lie farther apart than the bins."""
    rng = np.random.default_rng(4)
    logits = np.stack([rng.standard_normal(vocab), rng.integers(0, 3, vocab), np.zeros(vocab), np.exp(rng.uniform(-16, 0, vocab))])
    logits = logits.astype(np.float32)
    out = draw(g, logits, [Parameters(top=top)] * 4, max_top=256).top
    for i, row in enumerate(logits):
        expected = sample.reference(row, Parameters(top=top)).top
        assert [int(t) for t in out["token"][i][: len(expected)]] == [t for t, _ in expected]
        np.testing.assert_allclose(out["logprob"][i][: len(expected)], [x for _, x in expected], **LOGPROB)
        assert (out["token"][i][len(expected) : top] == -1).all() and (out["token"][i][top:] == NO_TOP["token"]).all()


# ---- temperature 0 and near it -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_temperature_0_takes_the_first_of_the_most_likely(g, vocab):
    for ties in (False, True):
        logits = random_logits(np.random.default_rng(vocab), 5, vocab, ties)
        out = draw(g, logits, [Parameters(top_p=0.5, top_k=3, xtc_probability=1.0)] * 5).sampled
        np.testing.assert_array_equal(out["token"], logits.argmax(1))
        np.testing.assert_array_equal(out["rank"], 1)
        np.testing.assert_array_equal(out["status"], params.MS_SAMPLE_OK)


def test_minus_0_and_0_are_one_logit(g):
    logits = np.array([[-1, -0.0, 0.0], [-1, 0.0, -0.0]], np.float32)
    out = draw(g, logits, [Parameters(top=2)] * 2)
    np.testing.assert_array_equal(out.sampled["token"], [1, 1])
    np.testing.assert_array_equal(out.top["token"][:, :2], [[1, 2], [1, 2]])
    out = draw(g, np.tile(logits[:1], (40, 1)), [Parameters(temperature=1.0, top_k=1)] * 40, counters=np.arange(40))
    assert set(out.sampled["token"]) == {1}


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize("options", [dict(), dict(top_k=4), dict(top_p=0.9), dict(min_p=0.1)], ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_a_tiny_temperature_draws_among_the_most_likely_alone(g, temperature, options, first):
    logits = np.array([1, 5, 2, 5, -np.inf, 4.99], np.float32)
    row = Parameters(temperature=temperature, temperature_first=first, **options)
    out = draw(g, np.tile(logits, (40, 1)), [row] * 40, counters=np.arange(40)).sampled
    assert set(out["token"]) == {1, 3}


@pytest.mark.parametrize("min_p", [0.0, 0.001])
@pytest.mark.parametrize("first", [False, True])
def test_a_low_temperature_weighs_what_xtc_leaves_and_not_what_it_drops(g, min_p, first):
    """e^(-3 / 0.01) is 0 in float32: two that are left lie that far below the largest."""
    logits = np.array([9, 6, 6, 5.9], np.float32)
    threshold = 0.0 if first else 0.04  # 0.04: of the three largest, at temperature 1
    row = Parameters(temperature=0.01, min_p=min_p, xtc_probability=1.0, xtc_threshold=threshold, temperature_first=first)
    drawn = draw(g, np.tile(logits, (60, 1)), [row] * 60, counters=np.arange(60)).sampled["token"]
    expected = sample.probabilities(logits.astype(np.float64), row) > 1e-3
    assert set(drawn) == set(np.flatnonzero(expected))


# ---- what a row depends on ----------------------------------------------------------------------------------------------
@given(vocab=st.sampled_from([1, 33, 300, 2049, 9000]), rows=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), processed=st.booleans())
@example(vocab=9000, rows=9, seed=0, processed=False)
@example(vocab=9000, rows=3, seed=0, processed=True)
@settings(max_examples=12, deadline=None)
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order_of_threads(g, vocab, rows, seed, processed):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, rows, vocab, ties=bool(rng.integers(2)))
    some = []
    for _ in range(rows):
        names = [name for name in (*PROCESSES, *FILTERS) if rng.random() < 0.3]
        fields = dict(temperature=float(rng.choice([0.0, 0.7, 1.0])), temperature_first=bool(rng.random() < 0.5))
        some.append(random_parameters(rng, vocab, names, processed_logprobs=processed, top=int(rng.integers(0, 9)), **fields))
    t = tables(some, vocab, seed=rng.integers(0, 2**63, rows).astype(np.uint64), commit=True)

    def part(rows):
        """The launch of these rows alone."""
        return replace(t, sampling=t.sampling[rows], positions=t.positions[rows])

    def assert_part(got, rows):
        assert_same(got.sampled, together.sampled[rows])
        assert_same(got.top, together.top[rows])
        assert_same(got.logits, together.logits[rows])
        states = t.sampling["state"][rows]
        assert_same(got.history[states], together.history[states])
        assert_same(got.counts[states], together.counts[states])

    together = run(g, logits, t)
    for thread_order in (1, 2, 3):
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("METALSTEP_SIM_SEED", str(thread_order))
            assert_part(run(g, logits, t), np.arange(rows))
            order = rng.permutation(rows)
            assert_part(run(g, logits[order], part(order)), order)
    for i in range(min(rows, 3)):
        assert_part(run(g, logits[i : i + 1], part(slice(i, i + 1))), slice(i, i + 1))


def test_other_seeds_and_counters_draw_other_tokens(g):
    logits, row = np.zeros((64, 4096), np.float32), [Parameters(temperature=1.0)] * 64
    counters = np.arange(64)
    base = draw(g, logits, row, seed=1, counters=counters).sampled["token"]
    assert len(set(base.tolist())) > 55  # 64 draws among 4096 repeat about half a token
    for other in (dict(seed=2, counters=counters), dict(seed=1 + 2**32, counters=counters), dict(seed=1, counters=counters + 64)):
        assert (draw(g, logits, row, **other).sampled["token"] == base).sum() < 4


def test_how_many_rows_run_is_data(g):
    logits = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)
    some = [Parameters(temperature=1.0, top=2)] * 4
    out = draw(g, logits, some, plan_rows=9)
    assert_same(out.sampled[:4], draw(g, logits, some).sampled)
    assert_same(out.sampled[4:], np.full(5, NOTHING, SAMPLED))
    assert (out.top[4:] == NO_TOP).all()
    none = draw(g, logits[:0], [], plan_rows=9)
    assert_same(none.sampled, np.full(9, NOTHING, SAMPLED))


# ---- rows that have no sample -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", [1, 33, 2500])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, "all -inf", "nothing allowed"])
@pytest.mark.parametrize(
    "options", [dict(), dict(temperature=1.0), dict(temperature=1.0, top_k=3, **MANY), dict(temperature=1.0, top_p=0.5, min_p=0.1)], ids=str
)
@pytest.mark.parametrize("processed", [False, True])
def test_a_bad_row_says_so_and_disturbs_no_other(g, vocab, value, options, processed):
    logits = np.random.default_rng(1).standard_normal((3, vocab)).astype(np.float32)
    status = params.MS_SAMPLE_NOTHING_ALLOWED if value == "nothing allowed" else params.MS_SAMPLE_NOT_FINITE
    row = Parameters(processed_logprobs=processed, **options)
    clean = run(g, logits, tables([row] * 3, vocab, commit=True))
    for place in {0, vocab - 1}:
        bad, rows = logits.copy(), [row] * 3
        if value == "nothing allowed":
            rows[1] = replace(row, allowed=np.zeros(vocab, bool))
        elif value == "all -inf":
            bad[1] = -np.inf
        else:
            bad[1, place] = value
        t = tables(rows, vocab, commit=True)
        out = run(g, bad, t)
        assert out.sampled["status"].tolist() == [0, status, 0]
        assert_same(out.sampled[1:2], np.array([(0, np.nan, 0, status)], SAMPLED))
        assert (out.top["token"][1][: row.top] == -1).all()
        assert_same(out.history[1], t.history[1])
        assert_same(out.counts[1], t.counts[1])
        for name in ("sampled", "top", "logits", "history", "counts"):
            assert_same(getattr(out, name)[[0, 2]], getattr(clean, name)[[0, 2]])


@pytest.mark.parametrize("processed", [False, True])
def test_biases_masks_and_stop_tokens_can_leave_no_token(g, processed):
    logits = np.zeros((1, 40), np.float32)
    everything = list(range(40))
    half = np.arange(40) < 20
    for row in (
        Parameters(bias=dict.fromkeys(everything, -np.inf)),
        Parameters(stop_tokens=everything, min_tokens=3, counter=2),
        Parameters(stop_tokens=everything[:20], min_tokens=1, allowed=half),
    ):
        out = draw(g, logits, [replace(row, processed_logprobs=processed, temperature=0.7)])
        assert out.sampled["status"] == params.MS_SAMPLE_NOTHING_ALLOWED
    out = draw(g, logits, [Parameters(stop_tokens=everything, min_tokens=3, counter=3)])
    assert out.sampled["status"] == params.MS_SAMPLE_OK
    assert draw(g, logits, [Parameters(bias={5: np.inf})]).sampled["status"] == params.MS_SAMPLE_NOT_FINITE


# ---- refusals and sizes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(vocab_size=0), "vocab_size is 0, expected 1 to"),
        (dict(vocab_size=2**31), "vocab_size is 2147483648, expected 1 to"),
        (dict(max_top=257), "max_top is 257, expected 0 to 256"),
        (dict(history_stride=2**30), "history_stride is 1073741824, expected less than"),
        (dict(max_rows=3), "the workspace has .* bytes, expected"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(g, changes, why):
    sizes = dict(vocab_size=1000, max_rows=2, max_top=8, history_stride=10)
    workspace = Buffer(0, 0, (gpu_sample.workspace_bytes(1000, 2),), "uint8")
    assert len(gpu_sample.launches(workspace, g.step(1), **sizes, workspace=workspace)) == 3
    with pytest.raises(ValueError, match=why):
        gpu_sample.launches(workspace, g.step(1), **(sizes | changes), workspace=workspace)


@pytest.mark.parametrize("kind", sorted(gpu_sample.TABLES))
def test_a_launchs_memory_fits_an_apple_gpu(kind):
    """32 KB in a threadgroup: marks of a part; bins of four words; a list of 64-bit places, which bins of two words share. Whole runs of
    all of them, and of a part's tokens, are a thread's."""
    for tuning in gpu_sample.TABLES[kind]:
        assert tuning.process * 512 * 4 + tuning.process * 7 * 4 <= 32768
        assert 4 * gpu_sample.DEPTH_BINS * 4 <= 32768
        assert 2048 * 8 + tuning.finish * 16 + 64 <= 32768
        threads = 32 * tuning.finish
        assert all(count % threads == 0 for count in (2048, gpu_sample.DEPTH_BINS, tuning.process * 512))
    assert gpu_sample.workspace_bytes(151_936, 1, kind) < 720_000


def test_a_vocabulary_has_a_line_of_the_largest_for_any_rows():
    """What a row's logprob depends on in its last digit is the same in every plan."""
    for table in gpu_sample.TABLES.values():
        for vocab in (1, 512, 513, 8192, 8193, 2**31 - 1):
            fits = [tuning for tuning in table if vocab <= tuning.vocab]
            assert fits[-1].rows == gpu_sample.ANY
            assert len({tuning.process for tuning in fits if tuning.vocab == fits[0].vocab}) == 1
