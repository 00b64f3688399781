"""A vLLM worker whose model is a hash: everything else of it, and of the engine's session, is the real one's."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hash_forward import HashForward

from metalstep.kernels.native import NativeDevice
from metalstep.kv_cache import CacheGroup, LayerShape, with_scheme
from metalstep.native_model import step_sizes
from metalstep.plan.request_slots import RequestSlots
from metalstep.plan.step_arrays import StepArrays
from metalstep.plugin.worker import MetalstepWorker
from metalstep.step_session import StepSession

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

SHAPE = LayerShape(heads=1, key_dim=8, value_dim=8)
SMOLLM2 = LayerShape(heads=3, key_dim=64, value_dim=64)
GEMMA3 = LayerShape(heads=1, key_dim=256, value_dim=256)
GROUPS = {
    "full": [CacheGroup(None, {0: SHAPE, 1: SHAPE})],
    "windowed": [CacheGroup(None, {0: SHAPE, 2: SHAPE}), CacheGroup(48, {1: SHAPE, 3: SHAPE})],
    "smollm2": [CacheGroup(None, dict.fromkeys(range(30), SMOLLM2))],
    "gemma3": [
        CacheGroup(None, {i: GEMMA3 for i in range(26) if i % 6 == 5}),
        CacheGroup(48, {i: GEMMA3 for i in range(26) if i % 6 != 5}),
    ],
}


class HashModel:
    """What the worker uses of a ServedModel."""

    fallback_reason = None
    weight_bytes = 0

    def __init__(self, groups: list[CacheGroup], vocab_size: int):
        self.groups = groups
        self.vocab_size = vocab_size
        self.device = NativeDevice.open("host", 1)

    def kv_memory(self, part: float | None = None) -> int:
        return 1 << 22

    def allocate(self, num_blocks: int, *, max_context: int, max_seqs: int, groups: Sequence[CacheGroup]) -> StepSession:
        sizes = step_sizes(max_seqs, len(groups), max_context, self.vocab_size)
        arrays = StepArrays(self.device, sizes)
        return StepSession(self.device, arrays, RequestSlots(arrays), HashForward(self.device, groups, num_blocks))

    def facts(self) -> Mapping[str, object]:
        return {"device": "hash"}

    def explain_cache(self) -> None:
        """As of eager MLX: there is nothing to say."""

    def close(self) -> None:
        self.device.close()


class HashWorker(MetalstepWorker):
    """Of a model whose layers all see everything. came_back: how the scheduler said so of preempted requests, and how often."""

    layers = "full"

    def init_device(self) -> None:
        super().init_device()
        self.came_back: Counter[str] = Counter()
        self._known: set[str] = set()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        again = [new.req_id for new in scheduler_output.scheduled_new_reqs if new.req_id in self._known]
        self._known |= scheduler_output.num_scheduled_tokens.keys()
        self.came_back["new"] += len(again)
        self.came_back["resumed"] += len(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        return super().execute_model(scheduler_output)

    def _open(self) -> HashModel:
        scheme = self.options.scheme(self.cache_config.cache_dtype)
        return HashModel(with_scheme(GROUPS[self.layers], scheme), self.model_config.get_vocab_size())


class WindowedHashWorker(HashWorker):
    """Of a model half of whose layers see a window of 48 tokens."""

    layers = "windowed"


class SmolLM2HashWorker(HashWorker):
    """Of a model with SmolLM2-135M's cache."""

    layers = "smollm2"


class Gemma3HashWorker(HashWorker):
    """Of a model with Gemma 3 1B's cache, but a window of 48 tokens."""

    layers = "gemma3"
