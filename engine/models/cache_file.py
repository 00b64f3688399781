"""Prompt caches on disk: mlx-lm's .safetensors layout, with the tokens among the metadata."""
from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

SUFFIX = ".safetensors"
OWN = "metalstep"  # our entry among the metadata
STATES = {"KVCache": 3, "RotatingKVCache": 6}  # mlx-lm's classes and the length of their state
ENCODED = "Metalstep"  # before the class of a layer that is encoded, so that mlx-lm does not take its bytes for numbers
KEPT_POSITIONS = 4  # first positions that max_kv_size keeps, as mlx-lm does


class CacheFileError(ValueError):
    """A file is no prompt cache that can be used."""


@dataclass(frozen=True)
class LayerState:
    """What one layer holds. keys [heads, rows, key_dim], values [heads, rows, value_dim]: float16, float32, or uint16 for bfloat16; where
    they are encoded [heads, rows, bytes of a vector] uint8.

    Rows are in order of position: all `offset` of them, or the first `keep` and the last ones. max_size: positions that a row sees.
    """

    keys: np.ndarray
    values: np.ndarray
    offset: int
    max_size: int | None = None
    keep: int = 0

    @property
    def is_whole(self) -> bool:
        return self.rows == self.offset

    @property
    def rows(self) -> int:
        return int(self.keys.shape[1])

    def places(self, positions: np.ndarray) -> np.ndarray:
        """The row of each position, -1 where it is not there."""
        missing = self.offset - self.rows  # positions between the kept ones and the last ones
        places = np.where(positions < self.keep, positions, positions - missing) if missing else positions
        there = (positions < self.offset) & ((positions < self.keep) | (places >= self.keep) | (missing == 0))
        return np.where(there, places, -1)

    def cut(self, tokens: int) -> LayerState:
        """The first `tokens` tokens of a whole layer."""
        return LayerState(self.keys[:, :tokens], self.values[:, :tokens], tokens, self.max_size, self.keep)


@dataclass
class CacheFile:
    """layers, max_sizes: per layer; an empty cache has None for each layer. tokens: -1 where the file does not say. encoding: how the
    layers are encoded (CacheKeeper.encoding), "" for floats."""

    layers: list[LayerState | None]
    max_sizes: list[int | None]
    tokens: list[int]
    max_kv_size: int | None
    metadata: dict[str, str]
    encoding: str = ""


def mlx_state(layer: LayerState | None, max_size: int | None, keep: int) -> tuple[Any, ...]:
    """The state of mlx-lm's KVCache, or of its RotatingKVCache where there is a max_size, for one layer."""
    if layer is None:
        return (None, None, 0) if max_size is None else (None, None, 0, keep, max_size, 0)
    arrays = to_mlx(layer.keys)[None], to_mlx(layer.values)[None]
    return (*arrays, layer.offset) if max_size is None else (*arrays, layer.offset, keep, max_size, layer.rows)


def write_cache(
    path: str,
    states: list[tuple[Any, ...]],
    tokens: list[int],
    max_kv_size: int | None,
    metadata: dict[str, str],
    encoding: str = "",
) -> None:
    """states: mlx_state of each layer. encoding: see CacheFile. Who reads meanwhile, or behind a failure, has the file from before.

    Raises: ValueError for metadata that is not text; OSError for a file that cannot be written, or a disk that is full.
    """
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str) or key == OWN or "." in key:  # mlx-lm's files nest names by dots
            raise ValueError(f"metadata has {key!r}: {text!r:.40}, expected text by name, no name with a dot, and not {OWN!r}")
    arrays: dict[str, mx.array] = {}
    others: list[Any] = [""]  # what is no array: mlx-lm's list begins with an empty entry
    flat: Any = tree_flatten(states)
    for name, value in flat:
        if not isinstance(value, mx.array):
            others.append((name, "none" if value is None else "scalar"))
        arrays[name] = mx.array([]) if value is None else mx.array(value)
    own = json.dumps({"tokens": tokens, "max_kv_size": max_kv_size, **({"encoding": encoding} if encoding else {})})
    classes = [(ENCODED if encoding else "") + next(name for name, length in STATES.items() if length == len(state)) for state in states]
    file = os.path.realpath(path if path.endswith(SUFFIX) else path + SUFFIX)  # as MLX names it
    unfinished = f"{file}.{os.getpid()}.new{SUFFIX}"
    try:
        mx.save_safetensors(unfinished, arrays, dict(tree_flatten([{**metadata, OWN: own}, classes, others])))
        os.replace(unfinished, file)
    except RuntimeError as error:  # MLX's only kind
        raise OSError(f"{file}: the prompt cache cannot be written: {error}; a file from before is as it was") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)


def read_cache(path: str) -> CacheFile:
    """Raises: CacheFileError naming the file and what is wrong with it."""
    try:
        loaded: Any = mx.load(path, return_metadata=True)
        arrays, header = loaded
        metadata, classes, others = tree_unflatten(list(header.items()))
        kinds = dict(others[1:])
        names: dict[str, dict[int, Any]] = {name.partition(".")[0]: {} for name in arrays}
        for name, array in arrays.items():
            layer, _, part = name.partition(".")
            kind = kinds.get(name)
            names[layer][int(part)] = None if kind == "none" else array.item() if kind == "scalar" else array
        states = [names[str(i)] for i in range(len(classes))]
    except Exception as error:  # MLX raises several kinds for a missing file and a foreign one
        raise CacheFileError(f"{path}: not a prompt cache: {error}; expected a file that save_prompt_cache wrote") from None
    classes = [name.removeprefix(ENCODED) for name in classes]
    for name in classes:
        if name not in STATES:
            raise CacheFileError(f"{path}: it holds {name}, expected layers of {' or '.join(STATES)}; only plain caches can be loaded")
    layers = [_layer(path, i, state, name) for i, (state, name) in enumerate(zip(states, classes, strict=True))]
    sizes = [_max_size(state, name) for state, name in zip(states, classes, strict=True)]
    length = layers[0].offset if layers and layers[0] else 0
    metadata = metadata if isinstance(metadata, dict) else {}
    try:
        own = json.loads(metadata.pop(OWN, "{}"))
        tokens = [int(token) for token in own.get("tokens", [-1] * length)]
        keeps = {size for size, keep in sizes if keep == KEPT_POSITIONS}  # what max_kv_size makes; windows keep nothing
        max_kv_size = own.get("max_kv_size", keeps.pop() if len(keeps) == 1 else None)
        check_max_kv_size(max_kv_size)
        encoding = str(own.get("encoding", ""))
        if min(tokens, default=0) < -1:
            raise ValueError(f"id {min(tokens)}")
    except (ValueError, TypeError, AttributeError) as error:
        raise CacheFileError(f"{path}: its tokens or max_kv_size cannot be read: {error}") from None
    offsets = {layer.offset if layer else 0 for layer in layers}
    if offsets - {length} or len(tokens) != length:
        raise CacheFileError(f"{path}: it has {len(tokens)} token ids for layers of {sorted(offsets)} tokens, expected one number")
    max_sizes = [size for size, _ in sizes]
    return CacheFile(layers if length else [None] * len(layers), max_sizes, tokens, max_kv_size, metadata, encoding)


def check_max_kv_size(value: object) -> None:
    """Raises: ValueError for anything but None and an integer above the number of kept positions."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not KEPT_POSITIONS < value < 2**31):
        raise ValueError(f"max_kv_size is {value!r}, expected None or an integer above {KEPT_POSITIONS}")


def to_mlx(array: np.ndarray) -> mx.array:
    """Stored elements as MLX sees them: bfloat16 is stored as uint16."""
    return mx.array(array).view(mx.bfloat16) if array.dtype == np.uint16 else mx.array(array)


def _layer(path: str, index: int, state: dict[int, Any], name: str) -> LayerState | None:
    parts: list[Any] = [state.get(i) for i in range(STATES[name])]
    if parts[0] is None and parts[1] is None:
        return None
    shapes = [tuple(getattr(part, "shape", ())) for part in parts[:2]]
    if any(len(s) != 4 or s[0] != 1 for s in shapes) or shapes[0][:3] != shapes[1][:3]:
        raise CacheFileError(f"{path}: layer {index} has arrays of shapes {shapes}, expected keys and values [1, heads, tokens, dim]")
    counts = parts[2:]
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        raise CacheFileError(f"{path}: layer {index} has the numbers {counts}, expected counts of tokens")
    keys, values = (_stored(part[0]) for part in parts[:2])
    rows = keys.shape[1]
    if name == "KVCache":
        offset = counts[0]
        if offset > rows:
            raise CacheFileError(f"{path}: layer {index} has {rows} rows for {offset} tokens, expected no fewer rows")
        return LayerState(keys[:, :offset], values[:, :offset], offset)
    offset, keep, max_size, place = counts
    turned = place < min(offset, rows)
    if not keep < max_size or place > rows or (turned and (rows < max_size or place < keep)) or (not turned and place > offset):
        raise CacheFileError(
            f"{path}: layer {index} has {rows} rows and the numbers (offset, keep, max_size, place) {tuple(counts)}, expected those of a "
            "ring buffer"
        )
    order = np.r_[:keep, place:rows, keep:place] if turned else np.arange(place)  # turned: the oldest row is at `place`
    return LayerState(keys[:, order], values[:, order], offset, max_size, keep)


def _max_size(state: dict[int, Any], name: str) -> tuple[int | None, int]:
    """(max_size, keep) of a layer."""
    return (None, 0) if name == "KVCache" else (state.get(4), state.get(3) or 0)


def _stored(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16)) if array.dtype == mx.bfloat16 else np.array(array)
