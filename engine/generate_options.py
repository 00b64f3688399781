"""The arguments of generate, stream_generate and batch_generate, checked, as the engine takes them."""
from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import numpy as np

from metalstep.sample_utils import native_params, seed_from_mlx
from metalstep.sampling import SamplingParams
from metalstep.stream import Picker
from metalstep.token_ids import picked_token

NO_DRAFTS = (
    "speculative decoding is not supported; leave it out, or let one native call make several tokens: decode_steps of batch_generate "
    "and Request"
)
REFUSED = {  # mlx-lm arguments without a native form, and what works instead
    "draft_model": NO_DRAFTS,
    "num_draft_tokens": NO_DRAFTS,
    "kv_bits": "a request has no KV cache of its own to quantise; load(..., kv_scheme='affine8') or another scheme",
    "kv_group_size": "groups belong to the scheme: load(..., kv_scheme='affine8'); leave it out",
    "quantized_kv_start": "a KV cache with a scheme is quantised from its first token: load(..., kv_scheme='affine8'); leave it out",
    "stream": "a native model does not run on an MLX stream; leave it out",
}
SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))
SAMPLER_FIELDS = frozenset(  # that a sampler says
    {"temperature", "top_p", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability", "xtc_threshold", "xtc_special_tokens"}
    | {"temperature_first"}
)
NONE_IS_DEFAULT = frozenset(field.name for field in fields(SamplingParams) if field.default is None)
MLX_DEFAULTS = {"num_draft_tokens": (2, 3), "kv_group_size": (64,), "quantized_kv_start": (0, 5000)}  # harmless to pass on

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked: params by the step, or `pick` by the caller's own functions."""

    params: SamplingParams
    sampler: Sampler | None
    processors: Sequence[Processor] | None
    is_native: bool

    def picker(self, vocab_size: int) -> Picker | None:
        """The caller's functions as the engine calls them; None when the step samples by itself."""
        return None if self.is_native else picker(self.sampler, self.processors, vocab_size)


def sampling_from(
    sampler: Sampler | None, logits_processors: Sequence[Processor] | None, options: dict[str, Any]
) -> Sampling:
    """Sampling of one request; takes what belongs to it out of `options`. `temp` is SamplingParams' temperature.

    Callables that metalstep.sample_utils or mlx_lm.sample_utils made run inside the step, together with options that say something else.
    The caller's own get the logits in Python, and options about picking tokens have no place then.
    Raises: ValueError for values, and for options that say what the callables say already.
    """
    given = {name: options.pop(name) for name in list(options) if name in SAMPLING_FIELDS or name == "temp"}
    if "temp" in given and "temperature" in given:
        raise ValueError("temp and temperature are the same; pass one of them")
    typed = {"temperature" if name == "temp" else name: name for name in given}
    given = {name: given[typed[name]] for name in typed}
    given = {name: value for name, value in given.items() if value is not None or name not in NONE_IS_DEFAULT}
    check_callables(sampler, logits_processors)
    if sampler is None and not logits_processors:
        return Sampling(SamplingParams(**{"processed_logprobs": True, **given}), None, None, True)
    params = native_params(sampler, logits_processors)
    if params is None:
        for name in sorted(set(given) - {"prompt_logprobs"}):
            raise ValueError(
                f"{typed[name]} has no effect on a sampler or logits processors of your own, which get the logits and pick the token; "
                "leave it out, or pass what metalstep.sample_utils makes"
            )
        return Sampling(SamplingParams(seed=0, **given), sampler, logits_processors, False)
    said = SAMPLER_FIELDS if sampler is not None else frozenset()
    for source, names in (("sampler", said), ("logits_processors", set(params) - SAMPLER_FIELDS)):
        for name in sorted(set(given) & names):
            raise ValueError(f"{typed[name]} and {source} both say how to pick tokens; pass one of them")
    if sampler is None:
        params.pop("temperature")
    elif given.get("seed") is None and params["temperature"] > 0:
        given["seed"] = seed_from_mlx()
    return Sampling(SamplingParams(**{**params, "processed_logprobs": True, **given}), None, None, True)


def check_callables(sampler: object, logits_processors: object) -> None:
    """Raises: ValueError for a sampler or a logits processor that is none."""
    if sampler is not None and not callable(sampler):
        raise ValueError(f"sampler is {sampler!r:.80}, expected a callable; see metalstep.sample_utils")
    if logits_processors is not None and not isinstance(logits_processors, list | tuple):
        raise ValueError(f"logits_processors is {logits_processors!r:.80}, expected a list of callables; see metalstep.sample_utils")
    for function in logits_processors or ():
        if not callable(function):
            raise ValueError(f"a logits processor is {function!r:.80}, expected a callable; see metalstep.sample_utils")


def refuse(options: dict[str, Any], function: str) -> None:
    """Raises: NotImplementedError for an mlx-lm argument without a native form, by name; TypeError for an unknown one."""
    for name, value in options.items():
        if name not in REFUSED:
            raise TypeError(f"{function} got an unexpected argument {name!r}")
        if value is not None and value not in MLX_DEFAULTS.get(name, ()):
            raise NotImplementedError(f"{name}: {REFUSED[name]}")


def wrapped(tokenizer: Any) -> Any:
    """A transformers tokenizer as mlx-lm wraps it, with a detokenizer and eos_token_ids."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return tokenizer if hasattr(tokenizer, "eos_token_ids") else TokenizerWrapper(tokenizer)


def max_tokens_from(value: object) -> int | None:
    """mlx-lm's max_tokens: above 0, or -1 for no limit but the context (None here). Raises: ValueError."""
    count = whole_number("max_tokens", value)
    if count == 0 or count < -1:
        raise ValueError(f"max_tokens is {count}, expected an integer above 0, or -1 for no limit")
    return None if count == -1 else count


def prefill_rows_from(value: object, most: int) -> int:
    """mlx-lm's prefill_step_size, at most and by default what a step has. Raises: ValueError."""
    if value is None:
        return most
    rows = whole_number("prefill_step_size", value)
    if rows < 1:
        raise ValueError(f"prefill_step_size is {rows}, expected an integer above 0")
    return min(rows, most)


def whole_number(name: str, value: object) -> int:
    """An integer of any type but bool. Raises: ValueError naming the argument."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None


def embeddings_from(value: Any) -> np.ndarray | None:
    """input_embeddings as float32 [length, hidden_size]. Raises: ValueError for another shape, or values that are not finite."""
    if value is None:
        return None
    try:
        rows = np.array(value.astype(mx.float32) if isinstance(value, mx.array) else value, np.float32)
    except (ValueError, TypeError):
        raise ValueError(f"input_embeddings is {value!r:.80}, expected an array [prompt length, hidden_size]") from None
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"input_embeddings has shape {rows.shape}, expected [prompt length, hidden_size]")
    if not np.isfinite(rows).all():
        raise ValueError("input_embeddings has values that are not finite")
    return rows


def picker(sampler: Sampler | None, processors: Sequence[Processor] | None, vocab_size: int) -> Picker:
    """The caller's own sampling: tokens so far and logits [vocab] -> the token, its logprob and the processed logits.

    What the callables return is checked: raises ValueError for logits of another shape, without a finite maximum, or for a token
    outside the vocabulary.
    """

    def pick(tokens: list[int], logits: np.ndarray) -> tuple[int, float, np.ndarray]:
        row = mx.array(logits)[None]
        known = mx.array(np.array([token for token in tokens if token >= 0] if tokens[0] < 0 else tokens, np.int32))
        for processor in (processors or ()) if known.size else ():  # as in mlx-lm: none before there is a token
            row = processor(known, row)
        shape = getattr(row, "shape", None)
        if shape != (1, vocab_size):
            raise ValueError(f"a logits processor returned {type(row).__name__} of shape {shape}, expected (1, {vocab_size})")
        total = mx.logsumexp(row, axis=-1, keepdims=True)
        if not np.isfinite(np.array(total)).all():
            raise ValueError("a logits processor left no token: NaN, infinity, or -infinity everywhere; allow at least one token")
        logprobs = row - total
        token = picked_token(sampler(logprobs) if sampler else mx.argmax(logprobs, axis=-1), vocab_size)
        return token, float(logprobs[0, token]), np.array(row[0].astype(mx.float32))

    return pick
