"""Text from a prompt, with mlx-lm's arguments and response fields."""
from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from metalstep.choices import PREFILL_ROWS
from metalstep.eager_generate import stream_eager
from metalstep.generate_options import (
    Processor,
    Sampler,
    Sampling,
    embeddings_from,
    max_tokens_from,
    prefill_rows_from,
    refuse,
    sampling_from,
    whole_number,
    wrapped,
)
from metalstep.grammar import Grammar
from metalstep.model import Model
from metalstep.plan.logits import Logits
from metalstep.request import PromptLogprob, Request, TokenOutput
from metalstep.stream import Stream
from metalstep.token_ids import prompt_ids

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of getrusage's ru_maxrss


class GenerationResponse:
    """One piece of generated text. The fields are those of mlx-lm's GenerationResponse.

    text: the next segment, possibly empty. token, logprobs (mx.array [vocab] float32), from_draft (always False). prompt_tokens,
    generation_tokens: counts. prompt_tps, generation_tps: tokens per second. peak_memory: of the process, in GB. finish_reason:
    "length", "stop" or None while going on. Beyond mlx-lm's: logprob and rank of the token, top_logprobs (the most likely tokens with
    theirs, when asked for), cached_tokens (of the prompt that were in the prefix cache), prompt_logprobs.
    """

    def __init__(
        self, text: str, output: TokenOutput, stream: Stream, counts: tuple[int, int], speeds: tuple[float, float], finish: str | None
    ):
        """counts and speeds: of the prompt and of the generation."""
        self.text = text
        self.token = output.token
        self.from_draft = False
        self.prompt_tokens, self.generation_tokens = counts
        self.prompt_tps, self.generation_tps = speeds
        self.finish_reason = finish
        self.logprob = output.logprob
        self.rank = output.rank
        self.top_logprobs = output.top
        self._running = stream.running  # not the stream: who has a response must not keep its request from ending
        self._logits = output.logits  # every output of this stream keeps them

    def __repr__(self) -> str:
        return (
            f"GenerationResponse(text={self.text!r}, token={self.token}, prompt_tokens={self.prompt_tokens}, "
            f"generation_tokens={self.generation_tokens}, finish_reason={self.finish_reason!r})"
        )

    @property
    def cached_tokens(self) -> int:
        return self._running.found_tokens

    @property
    def prompt_logprobs(self) -> list[PromptLogprob | None] | None:
        """One per prompt token, None for the first."""
        return self._running.asked_prompt_logprobs

    @cached_property
    def logprobs(self) -> mx.array:
        """Log-probabilities of the whole vocabulary before the token was picked, computed when read."""
        return _logprobs(self._logits)

    @cached_property
    def peak_memory(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: str | Sequence[int] | np.ndarray | mx.array,
    max_tokens: int = 256,
    *,
    sampler: Sampler | None = None,
    logits_processors: list[Processor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: Any = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: mx.array | None = None,
    grammar: Grammar | None = None,
    **options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate token by token. Calls of several threads on one model share its batch.

    prompt: text (special tokens are added unless it begins with the bos token) or token ids; may be empty with input_embeddings.
    max_tokens: -1 for no limit but the context. options: the fields of SamplingParams (temp is its temperature). sampler and
    logits_processors: as in mlx-lm; those that sample_utils makes run inside the step, others get the logits in Python, which costs a
    copy of the vocabulary and a native call per token. max_kv_size: positions that a row sees, the first 4 included. prompt_cache:
    see models.cache; continued in place. prefill_step_size: prompt tokens per step, up to 512 (2048 on an NVIDIA GPU); None: so many.
    prompt_progress_callback: called with the prompt tokens done and their number. input_embeddings: [prompt length, hidden_size] instead of
    the model's own. grammar: what may come next.
    Raises: ValueError for bad arguments, NotImplementedError for an mlx-lm argument that is refused, by name.
    """
    sampling = sampling_from(sampler, logits_processors, options)
    limit = max_tokens_from(max_tokens)
    prefill_rows = _prefill_rows(model, prefill_step_size)
    embeddings = embeddings_from(input_embeddings)
    ids = prompt_ids(tokenizer, prompt, may_be_empty=embeddings is not None)
    tokenizer = wrapped(tokenizer)
    if model.native is None:
        return stream_eager(
            model, tokenizer, ids, limit, sampling, prefill_rows, prompt_progress_callback,
            {**options, "max_kv_size": max_kv_size, "prompt_cache": prompt_cache, "input_embeddings": input_embeddings, "grammar": grammar},
        )  # fmt: skip
    stream = _submit(
        "stream_generate", model, ids, sampling, prompt_progress_callback, options,
        max_tokens=limit, stop_token_ids=frozenset(tokenizer.eos_token_ids), embeddings=embeddings, prompt_cache=prompt_cache,
        max_kv_size=max_kv_size, grammar=grammar, prefill_rows=prefill_rows,
    )  # fmt: skip
    return _responses(tokenizer, stream, len(ids) if embeddings is None else len(embeddings))


def generate_step(
    prompt: Sequence[int] | np.ndarray | mx.array,
    model: Model,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: list[Processor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: Any = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: mx.array | None = None,
    grammar: Grammar | None = None,
    **options: Any,
) -> Generator[tuple[int, mx.array], None, None]:
    """Tokens and logprobs, mx.array [vocab] float32, without a tokenizer: no token ends the text. Arguments are stream_generate's.

    max_tokens: 0 computes the prompt alone, into `prompt_cache`. Raises: as stream_generate.
    """
    if model.native is None:
        raise NotImplementedError(
            f"generate_step: the model runs eagerly ({model.fallback_reason}); use mlx_lm.generate.generate_step with model.eager"
        )
    sampling = sampling_from(sampler, logits_processors, options)
    prompt_alone = whole_number("max_tokens", max_tokens) == 0
    embeddings = embeddings_from(input_embeddings)
    if isinstance(prompt, str):
        raise ValueError("the prompt is text, expected token ids; encode it, or use stream_generate")
    stream = _submit(
        "generate_step", model, prompt_ids(None, prompt, may_be_empty=embeddings is not None), sampling, prompt_progress_callback, options,
        max_tokens=1 if prompt_alone else max_tokens_from(max_tokens), embeddings=embeddings, prompt_cache=prompt_cache,
        max_kv_size=max_kv_size, grammar=grammar, prefill_rows=_prefill_rows(model, prefill_step_size),
    )  # fmt: skip
    return _steps(stream, prompt_cache if prompt_alone else None, prompt_alone)


def _steps(stream: Stream, cache: Any, prompt_alone: bool) -> Generator[tuple[int, mx.array], None, None]:
    with contextlib.closing(stream):
        for output in stream:
            if not prompt_alone:
                yield output.token, _logprobs(output.logits)
    if cache is not None:
        cache.trim(1)


def _submit(
    function: str,
    model: Model,
    ids: np.ndarray,
    sampling: Sampling,
    progress: Callable[[int, int], None] | None,
    options: dict[str, Any],
    **fields: Any,
) -> Stream:
    """Queue a request of a native model. options: what is left of the caller's; fields: Request's."""
    assert model.native is not None
    refuse(options, function)
    if fields["embeddings"] is not None:
        model.check_input_embeddings()
    if fields["grammar"] is not None and not sampling.is_native:
        raise ValueError("grammar and a sampler or logits processors of your own both say how to pick tokens; pass one of them")
    pick = sampling.picker(model.native.vocab_size)
    request = Request(ids.tolist(), sampling.params, hand_out_logits=pick is not None, keep_logits=True, **fields)
    return model.engine.submit(request, pick, progress)


def _prefill_rows(model: Model, prefill_step_size: int | None) -> int:
    if model.native is not None:
        return prefill_rows_from(prefill_step_size, model.native.max_rows)
    return prefill_rows_from(PREFILL_ROWS if prefill_step_size is None else prefill_step_size, sys.maxsize)


def _logprobs(logits: Logits | None) -> mx.array:
    """Log-probabilities of a row that was kept, [vocab] float32."""
    assert logits is not None
    wide = logits.numpy().astype(np.float64)
    wide -= wide.max()
    return mx.array((wide - np.log(np.exp(wide).sum())).astype(np.float32))


def _responses(tokenizer: Any, stream: Stream, num_prompt: int) -> Generator[GenerationResponse, None, None]:
    try:
        started = time.perf_counter()
        detokenizer, stops = tokenizer.detokenizer, set(tokenizer.eos_token_ids)
        prompt_tps = 0.0
        for count, output in enumerate(stream, 1):
            if count == 1:
                prompt_tps = num_prompt / (time.perf_counter() - started)
                started = time.perf_counter()
            if output.token not in stops:
                detokenizer.add_token(output.token)
            if output.finish_reason:
                detokenizer.finalize()
            tps = count / (time.perf_counter() - started)
            yield GenerationResponse(
                detokenizer.last_segment, output, stream, (num_prompt, count), (prompt_tps, tps), output.finish_reason
            )
    finally:
        stream.close()


def generate(model: Model, tokenizer: Any, prompt: str | Sequence[int], verbose: bool = False, **options: Any) -> str:
    """The whole generated text. Options are stream_generate's; `verbose` prints the text and the speeds as they come."""
    text, response = "", None
    for response in stream_generate(model, tokenizer, prompt, **options):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print()
        print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens-per-sec")
        print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens-per-sec")
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    return text
