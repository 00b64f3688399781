"""sample: a row is what the reference says, by itself and in any batch; the random numbers; rows that are refused or not finite.

How often tokens are drawn is test_sample_draws.py's; penalties and states are test_sample_penalties.py's.
"""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import own_buffers
from samples import NO_TOP, NOTHING, SAMPLED, assert_same, draw, run, supports, tables

from metalstep.kernels import params, sample
from metalstep.kernels.launch import Launch
from metalstep.kernels.sample import Parameters

VOCABULARIES = [1, 2, 15, 16, 17, 31, 33, 63, 300, 511, 513, 1000, 4095, 4097, 5000]  # blocks of 512, chunks of 4096
# Sums of e^x in float32 are rounded as often as a lane adds (128 times a chunk), to either side; a logprob of a large logit
# carries its unit in the last place.
LOGPROB = dict(rtol=2e-6, atol=4e-7)


def random_logits(rng, rows, vocab, ties=False):
    """Logits of which some are -infinity, but not all; ties: of a few values."""
    logits = rng.integers(-3, 4, (rows, vocab)) if ties else rng.standard_normal((rows, vocab)) * rng.choice([0.5, 3, 8])
    logits = logits.astype(np.float32)
    logits[rng.random(logits.shape) < 0.05] = -np.inf
    logits[:, rng.integers(vocab)] = 2
    return logits


def some_tokens(rng, vocab, most):
    return [int(token) for token in rng.choice(vocab, min(vocab, int(rng.integers(1, most + 1))), replace=False)]


def history_of(rng, vocab):
    """Tokens of the history, and the counts of its first positions; some of it are a caller's embeddings."""
    history = [int(token) for token in rng.integers(-2, min(vocab, 12), rng.integers(1, 40))]
    counted = int(rng.integers(0, len(history) + 1))
    prompt, output = {}, {}
    for i, token in enumerate(history[:counted]):
        if token >= 0:
            where = prompt if i < counted // 2 else output
            where[token] = where.get(token, 0) + 1
    return dict(history=history, prompt=prompt, output=output, counted=counted)


# Each takes a random generator and the vocabulary's size and gives fields of Parameters.
PROCESSES = {
    "bias": lambda rng, vocab: dict(bias={token: float(rng.standard_normal() * 3) for token in some_tokens(rng, vocab, 20)}),
    "repetition": lambda rng, vocab: dict(
        history_of(rng, vocab), repetition_penalty=float(rng.choice([0.7, 1.3])), repetition_window=int(rng.choice([0, 1, 5, 90]))
    ),
    "presence": lambda rng, vocab: dict(
        history_of(rng, vocab), presence_penalty=float(rng.choice([-0.5, 1.5])), presence_window=int(rng.choice([0, 1, 5, 90]))
    ),
    "frequency": lambda rng, vocab: dict(
        history_of(rng, vocab), frequency_penalty=float(rng.choice([-0.3, 0.6])), frequency_window=int(rng.choice([0, 1, 5, 90]))
    ),
    "stop": lambda rng, vocab: dict(
        stop_tokens=some_tokens(rng, vocab, 5)[: vocab - 1], min_tokens=int(rng.integers(0, 3)), counter=int(rng.integers(0, 3))
    ),
    "masks": lambda rng, vocab: dict(allowed=np.arange(vocab) % 7 != rng.integers(1, 8)),
}
FILTERS = {
    "top_p": lambda rng, vocab: dict(top_p=float(rng.choice([0.01, 0.3, 0.7, 0.99]))),
    "min_p": lambda rng, vocab: dict(min_p=float(rng.choice([1e-6, 0.001, 0.05, 0.5, 1.0])), min_keep=int(rng.choice([0, 1, 3, 40]))),
    "top_k": lambda rng, vocab: dict(top_k=int(rng.choice([1, 3, 40, 700, 6000]))),
    "xtc": lambda rng, vocab: dict(
        xtc_probability=float(rng.choice([0.5, 1.0])), xtc_threshold=float(rng.choice([1e-4, 0.01, 0.1, 0.5])),
        xtc_special_tokens=some_tokens(rng, vocab, 4) if rng.random() < 0.5 else (),
    ),
}  # fmt: skip


def random_parameters(rng, vocab, names, **fields):
    """Fields of all `names` at random; the history of the last that has one serves them all."""
    for name in names:
        fields |= (PROCESSES | FILTERS)[name](rng, vocab)
    return Parameters(**fields)


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
    """kat_vectors of Random123: the yardstick of the next tests."""
    ones = [0xFFFFFFFF] * 6
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones[:4], ones[4:]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


COUNTERS = [0, 1, 2, 0x243F6A88, 2**32 - 1]


@pytest.mark.parametrize("vocab", [2**12, 2**16])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x299F31D0A4093822])
def test_a_draw_among_equal_logits_shows_the_first_word_of_philox(h, vocab, seed):
    words = [philox([c, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[0] for c in COUNTERS]
    some = [Parameters(temperature=1.0)] * 5
    out = draw(h, np.zeros((5, vocab)), some, seed=seed, counters=COUNTERS).sampled
    np.testing.assert_array_equal(out["token"], [w * vocab >> 32 for w in words])
    np.testing.assert_array_equal(out["rank"], out["token"] + 1)
    some = [Parameters(temperature=1.0, top_k=vocab // 4)] * 5
    out = draw(h, np.zeros((5, vocab)), some, seed=seed, counters=COUNTERS).sampled
    np.testing.assert_array_equal(out["token"], [w * (vocab // 4) >> 32 for w in words])


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x299F31D0A4093822])
def test_xtcs_coin_is_the_draw_of_the_second_counter_word(h, seed):
    """Token 0 is drawn unless xtc drops it: then the coin was below the probability."""
    logits = np.tile(np.array([4, 3, -60], np.float32), (5, 1))
    coins = [philox([c, 1, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[0] / 2**32 for c in COUNTERS]
    for probability in (1e-6, 0.3, 0.5, 0.7, 1.0):
        row = Parameters(temperature=0.01, xtc_probability=probability, xtc_threshold=0.1)
        out = draw(h, logits, [row] * 5, seed=seed, counters=COUNTERS).sampled
        np.testing.assert_array_equal(out["token"], [int(coin < probability) for coin in coins])


# ---- rows and the reference ------------------------------------------------------------------------------------------------
def check_row(h, logits, p, seed):
    """Both modes of a row against the reference; both draw the same token."""
    vocab = logits.shape[1]
    own = run(h, logits, tables([replace(p, processed_logprobs=False)], vocab, seed=seed))
    other = run(h, logits, tables([replace(p, processed_logprobs=True)], vocab, seed=seed))
    assert_same(own.logits, logits)
    expected = sample.reference(logits[0], p)
    assert own.sampled["status"] == other.sampled["status"] == expected.status
    if expected.status != params.MS_SAMPLE_OK:
        assert_same(own.sampled[:1], np.array([(0, np.nan, 0, expected.status)], SAMPLED))
        return
    # A bias, a product, two differences: four roundings, each of half a unit of the largest intermediate value.
    np.testing.assert_allclose(other.logits[0], expected.processed, rtol=2e-7, atol=2e-6)
    token = own.sampled["token"][0]
    assert token == other.sampled["token"][0]
    assert supports(other.logits[0], p)[1][token] > 0
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
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 30.0]), top=st.integers(0, 8),
)  # fmt: skip
@settings(max_examples=25)
def test_each_parameter_alone_is_as_the_reference_has_it(h, name, seed, vocab, ties, tempered_first, temperature, top):
    rng = np.random.default_rng(seed)
    fields = dict(temperature=temperature, temperature_first=tempered_first, top=top)
    p = random_parameters(rng, vocab, [] if name == "none" else [name], **fields)
    check_row(h, random_logits(rng, 1, vocab, ties), p, seed)


@given(
    seed=st.integers(0, 9999), vocab=st.sampled_from(VOCABULARIES), ties=st.booleans(), tempered_first=st.booleans(),
    names=st.sets(st.sampled_from([*PROCESSES, *FILTERS]), min_size=2), temperature=st.sampled_from([0.0, 0.7, 1.0, 30.0]),
)  # fmt: skip
@example(seed=1, vocab=5000, ties=False, tempered_first=False, names={*PROCESSES, *FILTERS}, temperature=0.7)
@example(seed=2, vocab=5000, ties=True, tempered_first=True, names={*PROCESSES, *FILTERS}, temperature=0.7)
@settings(max_examples=120)
def test_any_parameters_together_are_as_the_reference_has_them(h, seed, vocab, ties, tempered_first, names, temperature):
    rng = np.random.default_rng(seed)
    fields = dict(temperature=temperature, temperature_first=tempered_first, top=int(rng.integers(0, 9)))
    p = random_parameters(rng, vocab, sorted(names), **fields)
    check_row(h, random_logits(rng, 1, vocab, ties), p, seed)


@pytest.mark.parametrize("vocab", [1, 17, 513, 5000])
@given(seed=st.integers(0, 99), ties=st.booleans(), rows=st.integers(1, 9), processed=st.booleans())
@settings(max_examples=12)
def test_a_target_is_reported_on_as_the_reference_has_it(by_threads, vocab, seed, ties, rows, processed):
    """Bias counts only where the processed logits are asked for; nothing is drawn or committed."""
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, rows, vocab, ties)
    p = Parameters(temperature=1.0, top_k=1, top=3, bias={0: -2.0, vocab - 1: 3.0}, history=[0], processed_logprobs=processed)
    t = tables([p] * rows, vocab, commit=True)
    t.sampling["target"] = rng.integers(0, vocab, rows)
    for threads in (1, 3):
        out = run(by_threads[threads], logits, t)
        np.testing.assert_array_equal(out.sampled["token"], t.sampling["target"])
        assert_same(out.history, t.history)
        assert_same(out.counts, t.counts)
        for i in range(rows):
            expected = sample.reference(logits[i], p)
            token = t.sampling["target"][i]
            np.testing.assert_allclose(out.sampled["logprob"][i], expected.logprobs[token], **LOGPROB)
            assert out.sampled["rank"][i] == expected.ranks[token]
            assert [int(t) for t in out.top["token"][i][: len(expected.top)]] == [t for t, _ in expected.top]


# ---- temperature 0 and near it -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", VOCABULARIES)
@given(seed=st.integers(0, 99), ties=st.booleans(), rows=st.integers(1, 9))
@settings(max_examples=12)
def test_temperature_0_takes_the_first_of_the_most_likely(by_threads, vocab, seed, ties, rows):
    logits = random_logits(np.random.default_rng(seed), rows, vocab, ties)
    for threads in (1, 3):
        out = draw(by_threads[threads], logits, [Parameters(top_p=0.5, top_k=3, xtc_probability=1.0)] * rows).sampled
        np.testing.assert_array_equal(out["token"], logits.argmax(1))
        np.testing.assert_array_equal(out["rank"], 1)
        np.testing.assert_array_equal(out["status"], params.MS_SAMPLE_OK)


def test_minus_0_and_0_are_one_logit(h):
    logits = np.array([[-1, -0.0, 0.0], [-1, 0.0, -0.0]], np.float32)
    np.testing.assert_array_equal(draw(h, logits, [Parameters(top=2)] * 2).sampled["token"], [1, 1])
    np.testing.assert_array_equal(draw(h, logits, [Parameters(top=2)] * 2).top["token"][:, :2], [[1, 2], [1, 2]])
    out = draw(h, np.tile(logits[:1], (200, 1)), [Parameters(temperature=1.0, top_k=1)] * 200, counters=np.arange(200))
    assert set(out.sampled["token"]) == {1}


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize("options", [dict(), dict(top_k=4), dict(top_p=0.9), dict(min_p=0.1)], ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_a_tiny_temperature_draws_among_the_most_likely_alone(h, temperature, options, first):
    logits = np.array([1, 5, 2, 5, -np.inf, 4.99], np.float32)
    row = Parameters(temperature=temperature, temperature_first=first, **options)
    out = draw(h, np.tile(logits, (100, 1)), [row] * 100, counters=np.arange(100)).sampled
    assert set(out["token"]) == {1, 3}


@pytest.mark.parametrize("min_p", [0.0, 0.001])
@pytest.mark.parametrize("first", [False, True])
def test_a_low_temperature_weighs_what_xtc_leaves_and_not_what_it_drops(h, min_p, first):
    """e^(-3 / 0.01) is 0 in float32: two that are left lie that far below the largest."""
    logits = np.array([9, 6, 6, 5.9], np.float32)
    threshold = 0.0 if first else 0.04  # 0.04: of the three largest, at temperature 1
    row = Parameters(temperature=0.01, min_p=min_p, xtc_probability=1.0, xtc_threshold=threshold, temperature_first=first)
    drawn = draw(h, np.tile(logits, (100, 1)), [row] * 100, counters=np.arange(100)).sampled["token"]
    expected = sample.probabilities(logits.astype(np.float64), row) > 1e-3
    assert set(drawn) == set(np.flatnonzero(expected))


# ---- what a draw depends on ---------------------------------------------------------------------------------------------
@given(
    vocab=st.sampled_from([1, 17, 300, 4097, 9000]), rows=st.integers(1, 30), threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1), processed=st.booleans(),
)  # fmt: skip
@example(vocab=9000, rows=13, threads=3, seed=0, processed=False)  # more rows than the threads share by chunks
@example(vocab=9000, rows=2, threads=3, seed=0, processed=True)
@settings(max_examples=40)
def test_a_row_is_the_same_alone_and_in_any_batch(by_threads, vocab, rows, threads, seed, processed):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, rows, vocab)
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

    together = run(by_threads[threads], logits, t)
    order = rng.permutation(rows)
    assert_part(run(by_threads[2], logits[order], part(order)), order)
    for i in range(min(rows, 4)):
        assert_part(run(by_threads[1], logits[i : i + 1], part(slice(i, i + 1))), slice(i, i + 1))


def test_other_seeds_and_counters_draw_other_tokens(h):
    logits, row = np.zeros((64, 4096), np.float32), [Parameters(temperature=1.0)] * 64
    counters = np.arange(64)
    base = draw(h, logits, row, seed=1, counters=counters).sampled["token"]
    assert len(set(base.tolist())) > 55  # 64 draws among 4096 repeat about half a token
    np.testing.assert_array_equal(draw(h, logits, row, seed=1, counters=counters).sampled["token"], base)
    for other in (dict(seed=2, counters=counters), dict(seed=1 + 2**32, counters=counters), dict(seed=1, counters=counters + 64)):
        assert (draw(h, logits, row, **other).sampled["token"] == base).sum() < 4


@pytest.mark.parametrize("plan_rows", [9, 40])
def test_how_many_rows_run_is_data(by_threads, plan_rows):
    logits = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)
    some = [Parameters(temperature=1.0, top=2)] * 4
    for threads in (1, 3):
        out = draw(by_threads[threads], logits, some, plan_rows=plan_rows)
        assert_same(out.sampled[:4], draw(by_threads[2], logits, some).sampled)
        assert_same(out.sampled[4:], np.full(plan_rows - 4, NOTHING, SAMPLED))
        none = draw(by_threads[threads], logits[:0], [], plan_rows=plan_rows)
        assert_same(none.sampled, np.full(plan_rows, NOTHING, SAMPLED))


# ---- rows that have no sample -----------------------------------------------------------------------------------------------
MANY = dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1, bias={0: 1.0}, history=[0, 0], top=3)


@pytest.mark.parametrize("vocab", [1, 17, 4097])
@pytest.mark.parametrize("value", [np.nan, np.inf, "all -inf", "nothing allowed"])
@pytest.mark.parametrize(
    "options", [dict(), dict(temperature=1.0), dict(temperature=1.0, top_k=3, **MANY), dict(temperature=1.0, top_p=0.5, min_p=0.1)], ids=str
)
@pytest.mark.parametrize("processed", [False, True])
def test_a_bad_row_says_so_and_disturbs_no_other(by_threads, vocab, value, options, processed):
    logits = np.random.default_rng(1).standard_normal((5, vocab)).astype(np.float32)
    status = params.MS_SAMPLE_NOTHING_ALLOWED if value == "nothing allowed" else params.MS_SAMPLE_NOT_FINITE
    row = Parameters(processed_logprobs=processed, **options)
    for threads in (1, 3):
        for place in {0, vocab // 2, vocab - 1}:
            clean = run(by_threads[threads], logits, tables([row] * 5, vocab, commit=True))
            bad, rows = logits.copy(), [row] * 5
            if value == "nothing allowed":
                rows[2] = replace(row, allowed=np.zeros(vocab, bool))
            elif value == "all -inf":
                bad[2] = -np.inf
            else:
                bad[2, place] = value
            t = tables(rows, vocab, commit=True)
            out = run(by_threads[threads], bad, t)
            assert out.sampled["status"].tolist() == [0, 0, status, 0, 0]
            assert_same(out.sampled[2:3], np.array([(0, np.nan, 0, status)], SAMPLED))
            assert (out.top["token"][2][: row.top] == -1).all()
            assert_same(out.history[2], t.history[2])
            assert_same(out.counts[2], t.counts[2])
            others = [0, 1, 3, 4]
            for got, expected in ((out.sampled, clean.sampled), (out.top, clean.top), (out.logits, clean.logits)):
                assert_same(got[others], expected[others])
            for got, expected in ((out.history, clean.history), (out.counts, clean.counts)):
                assert_same(got[others], expected[others])


@pytest.mark.parametrize("processed", [False, True])
def test_biases_masks_and_stop_tokens_can_leave_no_token(h, processed):
    logits = np.zeros((1, 40), np.float32)
    everything = list(range(40))
    half = np.arange(40) < 20
    for row in (
        Parameters(bias=dict.fromkeys(everything, -np.inf)),
        Parameters(stop_tokens=everything, min_tokens=3, counter=2),
        Parameters(stop_tokens=everything[:20], min_tokens=1, allowed=half),
    ):
        out = draw(h, logits, [replace(row, processed_logprobs=processed, temperature=0.7)])
        assert out.sampled["status"] == params.MS_SAMPLE_NOTHING_ALLOWED
    out = draw(h, logits, [Parameters(stop_tokens=everything, min_tokens=3, counter=3)])
    assert out.sampled["status"] == params.MS_SAMPLE_OK


# ---- refusals -----------------------------------------------------------------------------------------------------------------
def constants(**fields):
    return params.pack("MSSampleParams", **(dict(vocab_size=10, max_rows=1, max_top=0, history_stride=0) | fields))


@pytest.mark.parametrize(
    ("constants", "binds", "why"),
    [
        (b"", 11, "constants are not one MSSampleParams"),
        (bytes(20), 11, "constants are not one MSSampleParams"),
        (constants(vocab_size=0), 11, "vocab_size is 0 or above"),
        (constants(vocab_size=2**31), 11, "vocab_size is 0 or above"),
        (constants(vocab_size=2**32 - 1), 11, "vocab_size is 0 or above"),
        (constants(max_rows=0), 11, "max_rows is less than the sampled rows"),
        (constants(history_stride=2**30), 11, "history_stride is 2\\^30 or more"),
        (constants(), 10, "fewer bindings than ms_sample_slot names"),
        (constants(), 0, "fewer bindings than ms_sample_slot names"),
    ],
)
def test_constants_that_do_not_fit_are_refused(h, constants, binds, why):
    bindings = [h.empty((64,)) for _ in range(binds)]
    with pytest.raises(ValueError, match=rf"launch 0 \(sample\): .*{why}"):
        h.device.create_plan([Launch("sample", bindings, constants, (1, 1, 1), (1, 1, 1))], 1, 1)


@given(words=st.lists(st.integers(0, 40) | st.integers(0, 2**32 - 1), max_size=5), max_sampled=st.integers(0, 2**16))
@settings(max_examples=60)
def test_any_constants_are_refused_or_run(h, words, max_sampled):
    """The step is zero: no rows."""
    with own_buffers(h):
        bindings = [h.put(np.zeros(64, np.float32)) for _ in range(11)]
        launch = Launch("sample", bindings, np.array(words, np.uint32).tobytes(), (1, 1, 1), (1, 1, 1))
        try:
            plan = h.device.create_plan([launch], 1, max_sampled)
        except (ValueError, MemoryError) as error:
            assert str(error)
            return
        plan.wait(plan.run(1))
        plan.close()
