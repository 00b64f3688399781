"""metalstep.sample_utils against mlx_lm.sample_utils: the same when called, and read back as what it was made with."""
import functools
import inspect
import math

import mlx.core as mx
import mlx_lm.sample_utils as theirs
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metalstep import sample_utils as ours
from metalstep import stream_generate
from metalstep.sample_utils import native_params, seed_from_mlx
from metalstep.sampling import ALL_TOKENS, SamplingParams

VOCABULARY = 40
tokens = st.integers(0, VOCABULARY - 1)
sampler_arguments = st.fixed_dictionaries(
    {"temp": st.sampled_from([0.0, 0.3, 1.0, 2.5])},
    optional={
        "top_p": st.floats(0, 1),
        "min_p": st.sampled_from([0.0, 0.01, 0.5, 1.0]),
        "min_tokens_to_keep": st.integers(1, 5),
        "top_k": st.integers(0, VOCABULARY - 1),
        "xtc_probability": st.sampled_from([0.0, 0.5, 1.0]),
        "xtc_threshold": st.floats(0, 0.5),
        "xtc_special_tokens": st.lists(tokens, unique=True, max_size=4),
    },
)
penalties = st.none() | st.sampled_from([0.0, 0.5, 1.0, 1.3])
sizes = st.integers(0, 12)
processor_arguments = st.fixed_dictionaries(
    {},
    optional={
        "logit_bias": st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=5),
        "repetition_penalty": penalties,
        "repetition_context_size": sizes,
        "presence_penalty": penalties | st.just(-1.0),
        "presence_context_size": sizes,
        "frequency_penalty": penalties | st.just(-1.0),
        "frequency_context_size": sizes,
    },
)
rows = st.lists(st.floats(-8, 8, width=16), min_size=VOCABULARY, max_size=VOCABULARY, unique=True)


def logits_of(row):
    """A fresh array [1, vocab]: mlx-lm's processors write into theirs."""
    return mx.array(np.array([row], np.float32))


@pytest.mark.parametrize("name", ["make_sampler", "make_logits_processors"])
def test_arguments_have_mlx_lms_names_order_and_defaults(name):
    def signature(module):
        return [(p.name, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]

    assert signature(ours) == signature(theirs)


def test_what_callers_import_from_mlx_lm_is_here():
    for name in ("apply_top_k", "apply_top_p", "apply_min_p", "apply_xtc", "categorical_sampling", "greedy_sampler"):
        assert getattr(ours, name) is getattr(theirs, name)


@settings(max_examples=40)  # MLX compiles each filter anew for new arguments
@given(arguments=sampler_arguments, row=rows, seed=st.integers(0, 2**32 - 1))
def test_a_sampler_picks_what_mlx_lms_picks(arguments, row, seed):
    logprobs = logits_of(row) - mx.logsumexp(logits_of(row), axis=-1, keepdims=True)
    picks = []
    for module in (ours, theirs):
        mx.random.seed(seed)
        picks.append(module.make_sampler(**arguments)(logprobs).tolist())
    assert picks[0] == picks[1]


@settings(max_examples=20)
@given(row=rows, seed=st.integers(0, 2**32 - 1), beyond=st.integers(0, 100))
def test_top_k_from_the_vocabulary_on_is_off(row, seed, beyond):
    picks = []
    for top_k in (VOCABULARY + beyond, 0):
        mx.random.seed(seed)
        picks.append(ours.make_sampler(1.0, min_p=0.1, min_tokens_to_keep=VOCABULARY + beyond, top_k=top_k)(logits_of(row)).item())
    assert picks[0] == picks[1]


@given(arguments=processor_arguments, row=rows, history=st.lists(tokens, max_size=20))
def test_processors_change_logits_as_mlx_lms_do(arguments, row, history):
    results = []
    for module in (ours, theirs):
        logits = logits_of(row)
        for processor in module.make_logits_processors(**arguments):
            logits = processor(mx.array(history, mx.int32), logits)
        results.append(np.array(logits))
    np.testing.assert_array_equal(results[0], results[1])


def expected_sampler(temp=0.0, top_p=0.0, min_p=0.0, min_tokens_to_keep=1, top_k=0, xtc_probability=0.0, **xtc):
    """The fields that the arguments of make_sampler stand for, by the words of mlx-lm's docstring."""
    if temp == 0:
        return SamplingParams(seed=0)
    return SamplingParams(
        temp, top_p if 0 < top_p < 1 else 1.0, min_p, top_k, 0, min_tokens_to_keep if min_p else 1, xtc_probability,
        xtc.get("xtc_threshold", 0.1) if xtc_probability else 0.1,
        xtc.get("xtc_special_tokens", ()) if xtc_probability else (),
    )  # fmt: skip


def expected_processors(logit_bias=None, **arguments):
    fields = {"logit_bias": logit_bias or None}
    for kind, off in (("repetition", 1.0), ("presence", 0.0), ("frequency", 0.0)):
        penalty, size = arguments.get(f"{kind}_penalty"), arguments.get(f"{kind}_context_size", 20)
        if penalty is None or penalty == 0:
            penalty, size = off, 0
        elif size == 0 and kind != "repetition":
            size = ALL_TOKENS
        fields |= {f"{kind}_penalty": penalty, f"{kind}_context_size": size}
    return fields


def read(sampler, processors):
    params = native_params(sampler, processors)
    return None if params is None else SamplingParams(**params, seed=0)


def without_idle(params):
    """Fields of filters that are off have no effect; mlx-lm's closures do not hold them."""
    fields = {name: getattr(params, name) for name in params.__dataclass_fields__}
    if not fields["min_p"]:
        fields["min_tokens_to_keep"] = 1
    if not fields["xtc_probability"]:
        fields["xtc_threshold"], fields["xtc_special_tokens"] = 0.1, ()
    return fields


@pytest.mark.parametrize("module", [ours, theirs])
@given(sampling=sampler_arguments, processing=processor_arguments)
@example(sampling={"temp": 0.5}, processing={"frequency_penalty": 0.5, "frequency_context_size": 0})
def test_what_a_closure_was_made_with_is_read_back(module, sampling, processing):
    params = read(module.make_sampler(**sampling), module.make_logits_processors(**processing))
    assert params is not None
    wanted = {**vars(expected_sampler(**sampling)), **expected_processors(**processing)}
    assert without_idle(params) == wanted


def test_no_sampler_and_mlx_lms_greedy_one_are_greedy():
    for sampler in (None, theirs.greedy_sampler, theirs.make_sampler(0.0), ours.make_sampler(0.0, top_k=3, xtc_probability=1.0)):
        for processors in (None, []):
            assert native_params(sampler, processors) == {"temperature": 0.0}


def test_mlx_lms_way_to_leave_top_p_off_is_off():
    for top_p in (0.0, 1.0, 1.5, -1.0):
        assert read(theirs.make_sampler(1.0, top_p=top_p), None).top_p == 1.0


kinds = {
    "logit_bias": lambda m: m.make_logits_processors({1: 2.0})[0],
    "repetition": lambda m: m.make_repetition_penalty(1.1),
    "presence": lambda m: m.make_presence_penalty(0.5, 7),
    "frequency": lambda m: m.make_frequency_penalty(0.5),
}


@given(order=st.lists(st.sampled_from(list(kinds)), max_size=5), data=st.data())
def test_only_mlx_lms_order_is_native(order, data):
    processors = [kinds[kind](data.draw(st.sampled_from([ours, theirs]))) for kind in order]
    in_order = [kind for kind in kinds if kind in order] == order
    assert (native_params(None, processors) is not None) == in_order


@pytest.mark.parametrize(
    "sampler",
    [
        lambda logprobs: mx.argmax(logprobs, axis=-1),
        functools.partial(theirs.categorical_sampling, temp=1.0),
        theirs.make_sampler(-1.0),
        theirs.make_sampler(math.nan),
        theirs.make_sampler(math.inf),
        theirs.make_sampler(1.0, min_p=-0.5),
        theirs.make_sampler(1.0, min_p=2.0),
        theirs.make_sampler(1.0, min_p=0.5, min_tokens_to_keep=0),
        theirs.make_sampler(1.0, xtc_probability=2.0),
        theirs.make_sampler(1.0, xtc_probability=1.0, xtc_threshold=0.7),
        theirs.make_sampler(1.0, xtc_probability=1.0, xtc_special_tokens=[-1]),
        theirs.make_sampler(mx.array(1.0)),
        type("Own", (ours.Sampler,), {"__call__": lambda self, x: mx.array([0])})({"temperature": 1.0}),
        min,
        "sampler",
    ],
)
def test_an_unknown_sampler_or_value_is_not_native(sampler):
    assert native_params(sampler, None) is None


@pytest.mark.parametrize(
    "processor",
    [
        lambda tokens, logits: logits,
        functools.partial(theirs.make_presence_penalty(1.0)),
        theirs.make_repetition_penalty(0.0),
        theirs.make_repetition_penalty(math.inf),
        theirs.make_presence_penalty(math.nan),
        theirs.make_presence_penalty(1.0, -3),
        theirs.make_frequency_penalty(1.0, None),
        theirs.make_frequency_penalty(1.0, 2.0),
        theirs.make_logits_processors({-1: 1.0})[0],
        theirs.make_logits_processors({1: math.inf})[0],
        None,
    ],
)
def test_an_unknown_processor_or_value_is_not_native(processor):
    assert native_params(None, [processor]) is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"temp": -1.0}, "temperature is -1.0"),
        ({"temp": math.nan}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0, expected a number from 0 to 1"),
        ({"min_tokens_to_keep": 0}, "min_tokens_to_keep is 0, expected an integer above 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"xtc_probability": 1.5}, "xtc_probability is 1.5"),
        ({"xtc_threshold": 0.6}, "xtc_threshold is 0.6"),
        ({"xtc_special_tokens": [-1]}, "a token id of xtc_special_tokens is -1"),
    ],
)
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_samplers_values_are_checked_when_it_is_made(arguments, text, temp):
    with pytest.raises(ValueError, match=text):
        ours.make_sampler(**{"temp": temp, **arguments})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"logit_bias": {-1: 1.0}}, "a token id of logit_bias is -1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0, expected a finite number above 0"),
        ({"repetition_penalty": 1.1, "repetition_context_size": None}, "repetition_context_size is None"),
        ({"presence_penalty": 1.0, "presence_context_size": -1}, "presence_context_size is -1"),
        ({"presence_penalty": 1.0, "presence_context_size": False}, "presence_context_size is False"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf"),
    ],
)
def test_a_processors_values_are_checked_when_it_is_made(arguments, text):
    with pytest.raises(ValueError, match=text):
        ours.make_logits_processors(**arguments)


@given(seed=st.integers(0, 2**32 - 1))
def test_mlx_seeds_repeat_ours(seed):
    mx.random.seed(seed)
    first = [seed_from_mlx() for _ in range(3)]
    mx.random.seed(seed)
    assert [seed_from_mlx() for _ in range(3)] == first
    assert len(set(first)) == 3 and all(0 <= s < 2**64 for s in first)


def test_a_seed_has_all_its_bits():
    mx.random.seed(0)
    seeds = np.array([seed_from_mlx() for _ in range(200)], np.uint64)
    ones = np.unpackbits(seeds.view(np.uint8).reshape(200, 8), axis=1).mean(axis=0)
    assert (abs(ones - 0.5) < 0.2).all()  # 5.6 standard deviations of a fair bit's mean


@given(penalty=st.sampled_from([0.5, 1.3]), size=st.integers(0, 9))
def test_processors_made_one_by_one_are_those_made_together(penalty, size):
    for kind in ("repetition", "presence", "frequency"):
        (together,) = ours.make_logits_processors(**{f"{kind}_penalty": penalty, f"{kind}_context_size": size})
        alone = getattr(ours, f"make_{kind}_penalty")(penalty, size)
        assert repr(alone) == repr(together)


def generated(smollm2, **options):
    model, tokenizer = smollm2
    return [r.token for r in stream_generate(model, tokenizer, "The cat sat on the mat, and the cat", max_tokens=12, **options)]


@settings(max_examples=8)
@given(
    arguments=st.fixed_dictionaries(
        {
            "logit_bias": st.dictionaries(st.integers(0, 400), st.floats(-20, 20, width=16), max_size=5),
            "repetition_penalty": penalties,
            "repetition_context_size": sizes,
            "presence_penalty": penalties,
            "presence_context_size": sizes,
            "frequency_penalty": penalties,
            "frequency_context_size": sizes,
        }
    )
)
@example({"presence_penalty": 1.0, "presence_context_size": 0})  # the prompt counts
@example({"repetition_penalty": 1.3, "repetition_context_size": 0, "frequency_penalty": 0.5, "frequency_context_size": 3})
def test_the_step_does_what_the_processors_do(smollm2, arguments):
    """A lambda hides what a processor is, so that it is called with the logits."""
    hidden = [lambda tokens, logits, p=p: p(tokens, logits) for p in theirs.make_logits_processors(**arguments)]
    assert native_params(None, hidden) is None or not hidden
    called = generated(smollm2, logits_processors=hidden)
    for module in (ours, theirs):
        assert generated(smollm2, logits_processors=module.make_logits_processors(**arguments)) == called


@pytest.mark.parametrize("module", [ours, theirs])
def test_mlx_seeds_repeat_a_text(smollm2, module):
    texts = []
    for seed in (5, 5, 6):
        mx.random.seed(seed)
        texts.append(generated(smollm2, sampler=module.make_sampler(1.0, top_p=0.9)))
    assert texts[0] == texts[1] != texts[2]
