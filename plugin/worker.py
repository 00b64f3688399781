"""vLLM's worker: the model's life, the memory it asks for, and the calls of vLLM's control plane. Steps are the runner's."""
from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from metalstep.kv_cache import CacheGroup, with_scheme
from metalstep.kv_plane import BLOCK_SIZE
from metalstep.kv_scheme import PLAIN
from metalstep.plugin import engine_errors, kv_pages, scheduler
from metalstep.plugin.options import device_of_rank, parse_options
from metalstep.plugin.runner import Runner
from metalstep.served_model import ServedModel

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

logger = init_logger("vllm.metalstep.worker")


class MetalstepWorker(WorkerBase):
    """One engine's model on one device. vLLM calls the methods in the order in which they stand here."""

    model: ServedModel | None = None
    runner: Runner | None = None

    def init_device(self) -> None:
        engine_errors.install()  # again: vLLM sets its loggers up anew in the engine's process
        self.device = torch.device("cpu")
        self.options = parse_options(self.vllm_config.additional_config, self.cache_config.cache_dtype)
        self._kv_config: KVCacheConfig | None = None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        if load_dummy_weights:
            raise NotImplementedError("dummy weights are not supported; serve a model with weights")
        self.model = self._open()

    def _open(self) -> ServedModel:
        options = self.options
        return ServedModel(
            options.model or self.model_config.model,
            device=device_of_rank(options, self.vllm_config.parallel_config.data_parallel_rank_local),
            threads=options.threads,
            arithmetic=options.arithmetic,
            scheme=options.scheme(self.cache_config.cache_dtype),
            batch_invariant=options.batch_invariant,
            strict=options.strict,
        )

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Of each part of the layers, as one layer of so many bytes: see kv_pages."""
        assert self.model is not None
        groups = self.model.groups
        self._pages, self._plain_pages = self._divide(groups), self._divide(with_scheme(groups, PLAIN))
        return {kv_pages.part_name(part): self._spec(part) for part in self._pages.parts}

    def _divide(self, groups: list[CacheGroup]) -> kv_pages.Pages:
        in_flight = self.scheduler_config.max_num_batched_tokens
        return kv_pages.divide(groups, context=self.model_config.max_model_len, in_flight=in_flight)

    def _spec(self, part: CacheGroup) -> KVCacheSpec:
        same = dict(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=self._pages.token_bytes, head_size_v=0, dtype=torch.uint8
        )
        return FullAttentionSpec(**same) if part.window is None else SlidingWindowSpec(**same, sliding_window=part.window)

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBNHC"]  # the engine has a layout of its own; vLLM wants to hear one that it knows

    def determine_available_memory(self) -> int:
        """Bytes of the KV cache: what the user says, or a part of what is free. `--gpu-memory-utilization` is a fraction of the memory
        that is free now, of a GPU with memory of its own or of the computer, behind the weights; vLLM's default, meant for a GPU that
        does nothing else, would leave too little of a computer's."""
        assert self.model is not None
        explicit = self.cache_config.kv_cache_memory_bytes
        if explicit:
            return int(explicit)
        utilization = self.cache_config.gpu_memory_utilization
        return self.model.kv_memory(None if utilization == type(self.cache_config)().gpu_memory_utilization else utilization)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        self._kv_config = kv_cache_config
        scheduler.use(self.scheduler_config)
        self._allocate()
        assert self.model is not None
        if self.model.fallback_reason is not None:
            logger.warning("The model runs through eager MLX, which is slower and has no prefix cache: %s", self.model.fallback_reason)
            # Eager MLX keeps caches per request; the scheduler, which is made after this, must not hand out parts of others.
            self.cache_config.enable_prefix_caching = False

    def _allocate(self) -> None:
        config, model = self._kv_config, self.model
        assert config is not None and model is not None
        ratio = self.cache_config.block_size // BLOCK_SIZE  # other sizes are refused
        session = model.allocate(
            config.num_blocks * ratio,
            max_context=self.model_config.max_model_len,
            max_seqs=self.scheduler_config.max_num_seqs,
            groups=self._groups(config),
        )
        if self.runner is None:
            self.runner = Runner(session, block_ratio=ratio, reasoning=getattr(self.vllm_config, "reasoning_config", None))
        else:
            self.runner.resume(session)

    def _groups(self, config: KVCacheConfig) -> list[CacheGroup]:
        """The parts as vLLM has put them together: each alone, except with --disable-hybrid-kv-cache-manager."""
        parts = {kv_pages.part_name(part): part for part in self._pages.parts}
        groups = []
        for together in ([parts[name] for name in group.layer_names] for group in config.kv_cache_groups):
            windows = [part.window for part in together]
            window = None if None in windows else max(window for window in windows if window is not None)
            groups.append(CacheGroup(window, {layer: shape for part in together for layer, shape in part.layers.items()}))
        return groups

    def compile_or_warm_up_model(self) -> CompilationTimes:
        assert self.model is not None
        logger.info("metalstep runs the model: %s", ", ".join(f"{k}={v}" for k, v in self.model.facts().items()))
        if (cache := self.model.explain_cache()) is not None:
            for line in kv_pages.cache_lines(cache, self._pages, self._plain_pages):
                logger.info("%s", line)
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def reset_mm_cache(self) -> None:
        """There are no multimodal inputs."""

    def reset_encoder_cache(self) -> None:
        """There is no encoder."""

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    # ---- every step ---------------------------------------------------------------------------------------------------------
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        assert self.runner is not None
        return self.runner.execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> AsyncModelRunnerOutput | None:
        assert self.runner is not None
        return self.runner.sample_tokens(grammar_output)

    def execute_dummy_batch(self) -> None:
        """Engines of one data-parallel group do not wait for each other."""

    # ---- control plane ------------------------------------------------------------------------------------------------------
    def synchronize_device(self) -> None:
        if self.runner is not None:
            self.runner.settle()

    def sleep(self, level: int = 1) -> None:
        """Give all memory back, the weights' too: they are read again from the file, which the system may still hold."""
        if self.model is not None and self.runner is not None:
            try:
                self.runner.suspend()
            finally:
                self._close_model()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Load again with the first of `tags`; None: all. The KV cache takes memory as it is written.

        Where that fails the engine is asleep as before: vLLM still has it so, and tries again when it is asked to.
        """
        if self.model is None:
            self.model = self._open()
            try:
                self._allocate()
            except BaseException:
                self._close_model()
                raise

    def _close_model(self) -> None:
        assert self.model is not None
        try:
            self.model.close()
        finally:  # a failed device makes closing raise, and there is no model to go on with then either
            self.model = None
            gc.collect()

    def metalstep_stats(self) -> dict[str, Any]:
        """For `collective_rpc`: how the model runs, and counts since the start."""
        if self.model is None or self.runner is None:
            return {"asleep": True}
        return {**self.model.facts(), **self.runner.stats()}

    def shutdown(self) -> None:
        if self.model is not None:
            self.model.close()
            self.model = self.runner = None
        if not torch.accelerator.is_available():
            # vLLM's clean-up empties the accelerator's cache on every platform that is not `cpu`, which raises where there is none.
            torch.accelerator.empty_cache = lambda: None
            torch.accelerator.empty_host_cache = lambda: None
