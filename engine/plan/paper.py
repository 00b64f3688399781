"""Plans on paper: a graph lowered for a target without its device. Buffers are counted, weights known by their shape alone."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import DTypeLike

from metalstep.capture import CapturedModel, CaptureError
from metalstep.capture.passes.kinds import row_size
from metalstep.checkpoint import Tensor, blocks
from metalstep.checkpoint.tensors import ITEM_SIZES
from metalstep.kernels import params
from metalstep.kernels.launch import Buffer
from metalstep.kernels.linear import PackedWeight
from metalstep.kernels.native import DeviceBuffer, DeviceInfo, NativeDevice
from metalstep.kv_cache import CacheGroup, PagedKVCache, cache_groups, with_scheme
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.kv_scheme import PLAIN, KVScheme
from metalstep.plan.lower import LoweredLaunch, lower
from metalstep.plan.step_arrays import StepArrays
from metalstep.plan.step_memory import StepMemory
from metalstep.plan.target import PlanShape, Target
from metalstep.plan.weights import CHUNK, DTYPES, WeightStore, quantised_planes

ANY_ROWS = (7, 5)  # tokens and sampled rows of a graph: a lowered graph's rows are data


class PaperDevice:
    """A device in name. Buffers have handles and sizes, and there is nothing behind them. nbytes: of all buffers."""

    unified = False

    def __init__(self, name: str):
        self.kind = name
        self.info = DeviceInfo(f"{name} (on paper)", "", 0, 0)
        self.nbytes = 0
        self._handles = 0

    def create_buffer(self, nbytes: int, *, shared: bool = True) -> DeviceBuffer:
        self._handles += 1
        self.nbytes += nbytes
        return DeviceBuffer(self._handles, nbytes, cast(NativeDevice, self), shared)

    def view(self, handle: int, dtype: DTypeLike, shape: Sequence[int], offset: int = 0) -> np.ndarray:
        """Zeros, which take no memory."""
        return np.zeros(tuple(shape), dtype)


class PaperWeights(WeightStore):
    """As the GPUs' store, with places and sizes alone: no byte of a weight is read.

    prepared: shapes of weights that are computed from others.
    """

    def __init__(self, device: NativeDevice, tensors: Mapping[str, Tensor], prepared: Mapping[str, tuple[int, ...]]):
        self.handles: set[int] = set()
        self._shapes = prepared
        super().__init__(device, tensors, {})

    def array(self, name: str) -> np.ndarray:
        """Ones. Only numbers of one element are asked for, and none of them changes a launch."""
        return np.ones(self._shape(name), np.float32)

    def vector(self, name: str) -> Buffer:
        if name not in self._vectors:
            self._vectors[name] = self._region(self._shape(name))
        return self._vectors[name]

    def constant(self, values: np.ndarray) -> Buffer:
        return self._region(np.shape(values))

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        return self._tensor(name).parameter_shape

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CaptureError(f"the model uses a weight {name!r} that the checkpoint does not have")
        return self._tensors[name]

    def _region(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        size = Buffer(0, 0, tuple(shape), dtype).nbytes
        owner, offset = self._reserve(size)
        self.handles.add(owner.handle)
        return Buffer(owner.handle, offset, tuple(shape), dtype)

    def _bytes(self, nbytes: int) -> Buffer:
        return self._region((nbytes,), "uint8")

    def _arena_bytes(self) -> int:
        return CHUNK

    def _pack(self, name: str, n: int, k: int, bits: int, group_size: int, first: int) -> PackedWeight:
        if name in self._shapes:
            return PackedWeight(self._bytes(n * k * 4), n, k, 32, 0, params.MS_FLOAT32)
        tensor = self._tensor(name)
        if tensor.format is not None:  # scales that need float32 are not told from those that fit float16 without reading them
            bits, group_size, dtype = blocks.FORMATS[tensor.format].bits, blocks.GROUP_SIZE, tensor.dtype
        elif tensor.dtype == "uint32":
            code, planes = quantised_planes(self._tensors, name, bits, group_size)
            sizes = [n * k * bits // 8, *(n * (k // group_size) * ITEM_SIZES[t.dtype] for t in planes.values())]
            return PackedWeight(self._bytes(sizes[0]), n, k, bits, group_size, code, *map(self._bytes, sizes[1:]))
        else:
            bits, group_size, dtype = 32 if tensor.dtype == "float32" else 16, 0, tensor.dtype
        if dtype not in DTYPES:
            raise CaptureError(f"{name} is {dtype}; a linear weight is float32, float16, bfloat16 or packed uint32")
        if not group_size:
            return PackedWeight(self._bytes(n * k * bits // 8), n, k, bits, 0, DTYPES[dtype])
        scales = n * (k // group_size) * (4 if dtype == "float32" else 2)
        words, *affine = (self._bytes(size) for size in (n * k * bits // 8, scales, scales))
        return PackedWeight(words, n, k, bits, group_size, DTYPES[dtype], *affine)


@dataclass(frozen=True)
class PaperPlan:
    """A lowered plan and whose its buffers are.

    launches: in order. arena_bytes: as on the device. kv_bytes_per_token: of all layers. arena, weights, planes: handles of buffers; the
    rest are the step's arrays and scratch memory. planes: by handle, bytes of one position of a layer's keys or values.
    """

    shape: PlanShape
    launches: list[LoweredLaunch]
    arena_bytes: int
    kv_bytes_per_token: int
    arena: int
    weights: frozenset[int]
    planes: Mapping[int, int]
    groups: list[CacheGroup]


def paper_plan(
    captured: CapturedModel, tensors: Mapping[str, Tensor], target: Target, *, rows: int, context: int, scheme: KVScheme = PLAIN
) -> PaperPlan:
    """The plan for decode steps of `rows` sequences of up to `context` tokens each, as `target` makes it; nothing is allocated.

    tensors: by mlx-lm parameter name; their shapes and dtypes are read. scheme: of the cache.
    Raises: CaptureError naming an operation that has no kernel; ValueError for heads that the scheme does not take.
    """
    # native_model explains its plans, so it imports what imports this module.
    from metalstep.native_model import MAX_SEQS, embedding_size, step_sizes

    graph = captured.graph(*ANY_ROWS)
    groups = cache_groups(graph)
    if not groups:
        raise CaptureError("a model without attention layers, whose state is not a KV cache")
    groups = with_scheme(groups, scheme)
    device = cast(NativeDevice, PaperDevice("metal"))
    prepared = {v.name: v.shape for node in graph.prepare for v in node.outputs if v.kind == "weight" and v.name}
    weights = PaperWeights(device, tensors, prepared)
    num_blocks = [-(-context // BLOCK_SIZE) * rows for _ in groups]
    cache = PagedKVCache(device, groups, num_blocks, keys_by_token=target.keys_by_token)
    vocab_size = row_size(graph.outputs[0])
    sizes = step_sizes(MAX_SEQS, len(groups), context, vocab_size, rows=target.max_rows, hidden_size=embedding_size(graph))
    arrays = StepArrays(device, sizes)
    shape = target.plan_shape(rows, decode=True, context=context)
    lowered = lower(captured.graph(*ANY_ROWS, target.fusion(shape)), StepMemory(device), weights, cache.planes, arrays, shape, target)
    positions = num_blocks[0] * BLOCK_SIZE
    planes = {plane.handle: plane.nbytes // positions for layer in cache.planes.values() for plane in (layer.k, layer.v)}
    return PaperPlan(
        shape, lowered.launches, lowered.arena.nbytes, cache.bytes_per_token, lowered.arena.handle, frozenset(weights.handles), planes,
        groups,
    )
