"""Memory and processor time of a process and all that it started."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Usage:
    """One process. rss, private and pss in bytes: resident; of that its own alone; its own and its share of what others use too.

    private and pss are None where the system does not tell. cpu_s: processor time since its start, of all its threads.
    """

    pid: int
    name: str
    rss: int
    private: int | None
    pss: int | None
    cpu_s: float


def usage(pid: int) -> list[Usage]:
    """`pid` and its descendants, itself first; those that end meanwhile are left out, so it is empty when `pid` has ended."""
    return [found for one in tree(pid) if (found := _usage(one)) is not None]


def cpu_seconds(pid: int) -> float:
    """Processor time of `pid` and the descendants that run."""
    return sum(found[1] for one in tree(pid) if (found := _name_and_cpu(one)) is not None)


def machine_cpu_seconds() -> float | None:
    """Processor time that the machine has given to anyone since its start, other machines on the same cores included; None if unknown."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, (PROC / "stat").read_text().split("\n")[0].split()[1:9])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """`pid` and its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found = [pid]
    for one in found:  # grows while it is read
        found += children.get(one, [])
    return found


def totals(processes: list[Usage]) -> dict[str, float | None]:
    """Sums in MiB: rss_mib (counts shared pages once per process), private_mib, pss_mib (the memory that ending them all gives back)."""
    return {
        f"{kind}_mib": None if None in values else sum(value or 0 for value in values) / MIB
        for kind in ("rss", "private", "pss")
        for values in [[getattr(process, kind) for process in processes]]
    }


def _parents() -> dict[int, int]:
    """Every process's parent."""
    if not sys.platform.startswith("linux"):
        listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return {int(line.split()[0]): int(line.split()[1]) for line in listed.splitlines()}
    parents = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            parents[int(entry.name)] = int(fields[1])
    return parents


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name, which may hold spaces and brackets; None when the process has ended."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def _name_and_cpu(pid: int) -> tuple[str, float] | None:
    if not sys.platform.startswith("linux"):
        listed = _ps(pid, "time=,comm=")
        if listed is None:
            return None
        time, _, name = listed.partition(" ")
        return name.strip(), _clock(time)
    fields = _stat(pid)
    if fields is None:
        return None
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    words[0] = words[0].rpartition(b"/")[2]  # where a program lies is this machine's own
    ticks = int(fields[11]) + int(fields[12])
    return b" ".join(words).decode(errors="replace").strip(), ticks / os.sysconf("SC_CLK_TCK")


def _usage(pid: int) -> Usage | None:
    found = _name_and_cpu(pid)
    if found is None:
        return None
    name, cpu = found
    if not sys.platform.startswith("linux"):
        rss = _ps(pid, "rss=")
        return None if rss is None else Usage(pid, name, int(rss) * KIB, None, None, cpu)
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
    return Usage(
        pid, name, kib["Rss"] * KIB, (kib["Private_Clean"] + kib["Private_Dirty"]) * KIB, kib["Pss"] * KIB, cpu
    )


def _ps(pid: int, columns: str) -> str | None:
    listed = subprocess.run(["ps", "-p", str(pid), "-o", columns], capture_output=True, text=True).stdout.strip()
    return listed or None


def _clock(text: str) -> float:
    """Seconds of `[[days-]hours:]minutes:seconds`."""
    days, _, time = text.rpartition("-")
    seconds = 0.0
    for part in time.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + int(days or 0) * 86400
