"""The paged KV cache on a device: a pair of planes per layer, in groups of layers that share their block tables."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from metalstep.capture.graph import Graph
from metalstep.kernels.kv_codec import KVCodec
from metalstep.kernels.native import NativeDevice
from metalstep.kv_plane import BLOCK_SIZE, Plane
from metalstep.kv_scheme import KVScheme
from metalstep.plan.bindings import KVPlanes
from metalstep.plan.row_compiler import named_inputs

FLOAT16 = KVCodec("float16")

LayerBlocks = tuple[np.ndarray, np.ndarray]  # keys and values, as Plane.read has them


@dataclass(frozen=True)
class LayerShape:
    """What one token keeps in a layer: kv heads, elements of a key, elements of a value, and how they are stored.

    shiftable: a constant that is added to every key changes no result, as softmax does not see it.
    """

    heads: int
    key_dim: int
    value_dim: int
    k_codec: KVCodec = FLOAT16
    v_codec: KVCodec = FLOAT16
    shiftable: bool = True

    @property
    def token_bytes(self) -> int:
        return self.heads * (self.k_codec.vector_bytes(self.key_dim) + self.v_codec.vector_bytes(self.value_dim))


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose rows see the same positions and that therefore share block tables. window: in positions; None: all."""

    window: int | None
    layers: dict[object, LayerShape]

    @property
    def token_bytes(self) -> int:
        return sum(shape.token_bytes for shape in self.layers.values())


class PagedKVCache:
    """Planes for the layers of `groups`, num_blocks[i] blocks for each layer of the i-th group.

    keys_by_token: how the device wants key planes, see Target. one_pool: block numbers are unique over all groups, whose layers share
    planes then: of those that store alike, the first of each group has one pair, the second another. Memory is committed when a block is
    first written. Which blocks are whose is not known here. key_means: see with_scheme.
    """

    def __init__(
        self,
        device: NativeDevice,
        groups: list[CacheGroup],
        num_blocks: list[int],
        *,
        keys_by_token: bool = False,
        one_pool: bool = False,
        key_means: Mapping[object, np.ndarray] | None = None,
    ):
        self.groups = groups
        self.planes: dict[object, KVPlanes] = {}
        self._views: dict[object, tuple[Plane, Plane]] = {}
        made: dict[tuple[LayerShape, int], object] = {}  # what is stored, its place among such: whose planes they are
        for index, (group, count) in enumerate(zip(groups, num_blocks, strict=True)):
            places: Counter[LayerShape] = Counter()
            for layer, shape in group.layers.items():
                stored = replace(shape, shiftable=True)
                owner = made.setdefault((stored, places[stored]), layer) if one_pool else layer
                places[stored] += 1
                if owner == layer:
                    k = Plane(device, count, shape.heads, shape.key_dim, shape.k_codec, by_token=keys_by_token)
                    v = Plane(device, count, shape.heads, shape.value_dim, shape.v_codec, by_token=True)
                    self._views[layer] = k, v
                else:
                    k, v = self._views[layer] = self._views[owner]
                mean = (key_means or {}).get(layer)
                self.planes[layer] = KVPlanes(k.buffer, v.buffer, shape.heads, BLOCK_SIZE, shape.k_codec, shape.v_codec, index, mean)

    @property
    def bytes_per_token(self) -> int:
        return sum(group.token_bytes for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Of all planes, as they were asked of the device."""
        return sum(plane.buffer.nbytes for plane in {id(plane): plane for views in self._views.values() for plane in views}.values())

    def shape(self, layer: object) -> LayerShape:
        return self.groups[self.planes[layer].group].layers[layer]

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy one block in every layer of a group. No step may be in flight."""
        for layer in self.groups[group].layers:
            for plane in self._views[layer]:
                plane.copy(source, target)

    def read_blocks(self, group: int, blocks: list[int]) -> dict[object, LayerBlocks]:
        """Copies of a group's blocks, per layer. No step may be in flight."""
        return {layer: (k.read(blocks), v.read(blocks)) for layer in self.groups[group].layers for k, v in [self._views[layer]]}

    def write_blocks(self, blocks: list[int], layers: dict[object, LayerBlocks]) -> None:
        """What `read_blocks` gave, into these blocks."""
        for layer, arrays in layers.items():
            for plane, array in zip(self._views[layer], arrays, strict=True):
                plane.write(blocks, array)


def to_blocks(keys: np.ndarray, values: np.ndarray) -> LayerBlocks:
    """Keys [heads, tokens, key_dim] and values [heads, tokens, value_dim] by blocks, the last one padded with zeros."""
    return _by_block(keys), _by_block(values)


def _by_block(vectors: np.ndarray) -> np.ndarray:
    heads, tokens, _ = vectors.shape
    count = -(-tokens // BLOCK_SIZE)
    padded = np.pad(vectors, [(0, 0), (0, count * BLOCK_SIZE - tokens), (0, 0)])
    return padded.reshape(heads, count, BLOCK_SIZE, -1).swapaxes(0, 1)


def from_blocks(blocks: LayerBlocks, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `to_blocks`."""
    k, v = (part.swapaxes(0, 1).reshape(part.shape[1], -1, part.shape[3])[:, :tokens] for part in blocks)
    return np.ascontiguousarray(k), np.ascontiguousarray(v)


def layer_order(layers: Iterable[object]) -> list[object]:
    """Layers of a KV cache as the model has them."""
    return sorted(layers, key=lambda layer: layer if isinstance(layer, tuple) else (layer,))


class SchemeError(ValueError):
    """A model's heads do not fit a scheme."""


def with_scheme(groups: list[CacheGroup], scheme: KVScheme) -> list[CacheGroup]:
    """`groups` with the scheme's codecs. Raises: SchemeError naming the layer that has heads which a codec does not take."""
    order = layer_order(layer for group in groups for layer in group.layers)
    codecs = dict(zip(order, scheme.layer_codecs(len(order)), strict=True))

    def encoded(layer: object, shape: LayerShape) -> LayerShape:
        k, v = codecs[layer]
        try:
            k.check_dim(shape.key_dim)
            v.check_dim(shape.value_dim)
        except ValueError as error:
            raise SchemeError(f"kv_scheme is {scheme.name!r}: layer {layer}: {error}; load with another kv_scheme, or 'none'") from None
        return replace(shape, k_codec=k, v_codec=v)

    return [CacheGroup(group.window, {layer: encoded(layer, shape) for layer, shape in group.layers.items()}) for group in groups]


def cache_groups(graph: Graph) -> list[CacheGroup]:
    """The groups of a captured graph: layers without a window first, then by window, widest first."""
    shapes: dict[object, LayerShape] = {}
    windows: dict[object, int] = {}  # 0: a reader sees everything
    fixed: set[object] = set()  # a reader's scores are not seen by a softmax alone
    for node in graph.nodes:
        for part in node.attrs.get("body", [node]):
            if part.op == "kv_write":
                keys, values = part.inputs[:2]
                shapes[part.attrs["layer"]] = LayerShape(keys.shape[1], keys.shape[3], values.shape[3])
            elif part.op == "attention":  # several may read one layer's cache
                layer, window = part.attrs["layer"], part.attrs.get("window") or 0
                if part.attrs.get("softcap") or "sinks" in named_inputs(part):
                    fixed.add(layer)
                windows[layer] = 0 if window == 0 or windows.get(layer, 1) == 0 else max(window, windows.get(layer, 0))
    groups: dict[int, dict[object, LayerShape]] = {}
    for layer, shape in shapes.items():
        groups.setdefault(windows.get(layer, 0), {})[layer] = replace(shape, shiftable=layer not in fixed)
    ordered = sorted(groups, key=lambda window: (window != 0, -window))
    return [CacheGroup(window or None, groups[window]) for window in ordered]


@dataclass(frozen=True)
class CacheCapacity:
    """num_blocks: per group. tokens: of one sequence that fit."""

    num_blocks: list[int]
    tokens: int


def cache_capacity(
    groups: list[CacheGroup], *, budget: int, context: int, max_seqs: int, chunk: int
) -> CacheCapacity:
    """Divide `budget` bytes: as many blocks as `max_seqs` sequences of `context` tokens could use, or what fits.

    A group with a window needs blocks for the window and a step's chunk of rows only, and gets its full share before the others grow.
    """
    most = -(-context // BLOCK_SIZE)
    windowed = [
        None if group.window is None else min(most, -(-(group.window + chunk) // BLOCK_SIZE) + 1) for group in groups
    ]
    block_bytes = [group.token_bytes * BLOCK_SIZE for group in groups]

    def counts(full: int, seqs: int) -> list[int]:
        return [full if need is None else min(need * seqs, max(full, need)) for need in windowed]

    def cost(full: int, seqs: int) -> int:
        return sum(n * b for n, b in zip(counts(full, seqs), block_bytes, strict=True))

    low, high = 0, most * max_seqs  # blocks of a group without a window; those with one follow
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle, max_seqs) <= budget:
            low = middle
        else:
            high = middle - 1
    num_blocks = counts(low, max_seqs)
    whole = [n for n, need in zip(num_blocks, windowed, strict=True) if need is None]
    tokens = min([context, *(n * BLOCK_SIZE for n in whole)])
    if not whole and low < min(need for need in windowed if need is not None):
        tokens = low * BLOCK_SIZE
    return CacheCapacity(num_blocks, tokens)
