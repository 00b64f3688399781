"""Generation of a model that runs eagerly: mlx-lm's own loop, with the same arguments."""
from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from metalstep.generate_options import Sampler, Sampling
from metalstep.models.cache import PromptCache
from metalstep.sampling import SamplingParams
from metalstep.token_ids import check_tokens, picked_tokens

if TYPE_CHECKING:
    from metalstep.model import Model

# Fields of SamplingParams that mlx-lm's own loop has.
MLX_FIELDS = (
    "top_p", "min_p", "top_k", "min_tokens_to_keep", "xtc_probability", "xtc_threshold", "xtc_special_tokens",
)  # fmt: skip
PENALTIES = ("repetition", "presence", "frequency")
ELSEWHERE = ("seed", "temperature", "processed_logprobs", "logit_bias")  # fields that mlx_sampling looks at by itself


def stream_eager(
    model: Model,
    tokenizer: Any,
    ids: np.ndarray,
    max_tokens: int | None,
    sampling: Sampling,
    prefill_rows: int,
    progress: Callable[[int, int], None] | None,
    others: dict[str, Any],
) -> Generator[Any, None, None]:
    """mlx-lm's stream_generate, with its own GenerationResponse.

    Raises: NotImplementedError for what only the native step does, by name; ValueError for token ids outside the vocabulary.
    """
    from mlx_lm.generate import stream_generate as mlx_stream_generate

    vocab_size = model.config.get("vocab_size")
    if vocab_size:  # MLX reads beyond the table
        check_tokens(ids, vocab_size)
    sampler, processors = _callables(sampling, vocab_size)
    _check_cache(others.get("prompt_cache"))
    if others.pop("grammar", None) is not None:
        raise NotImplementedError("grammar: a model that runs eagerly has no grammars; leave it out")
    extra = {name: value for name, value in others.items() if value is not None}
    if progress is not None:
        extra["prompt_progress_callback"] = progress
    return mlx_stream_generate(
        model.eager,
        tokenizer,
        mx.array(ids),
        max_tokens=-1 if max_tokens is None else max_tokens,
        sampler=sampler,
        logits_processors=processors,
        prefill_step_size=prefill_rows,
        **extra,
    )


def batch_eager(
    model: Model,
    tokenizer: Any,
    prompts: list[np.ndarray],
    prompt_caches: Any,
    limits: list[int | None],
    choices: list[Sampling],
    others: dict[str, Any],
) -> Any:
    """mlx-lm's batch_generate, with its own BatchResponse. Raises: NotImplementedError for what differs from prompt to prompt there."""
    from mlx_lm.generate import batch_generate as mlx_batch_generate

    for cache in prompt_caches or ():
        _check_cache(cache)
    counts = [limit for limit in limits if limit is not None]
    if len(counts) < len(limits):
        raise NotImplementedError("max_tokens=-1: a model that runs eagerly needs a limit for a batch; pass one")
    if len({(replace(x.params, seed=0), x.sampler, tuple(x.processors or ())) for x in choices}) > 1:
        raise NotImplementedError("sampler: a model that runs eagerly has one way to pick tokens for all prompts; pass one for all")
    vocab_size = model.config.get("vocab_size")
    if vocab_size:
        for ids in prompts:
            check_tokens(ids, vocab_size)
    sampler, processors = _callables(choices[0], vocab_size) if choices else (None, [])
    extra = {name: value for name, value in others.items() if value is not None}
    return mlx_batch_generate(
        model.eager,
        tokenizer,
        [ids.tolist() for ids in prompts],
        prompt_caches,
        max_tokens=counts,
        sampler=sampler,
        logits_processors=processors or None,
        **extra,
    )


def _callables(sampling: Sampling, vocab_size: int | None) -> tuple[Sampler | None, list[Callable[..., Any]]]:
    """Sampler and processors for mlx-lm's loops. vocab_size: None when the config has none. Raises: NotImplementedError, by name."""
    if sampling.is_native:
        return mlx_sampling(sampling.params)
    if sampling.params.prompt_logprobs is not None:
        raise NotImplementedError("prompt_logprobs: a model that runs eagerly generates with mlx-lm, which has none; leave it out")
    sampler = sampling.sampler
    if sampler is not None and vocab_size:
        sampler = _checked(sampler, vocab_size)
    return sampler, list(sampling.processors or ())


def mlx_sampling(params: SamplingParams) -> tuple[Sampler, list[Callable[..., Any]]]:
    """mlx-lm's sampler and processors for `params`; seeds MLX where they draw.

    Raises: NotImplementedError for a field that mlx-lm has not.
    """
    from metalstep.sample_utils import make_logits_processors, make_sampler

    default = SamplingParams(seed=0)
    penalties: dict[str, Any] = {}
    for kind in PENALTIES:
        value, size = getattr(params, f"{kind}_penalty"), getattr(params, f"{kind}_context_size")
        if value != getattr(default, f"{kind}_penalty"):
            if size == 0 and kind != "repetition":
                raise NotImplementedError(
                    f"{kind}_penalty over the output alone: a model that runs eagerly counts the last tokens; pass {kind}_context_size"
                )
            penalties |= {f"{kind}_penalty": value, f"{kind}_context_size": size}
    known = {*MLX_FIELDS, *ELSEWHERE, *(f"{kind}_{part}" for kind in PENALTIES for part in ("penalty", "context_size"))}
    for name in SamplingParams.__dataclass_fields__:
        if name not in known and getattr(params, name) != getattr(default, name):
            raise NotImplementedError(f"{name}: a model that runs eagerly samples with mlx-lm, which has no such option; leave it out")
    if params.adjusts_logits and not params.processed_logprobs:
        raise NotImplementedError("processed_logprobs=False: a model that runs eagerly reports logprobs behind biases and penalties")
    if params.temperature > 0:  # a greedy one draws nothing, and MLX's state is the caller's
        mx.random.seed(params.seed or 0)
    sampler = make_sampler(params.temperature, **{name: getattr(params, name) for name in MLX_FIELDS})
    return sampler, list(make_logits_processors(params.logit_bias, **penalties))


def _check_cache(cache: object) -> None:
    if isinstance(cache, PromptCache):
        raise ValueError(
            "the prompt cache is for a model that runs natively; make it with this model, or load it with "
            "mlx_lm.models.cache.load_prompt_cache"
        )


def _checked(sampler: Sampler, vocab_size: int) -> Sampler:
    """A caller's sampler for mlx-lm's loops, which look its tokens up unchecked: one per row of logprobs [rows, vocab]."""
    return lambda logprobs: mx.array(picked_tokens(sampler(logprobs), len(logprobs), vocab_size))
