"""A captured model on a device: its weights, its cache, the step's arrays and its plans."""
from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx

from metalstep import key_means
from metalstep.capture import CapturedModel, CaptureError
from metalstep.capture.graph import Graph
from metalstep.capture.passes.kinds import row_size
from metalstep.checkpoint import Checkpoint
from metalstep.choices import MAX_SEQS as MAX_SEQS
from metalstep.choices import MAX_STEPS as MAX_STEPS
from metalstep.choices import PREFILL_ROWS as PREFILL_ROWS
from metalstep.explain import explain_cache, explain_plan
from metalstep.kernels.native import NativeDevice
from metalstep.kv_cache import CacheGroup, PagedKVCache, cache_capacity, cache_groups, layer_order, with_scheme
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.kv_scheme import PLAIN, KVScheme
from metalstep.memory_size import memory_size
from metalstep.plan.lower import lower
from metalstep.plan.paper import PaperDevice
from metalstep.plan.plan import Plan
from metalstep.plan.request_slots import RequestSlots
from metalstep.plan.step_arrays import StepArrays, StepSizes, StepStage
from metalstep.plan.step_memory import StepMemory
from metalstep.plan.target import PlanShape, Target
from metalstep.sampling import MAX_LOGPROBS

MAX_RESULTS = 64  # rows of a step that are sampled, or whose logits are wanted
DEFAULT_CONTEXT = 4096  # tokens, when neither the model nor the caller says
ANY_ROWS = (7, 5)  # tokens and sampled rows of a graph: a lowered graph's rows are data


class NativeModel:
    """A captured model on `device`. One engine drives it (metalstep.engine, or step_session): steps share the arrays.

    It can run once `allocate` has been called. target: what the kind of device asks for.
    scheme: of its cache; where it centres keys, by the means of a calibration if there is one (metalstep.key_means).
    Raises: CaptureError for a model without attention; ValueError for weights that do not fit the device, a bad config, or heads that
    the scheme does not take.
    """

    cache: PagedKVCache
    arrays: StepArrays
    slots: RequestSlots
    decode_plan: Plan
    num_blocks: list[int]
    max_context: int

    def __init__(
        self,
        captured: CapturedModel,
        checkpoint: Checkpoint,
        device: NativeDevice,
        target: Target,
        scheme: KVScheme = PLAIN,
    ):
        self.device = device
        self.target = target
        self.max_rows = target.max_rows  # of a step
        self._captured = captured
        self._graph = captured.graph(*ANY_ROWS)
        self._lock = threading.Lock()  # of plans
        self._closed = False
        self._plans: dict[PlanShape, Plan] = {}
        self._memory = StepMemory(device)
        prepared = captured.prepare(lambda name: mx.array(checkpoint.tensors[name].numpy()))
        self.memory_left = self._memory_left(sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
        self.weights = target.weights(device, checkpoint.tensors, prepared)
        limit = checkpoint.config.get("max_position_embeddings")
        if limit is not None and not (isinstance(limit, int) and limit > 0):
            raise ValueError(f"the config's max_position_embeddings is {limit!r}, expected a positive integer")
        self.model_context = limit
        groups = cache_groups(self._graph)
        if not groups:
            raise CaptureError("a model without attention layers, whose state is not a KV cache")
        self.scheme = scheme
        self.groups = with_scheme(groups, scheme)
        self.key_means = _key_means(checkpoint, groups) if scheme.centers else {}
        self.encoding = _encoding(scheme, groups, self.key_means)  # what the cache's contents depend on besides the tokens; "" for floats
        self.vocab_size = row_size(self._graph.outputs[0])

    def allocate(
        self,
        num_blocks: list[int],
        *,
        max_context: int,
        max_seqs: int = MAX_SEQS,
        groups: list[CacheGroup] | None = None,
        one_pool: bool = False,
    ) -> None:
        """Make the cache, the step's arrays and the first plan. Once.

        num_blocks: per group. max_context: tokens of the longest sequence. max_seqs: that run at once. groups: `groups`, divided
        further; None: as they are. one_pool: see PagedKVCache.
        Raises: CaptureError for an operation without a kernel; MemoryError.
        """
        self.groups = groups or self.groups
        self.num_blocks, self.max_context = num_blocks, max_context
        self.cache = self._cache(self.device, num_blocks, one_pool)
        self.arrays = StepArrays(self.device, self._sizes(max_seqs, max_context))
        self.slots = RequestSlots(self.arrays)
        self.decode_plan = self.plan_for(1, decode=True)

    def _cache(self, device: NativeDevice, num_blocks: list[int], one_pool: bool = False) -> PagedKVCache:
        return PagedKVCache(
            device,
            self.groups,
            num_blocks,
            keys_by_token=self.target.keys_by_token,
            one_pool=one_pool,
            key_means=self.key_means,
        )

    def _sizes(self, max_seqs: int, max_context: int) -> StepSizes:
        return step_sizes(
            max_seqs, len(self.groups), max_context, self.vocab_size, rows=self.max_rows, hidden_size=embedding_size(self._graph)
        )

    def _memory_left(self, weight_bytes: int) -> int | None:
        """What the weights leave of the device's memory; None where it has no limit of its own."""
        limit = self.device.info.memory_bytes
        if limit and weight_bytes >= limit:
            raise ValueError(
                f"the weights take {weight_bytes:,} bytes and {self.device.info.name} has {limit:,} left; use a smaller model or fewer bits"
            )
        return limit - weight_bytes if limit else None

    def allocate_memory(
        self, *, max_context: int | None = None, kv_memory: int | float | str | None = None
    ) -> None:
        """`allocate` as many blocks as `kv_memory` holds.

        max_context: at most the model's own limit; None takes that limit or what fits. kv_memory: see memory_size; None takes the
        target's part of the free memory, or what the longest sequences that can run at once need if that is less.
        Raises: as `allocate`; ValueError for an option.
        """
        if max_context is not None and (isinstance(max_context, bool) or not isinstance(max_context, int) or not 1 <= max_context < 2**31):
            raise ValueError(f"max_context is {max_context!r}, expected an integer number of tokens from 1")
        context = max_context or self.model_context or DEFAULT_CONTEXT
        if self.model_context and context > self.model_context:
            raise ValueError(f"max_context is {max_context}, expected at most the model's own limit of {self.model_context} tokens")
        separate, left = not self.device.unified, self.memory_for_cache(context)
        budget = memory_size("kv_memory", self.target.kv_memory if kv_memory is None else kv_memory, left, separate=separate)
        if separate and left is not None and budget > left:
            raise ValueError(
                f"kv_memory is {kv_memory!r}, {budget:,} bytes, and {self.device.info.name} has {left:,} left beside the weights and a "
                "step's values; load with a smaller kv_memory, or a model of fewer bits"
            )
        capacity = cache_capacity(
            self.groups, budget=budget, context=context, max_seqs=MAX_SEQS, chunk=self.max_rows
        )
        need = context if max_context else min(context, BLOCK_SIZE)
        if capacity.tokens < need:
            needed = need * sum(group.token_bytes for group in self.groups)
            raise ValueError(
                f"a KV cache of {budget:,} bytes holds {capacity.tokens} tokens, expected room for {need} ({needed:,} bytes); load with a "
                f"larger kv_memory{' or a smaller max_context' if max_context else ''}"
            )
        self.allocate(capacity.num_blocks, max_context=min(context, capacity.tokens))

    def memory_for_cache(self, context: int | None = None) -> int | None:
        """Bytes that a cache can have, for sequences of up to `context` tokens; None where the device has no limit of its own.

        Of a device with memory of its own: what the weights, which are loaded now, and the steps' values leave. For before `allocate`.
        Raises: CaptureError for an operation without a kernel.
        """
        if self.device.unified:
            return self.memory_left
        context = context or self.model_context or DEFAULT_CONTEXT
        paper = PaperDevice(self.device.kind)
        device = cast(NativeDevice, paper)
        planes = self._cache(device, [1 for _ in self.groups]).planes
        memory, arrays = StepMemory(device), StepArrays(device, self._sizes(MAX_SEQS, context))
        for rows, decode in ((self.max_rows, False), (MAX_SEQS, True)):  # the others' values lie in the same memory
            shape = self.target.plan_shape(rows, decode=decode, context=context)
            try:
                lower(self._graph_of(shape), memory, self.weights, planes, arrays, shape, self.target)
            except ValueError as error:  # see _make_plan
                raise CaptureError(str(error)) from error
        return max(0, self.device.memory_left() - paper.nbytes)

    def plan(self, shape: PlanShape) -> Plan:
        """The plan for steps of this shape; made on first use."""
        if shape in self._plans:
            return self._plans[shape]
        with self._lock:
            self.check_open()
            if shape not in self._plans:  # another thread may have been first
                self._plans[shape] = self._make_plan(shape)
            return self._plans[shape]

    def _make_plan(self, shape: PlanShape) -> Plan:
        graph = self._graph_of(shape)
        try:
            lowered = lower(graph, self._memory, self.weights, self.cache.planes, self.arrays, shape, self.target)
            return Plan(self.device, lowered, self.arrays, shape)
        except ValueError as error:  # the model's sizes: nobody has given any others
            raise CaptureError(str(error)) from error

    def _graph_of(self, shape: PlanShape) -> Graph:
        fusion = self.target.fusion(shape)
        if self.key_means:  # keys are centred in the launch before attention
            fusion = replace(fusion, attention=False)
        return self._captured.graph(*ANY_ROWS, fusion)

    def plan_for(self, rows: int, *, decode: bool = False, context: int = 0) -> Plan:
        """The device's plan for a step of so many rows. decode: each of another sequence; context: tokens of the longest."""
        return self.plan(self.target.plan_shape(rows, decode=decode, context=context))

    def warmup(self, rows: int = 1, stages: Sequence[StepStage] = ()) -> None:
        """Make the plans that up to `rows` requests at once use, so that the first of them do not wait for a compiler.

        stages: where the steps' inputs come from, where they do.
        """
        shapes = self.target.warm_shapes(rows, self.max_context)
        for shape in sorted(shapes, key=lambda shape: -shape.tokens):  # so that the smaller ones' values lie in the memory of the larger
            plan = self.plan(shape)
            try:
                plan.compile(stages)
            except ValueError as error:  # see _make_plan
                raise CaptureError(str(error)) from error

    def check_open(self) -> None:
        """Raises: ValueError when the model is closed. For whoever holds the lock, so that it stays open meanwhile."""
        if self._closed:
            raise ValueError("the model is closed; load it again")

    def explain(self) -> dict[str, Any]:
        """What one decode step launches and reads: see `metalstep explain`."""
        info = self.device.info
        return {
            "device": self.device.kind,
            **({"isa": info.isa} if info.isa else {}),
            **({"threads": info.threads} if info.threads else {}),
            **self.target.facts(),
            "kv_bytes_per_token": self.cache.bytes_per_token,
            "kv": explain_cache(self.scheme, self.groups, len(self.key_means)),
            "max_context": self.max_context,
            **explain_plan(self.decode_plan),
        }

    def abandon(self) -> None:
        """In a forked child: it is closed here, and the lock is not that of a thread which the child has not."""
        self._lock = threading.Lock()
        self._closed = True

    def close(self) -> None:
        """Give the device's memory back; the step in progress ends first."""
        with self._lock:
            self._closed = True
            for plan in self._plans.values():
                plan.close()
            self._plans.clear()
            self.device.close()


def _key_means(checkpoint: Checkpoint, groups: list[CacheGroup]) -> key_means.Means:
    """Of the model's calibration, for the layers where a shift of all keys changes nothing. Raises: ValueError for another model's file."""
    file = key_means.find(checkpoint.path)
    if file is None:
        return {}
    shapes = {layer: shape for group in groups for layer, shape in group.layers.items()}
    sizes = {layer: (shapes[layer].heads, shapes[layer].key_dim) for layer in layer_order(shapes)}
    means = key_means.read(file, sizes, checkpoint.config.get("model_type"))
    return {layer: mean for layer, mean in means.items() if shapes[layer].shiftable}


def _encoding(scheme: KVScheme, groups: list[CacheGroup], means: key_means.Means) -> str:
    if not scheme.compressed:
        return ""
    text = scheme.describe(sum(len(group.layers) for group in groups))
    return text + (f", keys less the means {key_means.fingerprint(means)}" if means else "")


def step_sizes(
    seqs: int, groups: int, context: int, vocab_size: int, *, rows: int = PREFILL_ROWS, hidden_size: int = 1
) -> StepSizes:
    """Of the arrays that a model's steps share. rows: of a step. hidden_size: of a token's own embedding; 1 where nobody reads one."""
    return StepSizes(
        rows=rows,
        results=MAX_RESULTS,
        seqs=seqs,
        steps=2 * MAX_STEPS,  # of a run, and of the next one that is queued already
        top=MAX_LOGPROBS,
        groups=groups,
        block_size=BLOCK_SIZE,
        context=context,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
    )


def embedding_size(graph: Graph) -> int:
    """Elements of an embedding, 1 where the graph does not begin with one."""
    for node in graph.nodes:
        for part in node.attrs.get("body", [node]):
            if part.op == "embedding":
                return row_size(part.outputs[0])
    return 1
