"""The platform: what metalstep asks of vLLM's configuration, and what it tells vLLM about itself.

vLLM imports this file while `vllm.config` is half made, and in the API server's process: at the top only torch and the interface, and
nowhere MLX.
"""
from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from metalstep.plugin.options import PluginOptions

logger = logging.getLogger("vllm.metalstep")  # vLLM shows nothing below WARNING from loggers outside of its namespace

WORKER = "metalstep.plugin.worker.MetalstepWorker"


class MetalstepPlatform(Platform):
    """One engine of metalstep's per vLLM engine, driven in the engine's own process. Tensors that vLLM itself makes are on the CPU."""

    _enum = PlatformEnum.OOT
    device_name = "metalstep"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    vocab_size: int | None = None  # of the model that this process serves; set by check_and_update_config

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return cls.device_name

    # get_device_total_memory stays unanswered: vLLM then takes 256 sequences at once, not the 1024 of a large GPU.

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """Windowed layers keep KV groups of their own."""
        return True

    def is_sleep_mode_available(self) -> bool:
        return True

    @classmethod
    def import_kernels(cls) -> None:
        """None of vLLM's own are used."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Likewise."""

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """vLLM's dtype is that of activations, which metalstep computes in float32 whatever it is."""

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """There is one."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Requests have seeds of their own."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what cannot be honoured, then set what metalstep decides. vLLM calls this in the server's process and again in the
        engine's. Raises: ValueError."""
        from metalstep.choices import device_kind
        from metalstep.plugin.options import parse_options
        from metalstep.plugin.refusals import check_config, no_effect

        cache_dtype = vllm_config.cache_config.cache_dtype
        options = parse_options(vllm_config.additional_config, cache_dtype)
        check_config(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == "auto":  # the first time
            if unused := no_effect(vllm_config):
                logger.info("Without effect, since metalstep compiles its steps itself: %s", ", ".join(unused))
            for note in options.scheme_notes(cache_dtype):
                logger.warning("%s", note)
            parallel.worker_cls = WORKER
        share_cores(vllm_config, options)
        if parallel.distributed_executor_backend in (None, "mp"):
            # vLLM's choice for data-parallel engines, each a process already: the one worker is better off inside of it, where it knows
            # the scheduler's settings.
            parallel.distributed_executor_backend = "uni"
        parallel.disable_custom_all_reduce = True
        if vllm_config.model_config is not None:
            vllm_config.model_config.disable_cascade_attn = True
            cls.vocab_size = vllm_config.model_config.get_vocab_size()
        if sys.platform == "darwin" or device_kind(options.resolved_device) == "cuda":  # a forked process can use neither
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Raises: VLLMValidationError (HTTP 400) for a request that cannot be run as it asks."""
        from metalstep.plugin.refusals import check_request

        check_request(processed_inputs, params, cls.vocab_size)


def share_cores(vllm_config: Any, options: PluginOptions) -> None:
    """Divide the cores among the data-parallel engines of this machine. An engine's own process no longer knows how many they are, so
    the number goes with the options."""
    from metalstep.plugin.options import threads_of_rank

    ranks = vllm_config.parallel_config.data_parallel_size_local
    if ranks > 1 and (threads := threads_of_rank(options, ranks)) is not None:
        vllm_config.additional_config = {**vllm_config.additional_config, "threads": threads}
