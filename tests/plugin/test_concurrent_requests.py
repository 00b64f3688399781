"""Many requests at once: each gets the answer that it gets alone, to the last bit of its logprobs."""
from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace

import httpx
import pytest
from ask import answer, answer_async, complete
from conftest import KEY, MODEL
from kinds_of_request import LONG, STORY, every_kind
from metrics import sums
from openai import AsyncOpenAI

ASKS = every_kind()
# Each begins in one block of the other server's 50 and ends in five: together they run out of them on their way.
GROWING = [complete(STORY, 60, ignore_eos=True)] * 24


def together(url: str, key: str, verify, asks) -> list:
    async def run():
        async with AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=httpx.AsyncClient(verify=verify, timeout=300)
        ) as client:
            return await asyncio.gather(*(answer_async(client, MODEL, ask) for ask in asks))

    return asyncio.run(run())


def differences(asks, answers, alone) -> list[tuple]:
    """(request, what it got, what it gets alone) of those that got something else."""
    pairs = [(ask, found.choices, alone(ask).choices) for ask, found in zip(asks, answers, strict=True)]
    return [(ask.name, found, wanted) for ask, found, wanted in pairs if found != wanted]


def test_64_requests_of_every_kind_get_what_they_get_alone(server, alone):
    """Streamed or not. Those alone were streamed or not the other way round."""
    assert len(ASKS) == len({ask.key for ask in ASKS}) == 64
    for ask in ASKS:
        alone(replace(ask, stream=not ask.stream and ask.can_stream))
    assert differences(ASKS, together(server.url, "none", True, ASKS), alone) == []


def test_neither_chunks_nor_preemption_nor_scheduling_change_an_answer(other_server, other_client, certificate, alone):
    """A server with less memory than they need, small chunks, no prefix cache and no overlap of steps gives the same 64 answers."""
    trusting = ssl.create_default_context(cafile=certificate[1])
    for asks in (ASKS, GROWING):
        assert differences(asks, together(other_server.url, KEY, trusting, asks), alone) == []
    metrics = httpx.get(f"{other_server.url}/metrics", verify=trusting).text
    assert sums(metrics)["vllm:num_preemptions_total"] > 0


@pytest.mark.parametrize("ask", ASKS[:: len(ASKS) // 8], ids=lambda ask: ask.name)
def test_an_answer_is_the_same_again(client, alone, ask):
    assert answer(client, MODEL, ask).choices == alone(ask).choices


def test_a_prompt_from_the_cache_gives_the_same_answer(client):
    ask = complete("Rain. " + LONG + STORY, 12, temperature=1.0, seed=9, logprobs=4)
    cold, warm = answer(client, MODEL, ask), answer(client, MODEL, ask)
    assert cold.cached < 16 <= 256 < warm.cached < warm.usage.prompt_tokens
    assert warm.choices == cold.choices
