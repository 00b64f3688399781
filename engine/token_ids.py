"""Token ids from a caller: checked before anything indexes with them. MLX and the kernels would read beyond their tables."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np


def prompt_ids(
    tokenizer: Any, prompt: str | Sequence[int] | np.ndarray | mx.array, *, may_be_empty: bool = False
) -> np.ndarray:
    """Token ids of a prompt, int64 [length]. Text gets special tokens unless it begins with the bos token.

    Raises: ValueError for an empty prompt, text that is not Unicode, or anything but a flat list of integers.
    """
    if isinstance(prompt, str):
        check_text("the prompt", prompt)
        bos = getattr(tokenizer, "bos_token", None)
        prompt = tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
    ids = _integers(prompt)
    if ids is not None and ids.size == 0:
        if may_be_empty:
            return np.empty(0, np.int64)
        raise ValueError("the prompt is empty; expected at least one token")
    if ids is None or ids.ndim != 1:
        raise ValueError(f"the prompt is {_described(prompt)}, expected text or a flat list of token ids")
    return ids


def batch_ids(inputs: Any) -> np.ndarray:
    """Token ids of several sequences, int64 [batch, length]. Raises: ValueError for anything else, and for none."""
    ids = _integers(inputs)
    if ids is None or ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"model: inputs are {_described(inputs)}, expected integers [batch, length], not empty")
    return ids


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises: ValueError naming the first id outside [0, vocab_size)."""
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if bad.size:
        raise ValueError(
            f"token id {tokens.reshape(-1)[bad[0]]} at position {bad[0]} is outside the vocabulary; expected ids from 0 to "
            f"{vocab_size - 1}"
        )


def picked_token(choice: Any, vocab_size: int) -> int:
    """What a caller's sampler returned, as a token id. Raises: ValueError for anything but one id of the vocabulary."""
    return picked_tokens(choice, 1, vocab_size)[0]


def picked_tokens(choice: Any, rows: int, vocab_size: int) -> list[int]:
    """What a caller's sampler returned for `rows` rows of logprobs. Raises: ValueError for anything but one id each."""
    ids = _integers(choice)
    if ids is None or ids.size != rows or ((ids < 0) | (ids >= vocab_size)).any():
        expected = "one token id" if rows == 1 else f"{rows} token ids"
        raise ValueError(f"the sampler returned {choice!r}, expected {expected} from 0 to {vocab_size - 1}")
    return ids.reshape(-1).tolist()


def check_text(name: str, text: str) -> None:
    """Raises: ValueError for text with bytes that were not UTF-8 (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode: character {error.start} is {text[error.start]!r}; pass text decoded from UTF-8"
        ) from None


def _integers(values: Any) -> np.ndarray | None:
    """`values` as int64, or None when they are not integers that fit (an empty list counts as integers)."""
    try:
        array = np.array(values)
    except (ValueError, TypeError, RuntimeError):  # ragged, or a dtype that numpy has not
        return None
    if array.size == 0:
        return array.astype(np.int64) if array.dtype.kind in "iuf" else None
    if array.dtype.kind not in "iu" or (array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max):
        return None
    return array.astype(np.int64)


def _described(values: Any) -> str:
    shape, dtype = getattr(values, "shape", None), getattr(values, "dtype", None)
    return f"{dtype} of shape {tuple(shape)}" if shape is not None else repr(values)[:80]
