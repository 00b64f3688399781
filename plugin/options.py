"""metalstep's own options of a vLLM server: the JSON object of `--additional-config`.

Nothing here imports MLX: the API server's process reads the options, the engine's process uses them.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

DEVICES = ("host", "metal", "metal-sim", "eager")  # metalstep.model.DEVICES
ARITHMETIC = ("int16", "int8")  # metalstep.kernels.linear.ARITHMETIC
NOT_YET = {"kv_scheme": "a compressed KV cache is not supported yet; leave it out"}


class OptionError(ValueError):
    """A wrong option in --additional-config. What to do stands behind the text's last semicolon."""


@dataclass(frozen=True)
class PluginOptions:
    """How the engine behind a server runs. Raises: OptionError for a value that is out of range, of another type, or does not fit.

    device: host, metal, metal-sim or eager; None takes metal on a Mac and host elsewhere. threads: of the host device; None takes what
    the process may use. arithmetic: of the host device, int16 or int8. batch_invariant: a request's logits are the same bits in any
    batch. strict: fail where a model would run eagerly. model: the weights, where vLLM's own model path holds only their config and
    tokenizer.
    """

    device: str | None = None
    threads: int | None = None
    arithmetic: str = "int16"
    batch_invariant: bool = False
    strict: bool = False
    model: str | None = None

    def __post_init__(self) -> None:
        self._one_of("device", (None, *DEVICES))
        self._one_of("arithmetic", ARITHMETIC)
        for name in ("batch_invariant", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "true or false")
        if self.threads is not None and (isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1):
            raise _wrong("threads", self.threads, "an integer above 0")
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise _wrong("model", self.model, "a path or a name")
        device = self.resolved_device
        if device != "host":
            for name, given in (("threads", self.threads is not None), ("arithmetic", self.arithmetic != "int16")):
                if given:
                    raise _wrong(name, getattr(self, name), f"none on {device}: it is an option of the host device; leave it out")
        if device == "eager":
            for name in ("batch_invariant", "strict"):
                if getattr(self, name):
                    raise _wrong(name, True, "none on eager, which is mlx-lm's own; leave it out, or choose another device")

    @property
    def resolved_device(self) -> str:
        """The device that None stands for, or the one given."""
        return self.device or ("metal" if sys.platform == "darwin" else "host")

    def _one_of(self, name: str, known: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if (value is not None and not isinstance(value, str)) or value not in known:
            raise _wrong(name, value, f"one of {', '.join(str(x) for x in known if x)}")


def parse_options(additional_config: Mapping[str, Any] | None) -> PluginOptions:
    """The options in vLLM's `additional_config`. Raises: OptionError for one that does not exist or does not fit."""
    given = dict(additional_config or {})
    for name, reason in NOT_YET.items():
        if name in given:
            raise OptionError(f"--additional-config {name}: {reason}")
    known = [field.name for field in fields(PluginOptions)]
    if unknown := sorted(given.keys() - set(known)):
        raise OptionError(f"--additional-config: no option {', '.join(map(repr, unknown))}, expected {', '.join(known)}; leave it out")
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0") and PluginOptions(**given).resolved_device != "eager":
        given.setdefault("batch_invariant", True)  # vLLM's own way to ask for it
    return PluginOptions(**given)


def threads_of_rank(options: PluginOptions, ranks: int) -> int | None:
    """Threads of one of `ranks` data-parallel engines on this machine, which share its cores. None: as the environment says, or as many
    as the process may use."""
    if options.threads is not None or options.resolved_device != "host" or ranks <= 1 or os.environ.get("METALSTEP_THREADS"):
        return options.threads
    return max(1, available_cores() // ranks)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wrong(name: str, value: object, expected: str) -> OptionError:
    return OptionError(f"--additional-config {name} is {value!r:.80}, expected {expected}")
