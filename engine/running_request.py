"""A request on its way through the engine: its sequence, what it keeps on the device, and what its caller has not taken yet."""
from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from metalstep.models.cache import PromptCache
from metalstep.request import PromptLogprob, Request, TokenOutput
from metalstep.scheduler import Sequence
from metalstep.watch import Watch

if TYPE_CHECKING:
    from metalstep.step_trace import RequestTimes

_NUMBERS = itertools.count(1)
KEPT_LOGITS = 2  # rows of logits that wait for a caller before its request does


class RunningRequest:
    """Filled by whoever runs the engine's steps; the caller's thread takes `outputs`, `handed` and `error`, and fills `taken` and `picked`.

    An interrupt may fall between any two lines that fill one. What counts then: `outputs`, which are the caller's already, for a request
    that hands out logits its sequence's tokens, and `error`. `restore` makes the rest fit them.
    number: its own in this process. times: where steps are traced.
    cache: continued by this request. before: tokens that it had. collect: wants the logits of every position instead of tokens.
    steady: it goes on whatever its tokens are, unless one ends it. plain: besides, a token is all that a step's result means.
    """

    __slots__ = (
        "before",
        "cache",
        "cached_tokens",
        "collect",
        "done",
        "error",
        "grammar_moves",
        "handed",
        "logits",
        "number",
        "outputs",
        "owner",
        "picked",
        "plain",
        "prompt_logprobs",
        "record",
        "released",
        "request",
        "sequence",
        "steady",
        "taken",
        "times",
    )

    def __init__(self, request: Request, sequence: Sequence, *, collect: bool = False):
        sequence.request = self
        self.number = next(_NUMBERS)
        self.times: RequestTimes | None = None
        self.request = request
        self.sequence = sequence
        self.cache: PromptCache | None = request.prompt_cache
        self.before = sequence.prompt_len - len(request.prompt)
        self.collect = collect
        self.steady = not (collect or request.hand_out_logits or request.grammar is not None)
        self.plain = self.steady and not request.keep_logits and not request.sampling.logprobs
        self.outputs: list[TokenOutput | None] = []  # None: taken
        self.taken = 0
        self.handed: tuple[int, np.ndarray] | None = None  # a place in the sequence, and the logits to choose its token from
        self.picked: tuple[int, int] | None = None  # the place and the token that the caller chose
        self.logits: list[np.ndarray | None] = [None] * (len(request.prompt) if collect else 0)  # collected, by position
        wants_prompt = request.sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[PromptLogprob | None] = [None] * (len(request.prompt) if wants_prompt else 0)
        self.grammar_moves = False  # its grammar is taking a token in, or has and the output is not there yet
        self.error: Exception | None = None
        self.done = False
        self.released = self.cache is None  # its prompt cache is free for the next request
        self.cached_tokens = -1  # of the prompt, found in the prefix cache; -1: it has not begun
        self.record: Any = None  # its SAMPLING record
        self.owner: Watch | None = None  # of its stream; None: that has nothing to wait for any more

    @property
    def found_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache, as far as is known."""
        return max(0, self.cached_tokens)

    @property
    def asked_prompt_logprobs(self) -> list[PromptLogprob | None] | None:
        """None where the request did not ask for them."""
        return None if self.request.sampling.prompt_logprobs is None else self.prompt_logprobs

    @property
    def has_news(self) -> bool:
        """Whether the caller has something to do."""
        return self.taken < len(self.outputs) or self.done or self.wants_pick

    @property
    def wants_pick(self) -> bool:
        """Whether the caller is to choose a token."""
        handed, picked = self.handed, self.picked
        return handed is not None and (picked is None or picked[0] != handed[0])

    @property
    def waits(self) -> bool:
        """Whether it goes on only when the caller has done something: chosen a token, or taken outputs that hold rows of logits."""
        if self.request.hand_out_logits:
            return self.handed is not None and self.handed[0] == len(self.sequence.tokens)
        return self.request.keep_logits and len(self.outputs) - self.taken >= KEPT_LOGITS

    def take(self) -> TokenOutput:
        """The next output, for the caller."""
        index = self.taken
        output = self.outputs[index]
        self.taken = index + 1
        self.outputs[index] = None  # its logits go when the caller drops them
        assert output is not None
        return output

    def take_all(self) -> list[TokenOutput]:
        """All outputs that are there, for the caller."""
        first = self.taken
        outputs = self.outputs[first:]
        self.taken = first + len(outputs)
        self.outputs[first : self.taken] = [None] * len(outputs)
        return outputs  # type: ignore[return-value]  # none of them was taken

    def finish_reason(self, token: int, count: int) -> str | None:
        """Why the text ends with `token`, the `count`-th of prompt and output together; None: it goes on."""
        if token in self.request.stop_token_ids:
            return "stop"
        return "length" if count >= self.sequence.max_tokens_total else None

    def restore(self) -> bool:
        """After an interrupt: the sequence and the grammar are where the outputs are. Returns whether that is the request's end."""
        tokens, prompt_len = self.sequence.tokens, self.sequence.prompt_len
        if not self.request.hand_out_logits and not self.collect:
            del tokens[prompt_len + len(self.outputs) :]
        if self.error is not None:
            return True
        grammar, terminated = self.request.grammar, False
        if grammar is not None:
            try:
                if self.grammar_moves:  # nobody knows how far it got: once more from the start
                    grammar.reset()  # type: ignore[attr-defined]  # optional
                    for token in tokens[prompt_len:]:
                        grammar.accept(token)
                    self.grammar_moves = False
                terminated = grammar.is_terminated
            except Exception as error:  # one without `reset`; it is the caller's code
                self.error = RuntimeError(
                    "another thread's interrupt (Ctrl-C) fell into this request's grammar, which cannot start again "
                    f"({type(error).__name__}: {error}); give it a method `reset`, or send the request again"
                )
                return True
        if len(tokens) == prompt_len:
            return False
        return terminated or self.finish_reason(tokens[-1], len(tokens)) is not None
