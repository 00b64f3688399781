"""What a request must be like to run; whatever cannot run is refused here, before it takes anything."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from metalstep.grammar import Grammar
from metalstep.models.cache import PromptCache
from metalstep.models.cache_file import KEPT_POSITIONS
from metalstep.native_model import MAX_STEPS, NativeModel
from metalstep.request import Request
from metalstep.sampling import SamplingParams, shown
from metalstep.scheduler import Sequence
from metalstep.token_ids import check_tokens


def admit(native: NativeModel, request: Request, *, collect: bool = False) -> tuple[Request, Sequence]:
    """The request, checked, and its sequence behind what its prompt cache holds. collect: it wants the logits of every position.

    Raises: ValueError naming what does not fit.
    """
    if not isinstance(request.sampling, SamplingParams):
        raise ValueError(f"sampling is {shown(request.sampling)}, expected SamplingParams")
    ids = _ids("prompt", request.prompt, native.vocab_size)
    if not ids and request.embeddings is not None and np.ndim(request.embeddings) == 2:
        ids = [-1] * len(request.embeddings)  # no token ids stand behind them
        if request.sampling.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs needs the prompt's token ids; pass them with input_embeddings")
    if not ids:
        raise ValueError("the prompt is empty; expected at least one token")
    stops = frozenset(_ids("stop_token_ids", request.stop_token_ids, native.vocab_size))
    counts: dict[str, Any] = {
        name: _count(name, getattr(request, name), low, high)
        for name, low, high in (
            ("max_tokens", 0 if collect else 1, 2**31 - 1),
            ("decode_steps", 1, MAX_STEPS),
            ("prefill_rows", 1, native.max_rows),
            ("max_kv_size", KEPT_POSITIONS + 1, 2**31 - 1),
        )
    }
    for name in ("hand_out_logits", "keep_logits"):
        if not isinstance(getattr(request, name), bool):
            raise ValueError(f"{name} is {shown(getattr(request, name))}, expected True or False")
    request = replace(
        request,
        prompt=ids,
        stop_token_ids=stops,
        sampling=request.sampling.check_vocab(native.vocab_size, stops),
        embeddings=_embeddings(request.embeddings, len(ids), native.arrays.sizes.hidden_size),
        **counts,
    )
    _check_picking(request)
    held, max_kv_size = _held(request)
    total = len(held) + len(ids)
    if total > native.max_context:
        _refuse_length(native, total, len(held))
    alone = request.hand_out_logits or request.keep_logits or request.grammar is not None
    return request, Sequence(
        tokens=[*held, *ids],
        prompt_len=total,
        # The last token needs no place in the cache.
        max_tokens_total=min(native.max_context + 1, total + (2**31 if request.max_tokens is None else request.max_tokens)),
        prefill_rows=request.prefill_rows or native.max_rows,
        decode_steps=1 if alone else request.decode_steps,
        window=max_kv_size or 0,
        keep=KEPT_POSITIONS if max_kv_size else 0,
        cacheable=request.embeddings is None and (request.prompt_cache is None or request.prompt_cache.exact),
        prompt_logprobs=collect or request.sampling.prompt_logprobs is not None,
        salt=native.encoding.encode(),
    )


def _ids(name: str, values: Any, vocab_size: int) -> list[int]:
    """Token ids as a list. Raises: ValueError for anything but a flat collection of integers inside the vocabulary."""
    try:
        ids = None if isinstance(values, str | bytes | Mapping) else np.asarray(values if hasattr(values, "shape") else list(values))
    except (ValueError, TypeError, OverflowError):
        ids = None
    if ids is not None and ids.ndim == 1 and ids.size == 0:
        return []
    if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} is {shown(values)}, expected a flat list of token ids")
    try:
        check_tokens(ids, vocab_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return ids.tolist()


def _count(name: str, value: Any, low: int, high: int) -> int | None:
    """A whole number in [low, high]; None stays where the field may be None."""
    if value is None and name in ("max_tokens", "max_kv_size", "prefill_rows"):
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, expected an integer from {low} to {high}")
    return int(value)


def _embeddings(values: Any, rows: int, hidden_size: int) -> np.ndarray | None:
    if values is None:
        return None
    try:
        array = np.asarray(values, np.float32)
    except (ValueError, TypeError):
        raise ValueError(f"input_embeddings is {shown(values)}, expected float32 [{rows}, {hidden_size}]") from None
    if array.shape != (rows, hidden_size):
        raise ValueError(f"input_embeddings has shape {array.shape}, expected ({rows}, {hidden_size}): one row per prompt token")
    if not np.isfinite(array).all():
        raise ValueError("input_embeddings has values that are not finite; expected numbers")
    return array


def _check_picking(request: Request) -> None:
    """Raises: ValueError for a grammar that is none, or parameters of the step where the caller picks the tokens."""
    grammar, sampling = request.grammar, request.sampling
    if grammar is not None and not isinstance(grammar, Grammar):
        raise ValueError(f"grammar is {shown(grammar)}, expected an object with metalstep.grammar.Grammar's methods")
    if not request.hand_out_logits:
        return
    if grammar is not None:
        raise ValueError("grammar and hand_out_logits (a sampler or processors of the caller's own) both say how to pick; pass one of them")
    plain = SamplingParams(seed=sampling.seed, prompt_logprobs=sampling.prompt_logprobs, processed_logprobs=sampling.processed_logprobs)
    if sampling != plain:
        raise ValueError("sampling and hand_out_logits (the caller's own choice) both say how to pick; leave sampling at its defaults")


def _held(request: Request) -> tuple[list[int], int | None]:
    """The tokens of the request's prompt cache, and the positions that a row sees. Raises: ValueError for a cache that cannot be used."""
    cache = request.prompt_cache
    if cache is None:
        return [], request.max_kv_size
    if not isinstance(cache, PromptCache):
        raise ValueError(
            f"prompt_cache is {shown(cache)}, expected what metalstep.models.cache.make_prompt_cache or load_prompt_cache returns"
        )
    cache.check_idle()
    if request.max_kv_size not in (None, cache.max_kv_size):
        raise ValueError(
            f"max_kv_size is {request.max_kv_size} and the prompt cache's {cache.max_kv_size}; make the cache with the same, "
            "or pass one of them"
        )
    return cache.tokens, cache.max_kv_size


def _refuse_length(native: NativeModel, total: int, held: int) -> None:
    context, limit = native.max_context, native.model_context
    more = ", which is the model's own limit; shorten the prompt"
    if limit != context:
        more = f"; shorten the prompt, or load with a larger max_context or kv_memory (the model's limit: {limit or 'not stated'})"
    cached = f" ({held} of them in the prompt cache)" if held else ""
    raise ValueError(f"{total} tokens{cached} do not fit into the context of {context}{more}")
