"""Servers that all tests here share: one as most people start it, one with everything else set."""
from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ask import Answer, Ask
    from openai import OpenAI
    from server import Server

HAS_VLLM = importlib.util.find_spec("vllm") is not None
MODEL = "smollm2"
FLAGS = ["--max-model-len", "2048", "--max-logprobs", "-1", "--enable-prompt-tokens-details", "--enable-auto-tool-choice"]
FLAGS += ["--tool-call-parser", "hermes", "--enable-sleep-mode", "--disable-uvicorn-access-log"]
KEY = "a secret"
ORIGIN = "https://page.example"
KV_TOKENS = 800  # room of the other server's cache: too little for its 64 requests at once

if not HAS_VLLM:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header(config: pytest.Config) -> str:
    return "tests/plugin: " + ("with vLLM" if HAS_VLLM else "not collected, vLLM is not installed here; `metalstep setup vllm` installs it")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from server import Server

    started = Server([MODEL, *FLAGS], tmp_path_factory.mktemp("server") / "log.txt")
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and a certificate for 127.0.0.1 that it signs itself."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *names], check=True, capture_output=True)
    return key, certificate


@pytest.fixture(scope="session")
def other_server(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """TLS, a key, a path, an origin; chunks of 64 tokens, steps one after the other, no prefix cache, little memory."""
    from server import Server

    key, signed = certificate
    flags = ["--api-key", KEY, "--root-path", "/behind", "--allowed-origins", f'["{ORIGIN}"]']
    flags += ["--ssl-keyfile", str(key), "--ssl-certfile", str(signed), "--max-logprobs", "-1"]
    flags += ["--max-num-batched-tokens", "64", "--no-async-scheduling", "--no-enable-prefix-caching", "--block-size", "16"]
    flags += ["--max-model-len", "auto", "--kv-cache-memory-bytes", str(KV_TOKENS * 23040), "--served-model-name", MODEL, "other"]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--max-num-seqs", "48", "--disable-uvicorn-access-log"]
    started = Server([MODEL, *flags], tmp_path_factory.mktemp("other_server") / "log.txt", tls=True)
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="session")
def other_client(other_server: Server, certificate: tuple[Path, Path]) -> Iterator[OpenAI]:
    import ssl

    import httpx
    from openai import OpenAI

    trusting = httpx.Client(verify=ssl.create_default_context(cafile=certificate[1]), timeout=120)
    with OpenAI(base_url=f"{other_server.url}/v1", api_key=KEY, max_retries=0, http_client=trusting) as made:
        yield made


@pytest.fixture(scope="session")
def alone(client: OpenAI) -> Callable[[Ask], Answer]:
    """The answer to a request that nothing else runs beside; asked once."""
    from ask import answer

    known: dict[str, Any] = {}

    def asked(ask: Ask) -> Answer:
        if ask.key not in known:
            known[ask.key] = answer(client, MODEL, ask)
        return known[ask.key]

    return asked
