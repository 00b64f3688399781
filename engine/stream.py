"""What a caller holds of a request: an iterator of its tokens that drives the engine while it waits."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from metalstep.plan.logits import HostRow, Logits
from metalstep.request import PromptLogprob, TokenOutput
from metalstep.running_request import RunningRequest

if TYPE_CHECKING:
    from metalstep.engine import Engine

Picker = Callable[[list[int], np.ndarray], tuple[int, float, np.ndarray]]


class Stream:
    """Iterate to get TokenOutput; the last has a finish_reason. Closing (or dropping) it cancels the request.

    pick: for a request that hands out logits: called with its tokens so far (a prompt cache's not among them) and the row of logits,
    float32 [vocab], in the thread that iterates; returns the token, its logprob and the logits it was picked from. progress: called
    in that thread with the prompt's tokens done and all of them.
    Raises, while iterating: RuntimeError for what ended this request alone (logits that are not finite, nothing allowed).
    """

    def __init__(
        self,
        engine: Engine,
        running: RunningRequest,
        pick: Picker | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        self._engine = engine
        self.running = running
        self._pick = pick
        self._progress = progress
        self._reported = -1
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self._finished

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return self.running.found_tokens

    @property
    def prompt_logprobs(self) -> list[PromptLogprob | None] | None:
        """One per prompt token, None for the first; complete with the first token. None when not asked for."""
        return self.running.asked_prompt_logprobs

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> TokenOutput:
        try:
            while (output := self.poll()) is None and not self._finished:
                self._engine.wait((self,))
                if self._progress is not None:
                    self._report(min(self.running.sequence.computed, self.running.sequence.prompt_len))
        except BaseException:
            self.close()  # of an interrupt, nobody knows what it fell into
            raise
        if output is None:
            raise StopIteration
        return output

    def poll(self) -> TokenOutput | None:
        """The next token if it is there; picks it if that is the caller's turn. Raises: what ended the request."""
        running = self.running
        if self._finished:
            return None
        if self._progress is not None and self._reported < 0:
            self._report(running.before)
        if running.taken < len(running.outputs):
            output = running.take()
        elif running.error is not None:
            self._finish()
            raise running.error
        elif running.wants_pick:
            output = self._pick_token()
        elif running.done:
            if running.taken == len(running.outputs) and running.error is None:  # nothing came since it was looked at
                self._finish()
            return None
        else:
            return None
        if self._progress is not None:
            self._report(running.sequence.prompt_len)
        if output.finish_reason is not None:
            self._finish()
        return output

    def poll_all(self) -> list[TokenOutput]:
        """As `poll`, of all the tokens that are there."""
        running = self.running
        if self._finished or self._progress is not None or running.taken == len(running.outputs):
            output = self.poll()
            return [] if output is None else [output]
        outputs = running.take_all()
        if outputs[-1].finish_reason is not None:
            self._finish()
        return outputs

    def _pick_token(self) -> TokenOutput:
        running = self.running
        assert running.handed is not None and self._pick is not None
        place, logits = running.handed
        try:
            token, logprob, processed = self._pick(running.sequence.tokens[running.before :], logits)
        except BaseException:
            self.close()
            raise
        finish = running.finish_reason(token, place + 1)
        rank = 1 + int((processed > processed[token]).sum() + (processed[:token] == processed[token]).sum())
        output = TokenOutput(token, logprob, rank, None, finish, Logits(HostRow(processed)))
        running.picked = (place, token)
        return output

    def _report(self, done: int) -> None:
        total = self.running.sequence.prompt_len - self.running.before
        done = max(0, done - self.running.before)
        if self._progress is not None and done > self._reported:
            self._reported = done
            self._progress(done, total)

    def close(self) -> None:
        """Cancel what is left of the request; more than once is fine."""
        if not self._finished:
            self._engine.give_up(self.running)
            self._finished = True

    def _finish(self) -> None:
        """Nothing more comes, and everything was taken."""
        self._engine.release_cache(self.running)
        self._finished = True
        self.running.owner = None
