"""Masks of a request's next token that depend on the tokens before it. They are made on the host, while the device computes the logits.

A mask is uint32 words; bit `token % 32` of word `token // 32` says that the token is allowed.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class TokenMask(Protocol):
    """Forbids tokens in a mask."""

    def apply(self, mask: np.ndarray, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Clear bits of `mask` (uint32 words). prompt, output: the request's tokens so far."""


@dataclass(frozen=True)
class BadWords:
    """words: token ids of each; its last token is not allowed right behind the others. Of the output alone, as vLLM has it."""

    words: Sequence[Sequence[int]]

    def apply(self, mask: np.ndarray, prompt: Sequence[int], output: Sequence[int]) -> None:
        for *before, last in self.words:
            if not before or list(output[-len(before) :]) == before:
                mask[last // 32] &= ~np.uint32(1 << last % 32)


@dataclass(frozen=True)
class ThinkingBudget:
    """Ends a thought after `budget` tokens: `end` is forced, token by token. start, end: what encloses a thought, token ids."""

    start: Sequence[int]
    end: Sequence[int]
    budget: int

    def apply(self, mask: np.ndarray, prompt: Sequence[int], output: Sequence[int]) -> None:
        tokens = [*prompt, *output]
        begin = _last(tokens, self.start)
        if begin < 0:
            return
        thought = tokens[begin + len(self.start) :]
        if len(thought) < self.budget or _last(thought, self.end) >= 0:
            return
        written = next(n for n in range(len(self.end) - 1, -1, -1) if thought[len(thought) - n :] == list(self.end[:n]))
        token = self.end[written]
        mask[:] = 0
        mask[token // 32] = np.uint32(1 << token % 32)


def _last(tokens: Sequence[int], part: Sequence[int]) -> int:
    """Where `part` begins last in `tokens`; -1: nowhere."""
    if not part:
        return -1
    found = (i for i in range(len(tokens) - len(part), -1, -1) if list(tokens[i : i + len(part)]) == list(part))
    return next(found, -1)
