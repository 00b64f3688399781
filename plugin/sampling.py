"""vLLM's SamplingParams as the engine's, and what of them the engine does not do itself."""
from __future__ import annotations

from typing import TYPE_CHECKING

from metalstep.sampling import MAX_LOGPROBS, SamplingParams

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams as VllmParams

GREEDY = 1e-5  # temperatures below take the most likely token, as vLLM has it


def engine_params(params: VllmParams) -> SamplingParams:
    """The engine's parameters of a request; without a seed each call draws one.

    Masks that change with every token (grammars, bad words of several tokens, a thinking budget) are not in them: see token_masks. Nor are
    more logprobs than the step reports: see `wants_logits`.
    Raises: ValueError for what cannot be run.
    """
    logprobs = params.num_logprobs or 0
    return SamplingParams(
        temperature=params.temperature if params.temperature >= GREEDY else 0.0,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        seed=None if params.seed is None else params.seed % 2**64,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids,
        banned_token_ids=() if has_long_bad_words(params) else tuple(word[0] for word in params.bad_words_token_ids or ()),
        min_tokens=params.min_tokens,
        logprobs=logprobs if 0 <= logprobs <= MAX_LOGPROBS and not params.logprob_token_ids else 0,
        prompt_logprobs=None if params.prompt_logprobs is None else params.prompt_logprobs if _is_narrow(params.prompt_logprobs) else 0,
        temperature_first=True,
    )


def check(params: VllmParams, vocab_size: int) -> None:
    """Raises: ValueError for parameters that no request of this model can have."""
    engine_params(params).check_vocab(vocab_size, params.all_stop_token_ids)


def has_long_bad_words(params: VllmParams) -> bool:
    """Whether a bad word has several tokens, so that what is banned depends on the tokens before."""
    return any(len(word) > 1 for word in params.bad_words_token_ids or ())


def wants_logits(params: VllmParams) -> bool:
    """Whether logprobs are asked for that the step does not report: of chosen tokens, of all, or of more than it lists."""
    logprobs = params.num_logprobs
    return bool(params.logprob_token_ids) or not _is_narrow(logprobs or 0) or not _is_narrow(params.prompt_logprobs or 0)


def _is_narrow(logprobs: int) -> bool:
    return 0 <= logprobs <= MAX_LOGPROBS
