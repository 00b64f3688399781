"""Sizes of memory as users write them."""
from __future__ import annotations

import os
import re
from fractions import Fraction

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
EXPECTED = "expected bytes (2_000_000_000), a size ('2GB', '1.5GiB'), or a fraction of the free memory (0.5)"


def memory_size(name: str, value: object, device_free: int | None = None, *, separate: bool = False) -> int:
    """Bytes of `value`: a whole number of bytes, text with a unit, or a float up to 1 as a fraction of what is free now.

    device_free: bytes that the device may still take, where it has a limit of its own; a fraction is of these, or of what the machine
    has free if that is less. separate: they are no part of the machine's memory, and a fraction is of these alone.
    Raises: ValueError naming the option.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?|)b?\s*", value.lower())
        if match and match[2]:
            value = int(Fraction(match[1]) * UNITS[match[2]])
        elif match:
            value = float(match[1]) if "." in match[1] else int(match[1])
    if isinstance(value, float) and 0 < value <= 1:
        return int(memory_for(device_free, separate=separate) * value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} is {value!r}, {EXPECTED}")
    return value


def memory_for(device_free: int | None, *, separate: bool = False) -> int:
    """Bytes that buffers of a device can take; see memory_size."""
    if device_free is None:
        return free_memory()
    return device_free if separate else min(free_memory(), device_free)


def free_memory() -> int:
    """Bytes that processes can take without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.75)
