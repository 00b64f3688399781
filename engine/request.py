"""A request to the engine and what comes back for each token."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from metalstep.grammar import Grammar
from metalstep.plan.logits import Logits
from metalstep.sampling import SamplingParams

if TYPE_CHECKING:
    from metalstep.models.cache import PromptCache

STREAMED_STEPS = 1  # decode steps of one native call when each token is awaited


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    prompt: token ids, not empty unless there are embeddings. sampling: see SamplingParams. max_tokens: to generate; None: up to the
    context. stop_token_ids: end the text; the token is reported. embeddings: float32 [len(prompt), hidden_size] instead of the prompt's
    own; with an empty prompt, any number of rows, for which no tokens are known. prompt_cache: continues its sequence and is left with
    the longer one. max_kv_size: positions that a row sees, the first 4 of them those of the beginning; None: all. grammar: what may
    come next. hand_out_logits: the caller picks the tokens (see Stream). keep_logits: every token comes with its row of logits.
    decode_steps: tokens that may come at once, up to 32; fewer native calls, later delivery. prefill_rows: prompt tokens of a step; None:
    as many as a step of the device has.
    """

    prompt: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    embeddings: np.ndarray | None = None
    prompt_cache: PromptCache | None = None
    max_kv_size: int | None = None
    grammar: Grammar | None = None
    hand_out_logits: bool = False
    keep_logits: bool = False
    decode_steps: int = STREAMED_STEPS
    prefill_rows: int | None = None


@dataclass(slots=True)
class TokenOutput:
    """A generated token.

    logprob and rank (1: the most likely) under the distribution that SamplingParams.processed_logprobs names; top: the most likely
    tokens with their logprobs, as many as were asked for. finish_reason: "stop", "length" or None while going on. logits: when kept.
    """

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] | None = None
    finish_reason: str | None = None
    logits: Logits | None = None


@dataclass(frozen=True)
class PromptLogprob:
    """Of one prompt token behind those before it; the first token has none."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]
