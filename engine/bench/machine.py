"""The machine and the versions behind a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from metalstep.bench.process_tree import cpu_seconds, machine_cpu_seconds

BUSY_LOAD = 0.5  # runnable processes on average, before a benchmark starts
BUSY_CORES = 0.2  # taken by programs that are not measured
SIMULATED = "metal-sim runs the shaders on the CPU: its times say nothing of a GPU's speed"


def machine() -> dict[str, Any]:
    """The machine and its state, for the head of a benchmark. cpus: that this process may use; cores: different ones among them, None
    where the system does not tell; load: the average of the last minute; date: now, UTC."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "os": os_name(),
        "cpu": cpu_name(),
        "cpus": len(allowed),
        "cores": cores(allowed),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


class Watch:
    """What else the machine did from now on. A benchmark's own processes are this one and its descendants."""

    def __init__(self) -> None:
        self._wall, self._machine, self._own, self._steal = self._read()

    def result(self) -> dict[str, float | None]:
        """elsewhere: cores that other programs and other machines on the same processors took; stolen: of these, other machines. None
        where the system does not tell."""
        wall, machine, own, steal = self._read()
        seconds = max(wall - self._wall, 1e-9)
        if machine is None or self._machine is None or steal is None or self._steal is None:
            return {"seconds": round(seconds, 1), "elsewhere": None, "stolen": None}
        elsewhere = max(0.0, machine - self._machine - (own - self._own)) / seconds
        return {"seconds": round(seconds, 1), "elsewhere": round(elsewhere, 3), "stolen": round((steal - self._steal) / seconds, 3)}

    @staticmethod
    def _read() -> tuple[float, float | None, float, float | None]:
        """The wall's clock, processor seconds of the machine, of this process and its children, ended ones included, and stolen ones."""
        ended = os.times()
        own = cpu_seconds(os.getpid()) + ended.children_user + ended.children_system
        return time.monotonic(), machine_cpu_seconds(), own, stolen_seconds()


def stolen_seconds() -> float | None:
    """Processor time that other machines on the same processors took since this one's start; None if unknown."""
    try:
        return int(Path("/proc/stat").read_text().split("\n")[0].split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return None


def busy(load: float | None, watched: dict[str, float | None] | None = None) -> str | None:
    """Why numbers are not of this machine alone, or None. load: average before anything was measured; watched: a Watch's result."""
    if watched and (watched["elsewhere"] or 0.0) > BUSY_CORES:
        return f"other programs took {watched['elsewhere']:.1f} cores, {watched['stolen'] or 0.0:.1f} of them other machines"
    if watched is None and load is not None and load > BUSY_LOAD:
        return f"the load average is {load:.1f} before anything is measured"
    return None


def os_name() -> str:
    """The operating system with its version."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release().split('-')[0]}"
    except (OSError, KeyError, AttributeError):
        return f"{platform.system()} {platform.release()}"


def cores(cpus: list[int]) -> int | None:
    """Different cores among the processors of these numbers, None if unknown."""
    places = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            places.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            return None
    return len(places)


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        named = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if named.returncode == 0 and named.stdout.strip():
            return named.stdout.strip()  # "Apple M4 Max", where Python says "arm"
    return platform.processor() or "unknown processor"
