"""How generate's arguments say how tokens are picked: each has an effect, none is dropped, and the paths that mean one thing agree."""
import inspect

import mlx.core as mx
import mlx_lm.sample_utils as mlx_sample_utils
import numpy as np
import pytest
from families import BASE, FAMILIES, VOCAB, build
from mlx_lm.generate import generate_step as mlx_generate_step
from mlx_lm.generate import stream_generate as mlx_stream_generate
from tiny import write_model

import metalstep
from metalstep import SamplingParams, batch_generate, stream_generate
from metalstep import sample_utils as own_sample_utils
from metalstep.generate import generate_step
from metalstep.generate_options import REFUSED, sampling_from
from metalstep.grammar import ChoiceGrammar

PROMPT = [(19 * i + 3) % (VOCAB - 1) + 1 for i in range(30)]
MAKERS = [mlx_sample_utils, own_sample_utils]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, tokenizer) of a few thousand weights, its logits far enough apart to tell the tokens."""
    model = build("llama_untied", quantized=False)
    model.lm_head.weight = model.lm_head.weight * 6
    config = {"model_type": "llama", **BASE, **FAMILIES["llama_untied"].config}
    model, tokenizer = metalstep.load(write_model(tmp_path_factory.mktemp("llama"), model, config), strict=True)
    with model:
        yield model, tokenizer


def answer(tiny, count=12, **options):
    """Everything that a caller sees of every token."""
    found = []
    for r in stream_generate(*tiny, PROMPT, max_tokens=count, **options):
        prompt = None if r.prompt_logprobs is None else [p and (p.token, p.logprob, p.rank, tuple(p.top)) for p in r.prompt_logprobs]
        found.append((r.token, r.logprob, r.rank, r.top_logprobs, r.finish_reason, prompt))
    return found


# ---- each option does something ------------------------------------------------------------------------------------------------

WARM = {"temperature": 1.5, "seed": 3}
CHANGES = {  # field: (options without it, its value)
    "temperature": ({"seed": 3}, 1.5),
    "top_p": (WARM, 0.3),
    "min_p": (WARM, 0.4),
    "top_k": (WARM, 2),
    "seed": ({"temperature": 1.5, "seed": 4}, 3),
    "min_tokens_to_keep": ({**WARM, "min_p": 0.9}, 40),
    "xtc_probability": (WARM, 1.0),
    "xtc_threshold": ({**WARM, "xtc_probability": 1.0, "xtc_threshold": 0.5}, 0.01),
    "xtc_special_tokens": ({**WARM, "xtc_probability": 1.0, "xtc_threshold": 0.01}, tuple(range(VOCAB))),
    "repetition_penalty": ({}, 4.0),
    "repetition_context_size": ({"repetition_penalty": 4.0}, 2),
    "presence_penalty": ({}, 9.0),
    "presence_context_size": ({"presence_penalty": 9.0}, 40),
    "frequency_penalty": ({}, 9.0),
    "frequency_context_size": ({"frequency_penalty": 9.0}, 40),
    "logit_bias": ({}, {7: 50.0}),
    "allowed_token_ids": ({}, (7, 8)),
    "min_tokens": ({"logit_bias": {0: 90.0}}, 3),
    "logprobs": ({}, 3),
    "prompt_logprobs": ({}, 0),
    "processed_logprobs": ({"logit_bias": {7: 5.0}, "processed_logprobs": True}, False),
    "temperature_first": ({**WARM, "temperature": 6.0, "top_p": 0.6}, True),
}


@pytest.mark.parametrize("name", sorted(SamplingParams.__dataclass_fields__))
def test_every_field_changes_what_comes_back(tiny, name):
    if name == "banned_token_ids":
        first = answer(tiny)[0][0]
        assert answer(tiny, banned_token_ids=(first,))[0][0] != first
        return
    base, value = CHANGES[name]
    assert answer(tiny, **base) == answer(tiny, **base)
    assert answer(tiny, **{**base, name: value}) != answer(tiny, **base)


def test_temp_is_the_temperature(tiny):
    assert answer(tiny, temp=1.5, seed=3) == answer(tiny, **WARM)
    with pytest.raises(ValueError, match="temp and temperature are the same"):
        answer(tiny, temp=1.5, temperature=1.5)


# ---- mlx-lm's arguments ---------------------------------------------------------------------------------------------------------


def mlx_parameters():
    found = {}
    for function in (mlx_generate_step, mlx_stream_generate):
        found |= {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
    return {n: p for n, p in found.items() if n not in ("prompt", "model", "tokenizer")}


@pytest.mark.parametrize("name", sorted(mlx_parameters()))
def test_mlx_lms_arguments_are_taken_or_refused_by_name(tiny, name):
    default = mlx_parameters()[name].default
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=name):
            answer(tiny, **{name: 7})
        if name == "stream":
            return  # mlx-lm's default is a stream
    assert answer(tiny, **{"count" if name == "max_tokens" else name: default}) == answer(tiny, count=256 if name == "max_tokens" else 12)


def test_generate_step_is_stream_generate_without_a_tokenizer(tiny):
    model = tiny[0]
    want = list(stream_generate(*tiny, PROMPT, max_tokens=9, temp=0.8, seed=2, banned_token_ids=[0]))
    got = list(generate_step(mx.array(PROMPT), model, max_tokens=9, temp=0.8, seed=2, banned_token_ids=[0]))
    assert [token for token, _ in got] == [r.token for r in want]
    for (_, logprobs), r in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.array(logprobs), np.array(r.logprobs))
    assert [t for t, _ in generate_step(PROMPT, model, max_tokens=5, logits_processors=[lambda t, x: x.at[:, 0].add(99.0)])] == [0] * 5
    for options, error in (({"max_tokens": -2}, ValueError), ({"colour": 1}, TypeError), ({"kv_bits": 4}, NotImplementedError)):
        with pytest.raises(error, match=next(iter(options))):
            generate_step(PROMPT, model, **options)
    with pytest.raises(ValueError, match="the prompt is text"):
        generate_step("text", model)


# ---- callables -----------------------------------------------------------------------------------------------------------------


def opaque(function):
    """The same, of the caller's own making."""

    def own(*arguments):
        return function(*arguments)

    return own


PROCESSORS = [
    {"logit_bias": {7: 3.0, 9: -4.0}},
    {"repetition_penalty": 1.4, "repetition_context_size": 8},
    {"presence_penalty": 2.0, "presence_context_size": 6},
    {"frequency_penalty": 1.5, "frequency_context_size": 12},
    {"logit_bias": {7: 3.0}, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25},
]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("arguments", [{}, *PROCESSORS])
def test_greedy_inside_the_step_is_greedy_outside(tiny, maker, arguments):
    processors = maker.make_logits_processors(**arguments)
    sampler = maker.make_sampler(temp=0.0)
    inside = answer(tiny, 20, sampler=sampler, logits_processors=processors)
    outside = answer(tiny, 20, sampler=opaque(sampler), logits_processors=[opaque(p) for p in processors])
    alone = answer(tiny, 20, logits_processors=processors)
    assert [o[0] for o in inside] == [o[0] for o in outside] and inside == alone
    np.testing.assert_allclose([o[1] for o in inside], [o[1] for o in outside], atol=2e-5)
    assert [o[2] for o in inside] == [o[2] for o in outside]
    fields = {**arguments, **{f"{k}_context_size": 20 for k in ("repetition", "presence", "frequency") if f"{k}_penalty" in arguments}}
    assert answer(tiny, 20, **{**fields, **arguments}) == inside


@pytest.mark.parametrize("maker", MAKERS)
def test_a_sampler_is_its_arguments(tiny, maker):
    filters = ({}, {"top_p": 0.8, "min_p": 0.02}, {"top_k": 5}, {"xtc_probability": 0.5}, {"min_p": 0.5, "min_tokens_to_keep": 3})
    for arguments in ({"temp": 1.3, **others} for others in filters):
        assert answer(tiny, sampler=maker.make_sampler(**arguments), seed=9) == answer(tiny, **arguments, seed=9)


def test_options_that_callables_do_not_say_go_with_them(tiny):
    sampler = own_sample_utils.make_sampler(1.2, top_p=0.9)
    bias = own_sample_utils.make_logits_processors({7: 4.0})
    options = dict(seed=4, min_tokens=3, banned_token_ids=[11, 12], logprobs=2, prompt_logprobs=1, repetition_penalty=1.3)
    assert answer(tiny, sampler=sampler, **options) == answer(tiny, temp=1.2, top_p=0.9, **options)
    assert answer(tiny, logits_processors=bias, temp=1.2, **options) == answer(tiny, logit_bias={7: 4.0}, temp=1.2, **options)
    assert answer(tiny, sampler=sampler, logit_bias={7: 4.0}, **options) == answer(tiny, sampler=sampler, logits_processors=bias, **options)
    assert answer(tiny, sampler=sampler, seed=None, logit_bias=None, prompt_logprobs=None)
    outside = answer(tiny, sampler=opaque(own_sample_utils.make_sampler(0.0)), prompt_logprobs=2)
    assert [o[5] for o in outside] == [o[5] for o in answer(tiny, prompt_logprobs=2)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sampler": own_sample_utils.make_sampler(1.0), "temp": 0.5}, "temp and sampler both say how to pick tokens"),
        ({"sampler": mlx_sample_utils.make_sampler(1.0), "temperature": 0.5}, "temperature and sampler both say"),
        ({"sampler": own_sample_utils.make_sampler(1.0), "top_k": 5}, "top_k and sampler both say"),
        ({"sampler": own_sample_utils.make_sampler(1.0), "temperature_first": True}, "temperature_first and sampler both say"),
        ({"logits_processors": mlx_sample_utils.make_logits_processors({3: 1.0}), "logit_bias": {4: 1.0}}, "logit_bias and logits_proc"),
        (
            {"logits_processors": own_sample_utils.make_logits_processors(repetition_penalty=2.0), "repetition_context_size": 4},
            "repetition_context_size and logits_processors both say",
        ),
        ({"sampler": lambda x: x, "temp": 0.5}, "temp has no effect on a sampler or logits processors of your own"),
        ({"sampler": lambda x: x, "seed": 3}, "seed has no effect"),
        ({"logits_processors": [lambda t, x: x], "logprobs": 3}, "logprobs has no effect"),
        ({"logits_processors": [lambda t, x: x], "grammar": ChoiceGrammar([[3]])}, "grammar and a sampler or logits processors"),
        ({"sampler": 5}, "sampler is 5, expected a callable"),
        ({"logits_processors": [5]}, "a logits processor is 5, expected a callable"),
        ({"logits_processors": 5}, "logits_processors is 5, expected a list of callables"),
        ({"logits_processors": lambda t, x: x}, "expected a list of callables"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(tiny, options, text):
    with pytest.raises(ValueError, match=text):
        answer(tiny, **options)


def test_what_belongs_to_sampling_is_taken_out_of_the_options():
    options = {"temp": 0.5, "seed": 3, "kv_bits": None, "colour": "red"}
    assert sampling_from(None, None, options).params == SamplingParams(temperature=0.5, seed=3, processed_logprobs=True)
    assert options == {"kv_bits": None, "colour": "red"}


# ---- distributions -------------------------------------------------------------------------------------------------------------

DRAWS = 4000
FILTERS = [
    {},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 4},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"top_p": 0.9, "min_p": 0.02, "top_k": 10},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_tokens_come_as_often_as_mlx_lms_filters_say(tiny, filters):
    """Of one row of logits, over a sweep of seeds: no token that is filtered, each other one within five standard deviations."""
    temp = 1.3
    (first,) = stream_generate(*tiny, PROMPT, max_tokens=1)
    row = first.logprobs[None]
    if "top_p" in filters:
        row = mlx_sample_utils.apply_top_p(row, filters["top_p"])
    if "min_p" in filters:
        row = mlx_sample_utils.apply_min_p(row, filters["min_p"], 1)
    if "xtc_probability" in filters:
        row = mlx_sample_utils.apply_xtc(row, 1.0, filters["xtc_threshold"], [])
    if "top_k" in filters:
        row = mlx_sample_utils.apply_top_k(row, filters["top_k"])
    chances = np.array(mx.softmax(row / temp, axis=-1)[0], np.float64)
    params = [SamplingParams(temperature=temp, seed=seed, **filters) for seed in range(DRAWS)]
    drawn = batch_generate(*tiny, [PROMPT] * DRAWS, max_tokens=1, sampling=params, return_token_ids=True)
    counts = np.zeros(VOCAB)
    for ids in drawn.token_ids:
        counts[ids[0] if ids else 0] += 1
    assert counts[chances == 0].sum() == 0
    expected, spread = DRAWS * chances, np.sqrt(DRAWS * chances * (1 - chances))
    assert (np.abs(counts - expected) <= 5 * spread + 1).all()
    assert (counts > 0).sum() > 1
