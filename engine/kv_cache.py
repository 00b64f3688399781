"""The paged KV cache: one pair of planes per layer, blocks handed to sequences and taken back."""
from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from metalstep.capture.graph import Graph
from metalstep.kernels import params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.native import NativeDevice
from metalstep.plan.bindings import KVPlanes

BLOCK_SIZE = 16  # tokens in a KV block
DTYPES = {  # name: ms_dtype, bytes of an element
    "float16": (params.MS_FLOAT16, 2),
    "bfloat16": (params.MS_BFLOAT16, 2),
    "float32": (params.MS_FLOAT32, 4),
}


class OutOfBlocksError(RuntimeError):
    """No free KV block is left."""


@dataclass
class Sequence:
    """One sequence's place in the cache. blocks: its blocks in order; length: tokens written."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0

    def slot(self, position: int) -> int:
        """Where the token at `position` lies: block * BLOCK_SIZE + place in the block."""
        return self.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def slots(self, first: int, count: int) -> np.ndarray:
        """The places of `count` tokens from position `first`, int32."""
        positions = np.arange(first, first + count, dtype=np.int32)
        return np.asarray(self.blocks, np.int32)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


class PagedKVCache:
    """Planes for every attention layer of `graph`, `num_blocks` blocks each, allocated on `device`.

    dtype: float16, bfloat16 or float32. Memory is committed when a block is first written.
    """

    def __init__(self, device: NativeDevice, graph: Graph, num_blocks: int, dtype: str):
        if dtype not in DTYPES:
            raise ValueError(f"kv_dtype is {dtype!r}, expected one of {sorted(DTYPES)}")
        code, size = DTYPES[dtype]
        self.num_blocks = num_blocks
        self.planes: dict[object, KVPlanes] = {}
        self.bytes_per_token = 0
        for layer, (heads, key_dim, value_dim) in kv_layers(graph).items():
            shapes = [(num_blocks, heads, key_dim, BLOCK_SIZE), (num_blocks, heads, BLOCK_SIZE, value_dim)]
            regions = []
            for shape in shapes:
                owner = device.create_buffer(int(np.prod(shape)) * size)
                regions.append(Buffer(owner.handle, 0, shape, dtype))
            self.planes[layer] = KVPlanes(regions[0], regions[1], BLOCK_SIZE, code)
            self.bytes_per_token += heads * (key_dim + value_dim) * size
        self._lock = threading.Lock()  # sequences of several threads take blocks from here
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Give `sequence` blocks for `tokens` tokens in all.

        Raises: OutOfBlocksError, with nothing taken, when too few are free.
        """
        with self._lock:
            needed = -(-tokens // BLOCK_SIZE) - len(sequence.blocks)
            if needed > len(self._free):
                raise OutOfBlocksError(
                    f"the KV cache has {len(self._free)} free blocks of {BLOCK_SIZE} tokens and the sequence needs {needed} more; "
                    "finish another generation first, or load with a larger max_context"
                )
            for _ in range(needed):
                sequence.blocks.append(self._free.pop())

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back."""
        with self._lock:
            self._free.extend(reversed(sequence.blocks))
            sequence.blocks.clear()
            sequence.length = 0


def kv_layers(graph: Graph) -> dict[object, tuple[int, int, int]]:
    """Per layer of a captured graph: KV heads, elements of a key, elements of a value."""
    layers: dict[object, tuple[int, int, int]] = {}
    for node in graph.nodes:
        for part in node.attrs.get("body", [node]):
            if part.op == "kv_write":
                keys, values = part.inputs[:2]
                layers[part.attrs["layer"]] = (keys.shape[1], keys.shape[3], values.shape[3])
    return layers
