"""The engine's side of prompt caches: which blocks they hold, and how they become a sequence and a sequence becomes them."""
from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from metalstep.kernels.kv_codec import KVCodec
from metalstep.kv_cache import LayerBlocks, PagedKVCache, from_blocks, layer_order, to_blocks
from metalstep.kv_plane import BLOCK_SIZE, STORED
from metalstep.models.cache_file import KEPT_POSITIONS, LayerState, to_mlx
from metalstep.request import Request
from metalstep.scheduler import BlockTables, KVBlocks, Sequence

if TYPE_CHECKING:
    from metalstep.engine import Engine
    from metalstep.models.cache import PromptCache
    from metalstep.watch import Watch

Snapshot = list[dict[object, LayerBlocks]]  # per group, per layer: the blocks that KVBlocks.filled names
MLX_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class HostBlocks:
    """Blocks that were given back. layout: which those are, its tables are of zeros."""

    layout: BlockTables
    blocks: Snapshot


class CacheKeeper:
    """Methods run between two steps, except where they say otherwise."""

    def __init__(self, engine: Engine, cache: PagedKVCache, blocks: KVBlocks, encoding: str = ""):
        self._encoding = encoding
        self._engine, self._cache, self._blocks = engine, cache, blocks
        # By the tables' id, least recently used first.
        self._held: OrderedDict[int, tuple[BlockTables, Watch]] = OrderedDict()
        self._layers = layer_order(cache.planes)
        self.windows = [cache.groups[cache.planes[layer].group].window for layer in self._layers]  # per layer

    @property
    def encoding(self) -> str:
        """How keys and values are encoded; "" where they are floats. Two caches with one text hold the same bytes for the same tokens."""
        return self._encoding

    def held(self) -> Iterable[BlockTables]:
        """What all prompt caches hold."""
        return [tables for tables, _ in self._held.values()]

    # ---- a request's beginning and end -------------------------------------------------------------------------------------
    def lend(self, cache: PromptCache, sequence: Sequence) -> None:
        """`sequence`, which holds nothing, starts with what the cache has. Raises: ValueError where an interrupt lost its contents."""
        if min(cache.tokens[cache.computed :], default=0) < 0:
            raise ValueError("the prompt cache lost its contents when it was interrupted, and does not know all its tokens; make a new one")
        sequence.recomputable = cache.exact
        if cache.loaded is not None:
            sequence.snapshot = self._blocks_of(cache.loaded, self._blocks.layout(sequence, cache.computed))
        elif cache.spilled is not None:
            sequence.snapshot = cache.spilled.blocks
        elif cache.held.computed:
            self._blocks.fork(cache.held, sequence)
            return
        sequence.computed = sequence.snapshot_tokens = cache.computed

    def take_back(self, cache: PromptCache, sequence: Sequence) -> None:
        """The request ended, in whatever way: the cache goes on to where it got.

        Its tokens are all there are once one was generated, else those that were computed. Where blocks were lost by then, the next
        request computes what is missing; if it could not, because input_embeddings stood for tokens, the cache stays as it was.
        """
        running = sequence.request
        tokens, before = list(sequence.tokens), running.before
        has_blocks = sequence.computed > cache.computed and (any(sequence.tables) or sequence.snapshot is not None)
        if len(tokens) == sequence.prompt_len:
            del tokens[max(before, sequence.computed if has_blocks else cache.computed) :]
        if running.request.embeddings is not None and len(tokens) > before:
            if not has_blocks and cache.computed <= before:  # else an interrupt came when the cache had the blocks already
                return
            tokens[before : sequence.prompt_len] = [-1] * (min(sequence.prompt_len, len(tokens)) - before)
            cache.exact = False
        if has_blocks:
            self._hold(cache, sequence)
        cache.tokens = tokens

    def forget(self, cache: PromptCache, tokens: int) -> None:
        """The caller has not seen the tokens from this one on: they are no part of the cache. (Unless a window gave back what comes
        before them and it cannot be computed again.)"""
        if tokens < cache.computed:
            layout = cache.held if cache.spilled is None else cache.spilled.layout
            if self._blocks.can_continue(layout, layout, tokens):
                self._truncate(cache, tokens)
            elif cache.exact:  # a window gave back what the next row would see: compute it all again
                self._blocks.release(cache.held)
                cache.spilled = None
            else:
                return
        del cache.tokens[tokens:]

    def save(self, sequence: Sequence) -> Snapshot:
        """The blocks of a sequence that cannot be computed again, before they are given back."""
        return self._read(sequence)

    def spill(self) -> bool:
        """Move what prompt caches hold to the host, the least recently used first, until a block is free that was not; False: none is."""
        for idle in (True, False):
            for tables, reference in list(self._held.values()):
                cache = reference()
                if tables.computed == 0 or (cache is not None and cache.in_use == idle):
                    continue
                before = self._blocks.free_counts()
                if cache is not None:
                    self._blocks.trim_windows(tables)  # so that the layout is what a sequence's will be
                    cache.spilled = HostBlocks(self._blocks.layout(tables, tables.computed), self._read(tables))
                self._blocks.release(tables)
                if self._blocks.free_counts() != before:
                    return True
        return False

    # ---- what the owner of a cache asks for ------------------------------------------------------------------------------------
    def check(self, cache: PromptCache) -> None:
        """From any thread: a loaded cache's elements become the KV cache's. Raises: ValueError for layers that are not this model's."""
        if len(cache) != len(self._layers):
            raise ValueError(f"the prompt cache has {len(cache)} layers, the model {len(self._layers)}; it was made for another model")
        if cache.loaded is None:
            return
        if cache.encoding != self._encoding:
            has, wants = (f"kv_scheme {text}" if text else "a kv_scheme of 'none'" for text in (cache.encoding, self._encoding))
            raise ValueError(f"the prompt cache was saved with {has}, and the model has {wants}; load the model with the same one")
        for i, (name, layer) in enumerate(zip(self._layers, cache.loaded, strict=True)):
            group = self._cache.planes[name].group
            shape = self._cache.groups[group].layers[name]
            got = (layer.keys.shape[0], layer.keys.shape[2], layer.values.shape[2])
            want = (shape.heads, _columns(shape.k_codec, shape.key_dim), _columns(shape.v_codec, shape.value_dim))
            if got != want:
                raise ValueError(
                    f"layer {i} of the prompt cache has (heads, key_dim, value_dim) {got}, the model {want}; it was made for another model"
                )
            lacking = (seen := self._seen(cache, group))[layer.places(seen) < 0]
            if lacking.size:
                raise ValueError(
                    f"layer {i} of the prompt cache lacks position {lacking[0]} of {layer.offset}, which the model's next row sees; it was "
                    "made for another model, or with another max_kv_size"
                )
        cache.loaded = [
            LayerState(_converted(x.keys, shape.k_codec), _converted(x.values, shape.v_codec), x.offset, x.max_size, x.keep)
            for x, shape in zip(cache.loaded, map(self._cache.shape, self._layers), strict=True)
        ]

    def truncate(self, cache: PromptCache, tokens: int) -> None:
        """Keep the first `tokens` tokens. Raises: ValueError when windows have given back what they would see, or a request has begun."""

        def cut() -> None:
            cache.refuse_in_use()  # another thread may have been faster
            self._truncate(cache, tokens)

        self._engine.exclusively(cut)

    def share(self, source: PromptCache, target: PromptCache) -> None:
        """`target`, an empty one, has what `source` has."""

        def fork() -> None:
            source.refuse_in_use()
            target.spilled = source.spilled
            if source.held.computed:
                target.held.window, target.held.keep = source.held.window, source.held.keep
                self._register(target)
                self._blocks.fork(source.held, target.held)

        self._engine.exclusively(fork)

    def export(self, cache: PromptCache) -> list[LayerState]:
        """What every layer holds of all tokens; of a window's positions, those that later rows see."""
        if cache.computed < len(cache.tokens):
            self._compute(cache)
        if cache.loaded is not None:
            return cache.loaded
        return self._engine.exclusively(lambda: self._states(cache))

    # ---- inner workings -------------------------------------------------------------------------------------------------------
    def _register(self, cache: PromptCache) -> None:
        """It is the one used last. At no time it is none: what an interrupt finds unregistered loses its blocks."""
        held = cache.held
        key = id(held)
        self._held[key] = (held, self._engine.watch(cache, partial(self._drop, held)))
        self._held.move_to_end(key)

    def _drop(self, held: BlockTables) -> None:
        """The cache is gone: take its blocks back."""
        if self._held.pop(id(held), None) is not None:
            self._blocks.release(held)

    def _hold(self, cache: PromptCache, sequence: Sequence) -> None:
        """The cache's contents are the sequence's now."""
        held = cache.held
        spilled = None
        if not any(sequence.tables):
            spilled = HostBlocks(self._blocks.layout(sequence, sequence.computed), sequence.snapshot)
        self._register(cache)
        if held.tables:
            self._blocks.release(held)
        held.window, held.keep = sequence.window, sequence.keep
        if spilled is None:
            self._blocks.fork(sequence, held)
        cache.spilled, cache.loaded = spilled, None

    def _truncate(self, cache: PromptCache, tokens: int) -> None:
        if cache.spilled is not None:
            old, blocks = cache.spilled.layout, cache.spilled.blocks
            new = self._blocks.layout(old, tokens)
            picked: Snapshot = []
            for group, layers in enumerate(blocks):
                kept = np.isin(old.live_indices(group), new.live_indices(group))
                picked.append({name: (k[kept], v[kept]) for name, (k, v) in layers.items()})
            cache.spilled = HostBlocks(new, picked)
            return
        held, shorter = cache.held, BlockTables(window=cache.held.window, keep=cache.held.keep)
        self._blocks.fork(held, shorter, tokens)
        self._blocks.release(held)
        self._blocks.fork(shorter, held)
        self._blocks.release(shorter)

    def _compute(self, cache: PromptCache) -> None:
        """Have the keys and values of its last tokens computed."""
        tokens, computed = list(cache.tokens), cache.computed
        del cache.tokens[computed:]
        try:
            with contextlib.closing(self._engine.submit(Request(tokens[computed:], max_tokens=1, prompt_cache=cache))) as stream:
                next(stream)
            cache.trim(1)
        finally:
            cache.settle()
            cache.tokens = tokens

    def _read(self, held: BlockTables) -> Snapshot:
        return [self._cache.read_blocks(group, self._blocks.filled(held, group)) for group in range(len(held.tables))]

    def _states(self, cache: PromptCache) -> list[LayerState]:
        if cache.spilled is not None:
            layout, snapshot = cache.spilled.layout, cache.spilled.blocks
        else:
            layout, snapshot = cache.held, self._read(cache.held)
        offset, keep, states = layout.computed, layout.keep, []
        for name, window in zip(self._layers, self.windows, strict=True):
            group = self._cache.planes[name].group
            size = layout.window or window
            rows = np.arange(offset) if size is None or offset <= size else np.r_[:keep, offset - size + keep : offset]
            there = _positions(layout, group)
            found = np.searchsorted(there, rows).clip(max=len(there) - 1)
            places = np.where(there[found] == rows, found, -1)  # a ring buffer's oldest row may be gone: its next token replaces it
            keys, values = from_blocks(snapshot[group][name], len(there))
            states.append(LayerState(_gather(keys, places), _gather(values, places), offset, size, keep))
        return states

    def _blocks_of(self, layers: list[LayerState], layout: BlockTables) -> Snapshot:
        """Whole layers as the blocks of a layout."""
        snapshot: Snapshot = [{} for _ in self._cache.groups]
        for name, layer in zip(self._layers, layers, strict=True):
            group = self._cache.planes[name].group
            places = layer.places(_positions(layout, group))
            snapshot[group][name] = to_blocks(_gather(layer.keys, places), _gather(layer.values, places))
        return snapshot

    def _seen(self, cache: PromptCache, group: int) -> np.ndarray:
        """The positions of a loaded cache that its next row sees in a group of layers."""
        positions, window = np.arange(cache.computed), self._cache.groups[group].window
        back = cache.computed - positions  # 1: the latest
        seen = np.ones(len(positions), bool) if window is None else back < window
        if cache.max_kv_size is not None:
            seen &= (positions < KEPT_POSITIONS) | (back < cache.max_kv_size - KEPT_POSITIONS)
        return positions[seen]


def _columns(codec: KVCodec, dim: int) -> int:
    """Columns of a LayerState's vectors."""
    return dim if codec.is_float else codec.vector_bytes(dim)


def _converted(array: np.ndarray, codec: KVCodec) -> np.ndarray:
    """Floats as a plane of `codec` stores them; others are bytes already."""
    if not codec.is_float or array.dtype == STORED[codec.name]:
        return array
    cast = to_mlx(array).astype(MLX_DTYPES[codec.name])
    return np.array(cast.view(mx.uint16) if codec.name == "bfloat16" else cast)


def _positions(layout: BlockTables, group: int) -> np.ndarray:
    """The positions in a layout's live blocks, the last block's up to its end."""
    blocks = np.array(layout.live_indices(group), np.int64)
    blocks = blocks[blocks * BLOCK_SIZE < layout.computed]
    return (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)


def _gather(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """rows[:, places] with zeros where a place is -1."""
    found: np.ndarray = rows[:, places]
    found[:, places < 0] = 0
    return found
