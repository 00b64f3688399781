"""Prompt caches: sequences that stay in the KV cache between calls, with mlx_lm.models.cache's functions.

`make_prompt_cache(model)` and a first call with it compute a prompt once; later calls continue it. Such a cache holds blocks of the model's
KV cache, or waits on the host: when it was loaded from a file, or when others needed the blocks.
"""
from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

from metalstep.models.cache_file import (
    KEPT_POSITIONS,
    CacheFileError,
    LayerState,
    check_max_kv_size,
    mlx_state,
    read_cache,
    write_cache,
)
from metalstep.scheduler import BlockTables

if TYPE_CHECKING:
    from metalstep.cache_keeper import HostBlocks
    from metalstep.engine import Engine
    from metalstep.model import Model

__all__ = [
    "CacheFileError",
    "KVCache",
    "PromptCache",
    "RotatingKVCache",
    "can_trim_prompt_cache",
    "load_prompt_cache",
    "make_prompt_cache",
    "save_prompt_cache",
    "trim_prompt_cache",
]


class PromptCache(list[Any]):
    """A sequence's keys and values; a list of layers as in mlx-lm. Of one model; used by one request at a time.

    Filled by the engine's CacheKeeper. Contents are in one of: held (blocks of the KV cache), spilled (those blocks, on the host) and
    loaded (whole layers, from a file). What is not computed of the tokens comes with the next request, as the last one often does.
    """

    def __init__(self, windows: list[int | None], max_kv_size: int | None = None):
        """windows: positions that a layer's rows see by themselves, per layer; None: all."""
        super().__init__()
        self.max_kv_size = max_kv_size
        self._set_windows(windows)
        self._tokens: list[int] = []
        self.exact = True  # contents are, bit for bit, what the engine computes from `tokens`
        self.held = BlockTables()
        self.spilled: HostBlocks | None = None
        self.loaded: list[LayerState] | None = None
        self.encoding = ""  # of `loaded`, see CacheKeeper
        self.engine: Engine | None = None
        self.in_use = False  # a request has it whose caller has not taken or given up everything

    def _set_windows(self, windows: list[int | None]) -> None:
        self.windows = windows
        plain = self.max_kv_size is None
        self[:] = [KVCache(self, i) if plain and window is None else RotatingKVCache(self, i) for i, window in enumerate(windows)]

    @property
    def tokens(self) -> list[int]:
        """The ids in it, -1 where they are not known: from a file, or input_embeddings. While a request uses it, those from before."""
        self.settle()
        return self._tokens

    @tokens.setter
    def tokens(self, ids: list[int]) -> None:
        self._tokens = ids

    @property
    def offset(self) -> int:
        """The number of `tokens`."""
        return len(self.tokens)

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are there."""
        if self.loaded is not None:
            return self.loaded[0].offset
        return self.spilled.layout.computed if self.spilled is not None else self.held.computed

    def bind(self, engine: Engine) -> None:
        """Belong to an engine from now on. Raises: ValueError when it belongs to another one, or has another model's layers."""
        if self.engine is None:
            engine.caches.check(self)
            if self.windows != engine.caches.windows:  # mlx-lm's file may have a plain cache for a layer that sees a window
                self._set_windows(engine.caches.windows)
            self.engine = engine
        elif self.engine is not engine:
            raise ValueError("the prompt cache belongs to another model; make one with make_prompt_cache(model)")

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken off the end: no window has given back what a shorter sequence would see."""
        self.settle()
        if self.loaded is not None:
            return all(layer.is_whole for layer in self.loaded)
        layout = self.spilled.layout if self.spilled is not None else self.held
        return all(layout.gone_count(group) == 0 for group in range(len(layout.tables)))

    def trim(self, count: int) -> int:
        """Forget the last `count` tokens, or as many as there are; returns how many.

        Raises: ValueError for a negative count, while a request uses it, or when it is not trimmable.
        """
        _check_count(count)
        self.check_idle()
        count = min(count, len(self.tokens))
        left = len(self.tokens) - count
        if left < self.computed:
            if not self.is_trimmable():
                raise ValueError("the prompt cache is behind an attention window and lacks the tokens before it; start a new one")
            if self.loaded is not None:
                self.loaded = [layer.cut(left) for layer in self.loaded] if left else None
            elif self.engine is not None:
                self.engine.caches.truncate(self, left)
        del self.tokens[left:]
        self.exact |= left == 0
        return count

    def copy(self) -> PromptCache:
        """Another cache with the same contents; blocks are shared until one of them writes. Raises: ValueError while a request uses it."""
        self.check_idle()
        other = PromptCache(self.windows, self.max_kv_size)
        other.tokens = list(self.tokens)
        other.exact, other.loaded, other.encoding = self.exact, self.loaded, self.encoding
        if self.engine is not None:
            other.bind(self.engine)
            self.engine.caches.share(self, other)
        return other

    def __copy__(self) -> PromptCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[Any, Any]) -> PromptCache:
        return self.copy()

    def __reduce__(self) -> Any:
        raise TypeError("a prompt cache cannot be pickled; use save_prompt_cache")

    def check_idle(self) -> None:
        """Raises: ValueError while a request uses it."""
        self.settle()
        self.refuse_in_use()

    def refuse_in_use(self) -> None:
        """Raises: ValueError while a request uses it, as far as the engine knows."""
        if self.in_use:
            raise ValueError("the prompt cache is in use by a request that has not ended; end it, or pass a copy (copy.deepcopy)")

    def settle(self) -> None:
        """Let the engine take in that a request has ended."""
        if self.in_use and self.engine is not None:
            self.engine.settle()


class KVCache:
    """One layer of a PromptCache, with the face of mlx-lm's class of that name."""

    def __init__(self, owner: PromptCache, index: int):
        self._owner = weakref.ref(owner)
        self._index = index
        self._trimmed = 0  # of this layer, until all layers have been trimmed

    @property
    def _cache(self) -> PromptCache:
        owner = self._owner()
        if owner is None:
            raise ValueError("the prompt cache that this layer belongs to is gone; keep the whole list")
        return owner

    @property
    def offset(self) -> int:
        return self._cache.offset - self._trimmed

    @property
    def state(self) -> tuple[Any, ...]:
        """mlx-lm's state, of copies: keys and values [1, heads, rows, dim], or [1, heads, rows, bytes] where they are encoded; then counts.

        Raises: ValueError while a request uses it."""
        cache = self._cache
        cache.check_idle()
        return _states(cache)[self._index]

    @property
    def nbytes(self) -> int:
        arrays = self.state[:2]
        return sum(array.nbytes for array in arrays if array is not None)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    def is_trimmable(self) -> bool:
        return self._cache.is_trimmable()

    def trim(self, count: int) -> int:
        """Trim this layer; the cache is trimmed once every layer has been, as mlx-lm's trim_prompt_cache does."""
        _check_count(count)
        cache = self._cache
        count = min(count, self.offset)
        self._trimmed += count
        least = min(layer._trimmed for layer in cache)
        if least:
            for layer in cache:
                layer._trimmed -= least
            cache.trim(least)
        return count


class RotatingKVCache(KVCache):
    """One layer of which rows see a window, or that has a max_kv_size."""

    def size(self) -> int:
        cache = self._cache
        seen = [size for size in (cache.windows[self._index], cache.max_kv_size) if size is not None]
        return min(self.offset, *seen)


def _check_count(count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"the number of tokens to trim is {count!r}, expected an integer from 0")


def _states(cache: PromptCache) -> list[tuple[Any, ...]]:
    """mlx-lm's state of every layer; the last token's keys and values are computed first if they are missing."""
    engine = cache.engine
    layers: list[Any] = cache.loaded or [None] * len(cache)
    if cache.tokens and engine is not None:
        layers = engine.caches.export(cache)
    states = []
    for window, layer in zip(cache.windows, layers, strict=True):
        if window is not None and cache.max_kv_size is not None:
            raise ValueError("mlx-lm has no cache with max_kv_size for a model with windows of its own, so this one has no state")
        keep = 0 if cache.max_kv_size is None else KEPT_POSITIONS
        states.append(mlx_state(layer, window if cache.max_kv_size is None else cache.max_kv_size, keep))
    return states


def make_prompt_cache(model: Model, max_kv_size: int | None = None) -> Any:
    """An empty cache for `model`. max_kv_size: positions that a row sees, the first 4 of the sequence included; None: all.

    A model that runs eagerly gets mlx-lm's own. Raises: ValueError for a max_kv_size below 5.
    """
    if model.native is None:
        from mlx_lm.models.cache import make_prompt_cache as mlx_make_prompt_cache

        return mlx_make_prompt_cache(model.eager, max_kv_size)
    check_max_kv_size(max_kv_size)
    cache = PromptCache(model.engine.caches.windows, max_kv_size)
    cache.bind(model.engine)
    return cache


def save_prompt_cache(file_name: str | os.PathLike[str], cache: Any, metadata: dict[str, str] | None = None) -> None:
    """Write a cache to a .safetensors file that mlx-lm can load too; that of a model with a kv_scheme is for models with the same one.

    metadata: text by name, to be loaded with it.

    Raises: ValueError for one that cannot be saved: in use, or with a max_kv_size for a model with windows of its own; OSError for a file
    that cannot be written or a disk that is full: a file that was there before is as it was.
    """
    if not isinstance(cache, PromptCache):
        from mlx_lm.models.cache import save_prompt_cache as mlx_save_prompt_cache

        mlx_save_prompt_cache(os.fspath(file_name), cache, metadata)
        return
    cache.check_idle()
    encoding = cache.engine.caches.encoding if cache.engine is not None else cache.encoding
    write_cache(os.fspath(file_name), _states(cache), cache.tokens, cache.max_kv_size, metadata or {}, encoding)
    return None


def load_prompt_cache(file_name: str | os.PathLike[str], return_metadata: bool = False) -> Any:
    """Read a cache that save_prompt_cache wrote, or mlx-lm's own. With return_metadata: (cache, metadata).

    For a model that runs natively; one that runs eagerly takes what mlx_lm.models.cache.load_prompt_cache returns.
    Raises: CacheFileError for a file that is none, or holds another kind of cache.
    """
    contents = read_cache(os.fspath(file_name))
    windows = [None if contents.max_kv_size is not None else max_size for max_size in contents.max_sizes]
    cache = PromptCache(windows, contents.max_kv_size)
    cache.tokens = contents.tokens
    if contents.tokens:
        cache.loaded, cache.exact = [layer for layer in contents.layers if layer is not None], False
        cache.encoding = contents.encoding
    return (cache, contents.metadata) if return_metadata else cache


def can_trim_prompt_cache(cache: Any) -> bool:
    """Whether trim_prompt_cache can take tokens off the end."""
    return all(layer.is_trimmable() for layer in cache)


def trim_prompt_cache(cache: Any, num_tokens: int) -> int:
    """Take the last `num_tokens` tokens off; returns how many were: 0 where can_trim_prompt_cache says no."""
    if not isinstance(cache, PromptCache):
        from mlx_lm.models.cache import trim_prompt_cache as mlx_trim_prompt_cache

        trimmed: Any = mlx_trim_prompt_cache(cache, num_tokens)
        return int(trimmed)
    return cache.trim(num_tokens) if can_trim_prompt_cache(cache) else 0
