"""What a caller hands in to restrict a request's tokens one by one: JSON schemas, regular expressions, a choice."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Grammar(Protocol):
    """The state of one request's grammar. The engine calls `fill_bitmask` before a token is picked and `accept` after.

    One object serves one request: it starts where the request's output starts and moves on with each token, the stop token included.
    A method `reset()`, back to that start, is optional: with it the request survives a Ctrl-C that falls into one of these methods.
    """

    @property
    def is_terminated(self) -> bool:
        """Whether the output is complete: the request ends with "stop" and nothing is asked any more."""
        ...

    def fill_bitmask(self, row: np.ndarray) -> None:
        """Write which tokens may come next. row: uint32 [ceil(vocab_size / 32)]; bit `token % 32` of word `token // 32`: allowed."""
        ...

    def accept(self, token: int) -> None:
        """Move on by a token. Raises: ValueError for one that was not allowed."""
        ...


class ChoiceGrammar:
    """Allows exactly one of several token sequences, then a stop token."""

    def __init__(self, choices: Iterable[Sequence[int]], eos: int | Iterable[int] = ()):
        """choices: token ids of each, at least one and none empty. eos: what may follow a whole one; without it the output ends there.

        Raises: ValueError for no or empty choices, and without eos for a choice that begins another: where it ends is then unknown.
        """
        self._choices = sorted({tuple(int(token) for token in choice) for choice in choices})
        self._open = self._choices
        self._eos = frozenset([int(eos)] if isinstance(eos, int | np.integer) else map(int, eos))
        self._accepted: list[int] = []
        self.is_terminated = False
        if not self._open or not self._open[0]:
            raise ValueError("choices are none or have an empty one, expected sequences of at least one token id")
        # Sorted, a sequence stands right before one that it begins.
        for first, second in zip(self._open, self._open[1:], strict=False):
            if not self._eos and second[: len(first)] == first:
                raise ValueError(f"choice {list(first)} begins choice {list(second)}, expected choices that tell their end; pass eos")

    def fill_bitmask(self, row: np.ndarray) -> None:
        """See Grammar. Raises: ValueError for a choice with a token outside the vocabulary that `row` has."""
        allowed = np.array(sorted(self._allowed()), np.int64)
        if allowed.size and not 0 <= allowed[0] <= allowed[-1] < 32 * len(row):
            raise ValueError(
                f"a choice has token ids from {allowed[0]} to {allowed[-1]}, expected ids below {32 * len(row)}; "
                "pass ids of this model's tokenizer"
            )
        row[:] = 0
        np.bitwise_or.at(row, allowed // 32, np.left_shift(np.uint32(1), (allowed % 32).astype(np.uint32)))

    def accept(self, token: int) -> None:
        """See Grammar."""
        if token not in self._allowed():
            raise ValueError(f"token {token} is not allowed after {self._accepted}, expected one of {sorted(self._allowed())}")
        place = len(self._accepted)
        self._accepted.append(token)
        going_on = [choice for choice in self._open if len(choice) > place and choice[place] == token]
        self._open = going_on
        # A stop token that is also a choice's next token stands for that choice.
        self.is_terminated = not going_on or (not self._eos and len(going_on[0]) == place + 1)

    def reset(self) -> None:
        """See Grammar."""
        self._open, self._accepted, self.is_terminated = self._choices, [], False

    def _allowed(self) -> set[int]:
        """Tokens that may come next; none when terminated."""
        if self.is_terminated:
            return set()
        place = len(self._accepted)
        tokens = {choice[place] for choice in self._open if len(choice) > place}
        return tokens | self._eos if any(len(choice) == place for choice in self._open) else tokens


class XGrammarMatcher:
    """A Grammar around an `xgrammar.GrammarMatcher`, whose vocabulary size is the model's."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    @property
    def is_terminated(self) -> bool:
        return self._matcher.is_terminated()

    def fill_bitmask(self, row: np.ndarray) -> None:
        """See Grammar. xgrammar raises RuntimeError for a row of another vocabulary's size."""
        self._matcher.fill_next_token_bitmask(row.view(np.int32)[None], 0)

    def accept(self, token: int) -> None:
        """See Grammar."""
        if not self._matcher.accept_token(token):
            raise ValueError(f"the grammar does not accept token {token}, expected one that its bitmask allows")

    def reset(self) -> None:
        """See Grammar."""
        self._matcher.reset()


class LLGuidanceMatcher:
    """A Grammar around an `llguidance.LLMatcher`, whose tokenizer is the model's."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    @property
    def is_terminated(self) -> bool:
        return self._matcher.is_stopped()

    def fill_bitmask(self, row: np.ndarray) -> None:
        """See Grammar. Raises: RuntimeError with llguidance's own text where the grammar is at fault."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        row[:] = 0  # a tokenizer may have fewer tokens than the model has logits
        row[: len(words)] = words[: len(row)]

    def accept(self, token: int) -> None:
        """See Grammar."""
        accepted = self._matcher.consume_token(token)
        if not accepted:
            raise ValueError(f"the grammar does not accept token {token}, expected one that its bitmask allows")

    def reset(self) -> None:
        """See Grammar."""
        self._matcher.reset()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"llguidance: {self._matcher.get_error()}")
