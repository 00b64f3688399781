"""Text from a prompt, with mlx-lm's arguments and response fields."""
from __future__ import annotations

import operator
import resource
import sys
import time
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from metalstep.model import Model
from metalstep.native_model import NativeModel
from metalstep.plan.logits import Logits
from metalstep.sampling import SamplingParams
from metalstep.token_ids import check_tokens, picked_token, prompt_ids

REFUSED = {  # mlx-lm arguments without a native form, and what works instead
    "draft_model": "speculative decoding is not supported; leave it out",
    "prompt_cache": "a prompt cache cannot be passed in yet; pass the whole prompt",
    "max_kv_size": "a rotating cache is not supported; bound the context with load(..., max_context=...)",
    "kv_bits": "a quantised KV cache is not supported; load(..., kv_dtype='float16') is the smallest",
    "kv_group_size": "a quantised KV cache is not supported; leave it out",
    "quantized_kv_start": "a quantised KV cache is not supported; leave it out",
    "input_embeddings": "input embeddings are not supported; pass token ids",
}
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of getrusage's ru_maxrss


class GenerationResponse:
    """One piece of generated text. The fields are those of mlx-lm's GenerationResponse.

    text: the next segment, possibly empty. token, logprobs (mx.array [vocab] float32), from_draft (always False). prompt_tokens,
    generation_tokens: counts. prompt_tps, generation_tps: tokens per second. peak_memory: of the process, in GB. finish_reason:
    "length", "stop" or None while going on.
    """

    def __init__(
        self,
        text: str,
        token: int,
        logits: Logits,
        prompt_tokens: int,
        prompt_tps: float,
        generation_tokens: int,
        generation_tps: float,
        finish_reason: str | None,
    ):
        self.text = text
        self.token = token
        self.from_draft = False
        self.prompt_tokens = prompt_tokens
        self.prompt_tps = prompt_tps
        self.generation_tokens = generation_tokens
        self.generation_tps = generation_tps
        self.finish_reason = finish_reason
        self._logits = logits

    @cached_property
    def logprobs(self) -> mx.array:
        """Log-probabilities of the whole vocabulary before the token was picked, computed when read."""
        wide = self._logits.numpy().astype(np.float64)
        wide -= wide.max()
        return mx.array((wide - np.log(np.exp(wide).sum())).astype(np.float32))

    @cached_property
    def peak_memory(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: str | Sequence[int] | np.ndarray | mx.array,
    max_tokens: int = 256,
    *,
    temp: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    seed: int | None = None,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prefill_step_size: int = 512,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    **others: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate token by token.

    prompt: text (special tokens are added unless it begins with the bos token) or token ids. max_tokens: -1 for no limit but the
    context. temp, top_p, min_p, top_k, seed: see SamplingParams. sampler and logits_processors: callables as in mlx-lm; they get
    the logits in Python, which costs a copy of the vocabulary per token. prefill_step_size: prompt tokens per step, up to 512.
    Raises: ValueError for bad arguments, NotImplementedError for an mlx-lm argument that is refused, by name.
    """
    sampling = SamplingParams(temp, top_p, min_p, top_k, seed)
    max_tokens = _count("max_tokens", max_tokens)
    if max_tokens == 0 or max_tokens < -1:
        raise ValueError(f"max_tokens is {max_tokens}, expected an integer above 0, or -1 for no limit")
    prefill_step_size = _count("prefill_step_size", prefill_step_size)
    if prefill_step_size < 1:
        raise ValueError(f"prefill_step_size is {prefill_step_size}, expected an integer above 0")
    for name, value in others.items():
        if name not in REFUSED:
            raise TypeError(f"stream_generate got an unexpected argument {name!r}")
        if value is not None and model.native is not None:
            raise NotImplementedError(f"{name}: {REFUSED[name]}")
    ids = prompt_ids(tokenizer, prompt)
    if model.native is None:
        if vocab_size := model.config.get("vocab_size"):  # MLX reads beyond the table
            check_tokens(ids, vocab_size)
        return _eager(
            model, tokenizer, ids, max_tokens, sampling, sampler, logits_processors, prefill_step_size,
            prompt_progress_callback, others,
        )  # fmt: skip
    pick = _picker(sampler, logits_processors, model.native.vocab_size)
    return _native(
        model.native, tokenizer, ids, max_tokens, sampling, pick, prefill_step_size, prompt_progress_callback
    )


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


Picker = Callable[[list[int], np.ndarray], int]


def _picker(sampler: Callable | None, processors: list[Callable] | None, vocab_size: int) -> Picker | None:
    """The caller's own sampling as tokens so far, logits [vocab] -> token; None when the step samples by itself.

    What the callables return is checked: raises ValueError for logits of another shape, without a finite maximum, or for a token
    outside the vocabulary.
    """
    if sampler is None and not processors:
        return None

    def pick(tokens: list[int], logits: np.ndarray) -> int:
        row = mx.array(logits)[None]
        for processor in processors or ():
            row = processor(mx.array(tokens), row)
        shape = getattr(row, "shape", None)
        if shape != (1, vocab_size):
            raise ValueError(f"a logits processor returned {type(row).__name__} of shape {shape}, expected (1, {vocab_size})")
        total = mx.logsumexp(row, axis=-1, keepdims=True)
        if not np.isfinite(np.array(total)).all():
            raise ValueError("a logits processor left no token: NaN, infinity, or -infinity everywhere; allow at least one token")
        logprobs = row - total
        return picked_token(sampler(logprobs) if sampler else mx.argmax(logprobs, axis=-1), vocab_size)

    return pick


def _count(name: str, value: object) -> int:
    """An integer of any type but bool. Raises: ValueError naming the argument."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None


def _native(
    model: NativeModel,
    tokenizer: Any,
    ids: np.ndarray,
    max_tokens: int,
    sampling: SamplingParams,
    pick: Picker | None,
    prefill_rows: int,
    progress: Callable[[int, int], None] | None,
) -> Generator[GenerationResponse, None, None]:
    run = model.start(sampling)
    try:
        started = time.perf_counter()
        token = run.prefill(ids, progress, prefill_rows).token
        if pick is not None:
            token = pick(ids.tolist(), run.logits.numpy())
        prompt_tps = len(ids) / (time.perf_counter() - started)
        started = time.perf_counter()
        detokenizer, stops = tokenizer.detokenizer, set(tokenizer.eos_token_ids)
        generated: list[int] = []
        while True:
            generated.append(token)
            finish = "stop" if token in stops else "length" if len(generated) == max_tokens else None
            if finish is None and run.length >= model.max_context:
                finish = "length"
            if token not in stops:
                detokenizer.add_token(token)
            if finish:
                detokenizer.finalize()
            tps = len(generated) / (time.perf_counter() - started)
            yield GenerationResponse(
                detokenizer.last_segment, token, run.logits, len(ids), prompt_tps, len(generated), tps, finish
            )
            if finish:
                return
            token = run.decode(token).token
            if pick is not None:
                token = pick([*ids.tolist(), *generated], run.logits.numpy())
    finally:
        run.close()


def _eager(
    model: Model,
    tokenizer: Any,
    ids: np.ndarray,
    max_tokens: int,
    sampling: SamplingParams,
    sampler: Callable | None,
    processors: list[Callable] | None,
    prefill_rows: int,
    progress: Callable[[int, int], None] | None,
    others: dict[str, Any],
) -> Generator[Any, None, None]:
    """The same through mlx-lm's own loop, with its own GenerationResponse."""
    from mlx_lm.generate import stream_generate as mlx_stream_generate
    from mlx_lm.sample_utils import make_sampler

    if sampler is None:
        mx.random.seed(sampling.seed or 0)
        sampler = make_sampler(sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k)
    elif vocab_size := model.config.get("vocab_size"):
        sampler = _checked(sampler, vocab_size)
    extra = {name: value for name, value in others.items() if value is not None}
    if progress is not None:
        extra["prompt_progress_callback"] = progress
    return mlx_stream_generate(
        model.eager,
        tokenizer,
        mx.array(ids),
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=processors,
        prefill_step_size=prefill_rows,
        **extra,
    )


def _checked(sampler: Callable[[mx.array], mx.array], vocab_size: int) -> Callable[[mx.array], mx.array]:
    """A caller's sampler for mlx-lm's loop, which looks its token up unchecked."""
    return lambda logprobs: mx.array([picked_token(sampler(logprobs), vocab_size)])
