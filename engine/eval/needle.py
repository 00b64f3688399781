"""Needle retrieval: a sentence with a number, hidden in a long text, is asked for at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalstep.bench.quality import log_softmax
from metalstep.model import Model
from metalstep.models.cache import make_prompt_cache
from metalstep.request import Request

DEPTHS = (0, 25, 50, 75, 100)  # percent of the text that comes before the sentence
ANSWER_TOKENS = 16  # of a greedy answer, at most
NEEDLE = "The secret number of the blue lighthouse is {number}."
QUESTION = "What is the secret number of the blue lighthouse?"
ANSWER = "The secret number of the blue lighthouse is"  # the answer's beginning, which the model continues
SENTENCE_ENDS = (".", "!", "?", "\n")


@dataclass(frozen=True)
class NeedleCase:
    """length: tokens that were asked for. depth: percent. prompt: token ids, up to where the number comes. answer: ids of the number."""

    length: int
    depth: int
    number: str
    prompt: list[int]
    answer: list[int]


def needle_cases(tokenizer: Any, filler: Sequence[int], lengths: Sequence[int], depths: Sequence[int] = DEPTHS) -> list[NeedleCase]:
    """Each length with each depth, the sentence at the sentence end of the filler next to the depth, with a number of its own.

    filler: token ids of a text. Raises: ValueError for a length that the question alone takes, or that the filler does not fill.
    """
    numbers = np.random.default_rng(7).permutation(np.arange(1000, 10000))
    ends = [0, *(i + 1 for i, token in enumerate(filler) if tokenizer.decode([token]).rstrip(" ").endswith(SENTENCE_ENDS))]
    cases = []
    for i, (length, depth) in enumerate((length, depth) for length in lengths for depth in depths):
        number = str(numbers[i])
        least = len(_prompt(tokenizer, filler, 0, 0, number))
        room = length - least
        if room < 1:
            raise ValueError(f"a needle context of {length} tokens is too short, expected more than {least}: the question takes as many")
        if room > len(filler):
            raise ValueError(f"the text has {len(filler)} tokens and a needle context of {length} needs {room}; pass a longer text")
        for _ in range(8):  # joints may take tokens of their own
            cut = min((end for end in [*ends, room] if end <= room), key=lambda end: abs(end - room * depth / 100))
            prompt = _prompt(tokenizer, filler, cut, room, number)
            if len(prompt) <= length or room == 0:
                break
            room = max(0, room - (len(prompt) - length))
        cases.append(NeedleCase(length, depth, number, prompt, tokenizer.encode(f" {number}", add_special_tokens=False)))
    return cases


def _prompt(tokenizer: Any, filler: Sequence[int], cut: int, room: int, number: str) -> list[int]:
    parts = [tokenizer.decode(list(filler[:cut])), NEEDLE.format(number=number), tokenizer.decode(list(filler[cut:room]))]
    text = " ".join(part.strip() for part in parts if part.strip())
    content = f"{text}\n\n{QUESTION}"
    if tokenizer.has_chat_template:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(rendered + ANSWER, add_special_tokens=False))
    return list(tokenizer.encode(f"{content}\n\n{ANSWER}"))


def ask(model: Model, tokenizer: Any, case: NeedleCase) -> dict[str, Any]:
    """What the model makes of a case.

    answer: greedy, of at most ANSWER_TOKENS tokens; found: whether it has the number. Given the number's tokens one by one: logprob, of all
    of them together (nats), and rank, the worst of theirs (1: each is the most likely).
    """
    engine = model.engine
    cache = make_prompt_cache(model)
    with contextlib.closing(engine.submit(Request(case.prompt[:-1], max_tokens=1, prompt_cache=cache))) as stream:
        next(stream)
    cache.trim(cache.offset - len(case.prompt) + 1)
    forced = cache.copy()
    rows = np.stack(engine.collect(Request([case.prompt[-1], *case.answer[:-1]], max_tokens=0, prompt_cache=forced)))
    logprobs = log_softmax(rows)
    given = logprobs[np.arange(len(rows)), case.answer]
    stops = frozenset(tokenizer.eos_token_ids)
    request = Request([case.prompt[-1]], max_tokens=ANSWER_TOKENS, prompt_cache=cache, stop_token_ids=stops)
    with contextlib.closing(engine.submit(request)) as stream:
        tokens = [output.token for output in stream if output.token not in stops]
    answer = tokenizer.decode(tokens)
    return {
        "length": case.length,
        "depth": case.depth,
        "prompt_tokens": len(case.prompt),
        "number": case.number,
        "answer": answer,
        "found": case.number in answer,
        "logprob": float(given.sum()),
        "rank": int(1 + (logprobs > given[:, None]).sum(-1).max()),
    }


def summary(results: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """cases; found; first (cases whose number's tokens are each the most likely); logprob (mean), and its mean difference to the
    reference's with the standard error."""
    difference = np.array([ours["logprob"] - theirs["logprob"] for ours, theirs in zip(results, reference, strict=True)])
    return {
        "cases": len(results),
        "found": sum(result["found"] for result in results),
        "first": sum(result["rank"] == 1 for result in results),
        "logprob": float(np.mean([result["logprob"] for result in results])),
        "logprob_difference": float(difference.mean()),
        "logprob_difference_stderr": float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0,
    }
