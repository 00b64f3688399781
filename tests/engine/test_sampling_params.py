"""SamplingParams: what is in range is kept, what is not is refused by name, a vocabulary bounds the token ids."""
import copy
import math
import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metalstep.sampling import ALL_TOKENS, LARGEST, MAX_LOGPROBS, MAX_TOKEN_ENTRIES, SamplingParams

REALS = {  # field: its range, ends included
    "temperature": (0.0, LARGEST),
    "top_p": (math.ulp(0.0), 1.0),
    "min_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 0.5),
    "repetition_penalty": (math.ulp(0.0), LARGEST),
    "presence_penalty": (-LARGEST, LARGEST),
    "frequency_penalty": (-LARGEST, LARGEST),
}
INTEGERS = {
    "top_k": (0, 2**31 - 1),
    "seed": (0, 2**64 - 1),
    "min_tokens_to_keep": (1, 2**31 - 1),
    "repetition_context_size": (0, ALL_TOKENS),
    "presence_context_size": (0, ALL_TOKENS),
    "frequency_context_size": (0, ALL_TOKENS),
    "min_tokens": (0, 2**31 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
FLAGS = ("processed_logprobs", "temperature_first")
TOKEN_IDS = ("allowed_token_ids", "banned_token_ids", "xtc_special_tokens")

token_ids = st.integers(0, 2**31 - 1)
biases = st.dictionaries(token_ids, st.floats(-LARGEST, LARGEST), min_size=1, max_size=8)
valid = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.floats(low, high) for name, (low, high) in REALS.items()},
        **{name: st.integers(low, high) for name, (low, high) in INTEGERS.items()},
        **{name: st.booleans() for name in FLAGS},
        "xtc_special_tokens": st.lists(token_ids, unique=True, max_size=8).map(tuple),
        "banned_token_ids": st.lists(token_ids, unique=True, max_size=8).map(tuple),
        "logit_bias": biases,
    },
)
not_numbers = st.sampled_from([True, False, "1", [1.0], None, 1j, math.nan, math.inf, -math.inf, 10**400, 10**5000])


@given(fields=valid)
@example(fields={})
def test_what_is_in_range_is_kept(fields):
    params = SamplingParams(**fields)
    for name, value in fields.items():
        assert getattr(params, name) == value
        assert type(getattr(params, name)) is type(value)
    assert params == replace(params) == pickle.loads(pickle.dumps(params)) == copy.deepcopy(params)
    assert hash(params) == hash(replace(params))


@given(fields=valid)
def test_properties_say_what_the_step_has_to_do(fields):
    params = SamplingParams(**fields)
    penalties = fields.get("repetition_penalty", 1) != 1 or fields.get("presence_penalty", 0) or fields.get("frequency_penalty", 0)
    assert params.has_penalty == bool(penalties)
    changes = penalties or fields.get("logit_bias") or fields.get("banned_token_ids") or fields.get("min_tokens")
    assert params.adjusts_logits == bool(changes)
    assert replace(params, banned_token_ids=(), allowed_token_ids=[1]).adjusts_logits


@pytest.mark.parametrize("name", REALS)
@given(data=st.data())
def test_a_number_outside_its_range_is_refused_by_name(name, data):
    low, high = REALS[name]
    value = data.draw(
        not_numbers
        | st.floats(allow_nan=False).filter(lambda x: not low <= x <= high)
        | st.integers(int(high) + 1, int(high) + 2**60)
        | st.integers(-(2**1100), math.ceil(low) - 1)
    )
    if (value == 0 and value is not False) or (value is None and name.endswith("penalty")):  # mlx-lm's ways to say off
        assert getattr(SamplingParams(**{name: value}), name) == (0 if name in ("presence_penalty", "frequency_penalty") else 1)
        return
    with pytest.raises(ValueError, match=f"^{name} is .*, expected a.* number"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@given(data=st.data())
def test_an_integer_outside_its_range_is_refused_by_name(name, data):
    low, high = INTEGERS[name]
    value = data.draw(not_numbers | st.floats() | st.integers(max_value=low - 1) | st.integers(min_value=high + 1))
    if value is None and name in ("seed", "prompt_logprobs"):
        return
    with pytest.raises(ValueError, match=f"^{name} is .*, expected .*an integer"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, 1, None, "yes", 1.0])
def test_a_flag_is_true_or_false(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*, expected True or False"):
        SamplingParams(**{name: value})


@given(real=st.floats(0, 1, width=16), whole=st.integers(1, 32))
def test_numpy_scalars_are_numbers(real, whole):
    for kind in (np.float16, np.float32, np.float64, float, Fraction):
        for name in ("temperature", "min_p", "xtc_probability", "presence_penalty"):
            assert getattr(SamplingParams(**{name: kind(real)}), name) == real
    for kind in (np.int8, np.uint8, np.int64, np.uint64, int):
        for name in INTEGERS:
            assert getattr(SamplingParams(**{name: kind(whole)}), name) == whole
        params = SamplingParams(logit_bias={kind(whole): np.float16(real)}, banned_token_ids=np.array([whole], kind))
        assert params.logit_bias == {whole: real} and params.banned_token_ids == (whole,)
    assert SamplingParams(processed_logprobs=np.True_).processed_logprobs is True
    with pytest.raises(ValueError, match="top_k is True"):
        SamplingParams(top_k=np.True_)


def test_a_seed_is_drawn_and_kept():
    first, second = SamplingParams(), SamplingParams()
    assert first.seed != second.seed
    assert replace(first, top_k=3).seed == first.seed


@pytest.mark.parametrize("name", TOKEN_IDS)
@pytest.mark.parametrize("value", [[-1], [1.0], [True], ["1"], [None], [[1]], [2**31], 5, "12", b"12", {1: 2}, np.array([1.5])])
def test_what_is_no_list_of_token_ids_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*, expected (a list of token ids|an integer from 0)"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", TOKEN_IDS)
@given(ids=st.lists(token_ids, min_size=1, max_size=20))
def test_token_ids_may_be_any_collection_and_lose_duplicates(name, ids):
    expected = tuple(dict.fromkeys(ids))
    for values in (ids, tuple(ids), iter(ids), np.array(ids), dict.fromkeys(ids).keys()):
        assert getattr(SamplingParams(**{name: values}), name) == expected
    assert set(getattr(SamplingParams(**{name: set(ids)}), name)) == set(ids)


@pytest.mark.parametrize(
    ("bias", "text"),
    [
        ([1], "logit_bias is \\[1\\], expected a mapping"),
        ({-1: 1.0}, "a token id of logit_bias is -1"),
        ({"1": 1.0}, "a token id of logit_bias is '1'"),
        ({True: 1.0}, "a token id of logit_bias is True"),
        ({1: math.nan}, "the logit_bias of token 1 is nan, expected a finite number"),
        ({1: -math.inf}, "the logit_bias of token 1 is -inf, expected a finite number"),
        ({1: 1e39}, "the logit_bias of token 1 is 1e\\+39, expected a finite number"),
        ({1: None}, "the logit_bias of token 1 is None"),
    ],
)
def test_a_bias_that_is_none_is_refused(bias, text):
    with pytest.raises(ValueError, match=text):
        SamplingParams(logit_bias=bias)


@given(values=biases)
def test_a_callers_dict_is_copied(values):
    params = SamplingParams(logit_bias=values)
    before = dict(values)
    values.clear()
    assert params.logit_bias == before
    assert SamplingParams(logit_bias={}).logit_bias is None


@pytest.mark.parametrize("allowed", [[], [3], [3, 4]])
def test_something_must_be_allowed(allowed):
    with pytest.raises(ValueError, match="leave no token, expected at least one; allow more tokens"):
        SamplingParams(allowed_token_ids=allowed, banned_token_ids=[3, 4])


@given(vocab_size=st.integers(1, 300), data=st.data())
def test_token_ids_must_be_of_the_vocabulary(vocab_size, data):
    name = data.draw(st.sampled_from([*TOKEN_IDS, "logit_bias"]))
    outside = data.draw(st.integers(vocab_size, 2**31 - 1))
    inside = data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=5))
    wrap = (lambda ids: dict.fromkeys(ids, 1.0)) if name == "logit_bias" else list
    with pytest.raises(ValueError, match=f"{name} has token id {outside}, expected ids from 0 to {vocab_size - 1}; "):
        SamplingParams(**{name: wrap([*inside, outside])}).check_vocab(vocab_size)
    if inside and name != "banned_token_ids":
        params = SamplingParams(**{name: wrap(inside)})
        assert params.check_vocab(vocab_size) is params


@given(vocab_size=st.integers(1, 100), top_k=st.integers(0, 200), keep=st.integers(1, 200))
def test_counts_beyond_the_vocabulary_have_its_size(vocab_size, top_k, keep):
    params = SamplingParams(top_k=top_k, min_tokens_to_keep=keep, seed=1)
    checked = params.check_vocab(vocab_size)
    assert checked == replace(params, top_k=top_k if top_k < vocab_size else 0, min_tokens_to_keep=min(keep, vocab_size))
    assert checked.check_vocab(vocab_size) is checked


@given(
    vocab_size=st.integers(1, 8),
    allowed=st.none() | st.sets(st.integers(0, 7), min_size=1),
    banned=st.sets(st.integers(0, 7)),
    stops=st.sets(st.integers(0, 7)),
    min_tokens=st.integers(0, 1),
)
def test_a_vocabulary_of_which_nothing_is_left_is_refused(vocab_size, allowed, banned, stops, min_tokens):
    ids = set(range(vocab_size))
    allowed = None if allowed is None else (allowed & ids) or {0}
    left = (ids if allowed is None else allowed) - banned
    if allowed is not None and not left:
        return  # refused when made
    params = SamplingParams(allowed_token_ids=allowed, banned_token_ids=banned & ids, min_tokens=min_tokens)
    if left - (stops if min_tokens else set()):
        assert params.check_vocab(vocab_size, stops) is params
    else:
        with pytest.raises(ValueError, match="leave no token"):
            params.check_vocab(vocab_size, stops)


def test_the_table_of_a_request_has_an_end():
    full = dict.fromkeys(range(MAX_TOKEN_ENTRIES), 1.0)
    assert SamplingParams(logit_bias=full, banned_token_ids=range(5000)).check_vocab(50_000, [1, 2]).logit_bias == full
    with pytest.raises(ValueError, match="are 1026 ids, expected at most 1024"):
        SamplingParams(logit_bias=full, xtc_special_tokens=[1, 2])
    with pytest.raises(ValueError, match="are 1025 ids, expected at most 1024"):
        SamplingParams(logit_bias=full, min_tokens=1).check_vocab(50_000, [1])
