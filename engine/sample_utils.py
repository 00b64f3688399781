"""mlx-lm's samplers and logits processors, with what they do as data, so that the native step does it without Python.

`make_sampler` and `make_logits_processors` have the names and arguments of mlx_lm.sample_utils, and what they return computes, when
called, what mlx-lm's computes. `native_params` reads both mlx-lm's own closures and these objects.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import mlx.core as mx
import mlx_lm.sample_utils as mlx_lm_sample_utils
import numpy as np
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    categorical_sampling,
    greedy_sampler,
)

from metalstep.sampling import ALL_TOKENS, SamplingParams

__all__ = [
    "LogitsProcessor",
    "Sampler",
    "apply_min_p",
    "apply_top_k",
    "apply_top_p",
    "apply_xtc",
    "categorical_sampling",
    "greedy_sampler",
    "make_frequency_penalty",
    "make_logits_processors",
    "make_presence_penalty",
    "make_repetition_penalty",
    "make_sampler",
    "native_params",
    "seed_from_mlx",
]

Params = dict[str, Any]  # fields of SamplingParams by name


class Sampler:
    """Log-probabilities [..., vocab] -> tokens [...]: mlx-lm's sampler with its arguments. params: fields of SamplingParams."""

    def __init__(self, params: Params):
        self.params = params
        fields = dict(params)
        self._temp = fields.pop("temperature")
        self._filters = fields

    def __call__(self, logprobs: mx.array) -> mx.array:
        filters, vocab_size = dict(self._filters), logprobs.shape[-1]
        if filters.get("top_k", 0) >= vocab_size:  # off, as in the native step; mlx-lm refuses it
            filters["top_k"] = 0
        if "min_tokens_to_keep" in filters:
            filters["min_tokens_to_keep"] = min(filters["min_tokens_to_keep"], vocab_size)
        if "xtc_special_tokens" in filters:
            filters["xtc_special_tokens"] = list(filters["xtc_special_tokens"])
        return mlx_lm_sample_utils.make_sampler(self._temp, **filters)(logprobs)

    def __repr__(self) -> str:
        return f"Sampler({self.params})"


class LogitsProcessor:
    """(tokens so far [length], logits [1, vocab]) -> logits: one of mlx-lm's processors. params: fields of SamplingParams."""

    def __init__(self, function: Callable[[mx.array, mx.array], mx.array], params: Params):
        self._function = function
        self.params = params

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        return self._function(tokens, logits)

    def __repr__(self) -> str:
        return f"LogitsProcessor({self.params})"


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: list[int] | None = None,
) -> Sampler:
    """A sampler like mlx-lm's; the arguments are SamplingParams' of the same name, temp its temperature.

    Raises: ValueError for a value outside its range, at once; mlx-lm's raises when it is called.
    """
    params: Params = {
        "temperature": temp,
        "top_p": top_p,
        "min_p": min_p,
        "min_tokens_to_keep": min_tokens_to_keep,
        "top_k": top_k,
        "xtc_probability": xtc_probability,
        "xtc_threshold": xtc_threshold,
        "xtc_special_tokens": xtc_special_tokens or (),
    }
    checked = _checked(params)
    return Sampler({"temperature": 0.0} if checked["temperature"] == 0 else checked)


def make_logits_processors(
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int | None = 20,
    presence_penalty: float | None = None,
    presence_context_size: int | None = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int | None = 20,
) -> list[LogitsProcessor]:
    """Processors like mlx-lm's, in its order. Context sizes count the last tokens of prompt and output; 0 means all of them.

    Raises: ValueError for a value outside its range, at once.
    """
    processors = []
    if logit_bias:
        checked = _checked({"logit_bias": logit_bias})
        processors.append(LogitsProcessor(mlx_lm_sample_utils.make_logits_processors(checked["logit_bias"])[0], checked))
    for make, penalty, context_size in (
        (make_repetition_penalty, repetition_penalty, repetition_context_size),
        (make_presence_penalty, presence_penalty, presence_context_size),
        (make_frequency_penalty, frequency_penalty, frequency_context_size),
    ):
        if penalty is not None and penalty != 0:
            processors.append(make(penalty, context_size))
    return processors


def make_repetition_penalty(penalty: float, context_size: int | None = 20) -> LogitsProcessor:
    """Divides positive logits of the last `context_size` tokens by the penalty and multiplies negative ones. See SamplingParams."""
    return _penalty("repetition", penalty, context_size)


def make_presence_penalty(penalty: float, context_size: int | None = 20) -> LogitsProcessor:
    """Subtracts the penalty from the logit of each of the last `context_size` tokens, once. See SamplingParams."""
    return _penalty("presence", penalty, context_size)


def make_frequency_penalty(penalty: float, context_size: int | None = 20) -> LogitsProcessor:
    """Subtracts the penalty per occurrence among the last `context_size` tokens. See SamplingParams."""
    return _penalty("frequency", penalty, context_size)


def native_params(
    sampler: Callable[..., Any] | None, logits_processors: Sequence[Callable[..., Any]] | None
) -> Params | None:
    """What a sampler and processors do, as fields of SamplingParams; None where the step cannot do it by itself.

    Known are this module's objects and the closures that mlx_lm.sample_utils returns, processors in mlx-lm's order and each kind at
    most once: two penalties of one kind, or another order, compute something else. sampler None is greedy.
    """
    params = {"temperature": 0.0} if sampler is None else _sampler_params(sampler)
    if params is None:
        return None
    kinds = []
    for processor in logits_processors or ():
        kind, fields = _processor_params(processor)
        if kind is None:
            return None
        kinds.append(kind)
        params = {**params, **fields}
    if sorted(set(kinds)) != kinds:
        return None
    try:
        return _checked(params)
    except ValueError:  # what mlx-lm raises, or makes of such a value, it does when it is called
        return None


def seed_from_mlx() -> int:
    """A seed of 64 bits drawn from mx.random: after mx.random.seed(n) a text repeats, as with mlx-lm's samplers."""
    parts = np.array(mx.random.randint(0, 2**16, (4,)), np.uint16)  # MLX draws a float32, which has no more than 24 bits
    return int.from_bytes(parts.tobytes(), "little")


def _checked(params: Params) -> Params:
    """The same fields with the values that SamplingParams makes of them. Raises: ValueError for one outside its range."""
    sampling = SamplingParams(**{"seed": 0, **params})
    return {name: getattr(sampling, name) for name in params}


def _penalty(kind: str, penalty: float, context_size: int | None) -> LogitsProcessor:
    params = _penalty_params(kind, penalty, context_size)
    checked = _checked(params)
    make = getattr(mlx_lm_sample_utils, f"make_{kind}_penalty")
    return LogitsProcessor(make(checked[f"{kind}_penalty"], context_size), checked)


def _penalty_params(kind: str, penalty: Any, context_size: Any) -> Params:
    # SamplingParams' 0 leaves the prompt out of presence and frequency; mlx-lm's slice `tokens[-0:]` is the whole.
    whole = kind != "repetition" and not isinstance(context_size, bool) and context_size == 0
    return {f"{kind}_penalty": penalty, f"{kind}_context_size": ALL_TOKENS if whole else context_size}


# ---- reading mlx-lm's closures: by their code objects, taken from closures made here ------------------------------------------


def _code(function: Any) -> CodeType | None:
    return function.__code__ if type(function) is FunctionType else None


def _cells(function: FunctionType) -> dict[str, Any]:
    """What a closure's variables hold, by name."""
    cells: Iterable[Any] = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


_EVERY_FILTER: Any = mlx_lm_sample_utils.make_sampler(1.0, 0.5, 0.5, 1, 1, 0.5, 0.1, [])
_SAMPLER_CODE = _code(_EVERY_FILTER)
_FILTER_NAMES = {  # SamplingParams' fields that a filter's variables are
    frozenset(names)
    for names in (
        ("top_p",),
        ("min_p", "min_tokens_to_keep"),
        ("xtc_probability", "xtc_threshold", "xtc_special_tokens"),
        ("top_k",),
    )
}
_FILTER_CODES = [_code(method) for method in _cells(_EVERY_FILTER).get("sampling_methods", ())]
_PROCESSOR_CODES = [
    _code(processor) for processor in mlx_lm_sample_utils.make_logits_processors({0: 0.0}, 2.0, 1, 1.0, 1, 1.0, 1)
]
_KINDS = ("logit_bias", "repetition", "presence", "frequency")  # of processors, in mlx-lm's order


def _sampler_params(sampler: Any) -> Params | None:
    if type(sampler) is Sampler:
        return dict(sampler.params)
    if sampler is greedy_sampler:
        return {"temperature": 0.0}
    if _SAMPLER_CODE is None or _code(sampler) is not _SAMPLER_CODE:
        return None
    cells = _cells(sampler)
    if set(cells) != {"sampling_methods", "temp"}:
        return None
    params: Params = {"temperature": cells["temp"]}
    last = -1
    for method in cells["sampling_methods"]:
        code = _code(method)
        place = next((i for i, known in enumerate(_FILTER_CODES) if known is code), -1)
        fields = _cells(method) if code is not None else {}
        if place <= last or frozenset(fields) not in _FILTER_NAMES:
            return None
        last = place
        params.update(fields)
    return params


def _processor_params(processor: Any) -> tuple[int | None, Params]:
    """(place in _KINDS, fields of SamplingParams); (None, {}) for an unknown one."""
    if type(processor) is LogitsProcessor:
        name = next(iter(processor.params))
        return next(i for i, kind in enumerate(_KINDS) if name.startswith(kind)), processor.params
    code = _code(processor)
    place = next((i for i, known in enumerate(_PROCESSOR_CODES) if known is code and code is not None), None)
    if place is None:
        return None, {}
    cells = _cells(processor)
    if place == 0 and set(cells) == {"indices", "values"}:
        return 0, {"logit_bias": dict(zip(cells["indices"].tolist(), cells["values"].tolist(), strict=True))}
    if place == 1 and cells.get("penalty") == 0:  # off in SamplingParams, a division by zero here
        return None, {}
    if place > 0 and set(cells) == {"penalty", "context_size"}:
        return place, _penalty_params(_KINDS[place], cells["penalty"], cells["context_size"])
    return None, {}
