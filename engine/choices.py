"""What options may say, apart from what computes with it: the command line's help and completion import this and no MLX."""
from __future__ import annotations

import sys


class DeviceNames(tuple[str, ...]):
    """Names of devices. "cuda:N", the GPU of that number, is among them where "cuda" is."""

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        kind, _, number = name.partition(":")
        return super().__contains__(name) or (kind == "cuda" and super().__contains__(kind) and number.isascii() and number.isdecimal())

    @property
    def words(self) -> str:
        """What a name may be."""
        numbered = ", or cuda:N for the GPU of that number" if "cuda" in self else ""
        return f"{', '.join(self)}{numbered}"


DEVICES = DeviceNames(("host", "metal", "cuda", "metal-sim", "eager"))
DEFAULT_DEVICE = "metal" if sys.platform == "darwin" else "host"
ARITHMETIC = ("int16", "int8")  # of quantised weights on the host device: kernels/linear.py has what each is
KV_DTYPES = ("float16", "bfloat16", "float32")  # of the KV cache where it is not encoded
PREFILL_ROWS = 512  # rows of a step on most devices: Target.max_rows has each one's
CUDA_PREFILL_ROWS = 2048  # on an NVIDIA GPU
MAX_SEQS = 64  # sequences that run at once
MAX_STEPS = 32  # decode steps of one native call
PEERS = ("mlx-lm", "llama.cpp")  # that benchmarks compare with


def device_kind(name: str) -> str:
    """The kind of a device, "cuda" of "cuda:1". Raises: ValueError listing those that there are."""
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}, expected one of {DEVICES.words}")
    return name.partition(":")[0]
