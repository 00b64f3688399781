"""Requests to a server with the `openai` package, and answers in a form that can be compared: streamed or not, it is the same."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI, OpenAI


@dataclass
class Ask:
    """A request. body: its JSON; one with `messages` is a chat's. stream: whether the answer comes in pieces."""

    name: str
    body: dict[str, Any]
    stream: bool = False

    @property
    def chat(self) -> bool:
        return "messages" in self.body

    @property
    def can_stream(self) -> bool:
        """vLLM reports on prompts only in whole answers."""
        return not {"prompt_logprobs", "echo"} & self.body.keys()

    @property
    def key(self) -> str:
        return json.dumps(self.body, sort_keys=True)


@dataclass
class Choice:
    """One text of an answer. logprobs: per token (token, its logprob, the most likely ones). tools: names, arguments."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[str, float | None, Any]] = field(default_factory=list)
    prompt_logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: Any = None
    tools: list[list[str]] = field(default_factory=list)

    def take(self, part: Any) -> None:
        """What an answer, or a piece of it, says of this choice."""
        extra = part.model_extra or {}
        message = getattr(part, "message", None) or getattr(part, "delta", None)
        self.text += (message.content or "") if message is not None else part.text
        self.token_ids += extra.get("token_ids") or []
        self.prompt_logprobs = extra.get("prompt_logprobs") or self.prompt_logprobs
        self.finish_reason = part.finish_reason or self.finish_reason
        self.stop_reason = extra.get("stop_reason", self.stop_reason)
        self._take_logprobs(part.logprobs)
        for call in getattr(message, "tool_calls", None) or []:
            index = getattr(call, "index", len(self.tools))
            while len(self.tools) <= index:
                self.tools.append(["", ""])
            self.tools[index][0] += call.function.name or ""
            self.tools[index][1] += call.function.arguments or ""

    def _take_logprobs(self, logprobs: Any) -> None:
        if logprobs is None:
            return
        if hasattr(logprobs, "content"):
            for entry in logprobs.content or []:
                self.logprobs.append((entry.token, entry.logprob, [(top.token, top.logprob) for top in entry.top_logprobs]))
        else:
            tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
            for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=True):
                self.logprobs.append((token, logprob, None if top is None else sorted(top.items())))


@dataclass
class Answer:
    """choices by number. usage: the server's count of tokens."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Any = None

    def take(self, response: Any) -> None:
        for part in response.choices:
            self.choices.setdefault(part.index, Choice()).take(part)
        self.usage = response.usage or self.usage

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def only(self) -> Choice:
        (choice,) = self.choices.values()
        return choice

    @property
    def cached(self) -> int:
        """Prompt tokens that were in the prefix cache."""
        return self.usage.prompt_tokens_details.cached_tokens or 0


def _arguments(ask: Ask, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the client wants to be called with: its own arguments, and everything else."""
    own = {"model": model, "stream": ask.stream}
    rest = {"return_token_ids": True, **ask.body}
    for name in ("messages", "prompt"):
        if name in rest:
            own[name] = rest.pop(name)
    if ask.stream:
        own["stream_options"] = {"include_usage": True}
    return own, rest


def answer(client: OpenAI, model: str, ask: Ask) -> Answer:
    own, rest = _arguments(ask, model)
    create = client.chat.completions.create if ask.chat else client.completions.create
    response, found = create(**own, extra_body=rest), Answer()
    for part in response if ask.stream else [response]:
        found.take(part)
    return found


async def answer_async(client: AsyncOpenAI, model: str, ask: Ask) -> Answer:
    own, rest = _arguments(ask, model)
    create = client.chat.completions.create if ask.chat else client.completions.create
    response, found = await create(**own, extra_body=rest), Answer()
    if ask.stream:
        async for part in response:
            found.take(part)
    else:
        found.take(response)
    return found


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def complete(prompt: str | Sequence[int], max_tokens: int = 16, **body: Any) -> Ask:
    """Greedy, unless `body` says otherwise."""
    given = {"temperature": 0.0, "max_tokens": max_tokens, "prompt": prompt, **body}
    return Ask(", ".join(body) or "greedy", given)


def chat(text: str, max_tokens: int = 16, **body: Any) -> Ask:
    """Greedy, unless `body` says otherwise."""
    return Ask(f"chat {', '.join(body)}", {"temperature": 0.0, "max_tokens": max_tokens, "messages": say(text), **body})
