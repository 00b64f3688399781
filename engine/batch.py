"""Text for many prompts at once, with mlx-lm's batch_generate arguments and result."""
from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalstep.admission import admit
from metalstep.choices import PREFILL_ROWS
from metalstep.eager_generate import batch_eager
from metalstep.generate import RSS_UNIT
from metalstep.generate_options import (
    SAMPLING_FIELDS,
    Sampler,
    Sampling,
    max_tokens_from,
    prefill_rows_from,
    refuse,
    sampling_from,
    whole_number,
    wrapped,
)
from metalstep.grammar import Grammar
from metalstep.model import Model
from metalstep.models.cache import PromptCache, make_prompt_cache
from metalstep.native_model import MAX_SEQS
from metalstep.request import PromptLogprob, Request, TokenOutput
from metalstep.sampling import SamplingParams
from metalstep.stream import Stream
from metalstep.token_ids import prompt_ids

DECODE_STEPS = 8  # tokens that come at once: nobody watches them
SEED_STRIDE = 0x9E3779B97F4A7C15  # prompts of one call with one seed draw from different streams


@dataclass
class BatchStats:
    """Of one batch_generate. Times in seconds, memory in GB; prompt_time ends with the last prompt's first token."""

    prompt_tokens: int = 0
    prompt_tps: float = 0
    prompt_time: float = 0
    generation_tokens: int = 0
    generation_tps: float = 0
    generation_time: float = 0
    peak_memory: float = 0


@dataclass
class BatchResponse:
    """In the prompts' order. texts; stats; caches, token_ids and logprobs (of the tokens) when asked for, else None.

    errors: with raise_errors=False, None for each prompt that was answered, else what ended it; its text is what came before.
    top_logprobs: with SamplingParams.logprobs, the most likely tokens with theirs for each token of token_ids. prompt_logprobs: with
    SamplingParams.prompt_logprobs, one per prompt token, None for the first. Both are None where no prompt asked for them, and have
    None for a prompt that did not.
    """

    texts: list[str]
    stats: BatchStats
    caches: list[Any] | None = None
    token_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None
    errors: list[Exception | None] | None = None
    top_logprobs: list[list[list[tuple[int, float]]] | None] | None = None
    prompt_logprobs: list[list[PromptLogprob | None] | None] | None = None


def batch_generate(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    prompt_caches: Sequence[Any] | None = None,
    max_tokens: int | Sequence[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    sampler: Sampler | Sequence[Sampler | None] | None = None,
    logits_processors: Sequence[Any] | None = None,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    grammars: Sequence[Grammar | None] | None = None,
    max_kv_size: int | None = None,
    prefill_step_size: int | None = None,
    decode_steps: int = DECODE_STEPS,
    raise_errors: bool = True,
    **options: Any,
) -> BatchResponse:
    """Generate for all prompts; up to 64 run at once, the others wait their turn.

    prompts: token ids, or text. max_tokens: one number, or one per prompt. prompt_caches: one per prompt, None where there is none; they
    are copied, not continued in place. sampler, logits_processors: one for all, or a list with one entry per prompt (a list of
    processors each). sampling: SamplingParams for all or one per prompt; options: its fields instead, for all; a seed among them is
    varied from prompt to prompt, the first has it as it is. decode_steps: tokens of one native call. raise_errors: False reports what ends
    a single prompt in `errors`; the others are answered either way. completion_batch_size: prompts that run at once; prefill_batch_size:
    of those, prompts without a token yet.
    A model that runs eagerly takes mlx-lm's own arguments.
    Raises: ValueError for bad arguments, before anything runs; what ended the first of the prompts that failed.
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts is {prompts!r:.80}, expected a list of texts or of lists of token ids")
    count = len(prompts)
    tokenizer = wrapped(tokenizer)
    limits = [max_tokens_from(x) for x in _each("max_tokens", max_tokens, count, np.ndim(max_tokens) == 0)]
    caches = _each("prompt_caches", prompt_caches, count, prompt_caches is None)
    choices = _samplings(sampler, logits_processors, sampling, options, count)
    if model.native is None:
        if decode_steps != DECODE_STEPS or not raise_errors or grammars:
            raise NotImplementedError("decode_steps, raise_errors and grammars: a model that runs eagerly has none of them; leave them out")
        found = batch_eager(
            model, tokenizer, [prompt_ids(tokenizer, prompt) for prompt in prompts], prompt_caches, limits, choices,
            {**options, "verbose": verbose, "return_prompt_caches": return_prompt_caches, "return_token_ids": return_token_ids,
             "return_logprobs": return_logprobs, "max_kv_size": max_kv_size, "prefill_step_size": prefill_step_size or PREFILL_ROWS},
        )  # fmt: skip
        return BatchResponse(found.texts, found.stats, found.caches, found.token_ids, found.logprobs)
    sizes = _batch_sizes(options)
    refuse(options, "batch_generate")
    rows = prefill_rows_from(prefill_step_size, model.native.max_rows)
    grammars = _each("grammars", grammars, count, grammars is None)
    if len({id(grammar) for grammar in grammars if grammar is not None}) < sum(grammar is not None for grammar in grammars):
        raise ValueError("grammars has one object twice; each prompt needs its own, because it moves on with the tokens")
    requests, picks = [], []
    for i, prompt in enumerate(prompts):
        cache = _copied(model, caches[i])
        if cache is None and return_prompt_caches:
            cache = make_prompt_cache(model, max_kv_size)
        pick = choices[i].picker(model.native.vocab_size)
        if pick is not None and grammars[i] is not None:
            raise ValueError("grammars and a sampler or logits processors of your own both say how to pick tokens; pass one of them")
        picks.append(pick)
        request = Request(
            prompt_ids(tokenizer, prompt).tolist(),
            choices[i].params,
            limits[i],
            frozenset(tokenizer.eos_token_ids),
            prompt_cache=cache,
            max_kv_size=max_kv_size,
            grammar=grammars[i],
            hand_out_logits=pick is not None,
            decode_steps=decode_steps,
            prefill_rows=rows,
        )
        admit(model.native, request)  # all of them before the first one runs
        requests.append(request)
    return _run(model, tokenizer, requests, picks, sizes, verbose, return_prompt_caches, return_token_ids, return_logprobs, raise_errors)


def _batch_sizes(options: dict[str, Any]) -> tuple[int, int]:
    """Prompts that run at once, and of those, prompts without a token yet; takes mlx-lm's two sizes out of `options`."""
    sizes = []
    for name in ("completion_batch_size", "prefill_batch_size"):
        size = whole_number(name, options.pop(name)) if options.get(name) is not None else None
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}, expected an integer above 0")
        sizes.append(size)
    completion, prefill = sizes
    return max(completion or MAX_SEQS, prefill or 1), prefill or MAX_SEQS


def _copied(model: Model, cache: Any) -> PromptCache | None:
    if cache is None:
        return None
    if not isinstance(cache, PromptCache):
        raise ValueError(
            f"a prompt_cache is {cache!r:.80}, expected None or what metalstep.models.cache.make_prompt_cache or load_prompt_cache returns"
        )
    copied = cache.copy()
    copied.bind(model.engine)
    return copied


def _samplings(sampler: Any, logits_processors: Any, sampling: Any, options: dict[str, Any], count: int) -> list[Sampling]:
    """One Sampling per prompt; takes its fields out of `options`."""
    if sampling is not None:
        if sampler is not None or logits_processors:
            raise ValueError("sampling and sampler or logits_processors both say how to pick tokens; pass one of them")
        for name in options:
            if name in SAMPLING_FIELDS or name == "temp":
                raise ValueError(f"sampling and {name} both say how to pick tokens; pass one of them")
        each = _each("sampling", sampling, count, isinstance(sampling, SamplingParams))
        for params in each:
            if not isinstance(params, SamplingParams):
                raise ValueError(f"sampling has {params!r:.80}, expected SamplingParams")
        return [Sampling(params, None, None, True) for params in each]
    samplers = _each("sampler", sampler, count, sampler is None or callable(sampler))
    lists = logits_processors if isinstance(logits_processors, list | tuple) else ()
    nested = bool(lists) and all(entry is None or isinstance(entry, list | tuple) for entry in lists)
    processors = _each("logits_processors", logits_processors, count, not nested)
    seed = options.get("seed")
    given, choices = dict(options), []
    for i in range(count):
        fields = dict(given)
        if seed is not None and i:
            fields["seed"] = (whole_number("seed", seed) + i * SEED_STRIDE) % 2**64
        choices.append(sampling_from(samplers[i], processors[i], fields))
    sampling_from(None, None, options)  # takes the fields out
    return choices


def _each(name: str, values: Any, count: int, for_all: bool) -> list[Any]:
    """One value per prompt. Raises: ValueError for a list of another length."""
    if for_all:
        return [values] * count
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise ValueError(f"{name} is {values!r:.80}, expected one value, or a list of one per prompt")
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts; expected one for each")
    return list(values)


def _run(
    model: Model,
    tokenizer: Any,
    requests: list[Request],
    picks: list[Any],
    sizes: tuple[int, int],
    verbose: bool,
    with_caches: bool,
    with_ids: bool,
    with_logprobs: bool,
    raise_errors: bool,
) -> BatchResponse:
    engine, count = model.engine, len(requests)
    outputs: list[list[TokenOutput]] = [[] for _ in requests]
    errors: list[Exception | None] = [None] * count
    of_prompts: list[list[PromptLogprob | None] | None] = [None] * count
    started = time.perf_counter()
    prompt_time = 0.0
    queue = deque(enumerate(zip(requests, picks, strict=True)))
    streams: dict[int, Stream] = {}
    at_once, at_once_in_prompt = sizes
    _report_progress(verbose, 0, count)
    try:
        while queue or streams:
            in_prompt = sum(not outputs[i] for i in streams)
            while queue and len(streams) < at_once and in_prompt < at_once_in_prompt:
                i, (request, pick) = queue.popleft()
                streams[i] = engine.submit(request, pick)
                in_prompt += 1
            for i, stream in list(streams.items()):
                try:
                    while found := stream.poll_all():
                        if not outputs[i]:
                            prompt_time = time.perf_counter() - started
                        outputs[i] += found
                except Exception as error:
                    errors[i] = error
                if stream.finished:
                    of_prompts[i] = stream.prompt_logprobs
                    del streams[i]
                    _report_progress(verbose, count - len(streams) - len(queue), count)
            if streams and all(not stream.running.has_news for stream in streams.values()):
                engine.wait(list(streams.values()))
    finally:
        for stream in streams.values():
            stream.close()
    stats = _stats(requests, outputs, prompt_time, time.perf_counter() - started)
    if verbose:
        _report(count, stats)
    failed = next((error for error in errors if error is not None), None)
    if failed is not None and raise_errors:
        raise failed
    stops = set(tokenizer.eos_token_ids)
    ids = [[o.token for o in found if not (o.finish_reason == "stop" and o.token in stops)] for found in outputs]
    tops = [
        [o.top or [] for o in found[: len(kept)]] if request.sampling.logprobs else None
        for request, found, kept in zip(requests, outputs, ids, strict=True)
    ]
    return BatchResponse(
        [tokenizer.decode(found) for found in ids],
        stats,
        [request.prompt_cache for request in requests] if with_caches else None,
        ids if with_ids else None,
        [[o.logprob for o in found[: len(kept)]] for found, kept in zip(outputs, ids, strict=True)] if with_logprobs else None,
        None if raise_errors else errors,
        tops if any(top is not None for top in tops) else None,
        of_prompts if any(found is not None for found in of_prompts) else None,
    )


def _stats(requests: list[Request], outputs: list[list[TokenOutput]], prompt_time: float, total: float) -> BatchStats:
    prompt_tokens = sum(len(request.prompt) for request in requests)
    generated = sum(len(found) for found in outputs)
    generation_time = max(total - prompt_time, 1e-9)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9
    return BatchStats(
        prompt_tokens, prompt_tokens / max(prompt_time, 1e-9), prompt_time, generated, generated / generation_time, generation_time, peak
    )


def _report_progress(verbose: bool, done: int, count: int) -> None:
    if verbose:
        print(f"[batch_generate] Finished processing {done}/{count} ...", end="\r")


def _report(count: int, stats: BatchStats) -> None:
    print(f"[batch_generate] Finished processing {count}/{count}")
    print(f"[batch_generate] Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec")
    print(f"[batch_generate] Generation: {stats.generation_tokens} tokens, {stats.generation_tps:.3f} tokens-per-sec")
    print(f"[batch_generate] Peak memory: {stats.peak_memory:.3f} GB")
