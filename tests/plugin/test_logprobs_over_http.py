"""Logprobs of output and prompt, as few and as many as there are, against the logits of the engine itself."""
from __future__ import annotations

import httpx
import numpy as np
import pytest
from ask import answer, chat, complete
from conftest import MODEL
from kinds_of_request import STORY

import metalstep
from metalstep import Request, SamplingParams

VOCAB = 49152
NEAR = 1e-4


@pytest.fixture(scope="module")
def truth():
    """The prompt's tokens and those that follow, and the logprobs of each next token, float64 [tokens, vocab]."""
    model, tokenizer = metalstep.load(MODEL, strict=True, max_context=2048)
    with model:
        prompt = tokenizer.encode(STORY)
        tokens = [output.token for output in model.engine.submit(Request(prompt, SamplingParams(), 4))]
        logits = []
        for count in range(1, len(prompt) + len(tokens)):
            request = Request((prompt + tokens)[:count], SamplingParams(), 1, keep_logits=True)
            logits.append(np.array(next(iter(model.engine.submit(request))).logits.numpy(), np.float64))
    rows = np.array(logits)
    rows -= rows.max(axis=1, keepdims=True)
    return prompt, tokens, rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def raw(server, **body):
    """Logprobs with token ids for names: the `openai` package would take two tokens of one text for one."""
    given = {"model": MODEL, "prompt": STORY, "max_tokens": 4, "temperature": 0, "return_tokens_as_token_ids": True, **body}
    response = httpx.post(f"{server.url}/v1/completions", json=given, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def number(name: str) -> int:
    return int(name.removeprefix("token_id:"))


@pytest.mark.parametrize("count", [0, 1, 5, 32, 33, 100, -1])
def test_logprobs_are_the_models_own(server, truth, count):
    prompt, tokens, rows = truth
    found = raw(server, logprobs=count)["logprobs"]
    assert [number(name) for name in found["tokens"]] == tokens
    for i, (token, logprob) in enumerate(zip(tokens, found["token_logprobs"], strict=True)):
        row = rows[len(prompt) - 1 + i]
        assert logprob == pytest.approx(row[token], abs=NEAR)
        check_tops(found["top_logprobs"][i], row, VOCAB if count < 0 else max(count, 1))


def check_tops(tops: dict[str, float], row: np.ndarray, count: int) -> None:
    ids = [number(name) for name in tops]
    assert len(ids) in (count, count + 1)  # the row's own token may be beyond
    np.testing.assert_allclose(list(tops.values()), row[ids], atol=NEAR)
    assert sorted(row[ids])[-1] == row.max()
    if len(ids) == count:
        np.testing.assert_allclose(sorted(tops.values()), np.sort(row)[-count:], atol=NEAR)


@pytest.mark.parametrize("count", [0, 2, 32, 60, -1])
def test_prompt_logprobs_are_the_models_own(server, truth, count):
    prompt, _, rows = truth
    found = raw(server, prompt_logprobs=count, max_tokens=1)["prompt_logprobs"]
    assert len(found) == len(prompt) and found[0] is None
    for i, entry in enumerate(found[1:], 1):
        row, own = rows[i - 1], entry[str(prompt[i])]
        assert own["logprob"] == pytest.approx(row[prompt[i]], abs=NEAR)
        assert own["rank"] == 1 + (row > row[prompt[i]]).sum()
        wanted = VOCAB if count < 0 else count
        assert len(entry) in (wanted, wanted + 1)
        best = sorted((x["logprob"] for x in entry.values() if x["rank"] <= wanted), reverse=True)
        np.testing.assert_allclose(best, -np.sort(-row)[:wanted], atol=NEAR)


def test_an_echo_has_the_logprobs_of_prompt_and_output(client, server, truth):
    prompt, tokens, rows = truth
    found = raw(server, echo=True, logprobs=1)
    names = [number(name) for name in found["logprobs"]["tokens"]]
    assert names == prompt + tokens
    logprobs = found["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx([row[token] for row, token in zip(rows, names[1:], strict=True)], abs=NEAR)
    told = {"echo": True, "return_token_ids": False}  # vLLM echoes token ids or the text, not both
    assert answer(client, MODEL, complete(STORY, 4, **told)).text == STORY + answer(client, MODEL, complete(STORY, 4)).text


def test_a_prompt_of_one_token_has_no_logprobs(server):
    assert raw(server, prompt=[500], prompt_logprobs=2)["prompt_logprobs"] in (None, [None])
    assert len(raw(server, prompt=[500], echo=True, logprobs=1)["logprobs"]["tokens"]) == 5


def test_a_chat_has_as_many_as_it_asks_for(client):
    for count in (0, 3, 40):
        found = answer(client, MODEL, chat("Name a colour.", 4, logprobs=True, top_logprobs=count)).only
        assert len(found.logprobs) == len(found.token_ids) == 4
        assert all(len(tops) == count for _, _, tops in found.logprobs)
        assert all(tops[0] == (token, logprob) for token, logprob, tops in found.logprobs if tops)
