"""What a model sees as its caches during a trace: objects with the faces of mlx-lm's caches that leave markers."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_caches

from metalstep.capture.errors import CaptureError
from metalstep.capture.markers import CACHED_LENGTH, Marks

ATTENTION_CACHES = (
    mlx_caches.KVCache,
    mlx_caches.ConcatenateKVCache,
    mlx_caches.RotatingKVCache,
    mlx_caches.ChunkedKVCache,
)


@dataclass
class RecurrentStates:
    """Recurrent states of one trace by (layer, index). known: shapes and dtypes that an earlier trace wrote; written: this one's."""

    known: dict[tuple[Any, ...], tuple[tuple[int, ...], mx.Dtype]] = field(default_factory=dict[Any, Any])
    written: dict[tuple[Any, ...], mx.array] = field(default_factory=dict[Any, Any])


def stand_in(cache: Any, layer: object, marks: Marks, states: RecurrentStates) -> Any:
    """What a layer sees instead of the mlx-lm cache that its model made for it.

    Raises: CaptureError for a class of cache that is not known here.
    """
    if cache is None:
        return None  # a layer without a state
    if isinstance(cache, mlx_caches.CacheList):
        return CacheList([stand_in(c, (layer, i), marks, states) for i, c in enumerate(cache.caches)])
    if isinstance(cache, mlx_caches.ArraysCache):
        return RecurrentCache(layer, len(cache.cache), marks, states)
    if type(cache) in ATTENTION_CACHES:
        return AttentionCache(layer, cache, marks)
    names = ", ".join(c.__name__ for c in (*ATTENTION_CACHES, mlx_caches.ArraysCache, mlx_caches.CacheList))
    raise CaptureError(f"layer {layer} keeps its state in a {type(cache).__name__}; known caches are {names}")


class AttentionCache:
    """Keys and values: positions as its offset, a kv_write per update, a mask only where it says more than the cache's window."""

    step = 256
    left_padding = lengths = None

    def __init__(self, layer: object, cache: Any, marks: Marks):
        if getattr(cache, "keep", 0):
            raise CaptureError(f"layer {layer} has a rotating cache that keeps the first {cache.keep} tokens")
        self._layer, self._marks = layer, marks
        self.offset = marks.positions
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._window = getattr(cache, "max_size", None)
        self._chunk = getattr(cache, "chunk_size", None)
        if self._window:
            self.max_size = self._window

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        if window_size is None or window_size == self._window:
            return None
        assert self.offset is not None
        shape = (self.offset.shape[0], 1, 1, 1)
        return self._marks.add("mask", [(shape, mx.bool_)], {"positions": self.offset}, window=window_size)[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Handles that claim a length that no model has, so that a model that looks at the length is found out."""
        outputs = [((*a.shape[:2], CACHED_LENGTH, a.shape[3]), a.dtype) for a in (keys, values)]
        attrs = {"layer": self._layer, "window": self._window, "chunk": self._chunk}
        self.keys, self.values = self._marks.add("kv_write", outputs, {"k": keys, "v": values}, **attrs)
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values

    def maybe_trim_front(self) -> None:
        pass

    def size(self) -> int:
        return 1  # not empty

    def empty(self) -> bool:
        return False


class RecurrentCache:
    """Recurrent states. In the first trace reads give None, and writes teach the shapes; in the second, reads leave markers."""

    lengths = left_padding = None

    def __init__(self, layer: object, size: int, marks: Marks, states: RecurrentStates):
        self._layer, self._size, self._marks, self._states = layer, size, marks, states

    def __getitem__(self, index: int) -> mx.array | None:
        if index >= self._size:
            raise IndexError(index)  # some models unpack their cache
        key = (self._layer, index)
        if key in self._states.written:
            return self._states.written[key]
        if key not in self._states.known:
            return None
        return self._marks.add("state_read", [self._states.known[key]], {}, key=key)[0]

    def __setitem__(self, index: int, value: mx.array) -> None:
        self._states.written[(self._layer, index)] = value

    def advance(self, tokens: int) -> None:
        pass

    def make_mask(self, *_: Any, **__: Any) -> None:
        return None

    def empty(self) -> bool:
        return False

    @property
    def state(self) -> Iterable[mx.array]:
        raise CaptureError(f"layer {self._layer}: the model reads its recurrent cache as a whole")


class CacheList:
    """Several caches of one layer."""

    def __init__(self, caches: list[Any]):
        self.caches = caches

    def __getitem__(self, index: int) -> Any:
        return self.caches[index]

    @property
    def offset(self) -> Any:
        return self.caches[0].offset

    def empty(self) -> bool:
        return False
