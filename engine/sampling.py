"""How one request picks its tokens."""
from __future__ import annotations

import numbers
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

MAX_TOKEN_ENTRIES = 1024  # of one request: logit_bias, xtc_special_tokens and stop tokens together
MAX_LOGPROBS = 32
ALL_TOKENS = 2**31 - 1  # a context size that no request reaches: the whole prompt and output
LARGEST = 3.4028234663852886e38  # float32's, which the step computes with


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; every field is checked when it is made. Numbers may be numpy scalars, token ids arrays.

    What changes logits comes first, in this order: logit_bias; repetition, presence and frequency penalty; min_tokens; allowed and
    banned ids. Then the filters in mlx-lm's order, top_p, min_p, XTC, top_k, and the temperature last; with temperature_first, vLLM's
    order: the temperature, min_p, XTC, top_k, top_p. mlx-lm's ways to say off, 0 for top_p and None for a penalty, are taken as off.

    Raises: ValueError for a value outside its range, NaN included.
    """

    temperature: float = 0.0  # divides the logits; 0 takes the most likely token
    top_p: float = 1.0  # in (0, 1]: the smallest set of tokens with at least this probability; 1: off
    min_p: float = 0.0  # in [0, 1]: drops tokens below this times the most likely one's probability; 0: off
    top_k: int = 0  # tokens kept; 0: off
    seed: int | None = None  # 64 bits; None draws one
    min_tokens_to_keep: int = 1  # most likely tokens that min_p keeps in any case
    # XTC (exclude top choices): with this probability per token, drop all tokens above the threshold but the least likely of them.
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1  # in [0, 0.5]
    xtc_special_tokens: tuple[int, ...] = ()  # that XTC never drops
    # Context sizes count the last tokens of prompt and output. 0: repetition sees all of them, the other two the whole output alone.
    repetition_penalty: float = 1.0  # above 0: divides positive logits of tokens seen, multiplies negative ones; 1: off
    repetition_context_size: int = 0
    presence_penalty: float = 0.0  # subtracted once from a token seen
    presence_context_size: int = 0
    frequency_penalty: float = 0.0  # subtracted per occurrence
    frequency_context_size: int = 0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # added to logits
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    banned_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # generated before a stop token may come
    logprobs: int = 0  # most likely tokens reported per generated token, up to 32
    prompt_logprobs: int | None = None  # likewise per prompt token; None: no logprobs of the prompt
    processed_logprobs: bool = False  # logprobs of the logits after biases, penalties and masks; else of the model's own
    temperature_first: bool = False  # vLLM's order of filters

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            if getattr(self, name) is None:
                put(name, 0.0)
        for name, low, high, expected in (
            ("temperature", 0.0, LARGEST, "a finite number from 0"),
            ("top_p", 0.0, 1.0, "a number above 0 and up to 1 (0 is off, like 1)"),
            ("min_p", 0.0, 1.0, "a number from 0 to 1"),
            ("xtc_probability", 0.0, 1.0, "a number from 0 to 1"),
            ("xtc_threshold", 0.0, 0.5, "a number from 0 to 0.5"),
            ("repetition_penalty", 0.0, LARGEST, "a finite number above 0 (0 is off, like 1)"),
            ("presence_penalty", -LARGEST, LARGEST, "a finite number"),
            ("frequency_penalty", -LARGEST, LARGEST, "a finite number"),
        ):
            put(name, _number(name, getattr(self, name), low, high, expected))
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                put(name, 1.0)
        for name in ("top_k", "repetition_context_size", "presence_context_size", "frequency_context_size", "min_tokens"):
            put(name, _integer(name, getattr(self, name), 0, 2**31 - 1, "an integer from 0"))
        put("min_tokens_to_keep", _integer("min_tokens_to_keep", self.min_tokens_to_keep, 1, 2**31 - 1, "an integer above 0"))
        seed = secrets.randbits(64) if self.seed is None else self.seed
        put("seed", _integer("seed", seed, 0, 2**64 - 1, "an integer from 0 to 2**64 - 1"))
        put("logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}"))
        if self.prompt_logprobs is not None:
            expected = f"None or an integer from 0 to {MAX_LOGPROBS}"
            put("prompt_logprobs", _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, expected))
        put("xtc_special_tokens", _token_ids("xtc_special_tokens", self.xtc_special_tokens) or ())
        put("banned_token_ids", _token_ids("banned_token_ids", self.banned_token_ids) or ())
        put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
        if self.allowed_token_ids is not None and not set(self.allowed_token_ids) - set(self.banned_token_ids):
            raise ValueError(_nothing_left("allowed_token_ids and banned_token_ids leave"))
        put("logit_bias", _biases(self.logit_bias))
        self._check_entries(())
        for name in ("processed_logprobs", "temperature_first"):
            put(name, _flag(name, getattr(self, name)))

    @property
    def has_penalty(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits change before a token is picked: a bias, a penalty, a mask or min_tokens."""
        masks = self.allowed_token_ids is not None or bool(self.banned_token_ids)
        return self.has_penalty or masks or bool(self.logit_bias) or self.min_tokens > 0

    def check_vocab(self, vocab_size: int, stop_token_ids: Collection[int] = ()) -> SamplingParams:
        """These parameters for a vocabulary: `top_k` from its size on is off, `min_tokens_to_keep` is at most its size.

        stop_token_ids: that end the request; with min_tokens they are not allowed at first.
        Raises: ValueError for a token id outside the vocabulary, for too many ids, and where no token is left.
        """
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "xtc_special_tokens"):
            outside = [token for token in getattr(self, name) or () if token >= vocab_size]
            if outside:
                raise ValueError(
                    f"{name} has token id {outside[0]}, expected ids from 0 to {vocab_size - 1}; pass ids of this model's tokenizer"
                )
        self._check_entries(stop_token_ids if self.min_tokens else ())
        dropped = {*self.banned_token_ids, *(stop_token_ids if self.min_tokens else ())}
        if self.allowed_token_ids is None:  # counted: a set of the vocabulary costs milliseconds of every request
            left = vocab_size - sum(token < vocab_size for token in dropped)
        else:
            left = len(set(self.allowed_token_ids) - dropped)
        if left == 0:
            raise ValueError(_nothing_left("allowed_token_ids, banned_token_ids and min_tokens leave"))
        if self.top_k < vocab_size >= self.min_tokens_to_keep:
            return self
        top_k = self.top_k if self.top_k < vocab_size else 0
        return replace(self, top_k=top_k, min_tokens_to_keep=min(self.min_tokens_to_keep, vocab_size))

    def _check_entries(self, stop_token_ids: Collection[int]) -> None:
        count = len(self.logit_bias or ()) + len(self.xtc_special_tokens) + len(stop_token_ids)
        if count > MAX_TOKEN_ENTRIES:
            raise ValueError(
                f"logit_bias, xtc_special_tokens and stop tokens of min_tokens are {count} ids, expected at most {MAX_TOKEN_ENTRIES}; "
                "banned_token_ids and allowed_token_ids have no limit"
            )


def _number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """`value` as a float in [low, high]. Raises: ValueError, for NaN and bool too."""
    value = _plain(value)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(_checked(name, value, real and low <= value <= high, expected))


def _integer(name: str, value: Any, low: int, high: int, expected: str) -> int:
    """`value` as an int in [low, high]. Raises: ValueError, for bool too."""
    value = _plain(value)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(_checked(name, value, whole and low <= value <= high, expected))


def _flag(name: str, value: Any) -> bool:
    value = _plain(value)
    return bool(_checked(name, value, isinstance(value, bool), "True or False"))


def _plain(value: Any) -> Any:
    """A numpy scalar as Python's number, which compares with any bound without overflow."""
    return value.item() if isinstance(value, np.generic) else value


def _checked(name: str, value: Any, ok: bool, expected: str) -> Any:
    if not ok:
        raise ValueError(f"{name} is {shown(value)}, expected {expected}")
    return value


def _token_ids(name: str, values: Any) -> tuple[int, ...] | None:
    """Distinct token ids in the order given; None for None."""
    if values is None:
        return None
    values = values.tolist() if hasattr(values, "tolist") else values  # numpy's and MLX's arrays
    _checked(name, values, isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping), "a list of token ids")
    return tuple(dict.fromkeys(_token_id(name, value) for value in values))


def _token_id(name: str, value: Any) -> int:
    return _integer(f"a token id of {name}", value, 0, 2**31 - 1, "an integer from 0")


def _biases(values: Any) -> dict[int, float] | None:
    """A copy of a mapping from token id to bias; None for None or an empty one."""
    if values is None:
        return None
    _checked("logit_bias", values, isinstance(values, Mapping), "a mapping from token ids to numbers")
    biases = {
        _token_id("logit_bias", token): _number(f"the logit_bias of token {token}", bias, -LARGEST, LARGEST, "a finite number")
        for token, bias in values.items()
    }
    return biases or None


def _nothing_left(what: str) -> str:
    return f"{what} no token, expected at least one; allow more tokens"


def shown(value: Any) -> str:
    """A caller's value in an error: not longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # an int with more digits than Python prints
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:80]}…"
