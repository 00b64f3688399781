"""The rest of vLLM's server: other APIs, what it counts, sleep, clients that leave, and the options that guard it."""
from __future__ import annotations

import ssl
import time

import httpx
import openai
import pytest
from anthropic import Anthropic
from ask import answer, complete
from conftest import KEY, KV_TOKENS, MODEL, ORIGIN
from kinds_of_request import LONG, STORY
from metrics import sums
from openai import OpenAI

WAIT = 60  # seconds for something that has to come


def metrics(server) -> dict[str, float]:
    return sums(httpx.get(f"{server.url}/metrics").text)


def until(what, *, every: float = 0.2) -> None:
    end = time.monotonic() + WAIT
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(every)


def test_requests_and_tokens_are_counted(server, client):
    before = metrics(server)
    found = answer(client, MODEL, complete("Count this. " + LONG, 5))
    again = answer(client, MODEL, complete("Count this. " + LONG, 5))
    after = metrics(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["vllm:request_success_total"] == 2
    assert grown["vllm:generation_tokens_total"] == 10
    assert grown["vllm:prompt_tokens_total"] == 2 * found.usage.prompt_tokens
    assert grown["vllm:prefix_cache_hits_total"] == found.cached + again.cached >= 256
    assert grown["vllm:time_to_first_token_seconds_count"] == 2
    assert grown["vllm:inter_token_latency_seconds_count"] == 8


def test_a_client_that_leaves_frees_its_blocks(server, client):
    stream = client.completions.create(
        model=MODEL, prompt=STORY, max_tokens=1900, temperature=1, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(5):
        next(stream)
    assert metrics(server)["vllm:num_requests_running"] == 1
    stream.close()
    until(lambda: metrics(server)["vllm:num_requests_running"] == 0)
    until(lambda: metrics(server)["vllm:kv_cache_usage_perc"] == 0)
    answer(client, MODEL, complete(STORY, 2))  # with it the engine hears of the end
    stats = httpx.post(f"{server.url}/collective_rpc", json={"method": "metalstep_stats"}).json()["results"][0]
    assert stats["requests"] <= 1


def test_an_engine_asleep_holds_little_and_answers_the_same_afterwards(server, client):
    ask = complete(LONG + STORY, 8, temperature=1.0, seed=3, logprobs=2)
    before = answer(client, MODEL, ask)
    engine = server.engine
    awake = engine.memory_info().rss
    assert httpx.post(f"{server.url}/sleep?level=1", timeout=WAIT).status_code == 200
    try:
        assert httpx.get(f"{server.url}/is_sleeping").json() == {"is_sleeping": True}
        until(lambda: engine.memory_info().rss < awake - 100 * 2**20)
    finally:
        assert httpx.post(f"{server.url}/wake_up", timeout=WAIT).status_code == 200
    after = answer(client, MODEL, ask)
    assert after.choices == before.choices
    assert after.cached == 0  # what was cached is gone


def test_text_becomes_tokens_and_tokens_text(server):
    tokens = httpx.post(f"{server.url}/tokenize", json={"model": MODEL, "prompt": STORY}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 2048
    back = httpx.post(f"{server.url}/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}).json()
    assert back["prompt"] == STORY


@pytest.mark.parametrize("stream", [False, True])
def test_the_anthropic_client_is_answered(server, client, stream):
    asked = {"model": MODEL, "max_tokens": 12, "messages": [{"role": "user", "content": "Name a colour."}]}
    asked["extra_body"] = {"temperature": 0.0}
    wanted = client.chat.completions.create(**asked).choices[0].message.content
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as anthropic:
        if stream:
            with anthropic.messages.stream(**asked) as pieces:
                assert "".join(pieces.text_stream) == wanted
        else:
            found = anthropic.messages.create(**asked)
            assert (found.content[0].text, found.usage.output_tokens, found.stop_reason) == (wanted, 12, "max_tokens")


def test_the_responses_api_is_answered(client):
    wanted = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Name a colour."}], max_tokens=12, temperature=0
    )
    found = client.responses.create(model=MODEL, input="Name a colour.", max_output_tokens=12, temperature=0)
    assert found.output_text == wanted.choices[0].message.content


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 5000},
        {"temperature": -1},
        {"top_p": 2},
        {"allowed_token_ids": [10**9]},
        {"logit_bias": {"99999": 1}},
        {"prompt": LONG * 12},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"grammar": "root ::= nothing"}},
        {"stop_token_ids": [10**9], "min_tokens": 4},
        {"logit_bias": {str(i): 1 for i in range(1500)}},
        {"prompt": [10**6]},
    ],
    ids=", ".join,
)
def test_what_cannot_be_run_is_refused_and_the_server_goes_on(client, alone, body):
    with pytest.raises(openai.BadRequestError):
        answer(client, MODEL, complete(**{"prompt": STORY, "max_tokens": 4, **body}))
    assert answer(client, MODEL, complete(STORY)).choices == alone(complete(STORY)).choices


def test_only_a_key_opens_the_guarded_server(other_server, other_client, certificate):
    trusting = ssl.create_default_context(cafile=certificate[1])
    assert {model.id for model in other_client.models.list()} == {MODEL, "other"}
    wrong = OpenAI(base_url=f"{other_server.url}/v1", api_key="wrong", http_client=httpx.Client(verify=trusting), max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"{other_server.url}/health")


def test_pages_of_one_origin_may_ask_the_guarded_server(other_server, certificate):
    trusting = ssl.create_default_context(cafile=certificate[1])
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{other_server.url}/v1/completions", headers=asked, verify=trusting)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    refused = httpx.options(f"{other_server.url}/v1/completions", headers={**asked, "Origin": "https://else.example"}, verify=trusting)
    assert "access-control-allow-origin" not in refused.headers


def test_the_guarded_server_knows_the_path_that_it_is_behind(other_server, certificate):
    trusting = ssl.create_default_context(cafile=certificate[1])
    for path in ("/v1/models", "/behind/v1/models"):
        found = httpx.get(f"{other_server.url}{path}", headers={"Authorization": f"Bearer {KEY}"}, verify=trusting)
        assert found.status_code == 200
    page = httpx.get(f"{other_server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}, verify=trusting).json()
    assert page["servers"][0]["url"] == "/behind"


def test_the_longest_context_is_what_the_memory_holds(other_client):
    length = other_client.models.list().data[0].model_extra["max_model_len"]
    assert KV_TOKENS - 64 <= length <= KV_TOKENS
    with pytest.raises(openai.BadRequestError, match=str(length)):
        other_client.completions.create(model=MODEL, prompt=STORY, max_tokens=length + 1)
