"""metalstep's own options of a vLLM server: the JSON object of `--additional-config`.

Nothing here imports MLX: the API server's process reads the options, the engine's process uses them.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from metalstep.choices import ARITHMETIC, DEVICES, device_kind
from metalstep.kv_scheme import NAMES, VLLM_ALIASES, KVScheme, alias, parse
from metalstep.kv_scheme import OPTIONS as OF_SCHEME

# What is not encoded, by --kv-cache-dtype.
KV_FLOATS = {"auto": "float16", "float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
KV_DTYPES = (*KV_FLOATS, *VLLM_ALIASES)  # of --kv-cache-dtype; float32 where vLLM's own list has it
OF_VLLM_METAL = ("turboquant", "k_quant", "v_quant")


class OptionError(ValueError):
    """A wrong option in --additional-config. What to do stands behind the text's last semicolon."""


@dataclass(frozen=True)
class PluginOptions:
    """How the engine behind a server runs. Raises: OptionError for a value that is out of range, of another type, or does not fit.

    device: host, metal, cuda (cuda:1: the second GPU), metal-sim or eager; None takes metal on a Mac and host elsewhere. threads: of the
    host device; None takes what the process may use. arithmetic: of the host device, int16 or int8. batch_invariant: a request's logits are
    the same bits in any batch. strict: fail where a model would run eagerly. model: the weights, where vLLM's own model path holds only
    their config and tokenizer. kv_scheme and the other kv_*: how the cache is encoded, see metalstep.kv_scheme.parse; what they say
    together with --kv-cache-dtype is `scheme`'s answer. turboquant, k_quant, v_quant: vllm-metal's names of schemes.
    """

    device: str | None = None
    threads: int | None = None
    arithmetic: str = "int16"
    batch_invariant: bool = False
    strict: bool = False
    model: str | None = None
    kv_scheme: str | None = None
    kv_bits: int | None = None
    kv_norm_dtype: str | None = None
    kv_scale: str | Sequence[str] | Mapping[str, str] | None = None
    kv_boundary: int | None = None
    kv_key_center: str | None = None
    kv_start: int | None = None
    turboquant: bool | None = None
    k_quant: str | None = None
    v_quant: str | None = None

    def __post_init__(self) -> None:
        self._check_device()
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

    def scheme(self, cache_dtype: str = "auto") -> KVScheme:
        """Of the KV cache. cache_dtype: vLLM's --kv-cache-dtype, of KV_DTYPES.

        Raises: OptionError for options that contradict each other or the device.
        """
        name = self._scheme_name(cache_dtype)
        try:
            scheme = parse(name, kv_dtype=KV_FLOATS.get(cache_dtype, "float16"), **{option: getattr(self, option) for option in OF_SCHEME})
        except ValueError as error:
            raise OptionError(f"--additional-config {error}") from error
        if scheme.compressed and self.resolved_device == "eager":
            raise OptionError(
                f"--additional-config: kv_scheme {scheme.name!r} on eager, whose cache is mlx-lm's own; choose another device, or 'none'"
            )
        return scheme

    def _scheme_name(self, cache_dtype: str) -> str:
        """What is asked for in one way or in several that agree."""
        asked: dict[str, str] = {}  # what was given: the scheme that it means
        if self.kv_scheme is not None:
            if self.kv_scheme not in (*NAMES, *VLLM_ALIASES):
                raise OptionError(f"--additional-config kv_scheme is {self.kv_scheme!r:.60}, expected one of {', '.join(NAMES)}")
            asked[f"kv_scheme {self.kv_scheme!r}"] = VLLM_ALIASES.get(self.kv_scheme, self.kv_scheme)
        if any(getattr(self, name) is not None for name in OF_VLLM_METAL):
            try:
                asked["turboquant with k_quant and v_quant"] = alias(self.turboquant, self.k_quant, self.v_quant)
            except ValueError as error:
                raise OptionError(f"--additional-config {error}") from error
        if cache_dtype in VLLM_ALIASES:
            asked[f"--kv-cache-dtype {cache_dtype}"] = VLLM_ALIASES[cache_dtype]
        if len(set(asked.values())) > 1:
            meant = " and ".join(f"{given} ({name})" if name not in given else given for given, name in asked.items())
            raise OptionError(f"--additional-config: {meant} are two schemes of one KV cache; leave all but one out")
        return next(iter(asked.values()), "none")

    def scheme_notes(self, cache_dtype: str = "auto") -> list[str]:
        """What a user should know of the scheme: whose name it has, and whether keys of so few bits are enough."""
        scheme, notes = self.scheme(cache_dtype), []
        theirs = {"vllm-metal's turboquant": self.turboquant, "vLLM's --kv-cache-dtype": cache_dtype in VLLM_ALIASES}
        theirs["vLLM's name"] = self.kv_scheme in tuple(VLLM_ALIASES)
        for whose, given in theirs.items():
            if given:
                notes.append(f"{whose} means kv_scheme {scheme.name!r} here: only the name is shared, codes and scales are metalstep's own")
        if scheme.k.is_turbo and scheme.k.bits == 2:
            notes.append(f"kv_scheme {scheme.name!r} keeps 2 bits of each key: expect worse text; keys of 4 or 8 bits cost little more")
        return notes

    def _check_device(self) -> None:
        try:
            if self.device is not None:
                device_kind(self.device if isinstance(self.device, str) else "")
        except ValueError:
            raise _wrong("device", self.device, f"one of {', '.join(DEVICES)}, or cuda:N") from None

    def _one_of(self, name: str, known: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if (value is not None and not isinstance(value, str)) or value not in known:
            raise _wrong(name, value, f"one of {', '.join(str(x) for x in known if x)}")


def parse_options(additional_config: Mapping[str, Any] | None, cache_dtype: str = "auto") -> PluginOptions:
    """The options in vLLM's `additional_config`. cache_dtype: its --kv-cache-dtype, which may say a scheme too.

    Raises: OptionError for one that does not exist or does not fit.
    """
    given = dict(additional_config or {})
    known = [field.name for field in fields(PluginOptions)]
    if unknown := sorted(given.keys() - set(known)):
        raise OptionError(f"--additional-config: no option {', '.join(map(repr, unknown))}, expected {', '.join(known)}; leave it out")
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0") and PluginOptions(**given).resolved_device != "eager":
        given.setdefault("batch_invariant", True)  # vLLM's own way to ask for it
    options = PluginOptions(**given)
    options.scheme(cache_dtype)
    return options


def threads_of_rank(options: PluginOptions, ranks: int) -> int | None:
    """Threads of one of `ranks` data-parallel engines on this machine, which share its cores. None: as the environment says, or as many
    as the process may use."""
    if options.threads is not None or options.resolved_device != "host" or ranks <= 1 or os.environ.get("METALSTEP_THREADS"):
        return options.threads
    return max(1, available_cores() // ranks)


def device_of_rank(options: PluginOptions, rank: int | None) -> str | None:
    """The device of the data-parallel engine `rank` of this machine, None where there is one: of NVIDIA's GPUs each has one of its own."""
    return f"cuda:{rank}" if rank and options.device == "cuda" else options.device


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wrong(name: str, value: object, expected: str) -> OptionError:
    return OptionError(f"--additional-config {name} is {value!r:.80}, expected {expected}")
