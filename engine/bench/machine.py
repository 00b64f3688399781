"""The machine and the versions behind a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

SIMULATED = "metal-sim runs the shaders on the CPU: its times say nothing of a GPU's speed"


def machine() -> dict[str, str | int]:
    """The machine in words, for the head of a benchmark. cpus: that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"system": f"{platform.system()} {platform.machine()}", "cpu": cpu_name(), "cpus": allowed}


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
