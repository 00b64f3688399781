"""What each sampling parameter does, through the server: against the engine itself where it has the same, else by its effect."""
from __future__ import annotations

import pytest
from ask import answer, complete
from conftest import MODEL
from kinds_of_request import STORY

import metalstep
from metalstep import Request, SamplingParams


@pytest.fixture(scope="module")
def engine():
    model, tokenizer = metalstep.load(MODEL, strict=True, max_context=2048)
    with model:
        yield model.engine, tokenizer


def test_the_engine_itself_gives_the_same_tokens_and_logprobs(client, engine, alone):
    """Filters, penalties and seeds, with vLLM's order of filters."""
    runs, tokenizer = engine
    prompt = tokenizer.encode(STORY)
    for body in (
        {},
        {"temperature": 0.9, "seed": 1},
        {"temperature": 1.1, "top_p": 0.8, "top_k": 40, "min_p": 0.05, "seed": 2},
        {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 3},
        {"logit_bias": {"253": 6.0}},
        {"temperature": 1.0, "allowed_token_ids": list(range(200, 700)), "seed": 4},
    ):
        found = alone(complete(prompt, 12, logprobs=3, **body)).only
        options = {**body, "logit_bias": {int(token): bias for token, bias in body.get("logit_bias", {}).items()}}
        sampling = SamplingParams(logprobs=3, temperature_first=True, **options)
        wanted = list(runs.submit(Request(prompt, sampling, 12, frozenset({2}))))
        assert found.token_ids == [output.token for output in wanted]
        assert [entry[1] for entry in found.logprobs] == pytest.approx([output.logprob for output in wanted], abs=1e-4)
        for entry, output in zip(found.logprobs, wanted, strict=True):
            tops = dict(entry[2])
            for token, logprob in output.top:
                assert tops[tokenizer.decode([token])] == pytest.approx(logprob, abs=1e-4)


def test_a_seed_decides_and_without_one_answers_differ(client):
    hot = {"temperature": 1.5}
    seeded = [answer(client, MODEL, complete(STORY, 12, seed=seed, **hot)).text for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert len({answer(client, MODEL, complete(STORY, 12, **hot)).text for _ in range(3)}) == 3


def test_samples_of_one_request_differ_and_each_has_its_index(alone):
    choices = alone(complete(STORY, 10, n=4, temperature=1.5, seed=3)).choices
    assert sorted(choices) == [0, 1, 2, 3]
    assert len({choice.text for choice in choices.values()}) == 4


def test_penalties_keep_tokens_from_coming_again(alone):
    plain = alone(complete("one one one one one one", 8, temperature=0.0)).only.token_ids
    assert len(set(plain)) < len(plain)
    for body in ({"repetition_penalty": 5.0}, {"frequency_penalty": 2.0}):
        found = alone(complete("one one one one one one", 8, **body)).only.token_ids
        assert len(set(found)) > len(set(plain)), body
    assert alone(complete(STORY, 24, presence_penalty=2.0)).only.token_ids != alone(complete(STORY, 24)).only.token_ids
    tokens = alone(complete(STORY, 20, repetition_penalty=100.0)).only.token_ids
    assert len(set(tokens)) == len(tokens)


def test_biases_and_lists_of_tokens_decide_what_may_come(alone):
    assert set(alone(complete(STORY, 6, logit_bias={"253": 100})).only.token_ids) == {253}
    usual = alone(complete(STORY, 12)).only.token_ids
    assert usual[0] not in alone(complete(STORY, 12, logit_bias={str(usual[0]): -100})).only.token_ids
    allowed = [253, 260, 500, 501]
    found = alone(complete(STORY, 12, allowed_token_ids=allowed, temperature=2.0, seed=1)).only.token_ids
    assert set(found) <= set(allowed) and len(set(found)) > 1


def test_bad_words_of_one_token_and_of_several_never_come(alone):
    """The masks of longer ones depend on the token before, which the host sees while the next step is under way already."""
    plain = alone(complete(STORY, 24)).text
    words = plain.split()
    assert words[0] not in alone(complete(STORY, 24, bad_words=[words[0]])).text.split()
    pairs = [" ".join(words[i : i + 2]) for i in range(4)]
    for pair in pairs:
        assert f" {pair}" in plain
        assert f" {pair}" not in alone(complete(STORY, 24, bad_words=[pair])).text
    text = alone(complete(STORY, 24, bad_words=pairs)).text
    assert not any(f" {pair}" in text for pair in pairs)


def test_a_text_ends_where_it_is_told_to(client, alone):
    plain = alone(complete(STORY, 24)).only
    middle = plain.token_ids[4]
    at = plain.token_ids.index(middle)
    stopped = alone(complete(STORY, 24, stop_token_ids=[middle])).only
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", middle)
    assert stopped.token_ids == plain.token_ids[: at + 1]
    late = alone(complete(STORY, 24, stop_token_ids=[middle], min_tokens=16)).only
    assert len(late.token_ids) >= 16 and middle not in late.token_ids[:15]
    word = plain.text.split()[3]
    text = alone(complete(STORY, 24, stop=[word])).only
    assert (text.finish_reason, text.stop_reason) == ("stop", word)
    assert text.text == plain.text[: plain.text.index(word)]
    assert alone(complete(STORY, 24, stop=[word], include_stop_str_in_output=True)).text == text.text + word
    for count in (1, 7):
        assert len(alone(complete(STORY, count)).only.token_ids) == count
        assert alone(complete(STORY, count)).only.finish_reason == "length"


def test_the_end_of_the_text_can_be_ignored(alone):
    """A bias makes the end certain."""
    sure = {"logit_bias": {"2": 100}}
    ended = alone(complete(STORY, 6, **sure)).only
    assert (ended.token_ids, ended.finish_reason) == ([2], "stop")
    assert alone(complete(STORY, 6, ignore_eos=True, **sure)).only.token_ids == [2] * 6
    assert 2 not in alone(complete(STORY, 6, min_tokens=6, **sure)).only.token_ids[:5]
