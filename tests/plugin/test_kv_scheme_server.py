"""A server whose KV cache has a scheme: its answers are those of one request alone, and its memory holds what the scheme says."""
from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from ask import answer, answer_async, complete
from kinds_of_request import LONG, STORY
from metrics import sums
from openai import AsyncOpenAI, OpenAI
from server import Server

from metalstep.kv_scheme import parse

MODEL, SCHEME = "smollm2", "turbo8v4"
TOKEN_BYTES = 30 * 3 * sum(codec.vector_bytes(64) for codec in (parse(SCHEME).k, parse(SCHEME).v))  # of SmolLM2-135M
FLOAT16 = 23_040
MEMORY, LITTLE = 8192 * FLOAT16, 480 * TOKEN_BYTES
FLAGS = ["--max-model-len", "1024", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
FLAGS += ["--additional-config", json.dumps({"kv_scheme": SCHEME})]
WARM = {"temperature": 1.0, "seed": 11, "logprobs": 3}
ASKS = [
    complete(STORY, 24, logprobs=2),
    complete(LONG, 24, logprobs=2),
    complete(LONG + STORY, 24, **WARM),
    complete([500 + 7 * i for i in range(150)], 24, logprobs=1),
    complete(STORY + " lived", 64, **WARM),
    complete("The sea is", 48, repetition_penalty=1.2, **WARM),
    complete(LONG[:700], 32, top_p=0.8, **WARM),
    complete("One, two, three,", 40, logprobs=0),
]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("roomy")
    started = Server([MODEL, *FLAGS, "--kv-cache-memory-bytes", str(MEMORY)], folder / "log.txt")
    try:
        yield started
    finally:
        started.stop()


def asked(server, *asks):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        return [answer(client, MODEL, ask) for ask in asks]


def together(server, asks):
    async def run():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(answer_async(client, MODEL, ask) for ask in asks))

    return asyncio.run(run())


@pytest.fixture(scope="module")
def alone(roomy):
    return [found.choices for found in asked(roomy, *ASKS)]


def test_the_log_says_what_the_cache_is_and_its_size_is_the_schemes(roomy):
    log = roomy.log.read_text()
    assert f"KV cache {SCHEME}: {TOKEN_BYTES:,} bytes per token, {FLOAT16 / TOKEN_BYTES:.2f} times the tokens of float16" in log
    assert "layers 0 to 29: keys affine8, values turbo4" in log
    (size,) = re.findall(r"KV cache size: ([\d,]+) tokens", log)
    assert int(size.replace(",", "")) == pytest.approx(MEMORY / TOKEN_BYTES, rel=0.01)
    stats = httpx.post(f"{roomy.url}/collective_rpc", json={"method": "metalstep_stats"}).json()["results"][0]
    assert (stats["kv_scheme"], stats["kv_bytes_per_token"]) == (SCHEME, TOKEN_BYTES)


def test_streamed_or_not_the_answer_is_the_same(roomy, alone):
    for ask, wanted in zip(ASKS, alone, strict=True):
        (found,) = asked(roomy, replace(ask, stream=True))
        assert found.choices == wanted, ask.name


def test_eight_at_once_get_what_they_get_alone(roomy, alone):
    mixed = [replace(ask, stream=i % 2 == 1) for i, ask in enumerate(ASKS)]
    assert [found.choices for found in together(roomy, mixed)] == alone


def test_a_prompt_from_the_cache_gives_the_same_answer(roomy):
    ask = complete("Snow. " + LONG + STORY, 24, **WARM)
    cold, warm = asked(roomy, ask, ask)
    assert cold.cached < 16 <= 256 < warm.cached
    assert warm.choices == cold.choices


def test_preemption_in_little_memory_changes_no_answer(alone, tmp_path):
    little = ["--kv-cache-memory-bytes", str(LITTLE), "--max-num-batched-tokens", "64", "--max-model-len", "464"]
    server = Server([MODEL, *FLAGS[2:], *little], tmp_path / "log.txt")
    try:
        assert [found.choices for found in together(server, ASKS)] == alone
        assert sums(httpx.get(f"{server.url}/metrics").text)["vllm:num_preemptions_total"] > 0
    finally:
        server.stop()
