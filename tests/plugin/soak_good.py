"""Requests with one right answer: greedy or seeded, so that the host device gives the same bits whatever else it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import openai

TEXT = (
    "A lighthouse stands on a rock far from the shore. Its keeper writes down the wind, the height of the waves and the names of the ships "
    "that pass. On some days there is nothing to write, and then the keeper draws birds. "
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

@dataclass(frozen=True)
class Good:
    """A request. fields: of the openai package's call; extra: of vLLM's own, beyond that package. streams: it can be streamed."""

    name: str
    chat: bool
    fields: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    streams: bool = True


def chat(name: str, text: str, *, extra: dict[str, Any] | None = None, streams: bool = True, **fields: Any) -> Good:
    messages = [{"role": "user", "content": text}]
    return Good(name, True, {"messages": messages, "max_tokens": 24, "temperature": 0, **fields}, extra or {}, streams)


def complete(name: str, prompt: Any, *, extra: dict[str, Any] | None = None, streams: bool = True, **fields: Any) -> Good:
    return Good(name, False, {"prompt": prompt, "max_tokens": 24, "temperature": 0, **fields}, extra or {}, streams)


def good_requests() -> list[Good]:
    """Every feature, some alone and some together; prompts of a few tokens up to some that take several steps and share beginnings."""
    drawn = {"temperature": 0.9, "top_p": 0.95}
    ids = list(range(300, 340))
    return [
        *(chat(f"a question, {i}", f"What is {i} plus {i + 3}?") for i in range(4)),
        *(chat(f"drawn with seed {seed}", "Tell me about the sea.", seed=seed, **drawn) for seed in (1, 2, 3)),
        *(complete(f"token ids from {start}", ids[start:], max_tokens=16) for start in (0, 16, 39)),
        *(complete(f"a long prompt, {i}", TEXT * 6 + f"Then, on day {i},", max_tokens=12) for i in range(3)),
        complete("a very long prompt", TEXT * 14, max_tokens=4),
        complete("many tokens", "The keeper", max_tokens=160, extra={"ignore_eos": True}),
        complete("one token", "The keeper of", max_tokens=1),
        complete("logprobs", "The ship", logprobs=5),
        complete("more logprobs than the step lists", "The ship", logprobs=20, max_tokens=6),
        complete("logprobs of drawn tokens", "The ship", logprobs=3, seed=11, **drawn),
        complete("logprobs of the prompt", TEXT, max_tokens=8, logprobs=2, echo=True, streams=False),
        chat("top_logprobs", "Name a bird.", logprobs=True, top_logprobs=3),
        chat("three answers", "Name a colour.", n=3, seed=5, **drawn),
        complete("two answers of one prompt", "Once", n=2, seed=6, logprobs=1, **drawn),
        complete("three prompts", ["One", "Two and", "Three, which"], max_tokens=10),
        chat("a stop string", "Count from one to ten.", stop=[" five", ", 5", "\n\n"], max_tokens=60),
        complete("a stop string in the answer", "The sea is", stop=["."], extra={"include_stop_str_in_output": True}),
        complete("a stop token", "The sea is", extra={"stop_token_ids": [30]}),
        complete("a bias", "The bird is", logit_bias={"28": 8, "1000": -100}),
        complete("a bias for words", "The bird is", logit_bias={str(i): 2 for i in range(200, 700)}, seed=3, **drawn),
        complete("penalties", "na na na na na", frequency_penalty=1.2, presence_penalty=0.4),
        complete("a repetition penalty", "na na na na na", extra={"repetition_penalty": 1.3}),
        complete("filters", "A red", seed=8, extra={"top_k": 20, "min_p": 0.05}, **drawn),
        complete("at least some tokens", "Yes.", max_tokens=20, extra={"min_tokens": 20}),
        complete("allowed tokens", "A number:", extra={"allowed_token_ids": list(range(32, 60))}),
        complete("bad words", "The cat sat on the", extra={"bad_words": [" mat", " floor", " the couch"]}),
        complete("letters of all kinds", "Grüße, 世界! 👩🏽\u200d🚀 שלום", max_tokens=16),
        chat("a conversation", "And now?", messages=conversation()),
        chat("an object", "Give me a person.", max_tokens=60, response_format=json_schema()),
        chat("a drawn object", "Give me a person.", max_tokens=60, seed=4, response_format=json_schema(), **drawn),
        chat("a choice", "Is the sea wet?", extra={"structured_outputs": {"choice": ["yes", "no", "perhaps"]}}),
        complete("a pattern", "My number is", extra={"structured_outputs": {"regex": r"\d{3}-\d{4}"}}),
        complete("a grammar", "Sum:", extra={"structured_outputs": {"grammar": 'root ::= [0-9] "+" [0-9] "=" [0-9] [0-9]?'}}),
        chat("a pattern with logprobs", "A date?", logprobs=True, top_logprobs=2, extra={"structured_outputs": {"regex": "[0-9]{4}"}}),
    ]


def conversation() -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "You are a lighthouse keeper."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I keep the light."},
        {"role": "user", "content": "And now?"},
    ]


def json_schema() -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


async def ask(client: openai.AsyncOpenAI, model: str, good: Good, stream: bool) -> list[dict[str, Any]]:
    """The answer, one dict per choice: text, finish_reason, and logprobs as the tokens came.

    The same for both ways of asking. A stream that broke off has None for a finish_reason. Raises: openai.APIError.
    """
    api = client.chat.completions if good.chat else client.completions
    answer: Any = await api.create(model=model, **good.fields, extra_body=good.extra, stream=stream)  # type: ignore[call-overload]
    choices: dict[int, dict[str, Any]] = {}
    if stream:
        async for chunk in answer:
            add(chunk, choices)
    else:
        add(answer, choices)
    return [choices[index] for index in sorted(choices)]


def add(response: Any, choices: dict[int, dict[str, Any]]) -> None:
    """Add what a response or a chunk of one says to `choices`, by index."""
    for choice in response.choices:
        empty = {"text": "", "finish_reason": None, "logprobs": []}
        known = choices.setdefault(choice.index, empty)
        message = getattr(choice, "message", None) or getattr(choice, "delta", None)
        known["text"] += (message.content if message is not None else choice.text) or ""
        known["finish_reason"] = choice.finish_reason or known["finish_reason"]
        known["logprobs"] += logprobs(choice.logprobs)


def logprobs(found: Any) -> list[Any]:
    """Per token its text, its logprob and the best ones."""
    if found is None:
        return []
    if getattr(found, "content", None) is not None:
        return [[one.token, one.logprob, [[top.token, top.logprob] for top in one.top_logprobs]] for one in found.content]
    if getattr(found, "tokens", None) is None:
        return []
    tops = found.top_logprobs or [None] * len(found.tokens)
    return [
        [token, value, sorted((top or {}).items())] for token, value, top in zip(found.tokens, found.token_logprobs, tops, strict=True)
    ]
