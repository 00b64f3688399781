"""The paged KV cache on a device: a pair of planes per layer, in groups of layers that share their block tables."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from metalstep.capture.graph import Graph
from metalstep.kernels import params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice
from metalstep.plan.bindings import KVPlanes

BLOCK_SIZE = 16  # tokens in a KV block
DTYPES: dict[str, tuple[int, np.dtype]] = {  # name: ms_dtype, numpy's dtype of what is stored
    "float16": (params.MS_FLOAT16, np.dtype(np.float16)),
    "bfloat16": (params.MS_BFLOAT16, np.dtype(np.uint16)),
    "float32": (params.MS_FLOAT32, np.dtype(np.float32)),
}


LayerBlocks = tuple[np.ndarray, np.ndarray]  # keys [blocks, heads, key_dim, BLOCK_SIZE], values [blocks, heads, BLOCK_SIZE, value_dim]


@dataclass(frozen=True)
class LayerShape:
    """What one token keeps in a layer: kv heads, elements of a key, elements of a value."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose rows see the same positions and that therefore share block tables. window: in positions; None: all."""

    window: int | None
    layers: dict[object, LayerShape]

    def token_bytes(self, dtype: str) -> int:
        return sum(shape.elements for shape in self.layers.values()) * DTYPES[dtype][1].itemsize


class PagedKVCache:
    """Planes for the layers of `groups`, num_blocks[i] blocks for each layer of the i-th group.

    dtype: float16, bfloat16 or float32. keys_by_token: how the device wants key planes, see Target. one_pool: block numbers are unique
    over all groups, whose layers share planes then (the first of each group has one pair, the second another). Memory is committed when
    a block is first written. Which blocks are whose is not known here.
    """

    def __init__(
        self,
        device: NativeDevice,
        groups: list[CacheGroup],
        num_blocks: list[int],
        dtype: str,
        *,
        keys_by_token: bool = False,
        one_pool: bool = False,
    ):
        code, stored = DTYPES[dtype]
        self.groups = groups
        self.dtype = dtype
        self.planes: dict[object, KVPlanes] = {}
        self._views: dict[object, tuple[np.ndarray, np.ndarray]] = {}
        made: dict[tuple[LayerShape, int], object] = {}  # shape, place in its group: the layer whose planes they are
        for index, (group, count) in enumerate(zip(groups, num_blocks, strict=True)):
            for place, (layer, shape) in enumerate(group.layers.items()):
                owner = made.setdefault((shape, place), layer) if one_pool else layer
                if owner != layer:
                    self.planes[layer] = replace(self.planes[owner], group=index)
                    self._views[layer] = self._views[owner]
                    continue
                k_axes = (BLOCK_SIZE, shape.key_dim) if keys_by_token else (shape.key_dim, BLOCK_SIZE)
                k_shape = (count, shape.heads, *k_axes)
                v_shape = (count, shape.heads, BLOCK_SIZE, shape.value_dim)
                owners = [device.create_buffer(math.prod(s) * stored.itemsize) for s in (k_shape, v_shape)]
                k, v = (Buffer(o.handle, 0, s, dtype) for o, s in zip(owners, (k_shape, v_shape), strict=True))
                self.planes[layer] = KVPlanes(k, v, BLOCK_SIZE, code, index)
                keys = owners[0].numpy(stored, k_shape)
                # Whatever the plane's order, what is read and written is LayerBlocks.
                self._views[layer] = (keys.swapaxes(2, 3) if keys_by_token else keys, owners[1].numpy(stored, v_shape))

    @property
    def bytes_per_token(self) -> int:
        return sum(group.token_bytes(self.dtype) for group in self.groups)

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy one block in every layer of a group. No step may be in flight."""
        for layer in self.groups[group].layers:
            for plane in self._views[layer]:
                plane[target] = plane[source]

    def read_blocks(self, group: int, blocks: list[int]) -> dict[object, LayerBlocks]:
        """Copies of a group's blocks, per layer. No step may be in flight."""
        return {layer: tuple(plane[blocks] for plane in self._views[layer]) for layer in self.groups[group].layers}  # type: ignore[misc]

    def write_blocks(self, blocks: list[int], layers: dict[object, LayerBlocks]) -> None:
        """What `read_blocks` gave, into these blocks."""
        for layer, arrays in layers.items():
            for plane, array in zip(self._views[layer], arrays, strict=True):
                plane[blocks] = array


def to_blocks(keys: np.ndarray, values: np.ndarray) -> LayerBlocks:
    """Keys [heads, tokens, key_dim] and values [heads, tokens, value_dim] as blocks lie in the planes, the last one padded with zeros."""
    heads, tokens, _ = keys.shape
    count = -(-tokens // BLOCK_SIZE)
    padding = [(0, 0), (0, count * BLOCK_SIZE - tokens), (0, 0)]
    k = np.pad(keys, padding).reshape(heads, count, BLOCK_SIZE, -1).transpose(1, 0, 3, 2)
    v = np.pad(values, padding).reshape(heads, count, BLOCK_SIZE, -1).transpose(1, 0, 2, 3)
    return k, v


def from_blocks(blocks: LayerBlocks, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `to_blocks`."""
    k, v = blocks
    count, heads, key_dim, size = k.shape
    keys = k.transpose(1, 0, 3, 2).reshape(heads, count * size, key_dim)
    values = v.transpose(1, 0, 2, 3).reshape(heads, count * size, -1)
    return np.ascontiguousarray(keys[:, :tokens]), np.ascontiguousarray(values[:, :tokens])


def cache_groups(graph: Graph) -> list[CacheGroup]:
    """The groups of a captured graph: layers without a window first, then by window, widest first."""
    shapes: dict[object, LayerShape] = {}
    windows: dict[object, int] = {}  # 0: a reader sees everything
    for node in graph.nodes:
        for part in node.attrs.get("body", [node]):
            if part.op == "kv_write":
                keys, values = part.inputs[:2]
                shapes[part.attrs["layer"]] = LayerShape(keys.shape[1], keys.shape[3], values.shape[3])
            elif part.op == "attention":  # several may read one layer's cache
                layer, window = part.attrs["layer"], part.attrs.get("window") or 0
                windows[layer] = 0 if window == 0 or windows.get(layer, 1) == 0 else max(window, windows.get(layer, 0))
    groups: dict[int, dict[object, LayerShape]] = {}
    for layer, shape in shapes.items():
        groups.setdefault(windows.get(layer, 0), {})[layer] = shape
    ordered = sorted(groups, key=lambda window: (window != 0, -window))
    return [CacheGroup(window or None, groups[window]) for window in ordered]


@dataclass(frozen=True)
class CacheCapacity:
    """num_blocks: per group. tokens: of one sequence that fit."""

    num_blocks: list[int]
    tokens: int


def cache_capacity(
    groups: list[CacheGroup], dtype: str, *, budget: int, context: int, max_seqs: int, chunk: int
) -> CacheCapacity:
    """Divide `budget` bytes: as many blocks as `max_seqs` sequences of `context` tokens could use, or what fits.

    A group with a window needs blocks for the window and a step's chunk of rows only, and gets its full share before the others grow.
    """
    most = -(-context // BLOCK_SIZE)
    windowed = [
        None if group.window is None else min(most, -(-(group.window + chunk) // BLOCK_SIZE) + 1) for group in groups
    ]
    block_bytes = [group.token_bytes(dtype) * BLOCK_SIZE for group in groups]

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
