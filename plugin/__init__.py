"""metalstep as a platform of vLLM's, out of its tree: vLLM's server, scheduler and API, this engine's steps.

The two functions below are entry points that vLLM calls in every process it starts, the first one twice: they import nothing that takes
time, and never MLX.
"""
from __future__ import annotations


def platform_class() -> str | None:
    """Entry point of `vllm.platform_plugins`: the platform class, or None (and a warning) where the installed vLLM is none we know."""
    from metalstep.plugin.compat import unsupported

    if reason := unsupported():
        import logging

        logging.getLogger("vllm.metalstep").warning("metalstep is not used: %s", reason)
        return None
    return "metalstep.plugin.platform.MetalstepPlatform"


def register_models() -> None:
    """Entry point of `vllm.general_plugins`: tells vLLM the architectures that it can leave to metalstep."""
    from metalstep.plugin import engine_errors
    from metalstep.plugin.models import register

    engine_errors.install()
    register()
