"""Prompts of plain English, no two of which begin alike: an engine with a prefix cache finds nothing in it."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from typing import Any

TEXT = heapq.__about__  # about 1,000 tokens of English that every Python has
FEW = 64  # different tokens of TEXT: a tokenizer that makes no more of it knows no English
RANDOM_TOKENS = 10_007  # of such a tokenizer's vocabulary


class Prompts:
    """Gives prompts of any length from the tokens of one text, each beginning at another of its tokens.

    ids: of the text, at least one. The text is read in circles; when every token has begun a prompt, in circles that leave out every
    second token, then two of three, and so on. A process that asks one engine for several measurements shares one object.
    """

    def __init__(self, ids: Sequence[int]):
        if not len(ids):
            raise ValueError("the text of the prompts has no token, expected at least one")
        self._ids = list(ids)
        self._given = 0

    @classmethod
    def of(cls, tokenizer: Any) -> Prompts:
        """Of TEXT in a tokenizer's tokens; of tokens of its vocabulary in a random order where it knows no English."""
        ids = [int(token) for token in tokenizer.encode(TEXT)]
        if len(set(ids)) < FEW:
            vocabulary = sorted(set(tokenizer.get_vocab().values()) - set(ids))
            ids = random.Random(0).sample(vocabulary, min(RANDOM_TOKENS, len(vocabulary)))
        return cls(ids)

    def take(self, count: int, length: int) -> list[list[int]]:
        """`count` prompts of `length` tokens."""
        return [self._next(length) for _ in range(count)]

    def _next(self, length: int) -> list[int]:
        lap, start = divmod(self._given, len(self._ids))
        self._given += 1
        return [self._ids[(start + i * (lap + 1)) % len(self._ids)] for i in range(length)]
