"""Requests that no server should take, and odd ones that it may: none of them may end anything but themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REFUSED = range(400, 500)
ANSWERED_OR_REFUSED = range(200, 500)


@dataclass(frozen=True)
class Bad:
    """A request that is posted as it is. body: of a POST to `path`; where `raw` is given those bytes are sent instead of any HTTP.

    statuses: those that are right. A refusal has to say why.
    """

    name: str
    path: str
    body: bytes
    statuses: range = REFUSED
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    method: str = "POST"
    raw: bytes | None = None


def bad_requests(model: str, context: int) -> list[Bad]:
    """All of them. context: tokens that a sequence may have."""
    return [
        *malformed(model),
        *wrong_values(model),
        *too_long(model, context),
        *wrong_grammars(model),
        *wrong_prompts(model),
        *elsewhere(model),
        *odd(model),
    ]


def posted(name: str, path: str, body: Any, **others: Any) -> Bad:
    return Bad(name, path, json.dumps(body).encode(), **others)


def completion(name: str, model: str, **fields: Any) -> Bad:
    """A completion that is right but for `fields`."""
    return posted(name, COMPLETIONS, {"model": model, "prompt": "Once upon a time", "max_tokens": 4, **fields})


def chat(name: str, model: str, **fields: Any) -> Bad:
    """A chat that is right but for `fields`."""
    messages = [{"role": "user", "content": "Say hello."}]
    return posted(name, CHAT, {"model": model, "messages": messages, "max_tokens": 4, **fields})


def malformed(model: str) -> list[Bad]:
    whole = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4}).encode()
    return [
        Bad("no body", COMPLETIONS, b""),
        Bad("half a body", COMPLETIONS, whole[: len(whole) // 2]),
        Bad("words behind the body", COMPLETIONS, whole + b" and more"),
        Bad("single quotes", COMPLETIONS, whole.replace(b'"', b"'")),
        Bad("a list", CHAT, b"[1, 2, 3]"),
        Bad("a number", CHAT, b"5"),
        Bad("null", CHAT, b"null"),
        Bad("bytes that are no text", CHAT, bytes(range(256))),
        Bad("bytes that are no UTF-8 in a string", COMPLETIONS, whole.replace(b"Hello", b"H\xff\xfe\x80o")),
        Bad("a list 100,000 deep", CHAT, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        Bad("no JSON by its type", COMPLETIONS, whole, headers=(("Content-Type", "text/plain"),)),
        Bad("a form", COMPLETIONS, b"model=m&prompt=Hello", headers=(("Content-Type", "application/x-www-form-urlencoded"),)),
        Bad("no HTTP", "", b"", raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)) + b"\r\n\r\n"),
        Bad("a length that is no number", "", b"", raw=f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n".encode()),
    ]


def wrong_values(model: str) -> list[Bad]:
    fields: list[tuple[str, Any]] = [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", [0.5]),
        ("top_p", 0),
        ("top_p", 2.5),
        ("top_k", -5),
        ("top_k", 1.5),
        ("min_p", 7),
        ("max_tokens", -3),
        ("max_tokens", "five"),
        ("max_tokens", 2.5),
        ("max_tokens", 2**63),
        ("min_tokens", -1),
        ("min_tokens", 100),
        ("n", 0),
        ("n", -1),
        ("n", 10**9),
        ("n", "two"),
        ("seed", "seven"),
        ("seed", 2**70),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", [["."]]),
        ("stop_token_ids", ["a"]),
        ("presence_penalty", 100),
        ("frequency_penalty", -100),
        ("repetition_penalty", 0),
        ("repetition_penalty", -2),
        ("logit_bias", {"word": 1}),
        ("logit_bias", {"999999999": 1}),
        ("logit_bias", {"-7": 1}),
        ("logit_bias", [1, 2]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [10**7]),
        ("bad_words", 5),
        ("bad_words", [""]),
        ("stream", "perhaps"),
        ("stream_options", {"include_usage": True}),  # without stream
        ("prompt_logprobs", 10**6),
        ("prompt_logprobs", -2),
        ("truncate_prompt_tokens", -5),
        ("priority", "high"),
    ]
    both = [
        make(f"{kind} with {name} {value!r:.40}", model, **{name: value})
        for name, value in fields
        for kind, make in (("completion", completion), ("chat", chat))
    ]
    return [
        *both,
        completion("completion with logprobs a million", model, logprobs=10**6),
        completion("completion with logprobs of words", model, logprobs="many"),
        completion("completion with logprobs -5", model, logprobs=-5),
        completion("completion with a suffix", model, suffix=" the end"),
        chat("chat with a million top_logprobs", model, logprobs=True, top_logprobs=10**6),
        chat("chat with top_logprobs alone", model, top_logprobs=5),
        chat("chat with tools of no kind", model, tools=[{"type": "hammer"}]),
        chat("chat with a tool_choice that is no tool", model, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "no"}}),
        chat("chat with a tool_choice without tools", model, tool_choice="required"),
    ]


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}}


def too_long(model: str, context: int) -> list[Bad]:
    return [
        completion("a prompt twice as long as the context", model, prompt="word " * (2 * context)),
        completion("a prompt of a million letters", model, prompt="x" * 1_000_000),
        completion("more token ids than the context", model, prompt=[5] * (context + 1)),
        completion("more tokens asked than the context", model, max_tokens=10 * context),
        chat("a message twice as long as the context", model, messages=[{"role": "user", "content": "word " * (2 * context)}]),
        chat("ten thousand messages", model, messages=[{"role": "user", "content": "hello"}] * 10_000),
    ]


def wrong_grammars(model: str) -> list[Bad]:
    schemas: list[tuple[str, Any]] = [
        ("of type 5", {"type": 5}),
        ("with properties 7", {"type": "object", "properties": 7}),
        ("with a reference to nothing", {"$ref": "#/definitions/nothing"}),
        ("that is a list", [1, 2]),
        ("of an unknown type", {"type": "hamster"}),
        ("with a broken pattern", {"type": "string", "pattern": "(["}),
    ]
    rules: list[tuple[str, Any]] = [
        ("regex (", {"regex": "("}),
        ("regex [z-a]", {"regex": "[z-a]"}),
        ("regex *", {"regex": "*"}),
        ("regex with a look-behind", {"regex": "(?<=a)b"}),
        ("regex 5", {"regex": 5}),
        ("grammar of words", {"grammar": "this is no grammar"}),
        ("grammar without an end", {"grammar": 'root ::= "a" ('}),
        ("grammar without a root", {"grammar": 'start ::= "a"'}),
        ("grammar with an unknown rule", {"grammar": "root ::= nothing"}),
        ("choice of nothing", {"choice": []}),
        ("choice 5", {"choice": 5}),
        ("json that is text", {"json": "{"}),
        ("two rules", {"regex": "a", "choice": ["a"]}),
        ("no rule", {}),
        ("an unknown rule", {"poem": True}),
    ]
    return [
        *(
            chat(f"a schema {name}", model, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
            for name, schema in schemas
        ),
        *(completion(f"structured output: {name}", model, structured_outputs=rule) for name, rule in rules),
        chat("a response_format of no kind", model, response_format={"type": "prose"}),
        chat("a json_schema without a schema", model, response_format={"type": "json_schema"}),
    ]


def wrong_prompts(model: str) -> list[Bad]:
    return [
        completion("an empty list of tokens", model, prompt=[]),
        completion("a token beyond the vocabulary", model, prompt=[5, 10**7]),
        completion("a token below 0", model, prompt=[5, -1]),
        completion("a token of 2 to the 70", model, prompt=[2**70]),
        completion("a token and a half", model, prompt=[1.5]),
        completion("tokens and words", model, prompt=[5, "word"]),
        completion("a prompt that is an object", model, prompt={"text": "x"}),
        completion("a prompt that is null", model, prompt=None),
        chat("no messages", model, messages=[]),
        chat("messages that are text", model, messages="hello"),
        chat("a message without a role", model, messages=[{"content": "hello"}]),
        chat("content that is a number", model, messages=[{"role": "user", "content": 5}]),
        chat("content of an unknown kind", model, messages=[{"role": "user", "content": [{"type": "smell", "smell": "x"}]}]),
        chat("a picture", model, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]),
    ]


def elsewhere(model: str) -> list[Bad]:
    return [
        completion("another model", "gpt-4"),
        completion("a model that is a number", 5),  # type: ignore[arg-type]
        posted("an address that does not exist", "/v1/poems", {"model": model}),
        Bad("a method that does not exist", COMPLETIONS, b"", method="DELETE"),
        posted("embeddings of a model that has none", "/v1/embeddings", {"model": model, "input": "x"}),
    ]


def odd(model: str) -> list[Bad]:
    """What may be answered or refused."""
    either: dict[str, Any] = {"statuses": ANSWERED_OR_REFUSED}
    base = {"model": model, "prompt": "Once upon a time", "max_tokens": 4}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("an empty prompt", {"prompt": ""}),
        ("a prompt of zeros", {"prompt": "\0\0\0"}),
        ("a prompt of control characters", {"prompt": "".join(map(chr, range(1, 32)))}),
        ("half a surrogate pair", {"prompt": "a \ud800 b"}),
        ("a prompt of emoji and combining marks", {"prompt": "👩🏽\u200d🚀" * 20 + "e" + "\u0301" * 50}),
        ("right to left and back", {"prompt": "\u202eשלום \u202bمرحبا\u202c world"}),
        ("an unknown field", {"favourite_colour": "blue"}),
        ("a temperature of a billion", {"temperature": 1e9}),
        ("a temperature of almost nothing", {"temperature": 1e-300}),
        ("a bias for every token", {"logit_bias": {str(i): 100 for i in range(40_000)}}),
        ("a bias beyond the limit", {"logit_bias": {"5": 1e300}}),
        ("a thousand stop strings", {"stop": ["x" * i for i in range(1, 1001)]}),
        ("an empty stop string", {"stop": [""]}),
        ("every logprob", {"logprobs": -1}),
        ("an integer with a thousand digits", {"seed": 10**1000}),
        ("a pattern of many ways", {"structured_outputs": {"regex": "(a|a)*" * 10 + "b{1,300}"}}),
        ("a request id of another request", {"request_id": "the-same"}),
        ("no tokens", {"max_tokens": 0}),
        ("the last of its own kind", {"stop_token_ids": [10**9]}),
        ("echo without tokens", {"echo": True, "max_tokens": 0}),
    ]
    return [posted(name, COMPLETIONS, {**base, **fields}, **either) for name, fields in bodies]
