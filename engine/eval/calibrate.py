"""Means of a model's keys over a text, per layer and KV head, as the cache sees them: behind RoPE."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import metalstep
from metalstep.checkpoint.source import resolve
from metalstep.eval.kv import Window, check_length, text_ids, windows
from metalstep.kv_cache import layer_order
from metalstep.model import Model, load
from metalstep.models.cache import make_prompt_cache
from metalstep.request import Request

SINKS = 4  # first positions of a sequence, whose keys are like no others
STEP = 512  # tokens whose keys are read back at a time
CONTEXT = 2048  # tokens of a sequence, if the model takes so many
MATTERS = 1.0  # ratio of a mean to what varies about it: here the squared error of encoded keys is twice what it is without the mean


@dataclass(frozen=True)
class KeyStatistics:
    """Of a layer: mean float32 [kv_heads, key_dim]; residual float64 [kv_heads], the root mean square length of a key less the mean."""

    mean: np.ndarray
    residual: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """Length of the mean over the residual, float64 [kv_heads]; of keys that do not vary, infinity (0 where they are 0)."""
        lengths = np.sqrt((self.mean.astype(np.float64) ** 2).sum(-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(lengths == 0, 0.0, lengths / self.residual)


class KeySums:
    """Keys of one layer as they come: sums in float64."""

    def __init__(self, heads: int, dim: int):
        self.count = 0
        self._sum, self._squares = np.zeros((heads, dim)), np.zeros(heads)

    def add(self, keys: np.ndarray) -> None:
        """keys: [heads, tokens, dim]."""
        wide = keys.astype(np.float64)
        self.count += wide.shape[1]
        self._sum += wide.sum(1)
        self._squares += (wide**2).sum((1, 2))

    def statistics(self) -> KeyStatistics:
        mean = self._sum / self.count
        rest = np.maximum(self._squares / self.count - (mean**2).sum(-1), 0)
        return KeyStatistics(mean.astype(np.float32), np.sqrt(rest))


def calibrate(
    model: str | os.PathLike[str],
    text: str,
    *,
    tokens: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> tuple[Path, dict[object, KeyStatistics], dict[str, str]]:
    """Run a text through the model: (path of its files, statistics per layer in the model's order, what to write beside the means).

    tokens: of the text that are used; None: all. options: of metalstep.load, of the device and of memory. Keys come from a float32 cache.
    Raises: ValueError for a text that is too short; whatever load raises with strict.
    """
    progress("loading the model")
    loaded, tokenizer = load(model, strict=True, kv_dtype="float32", **options)
    with loaded:
        begin, ids = text_ids(tokenizer, text)
        check_length(ids, tokens)
        assert loaded.native is not None
        cut = windows(begin, ids[:tokens], min(CONTEXT, loaded.native.max_context))
        found = key_statistics(loaded, cut, progress)
        about = {
            "model_type": loaded.model_type,
            "tokens": str(len(ids[:tokens])),
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "version": metalstep.__version__,
        }
        return resolve(model), found, about


def key_statistics(
    model: Model, cut: list[Window], progress: Callable[[str], None] = lambda _: None
) -> dict[object, KeyStatistics]:
    """Per layer, in the model's order, over the keys that the sequences leave in the cache, without each one's first SINKS."""
    assert model.native is not None
    keeper, layers = model.engine.caches, layer_order(model.native.cache.planes)
    sums: dict[object, KeySums] = {}
    done, total = 0, sum(len(window.tokens) for window in cut)
    for window in cut:
        cache = make_prompt_cache(model)
        for at in range(0, len(window.tokens), STEP):
            chunk = window.tokens[at : at + STEP]
            model.engine.collect(Request(chunk, max_tokens=0, prompt_cache=cache))
            for layer, state in zip(layers, keeper.export(cache), strict=True):
                keys = state.keys[:, max(0, state.rows - len(chunk)) :]
                first = state.offset - keys.shape[1]  # position of the first of them
                keys = keys[:, max(0, SINKS - first) :]
                if keys.shape[1]:
                    sums.setdefault(layer, KeySums(keys.shape[0], keys.shape[2])).add(keys)
            done += len(chunk)
            progress(f"{done:,} of {total:,} tokens")
    return {layer: sums[layer].statistics() for layer in layers}

